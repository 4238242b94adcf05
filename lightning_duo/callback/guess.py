"""Inputs, targets and logits where no loss tells: what the user says, else what is usual."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call, call_base
from lightning_duo.batch import check_read, describe, read_batch
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.watch import Called
from lightning_duo.isolation import evaluating, own_stream, unnoticed


class Guess:
    """A batch as ``batch_fn`` or the usual keys read it, and which logits a step made of it.

    The logits are, in this order: what the user's ``logits_fn`` gives; logits in what the step
    returned; what the module's forward returned during the step; else those of one extra forward,
    which a message announces once.

    Args:
        module: The base.
        batch: As its step is about to get it.
        options: The user's.
        messages: Where to say what was taken for what.

    Raises:
        ValueError: If inputs and targets cannot be found in the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        options: Options,
        messages: Messages,
        *,
        first: bool = False,
    ) -> None:
        self.module, self.logits_fn, self.messages = module, options.logits_fn, messages
        if options.batch_fn is None:  # ours draws nothing
            found = read_batch(batch)
        else:
            with own_stream(next((p.device for p in module.parameters()), torch.device("cpu"))):
                found = options.batch_fn(batch)
        self.inputs, self.targets = check_read(found)
        if first and options.batch_fn is None:
            self._say_what_was_taken(batch)

    def _say_what_was_taken(self, batch: Any) -> None:
        count = len(self.targets)
        parts = batch[2:] if isinstance(batch, tuple | list) else ()
        others = [part for part in parts if isinstance(part, Tensor) and part.shape == (count,)]
        if any(not part.is_floating_point() for part in others):
            self.messages.warn(
                f"no loss was seen, so of the {len(batch)} parts of a batch the first is taken as "
                "the inputs and the second as the targets; pass batch_fn=lambda batch: (inputs, "
                "targets) if others are",
                once="parts of a batch",
            )

    @property
    def targets(self) -> Tensor:
        """What the sidekick should have said; one with metadata would carry them along."""
        return self._targets.as_subclass(Tensor)

    @targets.setter
    def targets(self, targets: Tensor) -> None:
        self._targets = targets

    @property
    def call(self) -> Call:
        """What the sidekick is called with."""
        return Call((self.inputs,), {})

    def logits(self, outputs: Any, calls: Sequence[Called], *, classes: int = 0) -> Tensor:
        """The base's logits of this batch, detached.

        Args:
            outputs: What the training, validation or test step returned.
            calls: The calls of modules during the step.
            classes: K, if it is known.

        Raises:
            ValueError: If no logits can be found or it is unclear which they are.
        """
        if self.logits_fn is not None:
            with evaluating(self.module), unnoticed(self.module):
                return self._checked(self.logits_fn(self.module, self.inputs))
        seen = [
            (next(iter((*c.call.args, *c.call.kwargs.values())), None), found.detach())
            for c in calls
            if not c.name and (found := plain_logits(c.output)) is not None
        ]
        logits = plain_logits(outputs)
        if logits is not None and len(logits) == len(self.targets):
            return self._checked(self._unless_forward_differs(outputs, logits, seen, classes))
        logits = self._from_forward(seen)
        return self._checked(self._extra_forward() if logits is None else logits)

    def _checked(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.ndim:
            raise ValueError(
                f"the base must give floating-point logits, got {describe(logits)}; pass "
                "DuoCallback(..., logits_fn=lambda module, inputs: ...) that returns them"
            )
        return logits.detach().as_subclass(Tensor)  # one with metadata would carry them along

    def _from_forward(self, seen: list[tuple[Any, Tensor]]) -> Tensor | None:
        """What the module's forward gave, if it is clear which call counts."""
        fitting = [(x, logits) for x, logits in seen if len(logits) == len(self.targets)]
        same_input = [logits for x, logits in fitting if x is self.inputs]
        candidates = same_input or [logits for _, logits in fitting]
        if len(candidates) == 1 and self.messages.first("forward compared"):
            self._compare(fitting)
        if len(candidates) > 1 and not all(torch.equal(candidates[0], c) for c in candidates):
            raise ValueError(
                f"the step called the module's forward {len(candidates)} times and each gave "
                f"logits for {len(self.targets)} samples, so it is unclear which are the "
                'prediction; return {"logits": ...} from the step or pass DuoCallback(..., '
                "logits_fn=lambda module, inputs: ...)"
            )
        return candidates[0] if candidates else None

    def _unless_forward_differs(
        self, outputs: Any, returned: Tensor, seen: list[tuple[Any, Tensor]], classes: int
    ) -> Tensor:
        """What the step returned as logits, beside what its forward gave for the same inputs.

        A bare tensor of another width is one of logits and features: that of as many columns as
        there are classes, or the narrower of the two, is taken for the logits.
        """
        same = (x for argument, x in seen if argument is self.inputs)
        forwards = [x for x in same if len(x) == len(returned)]
        if len(forwards) != 1 or not len(returned):
            return returned
        forward, chosen = forwards[0], returned
        if forward.shape != returned.shape and isinstance(outputs, Tensor):
            narrow, wide = sorted((forward, returned), key=lambda x: x.shape[1])
            width = narrow.shape[1]
            is_narrow = width == classes if classes else width > int(self.targets.max())
            chosen = narrow if is_narrow else wide
        if self.messages.first("forward compared"):
            if not (chosen is returned and _close(forward, returned)):
                which = "what it returns is" if chosen is returned else "forward's are"
                self.messages.warn(
                    f"the step returns {tuple(returned.shape)} and its forward, which the duo "
                    f"will call, gives other logits {tuple(forward.shape)} for the same inputs; "
                    f"{which} taken for the base's logits. Pass DuoCallback(..., "
                    "logits_fn=lambda module, inputs: ...) that gives the logits which are meant"
                )
        return chosen

    def _compare(self, calls: list[tuple[Any, Tensor]]) -> None:
        """Say where the step does more with its forward than the duo will."""
        argument = calls[0][0]
        same = argument is self.inputs or (
            isinstance(argument, Tensor)
            and isinstance(self.inputs, Tensor)
            and torch.equal(argument, self.inputs)
        )
        if len(calls) > 1 or not same:
            what = f"{len(calls)} times" if same else "with something else than the batch's inputs"
            self.messages.warn(
                f"the step calls forward {what} before it has its logits, but the duo calls it "
                "once, as forward(inputs), with the inputs as they are in the batch; pass "
                "DuoCallback(..., logits_fn=lambda module, inputs: ...) that does all the step does"
            )

    def _extra_forward(self) -> Tensor:
        self.messages.info(
            "the step neither returns logits nor calls the module, so the base runs once more "
            'per batch to get them; return {"logits": ...} to avoid that',
            once="extra forward",
        )
        try:
            with evaluating(self.module), unnoticed(self.module):
                return call_base(self.module, self.inputs)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the forward of {type(self.module).__name__} cannot run the batch's inputs as "
                f"they are: {type(error).__name__}: {error}; pass DuoCallback(..., "
                "logits_fn=lambda module, inputs: ...) that does what the step does, or return "
                '{"logits": ...} from the step'
            ) from error


def plain_logits(output: Any) -> Tensor | None:
    """Floating-point logits that an output is, or has under ``logits``."""
    from collections.abc import Mapping

    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    is_logits = isinstance(output, Tensor) and output.ndim >= 1 and output.is_floating_point()
    return output if is_logits else None


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=1e-3, atol=1e-3, equal_nan=True
    )

"""One step of the base: what goes in, and which logits it makes of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_duo.base import as_logits, call_base, remedy
from lightning_duo.batch import describe, read_batch
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.isolation import evaluating, own_stream, same_values, unnoticed


class Step:
    """A batch from the start of the base's step to its end.

    The base's logits are, in this order: what the user's ``logits_fn`` gives; logits in what the
    step returned; what the module's forward returned during the step; else those of one extra
    forward, which a message announces once.

    Args:
        module: The base.
        batch: As its step is about to get it.
        options: The user's.
        messages: Where to say what was taken for what.
        watch: Whether to note what the module's forward returns.
        first: Whether to look closely at what the step does with the batch.

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
        watch: bool,
        first: bool,
    ) -> None:
        self.module, self.logits_fn, self.messages = module, options.logits_fn, messages
        if options.batch_fn is None:  # ours draws nothing
            found = read_batch(batch)
        else:
            with own_stream(next((p.device for p in module.parameters()), torch.device("cpu"))):
                found = options.batch_fn(batch)
        _check_read(found)
        self.inputs, self.targets = found
        if first and options.batch_fn is None:
            self._say_what_was_taken(batch)
        self._before = _Snapshot(found, copy=first)
        self._seen: list[tuple[Any, Tensor]] = []
        self._hook = None
        if watch and self.logits_fn is None:
            self._hook = module.register_forward_hook(self._note, with_kwargs=True)

    def finish(self) -> None:
        """Watch the module no longer; may be called again."""
        if self._hook is not None:
            self._hook.remove()

    def check_unchanged(self) -> None:
        """Raise ValueError if the step changed inputs or targets in place."""
        self._before.check(self.module)

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Other callbacks may call the module too; Lightning says whose turn it is.
        if not (getattr(module, "_current_fx_name", None) or "a_step").endswith("_step"):
            return
        logits = as_logits(output)
        if logits is not None:
            self._seen.append((next(iter((*args, *kwargs.values())), None), logits.detach()))

    def _say_what_was_taken(self, batch: Any) -> None:
        count = len(self.targets)
        parts = batch[2:] if isinstance(batch, tuple | list) else ()
        others = [part for part in parts if isinstance(part, Tensor) and part.shape == (count,)]
        if any(not part.is_floating_point() for part in others):
            self.messages.info(
                f"of the {len(batch)} parts of a batch the first is taken as the inputs and the "
                "second as the targets; pass batch_fn=lambda batch: (inputs, targets) if others "
                "are",
                once="parts of a batch",
            )

    def num_classes(self, outputs: Any) -> int:
        """K, from any logits of the step, which returned ``outputs``."""
        seen = {x.shape[1]: x for _, x in self._seen if len(x) == len(self.targets)}
        if self.logits_fn is None and as_logits(outputs) is None and len(seen) == 1:
            (logits,) = seen.values()
            return check_logits(logits, self.targets).shape[1]
        return self.logits(outputs).shape[1]

    def logits(self, outputs: Any, *, classes: int = 0) -> Tensor:
        """The base's logits (N, K) of this batch, detached.

        Args:
            outputs: What the training, validation or test step returned.
            classes: K, if it is known.

        Raises:
            ValueError: If no logits can be found or their shape does not fit the targets.
        """
        if self.logits_fn is not None:
            with evaluating(self.module), unnoticed(self.module):
                return self._checked(self.logits_fn(self.module, self.inputs))
        logits = as_logits(outputs)
        if logits is not None and len(logits) == len(self.targets):
            return self._checked(self._unless_forward_differs(outputs, logits, classes))
        logits = self._from_forward()
        return self._checked(self._extra_forward() if logits is None else logits)

    def _checked(self, logits: Tensor) -> Tensor:
        logits = check_logits(logits, self.targets)
        if len(logits) and bool((logits >= 0).all()) and self.messages.first("probabilities?"):
            if bool((logits.float().sum(1) - 1).abs().max() < 1e-3):
                self.messages.warn(
                    "the base seems to give probabilities (non-negative rows that sum to 1) "
                    "where logits belong; give it logits, or pass DuoCallback(..., "
                    "logits_fn=...), or the temperatures will mean little"
                )
        return logits

    def _from_forward(self) -> Tensor | None:
        """What the module's forward gave, if it is clear which call counts."""
        fitting = [(x, logits) for x, logits in self._seen if len(logits) == len(self.targets)]
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

    def _unless_forward_differs(self, outputs: Any, returned: Tensor, classes: int) -> Tensor:
        """What the step returned as logits, beside what its forward gave for the same inputs.

        A bare tensor of another width is one of logits and features: that of as many columns as
        there are classes, or the narrower of the two, is taken for the logits.
        """
        same = (x for argument, x in self._seen if argument is self.inputs)
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


def _check_read(found: Any) -> None:
    """Raise ValueError if what ``batch_fn`` returned is no (inputs, targets)."""
    if not isinstance(found, tuple | list) or len(found) != 2 or found[0] is None:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else describe(found)
        raise ValueError(f"batch_fn must return (inputs, targets), got {what}")
    if not isinstance(found[1], Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with targets as a tensor of class indices, got "
            f"{type(found[1]).__name__}"
        )


class _Snapshot:
    """The tensors of a batch before a step, to tell whether the step changes them in place.

    Args:
        batch: Inputs and targets, nested as they come.
        copy: Whether to compare values too: tensors made in inference mode count no changes, nor
            do others where they are changed behind autograd's back.
    """

    def __init__(self, batch: Any, *, copy: bool) -> None:
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._counted = [(t, t._version) for t in tensors if not t.is_inference()]
        whole = [t for t in tensors if copy and t.layout == torch.strided]
        self._copied = [(t, t.clone()) for t in whole]

    def check(self, module: nn.Module) -> None:
        """Raise ValueError if a tensor is not what it was."""
        changed = [t for t, version in self._counted if t._version != version]
        changed += [t for t, copy in self._copied if not same_values(t, copy)]
        if changed:
            raise ValueError(
                f"{type(module).__name__} changed the batch in place (the tensor of shape "
                f"{tuple(changed[0].shape)}), so the sidekick would see other data than the base "
                "got; work on a copy in the step (x = x.clone()), or pass DuoCallback(..., "
                "batch_fn=lambda batch: (batch[0].clone(), batch[1].clone())), which is called "
                "before the step"
            )


def check_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return finite base logits, detached, or raise ValueError.

    Args:
        logits: Logits of the base, shape (N, K).
        targets: Targets of the same batch, shape (N,).
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(targets):
        raise ValueError(
            f"the base must give logits of shape ({len(targets)}, K) for a batch of {len(targets)} "
            f"targets, got {describe(logits)}{remedy(logits)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"a duo needs logits of K >= 2 classes, the base gives {describe(logits)}"
            f"{remedy(logits)}"
        )
    return logits.detach()


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=1e-3, atol=1e-3, equal_nan=True
    )

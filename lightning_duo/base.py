"""The base's logits, from whatever a user's module makes of a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_duo.batch import describe
from lightning_duo.isolation import evaluating, unnoticed

LogitsFn = Callable[[nn.Module, Any], Tensor]


def as_logits(output: Any) -> Tensor | None:
    """Find (N, K) logits in what a forward or a step returned; None if there are none.

    Args:
        output: A tensor, a mapping with the key ``logits`` or an object with that attribute.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    is_logits = isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point()
    return output if is_logits else None


def check_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return finite base logits, detached, or raise ValueError.

    Args:
        logits: Logits of the base, shape (N, K).
        targets: Targets of the same batch, shape (N,).
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(targets):
        raise ValueError(
            f"the base must give logits of shape ({len(targets)}, K) for a batch of {len(targets)} "
            f"targets, got {describe(logits)}{_remedy(logits)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"a duo needs logits of K >= 2 classes, the base gives {describe(logits)}"
            f"{_remedy(logits)}"
        )
    return logits.detach()


def _remedy(output: Any) -> str:
    """What to do about an output that is no (N, K) logits with K >= 2."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    logits = getattr(logits, "logits", logits)
    if isinstance(logits, Tensor) and (logits.ndim == 1 or logits.shape[1:] == (1,)):
        return (
            "; of a single output z the two classes have the logits (0, z): pass DuoCallback(..., "
            "logits_fn=lambda module, x: torch.nn.functional.pad(module(x).reshape(-1, 1), (1, 0)))"
            " and class indices 0 and 1 as targets"
        )
    if isinstance(logits, Tensor) and logits.ndim > 2:
        return (
            "; one prediction for each sample is needed, so segmentation and the like cannot have "
            "a duo; if one of them is the sample's, pass DuoCallback(..., logits_fn=...)"
        )
    return "; pass DuoCallback(..., logits_fn=lambda module, inputs: ...)"


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=1e-3, atol=1e-3, equal_nan=True
    )


class BaseLogits:
    """The base's logits of a batch, at no second forward where that can be avoided.

    In this order: the user's ``logits_fn``; logits in what the step returned; what the module's
    forward returned during the step; else one extra forward, announced once.

    Args:
        logits_fn: ``(module, inputs) -> logits (N, K)``, or None.
    """

    def __init__(self, logits_fn: LogitsFn | None) -> None:
        self.logits_fn = logits_fn
        self._seen: list[tuple[Any, Tensor]] = []
        self._handle: RemovableHandle | None = None
        self._announced = self._doubted = self._compared = False

    def watch(self, module: nn.Module) -> None:
        """Record what the module's forward returns in the step that begins, until `unwatch`."""
        self._seen.clear()
        if self.logits_fn is None and self._handle is None:
            self._handle = module.register_forward_hook(self._record, with_kwargs=True)

    def unwatch(self) -> None:
        """Stop recording and forget what was recorded."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._seen.clear()

    def _record(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Other callbacks may call the module too; Lightning says whose turn it is.
        if not (getattr(module, "_current_fx_name", None) or "a_step").endswith("_step"):
            return
        logits = as_logits(output)
        if logits is not None:
            self._seen.append((next(iter((*args, *kwargs.values())), None), logits.detach()))

    def of(
        self, module: nn.Module, outputs: Any, inputs: Any, targets: Tensor, *, classes: int = 0
    ) -> Tensor:
        """Logits (N, K) of the batch whose step just returned ``outputs``.

        Args:
            module: The base.
            outputs: What its training, validation or test step returned.
            inputs: Inputs of the batch.
            targets: Targets of the batch, shape (N,).
            classes: K, if it is known.

        Raises:
            ValueError: If no logits can be found or their shape does not fit the targets.
        """
        seen, self._seen = self._seen, []
        if self.logits_fn is not None:
            with evaluating(module), unnoticed(module):
                return self._checked(self.logits_fn(module, inputs), targets)
        logits = as_logits(outputs)
        if logits is not None and len(logits) == len(targets):
            logits = self._unless_forward_differs(outputs, seen, inputs, (targets, classes))
        else:
            logits = self._from_forward(seen, inputs, targets)
        if logits is None:
            logits = self._extra_forward(module, inputs)
        return self._checked(logits, targets)

    def _checked(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = check_logits(logits, targets)
        if not self._doubted and len(logits) and bool((logits >= 0).all()):
            if bool((logits.float().sum(1) - 1).abs().max() < 1e-3):
                rank_zero_warn(
                    "DuoCallback: the base seems to give probabilities (non-negative rows that sum "
                    "to 1) where logits belong; give it logits, or pass DuoCallback(..., "
                    "logits_fn=...), or the temperatures will mean little"
                )
            self._doubted = True
        return logits

    def _from_forward(
        self, seen: list[tuple[Any, Tensor]], inputs: Any, targets: Tensor
    ) -> Tensor | None:
        fitting = [(x, logits) for x, logits in seen if len(logits) == len(targets)]
        same_input = [logits for x, logits in fitting if x is inputs]
        candidates = same_input or [logits for _, logits in fitting]
        if len(candidates) == 1 and not self._compared:
            self._compared = True
            self._compare(fitting, inputs)
        if len(candidates) > 1 and not all(torch.equal(candidates[0], c) for c in candidates):
            raise ValueError(
                f"the step called the module's forward {len(candidates)} times and each gave "
                f"logits for {len(targets)} samples, so it is unclear which are the prediction; "
                'return {"logits": ...} from the step or pass '
                "DuoCallback(..., logits_fn=lambda module, inputs: ...)"
            )
        return candidates[0] if candidates else None

    def _unless_forward_differs(
        self, outputs: Any, seen: list[tuple[Any, Tensor]], inputs: Any, known: tuple[Tensor, int]
    ) -> Tensor:
        """What the step returned as logits, beside what its forward gave for the same inputs.

        A bare tensor of another width is one of logits and features: that of as many columns as
        there are classes, or the narrower of the two, is taken for the logits.
        """
        targets, classes = known
        returned = as_logits(outputs)
        assert returned is not None
        forwards = [x for argument, x in seen if argument is inputs and len(x) == len(returned)]
        if len(forwards) != 1 or not len(returned):
            return returned
        forward, chosen = forwards[0], returned
        if forward.shape != returned.shape and isinstance(outputs, Tensor):
            narrow, wide = sorted((forward, returned), key=lambda x: x.shape[1])
            width = narrow.shape[1]
            is_narrow = width == classes if classes else width > int(targets.max())
            chosen = narrow if is_narrow else wide
        if not self._compared and not (chosen is returned and _close(forward, returned)):
            which = "what it returns is" if chosen is returned else "forward's are"
            rank_zero_warn(
                f"DuoCallback: the step returns {tuple(returned.shape)} and its forward, which the "
                f"duo will call, gives other logits {tuple(forward.shape)} for the same inputs; "
                f"{which} taken for the base's logits. Pass DuoCallback(..., logits_fn=lambda "
                "module, inputs: ...) that gives the logits which are meant"
            )
        self._compared = True
        return chosen

    def _compare(self, calls: list[tuple[Any, Tensor]], inputs: Any) -> None:
        """Say where the step does more with its forward than the duo will."""
        argument = calls[0][0]
        same = argument is inputs or (
            isinstance(argument, Tensor)
            and isinstance(inputs, Tensor)
            and torch.equal(argument, inputs)
        )
        if len(calls) > 1 or not same:
            what = f"{len(calls)} times" if same else "with something else than the batch's inputs"
            rank_zero_warn(
                f"DuoCallback: the step calls forward {what} before it has its logits, but the duo "
                "calls it once, as forward(inputs), with the inputs as they are in the batch; pass "
                "DuoCallback(..., logits_fn=lambda module, inputs: ...) that does all the step does"
            )

    def num_classes(self, module: nn.Module, outputs: Any, inputs: Any, targets: Tensor) -> int:
        """K, from any logits of the batch whose step just returned ``outputs``."""
        seen = {x.shape[1]: x for _, x in self._seen if len(x) == len(targets)}
        if self.logits_fn is None and as_logits(outputs) is None and len(seen) == 1:
            (logits,) = seen.values()
            return check_logits(logits, targets).shape[1]
        return self.of(module, outputs, inputs, targets).shape[1]

    def _extra_forward(self, module: nn.Module, inputs: Any) -> Tensor:
        if not self._announced:
            rank_zero_info(
                "DuoCallback: the step neither returns logits nor calls the module, so the base "
                'runs once more per batch to get them; return {"logits": ...} to avoid that'
            )
            self._announced = True
        try:
            with evaluating(module), unnoticed(module):
                logits = call_base(module, inputs)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the forward of {type(module).__name__} cannot run the batch's inputs as they "
                f"are: {type(error).__name__}: {error}; pass DuoCallback(..., logits_fn=lambda "
                "module, inputs: ...) that does what the step does, or return "
                '{"logits": ...} from the step'
            ) from error
        self._seen.clear()
        return logits


class LogitsOf(nn.Module):
    """A base whose logits a ``logits_fn`` computes, as it is part of a duo.

    Args:
        logits_fn: ``(module, inputs) -> logits (N, K)``.
        module: The base.

    Example:
        >>> base = LogitsOf(lambda module, x: 2 * module(x), nn.Linear(4, 3))
        >>> base(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, logits_fn: LogitsFn, module: nn.Module) -> None:
        super().__init__()
        self.logits_fn, self.module = logits_fn, module

    @override
    def forward(self, x: Any) -> Tensor:
        return self.logits_fn(self.module, x)


def has_forward(module: nn.Module) -> bool:
    """Whether the user's class defines a forward (`LightningModule` only inherits an empty one)."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner is not nn.Module and not owner.__module__.startswith("lightning.")


def call_base(module: nn.Module, inputs: Any) -> Tensor:
    """Run the module's own forward and return its logits (N, K).

    Raises:
        ValueError: If it has no forward, or one that gives no logits.
    """
    if not has_forward(module):
        raise ValueError(
            f"{type(module).__name__} has no forward, so its logits cannot be computed; define "
            "forward(x) or pass DuoCallback(..., logits_fn=lambda module, inputs: ...)"
        )
    output = module(inputs)
    logits = as_logits(output)
    if logits is None:
        raise ValueError(
            f"the forward of {type(module).__name__} must give floating-point logits (N, K), or a "
            f"mapping or object with them under 'logits', got {describe(output)}{_remedy(output)}"
        )
    return logits

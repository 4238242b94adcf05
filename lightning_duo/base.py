"""The base's logits, from whatever a user's module makes of a batch."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_duo.batch import describe

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


def remedy(output: Any) -> str:
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


class LogitsOf(nn.Module):
    """A base whose logits a ``logits_fn`` computes, as it is part of a duo.

    Args:
        logits_fn: ``(module, inputs) -> logits (N, K)``.
        module: The base.

    Example:
        >>> import torch
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
            f"mapping or object with them under 'logits', got {describe(output)}{remedy(output)}"
        )
    return logits

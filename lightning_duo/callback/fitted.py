"""What a validation leaves: temperatures with the weights they are for, and the best sidekick."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from lightning_duo.calibration import Calibration
from lightning_duo.callback.fingerprint import fingerprint


@dataclass(frozen=True)
class BestSidekick:
    """The sidekick of the validation where its loss was lowest."""

    nll: float
    """Its validation loss: cross-entropy in nats per sample, at its own best temperature, so that
    overconfidence, which the duo's temperature takes away, does not count."""
    step: int
    """The Trainer's global step then."""
    weights: dict[str, Tensor] = field(repr=False)
    """A copy of its state dict, on the CPU."""

    @classmethod
    def of(cls, model: nn.Module, nll: float, step: int) -> Self:
        """Copy a model."""
        return cls(nll, step, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {"nll": self.nll, "step": self.step, "weights": self.weights}


@dataclass(frozen=True)
class Fitted:
    """Temperatures and threshold, and the weights that they are for."""

    calibration: Calibration
    step: int
    """Global step of the base; -1 if it is not known."""
    weights: tuple[int | None, ...]
    """Fingerprints of base and sidekick."""
    notes: tuple[str, ...] = ()
    """What is to be said of the threshold, once, when the Trainer is done."""

    def is_stale(self, *models: nn.Module) -> bool:
        """Whether base and sidekick have other weights now."""
        pairs = zip(map(fingerprint, models), self.weights, strict=False)
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

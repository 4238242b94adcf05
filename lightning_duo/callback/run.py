"""What a checkpoint keeps of a duo, and whether it still holds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from typing_extensions import Self

from lightning_duo._version import __version__
from lightning_duo.calibration import Calibration
from lightning_duo.evaluation import Predictions

STATE_VERSION = 3
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class BestSidekick:
    """The sidekick of the validation where its loss was lowest."""

    nll: float
    """Its validation loss: cross-entropy in nats per sample, at its own best temperature, so that
    overconfidence, which the duo's temperature takes away, does not count."""
    step: int
    """The Trainer's global step then."""
    weights: dict[str, Tensor]
    """A copy of its state dict, on the CPU."""

    @classmethod
    def of(cls, model: nn.Module, nll: float, step: int) -> Self:
        """Copy a model."""
        return cls(nll, step, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {"nll": self.nll, "step": self.step, "weights": self.weights}


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds a part of the module's weights only (FSDP2)."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


@torch.no_grad()
def fingerprint(module: nn.Module) -> int | None:
    """A number that changes with the weights, the same on every device; None if sharded.

    Weights are parameters and the statistics of batch normalisation. Bits are summed as integers,
    so the order of summation does not matter.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> _ = layer.weight.data.mul_(1.5)
        >>> fingerprint(layer) == before
        False
    """
    if is_sharded(module):
        return None
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
    sums = [
        tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum()
        for tensor in (*module.parameters(), *statistics)
        if tensor is not None and not (tensor.is_complex() or tensor.is_meta or is_lazy(tensor))
    ]
    found = 0
    for value in torch.stack(sums).tolist() if sums else []:
        found = (found * 1_000_003 + value) % (2**61 - 1)
    return found


def fingerprints(*modules: nn.Module) -> list[int | None]:
    """The `fingerprint` of each."""
    return [fingerprint(module) for module in modules]


class Record:
    """What is known of a run: of which weights the temperatures are, and what they gave."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, for another base."""
        self.calibration: Calibration | None = None
        self.fitted_at_step = -1
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        self.predictions: dict[str, dict[str, Predictions]] = {}
        self.step = 0
        """Global step of the base in memory; -1 if not known."""
        self.best: BestSidekick | None = None
        self.run = ""
        """Tells the checkpoints of one run from those of another."""
        self._fitted_to: list[int | None] = []

    def unfit(self) -> None:
        """Drop what was found with temperatures that no longer hold."""
        self.calibration, self.predictions = None, {}
        self.results = {k: v for k, v in self.results.items() if k.partition("/")[0] != "val"}

    def fit(self, calibration: Calibration, weights: list[int | None]) -> None:
        """Take temperatures that were fitted to the base in memory.

        Args:
            calibration: Temperatures and threshold.
            weights: `fingerprints` of base and sidekick at that time.
        """
        self.calibration, self.fitted_at_step = calibration, self.step
        self._fitted_to = weights

    def consider(self, sidekick: nn.Module, nll: float) -> None:
        """Keep a copy of the sidekick if none has been better.

        Args:
            sidekick: As it was validated.
            nll: Its validation loss; see `BestSidekick`.
        """
        if self.best is None or nll < self.best.nll:
            self.best = BestSidekick.of(sidekick, nll, self.step)

    def is_stale(self, base: nn.Module, sidekick: nn.Module) -> bool:
        """Whether the temperatures are for other weights than these."""
        if self.calibration is None:
            return False
        pairs = zip(fingerprints(base, sidekick), self._fitted_to, strict=False)
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {
            "run": self.run,
            "best": self.best and self.best.state_dict(),
            "calibration": self.calibration and self.calibration.state_dict(),
            "fitted_at_step": self.fitted_at_step,
            "fitted_to": self._fitted_to,
            "results": self.results,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint knows; a better sidekick of the same run is kept."""
        best = state["best"] and BestSidekick(**state["best"])
        mine = self.best if self.run == state["run"] else None
        self.best = min((b for b in (mine, best) if b), key=lambda b: b.nll, default=None)
        calibration = state["calibration"]
        self.calibration = calibration and Calibration.from_state_dict(calibration)
        self.run, self.results, self.predictions = state["run"], state["results"], {}
        self.fitted_at_step, self._fitted_to = state["fitted_at_step"], state["fitted_to"]


def check_state(state: dict[str, Any], num_classes: int | None) -> None:
    """Find what keeps a checkpoint's duo state from being loaded.

    Args:
        state: The state as it was saved.
        num_classes: K, or None if not known yet.

    Raises:
        ValueError: If another version of the library wrote it, or it is of other classes.
    """
    version = state.get("version")
    if version != STATE_VERSION:
        raise ValueError(
            f"the checkpoint holds duo state of version {version}, written by lightning_duo "
            f"{state.get('library', 'of an earlier day')}; this is lightning_duo {__version__}, "
            f"which reads version {STATE_VERSION}; load it with the version that wrote it, or "
            "without DuoCallback"
        )
    if state["sidekick"] is not None and num_classes not in (None, state["num_classes"]):
        raise ValueError(
            f"the checkpoint's sidekick {state['name']!r} has {state['num_classes']} classes, this "
            f"callback's has {num_classes}; make them the same, or load the checkpoint without "
            "DuoCallback"
        )


def load_weights(model: nn.Module, weights: dict[str, Tensor], names: tuple[str, str]) -> None:
    """Load a sidekick's weights from a checkpoint.

    Args:
        model: This callback's sidekick.
        weights: State dict of the checkpoint's.
        names: What the checkpoint's sidekick was called, and what this one is.

    Raises:
        ValueError: If they are those of another architecture.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint's sidekick {names[0]!r} has other weights than this callback's "
            f"{names[1]!r}; build it as it was when the checkpoint was saved, or load the "
            f"checkpoint without DuoCallback: {' '.join(str(error).split())}"
        ) from error

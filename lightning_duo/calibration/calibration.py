"""Calibration: temperatures, a threshold, and what they were fitted on; its file."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_duo._version import __version__
from lightning_duo.evaluation import Predictions
from lightning_duo.files import plain_float, whole
from lightning_duo.module import DuoModule
from lightning_duo.nested import Path as Keys
from lightning_duo.selective import Threshold
from lightning_duo.tasks import Classes, Task, task_from_state, task_state
from lightning_duo.temperature import TemperatureFit, Temperatures

FORMAT = "lightning_duo/calibration/1"
FORMAT_OF_TASKS = "lightning_duo/calibration/2"  # which versions that know (N, K) alone refuse


@dataclass(frozen=True)
class Calibration:
    """All that a duo knows beyond its two models."""

    fit: TemperatureFit
    """The temperatures, and what they reach."""
    num_classes: int
    """K."""
    samples: int
    """Number of samples that fitted."""
    target_accuracy: float | None = None
    """Accuracy that accepted predictions were to reach; None if no threshold was asked for."""
    delta: float | None = None
    """Probability with which new data may miss it; None for no guarantee."""
    threshold: Threshold | None = None
    """Which predictions to accept; None accepts all."""
    unscaled: tuple[float, float] | None = None
    """NLL of base and sidekick as they are, by which the samples that fitted are recognised."""
    task: Task = Classes()  # noqa: RUF009 (it is frozen)
    """What the models' outputs decide, of which rows were made for the fit."""

    @property
    def temperatures(self) -> Temperatures:
        """The duo's temperatures."""
        return self.fit.temperatures

    def module(
        self, base: Callable[..., Any], sidekick: Callable[..., Any], *, logits_at: Keys = ()
    ) -> DuoModule:
        """The duo of these models, in eval mode; it shares their weights.

        Args:
            base: The base.
            sidekick: The sidekick, behind what it needs to be called as the base is; as
                `collect_logits` called it, it is ``found.fitted_sidekick``.
            logits_at: As of `DuoModule`.
        """
        threshold = 0.0 if self.threshold is None else self.threshold.value
        given: dict[str, Any] = {"threshold": threshold, "task": self.task, "logits_at": logits_at}
        return DuoModule(base, sidekick, self.temperatures, **given).eval()

    def state_dict(self) -> dict[str, Any]:
        """The same in types that JSON and checkpoints hold."""
        state = {k: v for k, v in vars(self).items() if k not in ("fit", "threshold")}
        state["unscaled"] = None if self.unscaled is None else list(self.unscaled)
        state["task"] = task_state(self.task)
        chosen = self.threshold and self.threshold._asdict()
        if chosen:
            chosen["value"] = plain_float(chosen["value"])
            chosen["accuracy_bound"] = chosen["accuracy_bound"] if chosen["coverage"] else None
        return {**state, "threshold": chosen, "fit": self.fit.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Calibration":
        """The calibration that `state_dict` described."""
        names = ("num_classes", "samples", "target_accuracy", "delta")
        chosen = state["threshold"]
        threshold = chosen and Threshold(
            float(chosen["value"]),
            chosen["coverage"],
            math.nan if chosen["accuracy_bound"] is None else chosen["accuracy_bound"],
        )
        fit = TemperatureFit.from_state_dict(state["fit"])
        unscaled = state.get("unscaled")
        return cls(
            fit=fit,
            threshold=threshold,
            unscaled=None if unscaled is None else tuple(unscaled),
            task=task_from_state(state.get("task")),
            **{name: state[name] for name in names},
        )

    def fitted_on(self, predictions: dict[str, Predictions]) -> bool:
        """Whether these are the samples that fitted, in whatever order.

        Args:
            predictions: What all forms say of some samples; see `evaluate`.
        """
        if len(predictions["duo"].targets) != self.samples:
            return False
        if self.unscaled is None:  # not remembered, as by the first files
            return abs(float(predictions["duo"].nll.mean()) - self.fit.nll) < 1e-9
        found = unscaled_nll(predictions)
        pairs = zip(found, self.unscaled, strict=True)
        return all(math.isclose(mine, its, rel_tol=1e-9) for mine, its in pairs)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, which appears whole or not at all.

        Raises:
            ValueError: If the path is not named ``*.json``.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"a temperatures file is named *.json, got {path}")
        format = FORMAT if self.task == Classes() else FORMAT_OF_TASKS
        head = {"format": format, "temperatures": self.temperatures._asdict()}
        state = {**head, **self.state_dict(), "version": __version__}
        text = json.dumps(state, indent=2, allow_nan=False)
        with whole(path) as file:
            file.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            if state["format"] not in (FORMAT, FORMAT_OF_TASKS):
                raise ValueError(f"its format is {state['format']!r}, not {FORMAT!r}")
            found = cls.from_state_dict(state)
            if state["temperatures"] != found.temperatures._asdict():
                raise ValueError(
                    f"somebody edited it, as its temperatures {state['temperatures']} are not "
                    f"those of its fit, {found.temperatures._asdict()}; to use temperatures of "
                    "your own, pass them to DuoModule"
                )
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no temperatures file written by lightning-duo calibrate or "
                f"Calibration.save ({type(error).__name__}: {error})"
            ) from error


def unscaled_nll(predictions: dict[str, Predictions]) -> tuple[float, float]:
    """NLL of base and sidekick as they are."""
    base, sidekick = (float(predictions[name].nll.mean()) for name in ("base", "sidekick"))
    return base, sidekick

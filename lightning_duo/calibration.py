"""Make a duo of two trained models without training: temperatures, and a threshold."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_duo._version import __version__
from lightning_duo.evaluation import Predictions, evaluate
from lightning_duo.files import plain_float, whole
from lightning_duo.logits import Logits, check_logits
from lightning_duo.module import DuoModule
from lightning_duo.selective import Threshold, select_threshold
from lightning_duo.selective.threshold import check_target
from lightning_duo.tasks import Classes, Task, task_from_state, task_state
from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures

FORMAT = "lightning_duo/calibration/1"
FORMAT_OF_TASKS = "lightning_duo/calibration/2"  # which versions that know (N, K) alone refuse
FEW = 100  # samples, below which temperatures and metrics are rough


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

    def module(self, base: nn.Module, sidekick: nn.Module) -> DuoModule:
        """The duo of these models, in eval mode; it shares their weights."""
        threshold = 0.0 if self.threshold is None else self.threshold.value
        given: dict[str, Any] = {"threshold": threshold, "task": self.task}
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
        found = _unscaled(predictions)
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


def calibrate(
    base_logits: Tensor,
    sidekick_logits: Tensor,
    targets: Tensor,
    *,
    target_accuracy: float | None = None,
    delta: float | None = None,
    items: Tensor | None = None,
    task: Task = Classes(),  # noqa: B008 (it is frozen)
) -> Calibration:
    """Fit the temperatures of a duo of two trained models, and choose its threshold.

    Args:
        base_logits: Logits of the base on held-out samples, shape (N, K).
        sidekick_logits: Logits of the sidekick on the same samples, shape (N, K).
        targets: True classes, shape (N,).
        target_accuracy: Accuracy that accepted predictions are to reach, in (0, 1]; by default
            everything is accepted.
        delta: Probability with which the accepted of new data may miss it; see `select_threshold`.
            The temperatures were fitted on the same samples, which its guarantee ignores: two
            numbers cost it little beside hundreds of samples.
        items: Number of the item that each row belongs to, shape (N,), where rows are pixels of an
            image, tokens of a sentence or labels of a sample.
        task: What the models' outputs decide, if the logits are rows that it made.

    Returns:
        The calibration; ``calibration.module(base, sidekick)`` is the duo.

    Raises:
        ValueError: If shapes or values do not fit, the target or ``delta`` is out of range, or
            ``delta`` is given although several rows belong to one item.

    Example:
        >>> import torch
        >>> base = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
        >>> found = calibrate(base, 0.5 * base, torch.tensor([0, 0, 1, 1]), target_accuracy=0.9)
        >>> found.threshold.coverage
        0.5

    Source: Asymmetric Duos, Sec. 3.1; Geifman and El-Yaniv (2017).
    """
    check_request(target_accuracy, delta)
    logits = check_logits(Logits(base_logits, sidekick_logits, targets))
    return calibrate_checked(logits, target_accuracy, delta, items=items, task=task)[0]


def calibrate_checked(
    logits: Logits,
    target_accuracy: float | None,
    delta: float | None,
    *,
    items: Tensor | None = None,
    task: Task = Classes(),  # noqa: B008 (it is frozen)
) -> tuple[Calibration, dict[str, Predictions]]:
    """`calibrate` for logits that `check_logits` has seen; also what all forms say of them."""
    fit = fit_temperatures(*logits)
    samples = len(logits.targets)
    if samples < FEW:
        warnings.warn(
            f"{samples} samples are few to fit and judge a duo on; use several hundred",
            stacklevel=3,
        )
    if fit.status == "separable":
        warnings.warn(
            "the duo predicts these samples without error, so no finite temperatures are best and "
            "confidences will be near 1; calibrate on more samples",
            stacklevel=3,
        )
    elif fit.temperatures == (0, 0):
        warnings.warn(
            "both temperatures are 0, because neither model predicts these targets; check that "
            "logits and targets have their rows and classes in the same order",
            stacklevel=3,
        )
    predictions = evaluate(*logits, fit, items=items)
    chosen = choose_threshold(fit, predictions, target_accuracy, delta, task=task)
    return chosen, predictions


def choose_threshold(
    fit: TemperatureFit,
    predictions: dict[str, Predictions],
    target_accuracy: float | None,
    delta: float | None,
    *,
    task: Task = Classes(),  # noqa: B008 (it is frozen)
) -> Calibration:
    """The fit with the threshold for a target accuracy, if there is one.

    Args:
        fit: The temperatures.
        predictions: What all forms say with them of the samples that choose; see `evaluate`.
        target_accuracy: As in `calibrate`.
        delta: As in `calibrate`.
        task: What the models' outputs decide.

    Raises:
        ValueError: If ``delta`` is given although several rows belong to one item.

    Warns:
        UserWarning: If no threshold reaches the target, so that nothing is accepted.
    """
    chosen, duo = None, predictions["duo"]
    if target_accuracy is not None:
        if delta is not None and duo.several_of_an_item() is not None:
            raise ValueError(
                "a guarantee needs independent decisions, but several rows belong to one item; "
                "pass one row for each item, or leave delta out"
            )
        chosen = select_threshold(duo.confidence, duo.correct, target_accuracy, delta=delta)
    return Calibration(
        fit,
        duo.num_classes,
        len(duo.targets),
        target_accuracy,
        delta,
        chosen,
        _unscaled(predictions),
        task,
    )


def _unscaled(predictions: dict[str, Predictions]) -> tuple[float, float]:
    base, sidekick = (float(predictions[name].nll.mean()) for name in ("base", "sidekick"))
    return base, sidekick


def check_request(target_accuracy: float | None, delta: float | None) -> None:
    """Raise ValueError if a threshold cannot be asked for so."""
    if target_accuracy is not None:
        check_target(target_accuracy, delta)
    elif delta is not None:
        raise ValueError("delta belongs to a target_accuracy; pass both, or neither")

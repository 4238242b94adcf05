"""Temperatures and a threshold from logits of two models."""

import warnings

from torch import Tensor

from lightning_duo.calibration.calibration import Calibration, unscaled_nll
from lightning_duo.evaluation import Predictions, evaluate
from lightning_duo.logits import Logits, check_logits
from lightning_duo.selective import select_threshold
from lightning_duo.selective.threshold import check_target
from lightning_duo.tasks import Classes, Task
from lightning_duo.temperature import TemperatureFit, fit_temperatures

FEW = 100  # samples, below which temperatures and metrics are rough


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
            image, tokens of a sentence or labels of a sample; as `collect_logits` gives them.
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
        unscaled_nll(predictions),
        task,
    )


def check_request(target_accuracy: float | None, delta: float | None) -> None:
    """Raise ValueError if a threshold cannot be asked for so."""
    if target_accuracy is not None:
        check_target(target_accuracy, delta)
    elif delta is not None:
        raise ValueError("delta belongs to a target_accuracy; pass both, or neither")

"""Logits of two trained models on the same samples, from files, and what is wrong with them."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_duo.arrays import read_array

SURE = 5.0  # standard deviations above chance from which a model knows the targets
CHANCE = 3.0  # ... and up to which it may as well not


class Logits(NamedTuple):
    """Logits of base and sidekick, and the targets, of the same decisions in the same order.

    Each row is a decision: of a sample, or of a pixel, token or label of a sample.
    """

    base: Tensor
    """Shape (N, K), a floating dtype."""
    sidekick: Tensor
    """Shape (N, K), a floating dtype."""
    targets: Tensor
    """True classes, shape (N,), int64; or their probabilities, shape (N, K)."""


NAMES = Logits("base_logits", "sidekick_logits", "targets")  # type: ignore[arg-type]


def read_logits(base: str, sidekick: str, targets: str) -> Logits:
    """Read logits and targets from files.

    Each is ``.npy``, ``.npz``, ``.safetensors`` or ``.csv`` (one sample a line, a header if any).
    Of a file with several arrays one is named after a colon, as in ``test.npz:base``.

    Args:
        base: File of the base's logits, (N, K).
        sidekick: File of the sidekick's, (N, K).
        targets: File of the true classes, (N,), whole numbers from 0.

    Returns:
        Logits and targets, checked by `check_logits`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file cannot be read, or holds something else; says which and where.
    """
    arrays = [read_array(name) for name in (base, sidekick, targets)]
    names = Logits(base, sidekick, targets)  # type: ignore[arg-type]
    return check_logits(Logits(*arrays), names)


def check_logits(logits: Logits, names: Logits = NAMES) -> Logits:
    """Check that logits and targets fit each other, and warn of what is probably a mistake.

    Args:
        logits: Logits (N, K) twice, and targets (N,), or probabilities of the classes (N, K).
        names: What to call the three.

    Returns:
        The same, with class indices as int64.

    Raises:
        ValueError: If shapes, dtypes or values do not fit; names the first rows concerned.

    Warns:
        UserWarning: If rows look like probabilities, or agree with the targets no better than in a
            random order.
    """
    for name, values in zip(names, logits, strict=True):
        if not isinstance(values, Tensor):
            raise ValueError(
                f"{name} must be a tensor (torch.as_tensor), got {type(values).__name__}"
            )
    for name, values in zip(names[:2], logits[:2], strict=True):
        _check_rows(str(name), values)
    base, sidekick, targets = logits
    if base.shape != sidekick.shape:
        raise ValueError(
            f"{names.sidekick} has shape {tuple(sidekick.shape)}, {names.base} "
            f"{tuple(base.shape)}; both models need logits for the same samples and classes"
        )
    soft = targets.is_floating_point() and targets.shape == base.shape
    checked = _probabilities if soft else _class_indices
    found = Logits(base, sidekick, checked(targets, len(base), base.shape[1], names))
    hard = found._replace(targets=found.targets.argmax(1)) if soft else found
    _refuse_targets(hard, names)
    _warn_of_probabilities(hard, names)
    _warn_of_order(hard, names)
    return found


def _check_rows(name: str, values: Tensor) -> None:
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        raise ValueError(
            f"{name} must hold logits of shape (N, K), at least one sample and two classes; got "
            f"shape {tuple(values.shape)} (for one sigmoid logit z use the columns 0 and z)"
        )
    if not values.is_floating_point():
        raise ValueError(f"{name} must hold floating-point logits, got {values.dtype}")
    bad = ~(values.isfinite() | (values == -torch.inf)).all(1)
    if bad.any():
        raise ValueError(
            f"{name} has NaN or +inf in {int(bad.sum())} of {len(values)} rows, first in rows "
            f"{_first(bad)} (counted from 0); logits must be numbers"
        )


def _probabilities(targets: Tensor, samples: int, classes: int, names: Logits) -> Tensor:
    bad = (targets < 0).any(1) | ~((targets.double().sum(1) - 1).abs() <= 0.01)
    if bad.any():
        raise ValueError(
            f"{names.targets} has one value per class, but rows {_first(bad)} (counted from 0) are "
            "no probabilities, at least 0 with a sum of 1; give one class index per sample, or "
            "such probabilities; several labels of a sample are rows of two classes each, as "
            "collect_logits(..., task=Labels()) makes them"
        )
    return targets


def _class_indices(targets: Tensor, samples: int, classes: int, names: Logits) -> Tensor:
    name = names.targets
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise ValueError(
            f"{name} must hold one class index per sample, shape ({samples},); got shape "
            f"{tuple(targets.shape)} (of one-hot rows take argmax)"
        )
    if len(targets) != samples:
        raise ValueError(
            f"{name} holds {len(targets)} targets, {names.base} {samples} rows; both must "
            "describe the same samples"
            + (" (is a first line a header?)" if abs(len(targets) - samples) == 1 else "")
        )
    if targets.dtype == torch.bool and classes > 2:
        raise ValueError(f"{name} must hold class indices, got booleans for {classes} classes")
    if targets.is_floating_point():
        broken = targets != targets.round()
        if broken.any():
            raise ValueError(
                f"{name} must hold whole numbers, got {float(targets[broken][0])} in row "
                f"{_first(broken)[0]}"
            )
    targets = targets.long()
    bad = (targets < 0) | (targets >= classes)
    if bad.any():
        low, high = int(targets.min()), int(targets.max())
        hint = "; they seem to start at 1: subtract 1" if (low, high) == (1, classes) else ""
        raise ValueError(
            f"{name} must hold classes 0..{classes - 1}, as {names.base} has {classes} columns; "
            f"got {low}..{high}, first outside in rows {_first(bad)} (counted from 0){hint}"
        )
    return targets


def _refuse_targets(logits: Logits, names: Logits) -> None:
    """Refuse a column of targets among the logits, which would count as a further class."""
    low, high = int(logits.targets.min()), int(logits.targets.max())
    for name, values in zip(names[:2], logits[:2], strict=True):
        if low == high or high == values.shape[1] - 1:
            continue  # the column may be a logit by chance, or there is no class too many
        same = (values == logits.targets[:, None]).all(0)
        if same.any():
            raise ValueError(
                f"column {_first(same)[0]} of {name} (counted from 0) holds the targets; logits "
                "must have one column per class and no other, so leave it out"
            )


def _warn_of_probabilities(logits: Logits, names: Logits) -> None:
    for name, values in zip(names[:2], logits[:2], strict=True):
        sums = values.double().sum(1)
        whole = 100.0 if float(sums[0]) > 10 else 1.0  # percent; rounding is allowed for
        if bool((values >= 0).all()) and bool(((sums / whole - 1).abs() < 0.05).all()):
            warnings.warn(
                f"{name} seems to hold probabilities, not logits (its rows are >= 0 and sum to "
                f"{whole:g}); use the outputs before softmax, or the probabilities' logarithms",
                stacklevel=4,
            )


def _warn_of_order(logits: Logits, names: Logits) -> None:
    """Rows in another order than the targets agree with them as independent ones would."""
    if bool((logits.targets == logits.targets[0]).all()):
        warnings.warn(
            f"{names.targets} holds one class only ({int(logits.targets[0])}), so no fit to it "
            "means anything; use samples of all classes",
            stacklevel=4,
        )
        return
    for name, values in zip(names[:2], logits[:2], strict=True):
        prediction, commonest = values.argmax(1), int(logits.targets.mode().values)
        one = bool((prediction == prediction[0]).all()) and int(prediction[0]) != commonest
        if one and len(prediction) >= 50 and bool((values != values[:, :1]).any()):
            warnings.warn(
                f"{name} predicts class {int(prediction[0])} for every sample, although class "
                f"{commonest} is the most frequent; check that each column is the logit of a class",
                stacklevel=4,
            )
    above = [_above_chance(values, logits.targets) for values in logits[:2]]
    for name, other, mine, its in zip(names[:2], names[1::-1], above, above[::-1], strict=True):
        if mine is not None and its is not None and mine < CHANCE and its > SURE:
            warnings.warn(
                f"{name} predicts the targets no better than chance, while {other} does; are its "
                "rows in the same order as those of the targets?",
                stacklevel=4,
            )
    if all(deviation is not None and deviation < CHANCE for deviation in above):
        warnings.warn(
            f"neither {names.base} nor {names.sidekick} predicts {names.targets} better than "
            "chance; are the targets in the same order as the logits?",
            stacklevel=4,
        )


def _above_chance(values: Tensor, targets: Tensor) -> float | None:
    """Standard deviations by which accuracy exceeds that of a random order; None if unknowable."""
    classes, prediction = values.shape[1], values.argmax(1)
    shares = [torch.bincount(x, minlength=classes) / len(targets) for x in (prediction, targets)]
    chance = float((shares[0] * shares[1]).sum())
    deviation = math.sqrt(chance * (1 - chance) / len(targets))
    if len(targets) < 50 or deviation == 0 or float(shares[0].max()) == 1:
        return None
    return (float((prediction == targets).double().mean()) - chance) / deviation


def _first(bad: Tensor) -> list[int]:
    found: list[int] = bad.nonzero().flatten()[:5].tolist()
    return found

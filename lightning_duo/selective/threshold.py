"""The confidence from which predictions are accepted, chosen for a target accuracy."""

import math
import warnings
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_duo.selective.ranking import Counts, fraction, rank

STARTS = 8  # numbers of accepted samples that are tested first
EXTENSION = 4096  # numbers of accepted samples that are tested in one go afterwards


class Threshold(NamedTuple):
    """Accept a prediction if its confidence is at least ``value``."""

    value: float
    """Lowest accepted confidence; ``inf``, which accepts nothing, if the target is out of reach."""
    coverage: float
    """Accepted fraction of the samples it was chosen on."""
    accuracy_bound: float
    """Accuracy of the accepted: that on the same samples, or, with ``delta``, the target, which
    new data reach with probability 1 - delta. NaN if nothing is accepted."""


NOTHING = Threshold(math.inf, 0.0, math.nan)


def select_threshold(
    confidence: Tensor, correct: Tensor, accuracy: float, *, delta: float | None = None
) -> Threshold:
    """Choose the lowest confidence to accept, so that the accepted reach a target accuracy.

    Without ``delta`` it is the threshold with the largest coverage whose accepted samples reach
    the target on the given data. On new data about half of such thresholds miss it.

    With ``delta`` the accuracy of what it accepts of new data from the same source is below the
    target with probability at most ``delta`` (over the draw of the given samples). Numbers of
    accepted samples are tested with the exact binomial tail, which gives the chance of so few
    errors if the true accuracy were the target: half of ``delta`` is shared by eight numbers, in
    equal ratios from the fewest samples that could pass to all of them, and with the other half the
    largest that passes is extended sample by sample. Two assumptions: the confidences do not depend
    on the given samples (temperatures fitted on them do, a little), and accuracy falls below the
    target once as the threshold is lowered, and stays below.

    Groups of equal confidence are accepted whole. NaN confidences are refused.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.
        accuracy: Target accuracy of the accepted, in (0, 1].
        delta: Probability in (0, 1) with which new data may miss the target; None for no guarantee.

    Returns:
        The threshold; if none reaches the target it accepts nothing, and a warning says so.

    Raises:
        ValueError: If shapes differ, N = 0, a confidence is NaN, the accuracy is outside (0, 1],
            ``delta`` is outside (0, 1), or a guarantee of accuracy 1 is asked for.

    Example:
        >>> import torch
        >>> confidence = torch.tensor([0.9, 0.75, 0.5, 0.25])
        >>> correct = torch.tensor([True, True, False, False])
        >>> select_threshold(confidence, correct, 0.9)
        Threshold(value=0.75, coverage=0.5, accuracy_bound=1.0)

    Source: Geifman and El-Yaniv (2017), selection with guaranteed risk; instead of their bisection
    the numbers are tested in sequence (Bauer 1991).
    """
    (found,) = select_thresholds(confidence, correct, [accuracy], delta=delta)
    if not found.coverage:
        warnings.warn(
            f"no threshold reaches accuracy {accuracy:g} on {len(confidence)} samples"
            f"{'' if delta is None else f' with probability {1 - delta:g}'}, so nothing is "
            f"accepted; {_remedy(len(confidence), accuracy, delta)}",
            stacklevel=2,
        )
    return found


def select_thresholds(
    confidence: Tensor, correct: Tensor, accuracies: Iterable[float], *, delta: float | None = None
) -> list[Threshold]:
    """`select_threshold` for several targets at the price of one sort, without its warning.

    With ``delta`` each target has its own guarantee, not all of them together.
    """
    targets = [check_target(accuracy, delta) for accuracy in accuracies]
    ranked = rank(confidence, correct)
    found = []
    for target in targets:
        if delta is None:
            group = _empirical(ranked.counts, target)
        else:
            group = _guaranteed(ranked.counts, target, delta)
        if group < 0:
            found.append(NOTHING)
            continue
        accepted, errors = (int(count[group]) for count in ranked.counts)
        reached = 1 - errors / accepted if delta is None else float(target)
        coverage = accepted / len(confidence)
        found.append(Threshold(float(ranked.confidence[accepted - 1]), coverage, reached))
    return found


def check_target(accuracy: float, delta: float | None) -> Fraction:
    """The target as a fraction, or a ValueError that says why there can be no such threshold."""
    target = fraction(accuracy, "accuracy", positive=True)
    if delta is not None and not 0 < delta < 1:
        raise ValueError(
            f"delta must be a probability in (0, 1), such as 0.05; got {delta} (None: no guarantee)"
        )
    if delta is not None and target == 1:
        raise ValueError(
            "no number of samples guarantees an accuracy of 1; ask for 0.999, say, or leave out "
            "delta"
        )
    return target


def fewest_samples(accuracy: float, delta: float) -> int:
    """Accepted samples, all right, that a guarantee takes at least."""
    return math.ceil(math.log(delta / 2) / math.log(accuracy))


def as_text(value: float) -> str:
    """A threshold in as many digits as tell it from all others in float32, as duos hold it."""
    return np.format_float_positional(np.float32(value), trim="0")


def _remedy(samples: int, accuracy: float, delta: float | None) -> str:
    if delta is not None and samples < fewest_samples(accuracy, delta):
        return (
            f"a guarantee takes at least {fewest_samples(accuracy, delta)} samples even if all are "
            "right: use more of them, or a lower target"
        )
    return "lower the target" + ("" if delta is None else ", raise delta, or use more samples")


def _empirical(counts: Counts, target: Fraction) -> int:
    """Last group down to which the accepted reach the target; -1 if there is none."""
    right = counts.accepted - counts.errors
    reached = right * target.denominator >= counts.accepted * target.numerator
    groups = reached.nonzero().flatten()
    return int(groups[-1]) if len(groups) else -1


def _guaranteed(counts: Counts, target: Fraction, delta: float) -> int:
    """Last group down to which the accepted reach the target but for chance ``delta``; or -1.

    H_g says that what is accepted down to group g is less accurate than the target. As accuracy
    falls below the target once, H_g implies H_h for later h. So the claims "H holds from g on" are
    tested in order of g, each at level delta, until one stands: half of delta is shared by the
    starts from g on (what passes at a later start speaks against H_g too), half is for g itself.
    The first true claim is rejected with probability delta at most.
    """
    total, risk = int(counts.total), float(1 - target)
    fewest = math.ceil(math.log(delta / 2 / STARTS) / math.log(float(target)))
    ends = math.log10(min(fewest, total)), math.log10(total)
    sizes = torch.logspace(*ends, STARTS, dtype=torch.float64).round().long().clamp(max=total)
    sizes = sizes.to(counts.accepted.device)
    starts = torch.unique(torch.searchsorted(counts.accepted, sizes))
    tails = binomial_tail(counts.errors[starts], counts.accepted[starts], risk)
    group = -1
    for index, start in enumerate(starts.tolist()):
        remaining = len(starts) - index
        if not bool((tails[index:] <= delta / 2 / remaining).any()):
            break
        group = start
    if group < 0:
        return -1
    while group < len(counts.accepted) - 1:
        more = slice(group + 1, group + 1 + EXTENSION)
        passes = binomial_tail(counts.errors[more], counts.accepted[more], risk) <= delta / 2
        group += int(passes.long().cumprod(0).sum())
        if not bool(passes.all()):
            break
    return group


def binomial_tail(errors: Tensor, accepted: Tensor, risk: float) -> Tensor:
    """Probability of at most ``errors`` among ``accepted`` samples at this error rate, float64."""
    from scipy.special import bdtr

    tail: Any = bdtr(errors.double().cpu().numpy(), accepted.cpu().numpy(), risk)
    return torch.as_tensor(tail, dtype=torch.float64, device=errors.device)

"""Selective classification: pure functions over (confidence, correct).

A selective classifier answers where its confidence is high and defers the rest. All functions
take ``confidence`` (N,), any real score that is higher where the model is surer, and ``correct``
(N,), whether each prediction is right. Sums are taken in float64 and integers; results are
float64 if the confidence is, else float32. Samples of equal confidence have no order among them:
errors are spread evenly over their group, so permuting the samples changes nothing.
"""

import warnings
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class RiskCoverageCurve(NamedTuple):
    """Risk at every coverage k/N, k = 1..N, from the surest sample to all of them."""

    coverage: Tensor
    """Accepted fraction, shape (N,)."""
    risk: Tensor
    """Error rate among the accepted, shape (N,)."""
    threshold: Tensor
    """Lowest accepted confidence, shape (N,)."""


def risk_coverage_curve(confidence: Tensor, correct: Tensor) -> RiskCoverageCurve:
    """Error rate among the k surest samples, for every k.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Returns:
        The curve; inside a group of equal confidence errors are interpolated linearly.

    Raises:
        ValueError: If shapes differ, N = 0, or a confidence is NaN.

    Example:
        >>> import torch
        >>> curve = risk_coverage_curve(torch.tensor([0.9, 0.6]), torch.tensor([True, False]))
        >>> curve.risk
        tensor([0.0000, 0.5000])

    Source: Geifman and El-Yaniv (2017); Asymmetric Duos, Sec. 5.3.
    """
    ranked = _rank(confidence, correct)
    accepted = torch.arange(1, len(ranked.errors) + 1, device=confidence.device)
    return RiskCoverageCurve(
        ranked.result(accepted / len(accepted)),
        ranked.result(ranked.errors / accepted),
        ranked.confidence,
    )


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk-coverage curve: the mean risk over all N coverages; lower is better.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Returns:
        AURC in [0, 1], a scalar.

    Raises:
        ValueError: As in `risk_coverage_curve`.

    Example:
        >>> import torch
        >>> aurc(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 0]))
        tensor(0.1111)

    Source: Geifman et al. (2019); Asymmetric Duos, Sec. 5.3.
    """
    ranked = _rank(confidence, correct)
    return ranked.result(_mean_risk(ranked.errors))


def e_aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """AURC in excess of an oracle that ranks every right prediction above every wrong one.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Returns:
        E-AURC in [0, 1], a scalar; 0 is a perfect ranking.

    Raises:
        ValueError: As in `risk_coverage_curve`.

    Example:
        >>> import torch
        >>> e_aurc(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 0]))
        tensor(0.)

    Source: Geifman et al. (2019), with the oracle of the same N samples.
    """
    ranked = _rank(confidence, correct)
    samples = torch.arange(1, len(ranked.errors) + 1, device=confidence.device)
    oracle = (samples - ranked.right).clamp(min=0).double()
    return ranked.result(_mean_risk(ranked.errors) - _mean_risk(oracle))


def augrc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the generalized risk-coverage curve: mean rate of undetected errors.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Returns:
        AUGRC in [0, 1/2], a scalar: the area under (errors among the accepted) / N, by trapezoids
        from coverage 0; lower is better.

    Raises:
        ValueError: As in `risk_coverage_curve`.

    Example:
        >>> import torch
        >>> augrc(torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))
        tensor(0.5000)

    Source: Traub et al. (2024), "Overcoming Common Flaws in the Evaluation of Selective
    Classification Systems".
    """
    ranked = _rank(confidence, correct)
    count = len(ranked.errors)
    return ranked.result((ranked.errors.sum() - ranked.errors[-1] / 2) / count**2)


def coverage_at_accuracy(confidence: Tensor, correct: Tensor, accuracy: float) -> Tensor:
    """Largest coverage whose selective accuracy reaches a target (SAC@a).

    Only coverages that a threshold can give count, so groups of equal confidence are accepted
    whole. Counts are compared with the exact fraction that ``accuracy`` is written as (0.98 is
    49/50), so rounding never decides.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.
        accuracy: Target selective accuracy in [0, 1].

    Returns:
        Coverage in [0, 1], a scalar; 0 if no threshold reaches the target.

    Raises:
        ValueError: As in `risk_coverage_curve`, or if the accuracy is outside [0, 1].

    Example:
        >>> import torch
        >>> correct = torch.tensor([True, True, False])
        >>> coverage_at_accuracy(torch.tensor([0.9, 0.8, 0.7]), correct, 0.98)
        tensor(0.6667)

    Source: Asymmetric Duos, Sec. 5.4.
    """
    target = _fraction(accuracy, "accuracy")
    ranked = _rank(confidence, correct)
    accepted = ranked.group_end
    enough = (accepted - ranked.group_errors) * target.denominator >= accepted * target.numerator
    most = torch.where(enough, accepted, 0).max()
    return ranked.result(most / len(ranked.errors))


def accuracy_at_coverage(confidence: Tensor, correct: Tensor, coverage: float) -> Tensor:
    """Selective accuracy when the surest ``coverage`` of the samples are accepted.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.
        coverage: Accepted fraction in (0, 1], rounded up to whole samples.

    Returns:
        Accuracy among the accepted, a scalar.

    Raises:
        ValueError: As in `risk_coverage_curve`, or if the coverage is outside (0, 1].

    Example:
        >>> import torch
        >>> correct = torch.tensor([True, True, False])
        >>> accuracy_at_coverage(torch.tensor([0.9, 0.8, 0.7]), correct, 0.5)
        tensor(1.)

    Source: Geifman and El-Yaniv (2017).
    """
    fraction = _fraction(coverage, "coverage")
    if not fraction:
        raise ValueError("coverage must be in (0, 1], got 0: no sample would be accepted")
    ranked = _rank(confidence, correct)
    accepted = -(-fraction.numerator * len(ranked.errors) // fraction.denominator)
    return ranked.result(1 - ranked.errors[accepted - 1] / accepted)


def correctness_auroc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Probability that a right prediction is surer than a wrong one, ties counting one half.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Returns:
        AUROC in [0, 1], a scalar; NaN, with a warning, if all predictions are right or all wrong.

    Raises:
        ValueError: As in `risk_coverage_curve`.

    Example:
        >>> import torch
        >>> correct = torch.tensor([True, False, True])
        >>> correctness_auroc(torch.tensor([0.9, 0.8, 0.7]), correct)
        tensor(0.5000)

    Source: Asymmetric Duos, Sec. 5.2.
    """
    ranked = _rank(confidence, correct)
    count, right = len(ranked.errors), ranked.right
    if right in (0, count):
        warnings.warn(
            f"correctness AUROC is undefined (NaN): all {count} predictions are "
            f"{'right' if right else 'wrong'}",
            stacklevel=2,
        )
        return ranked.result(torch.tensor(torch.nan))
    # Each right prediction beats the wrong ones of less sure groups, and half of its own group's.
    size = ranked.group_end.diff(prepend=ranked.group_end.new_zeros(1))
    wrong = ranked.group_errors.diff(prepend=ranked.group_errors.new_zeros(1))
    below = (count - right) - ranked.group_errors
    twice_wins = ((size - wrong) * (2 * below + wrong)).sum()
    return ranked.result(twice_wins.double() / (2 * right * (count - right)))


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> Tensor:
    """Mean gap between confidence and accuracy over equal-width bins ``(lo, hi]``.

    torchmetrics bins ``[lo, hi)`` and so gives confidences of exactly 1, frequent in float32, a
    bin of their own; otherwise the two agree.

    Args:
        confidence: Probabilities of the predictions, shape (N,), in [0, 1].
        correct: Whether each prediction is right, shape (N,), bool or 0/1.
        bins: Number of bins.

    Returns:
        ECE in [0, 1], a scalar.

    Raises:
        ValueError: If shapes differ, N = 0, or a confidence is outside [0, 1].

    Example:
        >>> import torch
        >>> expected_calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1, 0]))
        tensor(0.5000)

    Source: Guo et al. (2017); Asymmetric Duos, Sec. 5.2.
    """
    hits = _check(confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1:
        raise ValueError(
            "expected_calibration_error expects probabilities in [0, 1], got "
            f"{confidence.min():g} to {confidence.max():g}"
        )
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    scores = confidence.double()
    bin_of = torch.bucketize(scores, edges[1:-1])
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.scatter_add_(0, bin_of, scores - hits.double())
    return _like(confidence, gap.abs().sum() / len(confidence))


class _Ranked(NamedTuple):
    confidence: Tensor  # (N,), descending
    errors: Tensor  # (N,) float64: errors among the k surest, interpolated inside ties
    group_end: Tensor  # (G,) int64: samples up to the end of each group of equal confidence
    group_errors: Tensor  # (G,) int64: errors up to there
    right: int

    def result(self, value: Tensor) -> Tensor:
        return _like(self.confidence, value)


def _rank(confidence: Tensor, correct: Tensor) -> _Ranked:
    hits = _check(confidence, correct)
    scores, order = confidence.sort(descending=True, stable=True)
    _, group, size = torch.unique_consecutive(scores, return_inverse=True, return_counts=True)
    wrong = torch.zeros_like(size).scatter_add_(0, group, (~hits[order]).long())
    group_end, group_errors = size.cumsum(0), wrong.cumsum(0)
    position = torch.arange(1, len(scores) + 1, device=scores.device)
    inside = (position - (group_end - size)[group]).double() / size[group]
    errors = (group_errors - wrong)[group] + inside * wrong[group]
    return _Ranked(scores, errors, group_end, group_errors, int(hits.sum()))


def _mean_risk(errors: Tensor) -> Tensor:
    return (errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean()


def _like(confidence: Tensor, value: Tensor) -> Tensor:
    return value.to(torch.float64 if confidence.dtype == torch.float64 else torch.float32)


def _fraction(number: float, name: str) -> Fraction:
    """The fraction a decimal was meant as, so that counts can be compared exactly."""
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be a fraction in [0, 1], got {number}")
    return Fraction(str(float(number))).limit_denominator(10**9)


def _check(confidence: Tensor, correct: Tensor) -> Tensor:
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            "expected confidence and correct of one shape (N,) with N >= 1, got "
            f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    if not confidence.is_floating_point() or confidence.isnan().any():
        raise ValueError(
            f"expected confidence as floating-point numbers, got {confidence.dtype}"
            f"{' with NaN' if confidence.is_floating_point() else ''}"
        )
    if correct.dtype != torch.bool and not ((correct == 0) | (correct == 1)).all():
        raise ValueError("expected correct as booleans, or numbers 0 and 1")
    return correct.bool()

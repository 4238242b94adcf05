"""Samples ranked by confidence, as counts per group of equal confidence.

Samples of equal confidence have no order among them, so all that selective classification can know
is how many samples, and how many errors, lie at or above each confidence. Every area below is a
closed formula of these two counts. Counts may have leading dimensions, such as one for the
resamples of a bootstrap, in which a group may be empty.
"""

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

EULER = 0.5772156649015329  # H(n) = digamma(n + 1) + this


class Counts(NamedTuple):
    """What is accepted down to the end of each of G groups of equal confidence, surest first."""

    accepted: Tensor
    """Samples, shape (..., G), int64."""
    errors: Tensor
    """Wrong predictions among them, shape (..., G), int64."""

    @property
    def total(self) -> Tensor:
        """All samples, shape (...)."""
        return self.accepted[..., -1]

    @property
    def wrong(self) -> Tensor:
        """All wrong predictions, shape (...)."""
        return self.errors[..., -1]


class Ranking(NamedTuple):
    """N samples in descending order of confidence."""

    confidence: Tensor
    """Descending, shape (N,)."""
    order: Tensor
    """Where each comes from, shape (N,)."""
    ends: Tensor
    """Samples up to the end of each group, shape (G,)."""
    counts: Counts

    @property
    def thresholds(self) -> Tensor:
        """Confidence of each group, shape (G,)."""
        return self.confidence[self.ends - 1]

    def recount(self, weights: Tensor, wrong: Tensor) -> Counts:
        """Counts when sample i occurs ``weights[..., i]`` times.

        Args:
            weights: Multiplicities, shape (..., N), in the order of the samples.
            wrong: Whether each prediction is wrong, shape (N,), in that order too.
        """
        ranked = weights[..., self.order]
        last = self.ends - 1
        return Counts(
            ranked.cumsum(-1)[..., last], (ranked * wrong[self.order]).cumsum(-1)[..., last]
        )

    def errors_by_rank(self) -> Tensor:
        """Errors among the k surest, k = 1..N, interpolated inside groups: (N,) float64."""
        if len(self.ends) == len(self.order):
            return self.counts.errors.double()
        accepted, errors = (_shifted(count) for count in self.counts)
        size = self.counts.accepted - accepted
        slope = (self.counts.errors - errors).double() / size
        # Errors at rank k of a group are slope * k + (errors - slope * accepted) before it.
        level = torch.repeat_interleave(errors - slope * accepted, size)
        position = torch.arange(1, len(self.order) + 1, device=self.order.device)
        return torch.repeat_interleave(slope, size).mul_(position).add_(level)

    def errors_at(self, accepted: int) -> Tensor:
        """Errors among the ``accepted`` surest, interpolated inside a group: a scalar, float64."""
        group = int(torch.searchsorted(self.ends, accepted))
        before = (self.ends[group - 1], self.counts.errors[group - 1]) if group else (0, 0)
        size, wrong = self.ends[group] - before[0], self.counts.errors[group] - before[1]
        return before[1] + wrong * (accepted - before[0]) / size.double()


def rank(confidence: Tensor, correct: Tensor) -> Ranking:
    """Sort samples by confidence, surest first.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Raises:
        ValueError: If shapes differ, N = 0, a confidence is NaN, or ``correct`` is no truth value.
    """
    hits = check_samples(confidence, correct)
    scores, order = confidence.sort(descending=True)
    last = torch.ones_like(hits)
    torch.ne(scores[1:], scores[:-1], out=last[:-1])
    ends = last.nonzero().flatten() + 1
    errors = (~hits)[order].cumsum(0)[ends - 1]
    return Ranking(scores, order, ends, Counts(ends, errors))


def mean_risk(counts: Counts) -> Tensor:
    """Mean error rate over the N coverages (AURC), shape (...), float64.

    In a group of m samples with e errors, after a samples with E errors, the risk at rank k is
    (E + (k - a) e/m) / k, whose sum over the group is e + (E - a e/m) (H(a + m) - H(a)) with
    harmonic numbers H.
    """
    accepted, errors = _shifted(counts.accepted), _shifted(counts.errors)
    size, wrong = counts.accepted - accepted, counts.errors - errors
    harmonic = _harmonic(counts.accepted, counts)
    reciprocals = harmonic - _shifted(harmonic)
    level = errors - accepted * (wrong / size.clamp(min=1).double())
    return (wrong + level * reciprocals).sum(-1) / counts.total


def oracle_risk(counts: Counts) -> Tensor:
    """Mean error rate over the coverages if all right samples came first, shape (...), float64."""
    right = counts.total - counts.wrong
    tail = _harmonic(counts.total, counts) - _harmonic(right, counts)
    return (counts.wrong - right * tail) / counts.total


def mean_undetected(counts: Counts) -> Tensor:
    """Area under (errors among the accepted) / N over coverage, by trapezoids, shape (...)."""
    accepted, errors = _shifted(counts.accepted), _shifted(counts.errors)
    size = (counts.accepted - accepted).double()
    return (size * (errors + counts.errors)).sum(-1) / (2 * counts.total.double() ** 2)


def most_accepted(counts: Counts, accuracy: Fraction) -> Tensor:
    """Most samples whose accuracy reaches a target when whole groups are accepted, shape (...)."""
    right = counts.accepted - counts.errors
    enough = right * accuracy.denominator >= counts.accepted * accuracy.numerator
    return torch.where(enough, counts.accepted, 0).amax(-1)


def right_above_wrong(counts: Counts) -> Tensor:
    """Chance that a right sample ranks above a wrong one, ties one half; NaN without both."""
    wrong = counts.errors - _shifted(counts.errors)
    right = counts.accepted - _shifted(counts.accepted) - wrong
    below = counts.wrong[..., None] - counts.errors
    twice_wins = (right * (2 * below + wrong)).sum(-1).double()
    return twice_wins / (2 * counts.wrong * (counts.total - counts.wrong))


def wrong_share(counts: Counts, right_share: Fraction) -> Tensor:
    """Accepted share of the wrong samples at the first group where a share of the right is in."""
    right = counts.accepted - counts.errors
    reached = right * right_share.denominator >= right[..., -1:] * right_share.numerator
    first = reached.long().argmax(-1, keepdim=True)
    share = counts.errors.gather(-1, first).squeeze(-1) / counts.wrong.double()
    return torch.where(right[..., -1] > 0, share, torch.nan)


def fraction(number: float, name: str, *, positive: bool = False) -> Fraction:
    """The fraction a decimal was meant as, so that counts can be compared exactly."""
    if positive and number == 0:
        raise ValueError(f"{name} must be in (0, 1], got 0")
    if not 0 <= number <= 1:
        hint = f"; did you mean {number / 100:g}?" if 1 < number <= 100 else ""
        raise ValueError(f"{name} must be a fraction in [0, 1], got {number}{hint}")
    exact = Fraction(str(float(number))).limit_denominator(10**9)
    if 0 < number < 1 and exact in (0, 1):
        raise ValueError(f"{name} {number} is too near to {exact}: 9 digits are told apart")
    return exact


def check_samples(confidence: Tensor, correct: Tensor) -> Tensor:
    """Whether each prediction is right, as bool (N,), or a ValueError that says what is wrong."""
    if not (isinstance(confidence, Tensor) and isinstance(correct, Tensor)):
        raise ValueError(
            f"expected tensors (torch.from_numpy), got {type(confidence).__name__} and "
            f"{type(correct).__name__}"
        )
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


def _shifted(cumulative: Tensor) -> Tensor:
    """What was reached before each group."""
    return torch.nn.functional.pad(cumulative[..., :-1], (1, 0))


def _harmonic(numbers: Tensor, counts: Counts) -> Tensor:
    """Harmonic numbers H(n) of up to as many as there are samples, float64.

    From a table of all; where there are far fewer groups than samples, from the digamma function,
    as the table would take more time and memory than all the rest.
    """
    most = int(counts.total.max())
    if 8 * counts.accepted.numel() < most:
        return torch.digamma(numbers.double() + 1) + EULER
    steps = torch.arange(1, most + 1, device=numbers.device)
    return torch.nn.functional.pad(steps.double().reciprocal().cumsum(0), (1, 0))[numbers]


def like(confidence: Tensor, value: Tensor) -> Tensor:
    """A result in float64 if the confidence is, else in float32."""
    return value.to(torch.float64 if confidence.dtype == torch.float64 else torch.float32)

"""Selective classification: pure functions over (confidence, correct).

A selective classifier answers where its confidence is high and defers the rest. All functions
take ``confidence`` (N,), any real score that is higher where the model is surer, and ``correct``
(N,), whether each prediction is right. Sums are taken in float64 and integers; results are
float64 if the confidence is, else float32. Samples of equal confidence have no order among them:
errors are spread evenly over their group, so permuting the samples changes nothing.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import lightning_duo.selective.ranking as ranking
from lightning_duo.selective.ranking import Counts, fraction, like, rank


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
    return _curve(confidence, correct, generalized=False)


def generalized_risk_coverage_curve(confidence: Tensor, correct: Tensor) -> RiskCoverageCurve:
    """Undetected errors among the k surest samples as a share of all N, for every k.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.

    Returns:
        The curve; its ``risk`` is (errors among the accepted) / N, which never falls with coverage
        and ends at the error rate. The area under it, from (0, 0), is `augrc`.

    Raises:
        ValueError: As in `risk_coverage_curve`.

    Example:
        >>> import torch
        >>> correct = torch.tensor([False, True])
        >>> generalized_risk_coverage_curve(torch.tensor([0.9, 0.6]), correct).risk
        tensor([0.5000, 0.5000])

    Source: Traub et al. (2024), "Overcoming Common Flaws in the Evaluation of Selective
    Classification Systems".
    """
    return _curve(confidence, correct, generalized=True)


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
    return like(confidence, ranking.mean_risk(rank(confidence, correct).counts))


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
    counts = rank(confidence, correct).counts
    return like(confidence, ranking.mean_risk(counts) - ranking.oracle_risk(counts))


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
    return like(confidence, ranking.mean_undetected(rank(confidence, correct).counts))


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
    target = fraction(accuracy, "accuracy")
    counts = rank(confidence, correct).counts
    return like(confidence, ranking.most_accepted(counts, target).double() / counts.total)


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
    share = fraction(coverage, "coverage", positive=True)
    ranked = rank(confidence, correct)
    accepted = -(-share.numerator * len(ranked.order) // share.denominator)
    return like(confidence, 1 - ranked.errors_at(accepted) / accepted)


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
    counts = rank(confidence, correct).counts
    _warn_if_one_sided(counts, "correctness AUROC")
    return like(confidence, ranking.right_above_wrong(counts))


def fpr_at_tpr(confidence: Tensor, correct: Tensor, tpr: float = 0.95) -> Tensor:
    """Share of the wrong predictions that pass where a given share of the right ones does.

    Args:
        confidence: Scores, shape (N,), higher is surer.
        correct: Whether each prediction is right, shape (N,), bool or 0/1.
        tpr: Share of the right predictions to accept, in (0, 1]; the highest threshold that
            accepts as many is taken, and groups of equal confidence are accepted whole.

    Returns:
        False-positive rate in [0, 1], a scalar, lower is better; NaN, with a warning, if all
        predictions are right or all wrong.

    Raises:
        ValueError: As in `risk_coverage_curve`, or if ``tpr`` is outside (0, 1].

    Example:
        >>> import torch
        >>> correct = torch.tensor([True, False, True, False])
        >>> fpr_at_tpr(torch.tensor([0.9, 0.8, 0.7, 0.6]), correct)
        tensor(0.5000)

    Source: Hendrycks and Gimpel (2017), for right against wrong predictions.
    """
    share = fraction(tpr, "tpr", positive=True)
    counts = rank(confidence, correct).counts
    _warn_if_one_sided(counts, f"FPR at {float(100 * share):g} % TPR")
    return like(confidence, ranking.wrong_share(counts, share))


def _curve(confidence: Tensor, correct: Tensor, *, generalized: bool) -> RiskCoverageCurve:
    ranked = rank(confidence, correct)
    count = len(ranked.order)
    accepted = torch.arange(1, count + 1, device=confidence.device)
    return RiskCoverageCurve(
        like(confidence, accepted.double() / count),
        like(confidence, ranked.errors_by_rank() / (count if generalized else accepted)),
        ranked.confidence,
    )


def _warn_if_one_sided(counts: Counts, what: str) -> None:
    total, wrong = int(counts.total), int(counts.wrong)
    if wrong in (0, total):
        warnings.warn(
            f"{what} is undefined (NaN): all {total} predictions are "
            f"{'wrong' if wrong else 'right'}",
            stacklevel=3,
        )

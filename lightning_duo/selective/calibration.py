"""How honest probabilities are: expected calibration error and Brier score."""

import torch
from torch import Tensor

from lightning_duo.selective.ranking import check_samples, like


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
    hits = check_samples(confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1:
        raise ValueError(
            "expected_calibration_error expects probabilities in [0, 1], got "
            f"{confidence.min():g} to {confidence.max():g}"
        )
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    bin_of = calibration_bins(confidence, bins)
    gap.scatter_add_(0, bin_of, confidence.double() - hits.double())
    return like(confidence, gap.abs().sum() / len(confidence))


def calibration_bins(confidence: Tensor, bins: int) -> Tensor:
    """The equal-width bin ``(lo, hi]`` of [0, 1] of each confidence, shape (N,), int64."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence.double(), edges[1:-1])


def brier_scores(probs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each sample's probabilities, summed over classes; lower is better.

    Args:
        probs: Class probabilities, shape (N, K), rows that sum to 1.
        targets: True classes, shape (N,), an integer dtype; or class probabilities, shape (N, K),
            a floating dtype, to whose `distributions` the distance is then.

    Returns:
        Scores in [0, 2], shape (N,), float64; their mean is the Brier score. (The code of
        Asymmetric Duos divides it by K.)

    Raises:
        ValueError: If the shapes do not fit, rows of either are no probabilities, or targets are
            out of range.

    Example:
        >>> import torch
        >>> brier_scores(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        tensor([0.5000], dtype=torch.float64)

    Source: Brier (1950); Asymmetric Duos, App. E.
    """
    soft = targets.is_floating_point()
    if probs.ndim != 2 or targets.shape != probs.shape[: 1 + soft]:
        raise ValueError(
            "expected probs (N, K) and integer targets (N,), or class probabilities (N, K) as "
            f"targets, got {tuple(probs.shape)} and {targets.dtype} {tuple(targets.shape)}"
        )
    if not len(targets):
        return torch.zeros(0, dtype=torch.float64, device=probs.device)
    exact = probs.double()
    if not _are_probabilities(exact):
        raise ValueError("expected probs as rows of probabilities that sum to 1; apply softmax")
    if soft:
        return (exact - distributions(targets)).square().sum(1)
    targets = targets.long()
    if targets.min() < 0 or targets.max() >= probs.shape[1]:
        raise ValueError(f"expected targets in 0..{probs.shape[1] - 1}")
    right = exact.gather(1, targets[:, None]).squeeze(1)
    return exact.square().sum(1) - 2 * right + 1


def distributions(targets: Tensor) -> Tensor:
    """What soft targets are taken as: each row divided by its sum, as half precision rounds it.

    Args:
        targets: Class probabilities, shape (N, K), a floating dtype.

    Returns:
        Rows that sum to 1, shape (N, K), float64.

    Raises:
        ValueError: If rows are no probabilities, or their sum is off 1 by more than 0.01.

    Example:
        >>> import torch
        >>> distributions(torch.tensor([[0.25, 0.745]])).sum()
        tensor(1., dtype=torch.float64)
    """
    exact = targets.double()
    if not _are_probabilities(exact):
        raise ValueError("expected soft targets as rows of probabilities that sum to 1")
    return exact / exact.sum(1, keepdim=True)


def _are_probabilities(exact: Tensor) -> bool:
    if not len(exact):
        return True
    return bool((exact >= 0).all()) and bool((exact.sum(1) - 1).abs().max() <= 1e-2)

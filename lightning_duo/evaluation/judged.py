"""What measures are made of: sums over judged samples, of the samples themselves or of a tally."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_duo.evaluation.predictions import Predictions
from lightning_duo.selective import ranking
from lightning_duo.selective.calibration import calibration_bins

BINS = 15  # of the confidence


class Sums(ABC):
    """What the formulas of `MEASURES` are made of, for each of R rows of weights."""

    @property
    @abstractmethod
    def counts(self) -> ranking.Counts:
        """Samples and errors down to each score, shapes (R, G)."""

    @property
    @abstractmethod
    def accuracy(self) -> Tensor:
        """Share of right predictions, shape (R,), float64."""

    @property
    @abstractmethod
    def nll(self) -> Tensor:
        """Mean negative log-likelihood, shape (R,), float64."""

    @property
    @abstractmethod
    def brier(self) -> Tensor:
        """Mean Brier score, shape (R,), float64."""

    @property
    @abstractmethod
    def gaps(self) -> Tensor:
        """Confidence less accuracy, summed over each bin of the confidence, (R, BINS), float64."""

    @property
    @abstractmethod
    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Right predictions, targets and predictions of each class, each of shape (R, K)."""

    @property
    @abstractmethod
    def exact(self) -> Tensor:
        """Share of items with every sample right, shape (R,), float64."""

    @property
    def total(self) -> Tensor:
        """Number of samples, shape (R,)."""
        return self.counts.total

    @cached_property
    def risk(self) -> Tensor:
        """Error rate averaged over all coverages, shape (R,)."""
        return ranking.mean_risk(self.counts)


@dataclass(frozen=True)
class Judged(Sums):
    """N judged samples, and R rows of weights that say how often each of them counts.

    The samples themselves are one row of ones; R resamples of a bootstrap are R rows. All that a
    measure needs comes from here, so that a measure is one formula for both.
    """

    predictions: Predictions
    """What was said of the samples."""
    ranked: ranking.Ranking
    """The samples by score, surest first."""
    weights: Tensor
    """How often each sample counts, shape (R, N), int32."""
    items: Tensor | None
    """Item of each sample, numbered from 0, shape (N,); None where each has one sample."""

    @classmethod
    def once(cls, predictions: Predictions) -> "Judged":
        """Every sample counts once, R = 1.

        Raises:
            ValueError: If there is no sample, a score is NaN, or a confidence no probability.
        """
        if not len(predictions.targets):
            raise ValueError("there are no samples to measure")
        confidence = predictions.confidence
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise ValueError(
                "expected confidences as probabilities in [0, 1], got "
                f"{confidence.min():g} to {confidence.max():g}"
            )
        weights = torch.ones_like(predictions.targets, dtype=torch.int32)[None]
        ranked = ranking.rank(predictions.score, predictions.correct)
        return cls(predictions, ranked, weights, predictions.several_of_an_item())

    def counted(self, weights: Tensor) -> "Judged":
        """The same samples with other weights, shape (R, N); nothing is sorted anew."""
        return replace(self, weights=weights)

    @cached_property
    @override
    def counts(self) -> ranking.Counts:
        return self.ranked.recount(self.weights, ~self.predictions.correct)

    @property
    @override
    def accuracy(self) -> Tensor:
        return self.mean(self.predictions.correct)

    @property
    @override
    def nll(self) -> Tensor:
        return self.mean(self.predictions.nll)

    @property
    @override
    def brier(self) -> Tensor:
        return self.mean(self.predictions.brier)

    @property
    @override
    def gaps(self) -> Tensor:
        confidence = self.predictions.confidence
        gaps = confidence.double() - self.predictions.correct.double()
        return self.sums(gaps, calibration_bins(confidence, BINS), BINS)

    @property
    @override
    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        found = self.predictions
        targets, prediction, classes = found.targets, found.prediction, found.num_classes
        once = torch.ones_like(targets, dtype=torch.int32)
        return (
            self.sums(found.correct, targets, classes),
            self.sums(once, targets, classes),
            self.sums(once, prediction, classes),
        )

    @property
    @override
    def exact(self) -> Tensor:
        assert self.items is not None  # each sample counts as its share of the item
        right, items = self.predictions.correct, self.items
        all_right = torch.ones(int(items.max()) + 1, device=items.device).index_fill_(
            0, items[~right], 0.0
        )
        share = items.bincount().double().reciprocal()[items]
        return self.mean(all_right[items] * share) / self.mean(share)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of one value a sample (N,): shape (R,), float64."""
        return (self.weights * values.double()).sum(1) / self.total

    def sums(self, values: Tensor, group: Tensor, groups: int) -> Tensor:
        """Sums of one value a sample (N,) over each of the groups (N,): shape (R, groups)."""
        weighted = self.weights * values
        sums = weighted.new_zeros(len(weighted), groups)
        return sums.index_add_(1, group, weighted)

"""The table of metrics: what each is called, how it is computed and how it is shown."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_duo.evaluation.predictions import Predictions
from lightning_duo.selective import Threshold, ranking
from lightning_duo.selective.calibration import calibration_bins

BINS = 15  # of the confidence
ACCURACY_98 = ranking.fraction(0.98, "accuracy")
TPR_95 = ranking.fraction(0.95, "tpr")


@dataclass(frozen=True)
class Judged:
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
    def counts(self) -> ranking.Counts:
        """Samples and errors down to each score, shapes (R, G)."""
        return self.ranked.recount(self.weights, ~self.predictions.correct)

    @property
    def total(self) -> Tensor:
        """Number of samples, shape (R,)."""
        return self.counts.total

    @cached_property
    def risk(self) -> Tensor:
        """Error rate averaged over all coverages, shape (R,)."""
        return ranking.mean_risk(self.counts)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of one value a sample (N,): shape (R,), float64."""
        return (self.weights * values.double()).sum(1) / self.total

    def sums(self, values: Tensor, group: Tensor, groups: int) -> Tensor:
        """Sums of one value a sample (N,) over each of the groups (N,): shape (R, groups)."""
        weighted = self.weights * values
        sums = weighted.new_zeros(len(weighted), groups)
        return sums.index_add_(1, group, weighted)


@dataclass(frozen=True)
class Measure:
    """A metric: its formula, and how it is shown. An entry of `MEASURES` is all that it takes."""

    label: str
    """Heading in tables."""
    meaning: str
    """What it is, in a few words, without its unit."""
    higher_is_better: bool
    of: Callable[[Judged], Tensor]
    """The formula: value for each row of weights, shape (R,), float64; NaN where it is undefined.
    """
    factor: float = 100
    """A value times this is what is shown."""
    digits: int = 1
    """Decimals that are shown."""
    unit: str = "%"
    """Of what is shown; empty if it has none."""
    interval: Literal["percentile", "basic"] = "percentile"
    """Bootstrap interval. The basic one takes off a bias; it is for measures between 0 and 1."""
    summary: bool = True
    """Whether the table in the terminal, of 80 columns, has it."""
    needs_items: bool = False
    """Whether it is left out where no item has several decisions."""

    @property
    def arrow(self) -> str:
        """An arrow to the better side."""
        return "↑" if self.higher_is_better else "↓"

    @property
    def heading(self) -> str:
        """The label with an arrow to the better side."""
        return self.label + self.arrow

    def text(self, value: float) -> str:
        """A value as it is shown, without its unit."""
        text = f"{self.factor * value:.{self.digits}f}"
        return "n/a" if math.isnan(value) else text.lstrip("-") if float(text) == 0 else text

    def best(self, values: Mapping[str, float]) -> set[str]:
        """The models with the best value; none if it is undefined for all.

        Args:
            values: Model -> value.
        """
        defined = {model: value for model, value in values.items() if not math.isnan(value)}
        top = (max if self.higher_is_better else min)(defined.values(), default=math.nan)
        return {model for model, value in defined.items() if value == top}


def _f1(judged: Judged) -> Tensor:
    """Mean F1 over the classes that occur as target or prediction."""
    found = judged.predictions
    targets, prediction, classes = found.targets, found.prediction, found.num_classes
    once = torch.ones_like(targets, dtype=torch.int32)
    right = judged.sums(found.correct, targets, classes)
    either = judged.sums(once, targets, classes) + judged.sums(once, prediction, classes)
    f1 = 2 * right / either.clamp(min=1).double()
    return f1.sum(1) / (either > 0).sum(1)


def _ece(judged: Judged) -> Tensor:
    found = judged.predictions
    gaps = found.confidence.double() - found.correct.double()
    bins = calibration_bins(found.confidence, BINS)
    return judged.sums(gaps, bins, BINS).abs().sum(1) / judged.total


def _exact(judged: Judged) -> Tensor:
    """Of items: each of their rows counts as its share of the item."""
    assert judged.items is not None
    right, items = judged.predictions.correct, judged.items
    all_right = torch.ones(int(items.max()) + 1, device=items.device).index_fill_(
        0, items[~right], 0.0
    )
    share = items.bincount().double().reciprocal()[items]
    return judged.mean(all_right[items] * share) / judged.mean(share)


MEASURES: dict[str, Measure] = {
    "accuracy": Measure(
        "acc",
        "share of right predictions",
        True,
        lambda judged: judged.mean(judged.predictions.correct),
    ),
    "f1": Measure("F1", "mean F1 over the classes", True, _f1, interval="basic"),
    "nll": Measure(
        "NLL",
        "negative log-likelihood",
        False,
        lambda judged: judged.mean(judged.predictions.nll),
        factor=1,
        digits=3,
        unit="nats",
    ),
    "brier": Measure(
        "Brier",
        "squared error of the probabilities, summed over classes",
        False,
        lambda judged: judged.mean(judged.predictions.brier),
        factor=1,
        digits=3,
        unit="",
    ),
    "ece": Measure(
        "ECE",
        f"gap between confidence and accuracy in {BINS} bins",
        False,
        _ece,
        interval="basic",
    ),
    "auroc": Measure(
        "AUROC",
        "chance that a right answer is surer than a wrong one",
        True,
        lambda judged: ranking.right_above_wrong(judged.counts),
    ),
    "fpr95": Measure(
        "FPR95",
        "wrong answers kept where 95 % of the right are kept",
        False,
        lambda judged: ranking.wrong_share(judged.counts, TPR_95),
        summary=False,
    ),
    "aurc": Measure(
        "AURC",
        "error rate averaged over all coverages",
        False,
        lambda judged: judged.risk,
        digits=2,
    ),
    "e_aurc": Measure(
        "E-AURC",
        "AURC above that of a perfect ranking",
        False,
        lambda judged: judged.risk - ranking.oracle_risk(judged.counts),
        digits=2,
        summary=False,
    ),
    "augrc": Measure(
        "AUGRC",
        "undetected errors among all samples, averaged",
        False,
        lambda judged: ranking.mean_undetected(judged.counts),
        digits=2,
        summary=False,
    ),
    "sac98": Measure(
        "SAC98",
        "share that can be answered with 98 % right",
        True,
        lambda judged: ranking.most_accepted(judged.counts, ACCURACY_98) / judged.total.double(),
    ),
    "exact": Measure(
        "exact",
        "share of items with every decision right",
        True,
        _exact,
        summary=False,
        needs_items=True,
    ),
}
HIGHER_IS_BETTER = {name: measure.higher_is_better for name, measure in MEASURES.items()}


def applicable(judged: Judged) -> dict[str, Measure]:
    """The measures of `MEASURES` that the samples have what it takes for."""
    several = judged.items is not None
    return {name: found for name, found in MEASURES.items() if several or not found.needs_items}


def measure(predictions: Predictions) -> dict[str, float]:
    """Every metric of `MEASURES` that applies, as fractions (NLL in nats).

    ``auroc`` and ``fpr95`` are NaN where all predictions are right, or all wrong. ``exact`` is
    measured only where an item has several rows.

    Args:
        predictions: What a model says of some samples.

    Raises:
        ValueError: If there is no sample, a score is NaN, or a confidence is no probability.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
        >>> measure(Predictions.of(probs, torch.tensor([0, 0])))["accuracy"]
        0.5
    """
    judged = Judged.once(predictions)
    return {name: found.of(judged).item() for name, found in applicable(judged).items()}


def measure_accepted(duo: Predictions, threshold: Threshold) -> dict[str, float]:
    """``coverage`` and ``selective_accuracy`` (NaN if nothing is accepted) at a threshold."""
    accepted = duo.confidence >= threshold.value
    return {
        "coverage": float(accepted.double().mean()),
        "selective_accuracy": float(duo.correct[accepted].double().mean()),
    }

"""The table of metrics: what each is called, how it is computed and how it is shown."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_duo.evaluation.judged import BINS, Judged, Sums
from lightning_duo.evaluation.predictions import Predictions
from lightning_duo.selective import Threshold, ranking

ACCURACY_98 = ranking.fraction(0.98, "accuracy")
TPR_95 = ranking.fraction(0.95, "tpr")


@dataclass(frozen=True)
class Measure:
    """A metric: its formula, and how it is shown. An entry of `MEASURES` is all that it takes."""

    label: str
    """Heading in tables."""
    meaning: str
    """What it is, in a few words, without its unit."""
    higher_is_better: bool
    of: Callable[[Judged], Tensor] | Callable[[Sums], Tensor]
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
    needs_samples: bool = False
    """Whether the formula takes more of `Judged` than `Sums` has. A `Tally` leaves it out."""

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


def _f1(judged: Sums) -> Tensor:
    """Mean F1 over the classes that occur as target or prediction."""
    right, targets, predicted = judged.classes
    either = targets + predicted
    f1 = 2 * right / either.clamp(min=1).double()
    return f1.sum(1) / (either > 0).sum(1)


MEASURES: dict[str, Measure] = {
    "accuracy": Measure(
        "acc",
        "share of right predictions",
        True,
        lambda judged: judged.accuracy,
    ),
    "f1": Measure("F1", "mean F1 over the classes", True, _f1, interval="basic"),
    "nll": Measure(
        "NLL",
        "negative log-likelihood",
        False,
        lambda judged: judged.nll,
        factor=1,
        digits=3,
        unit="nats",
    ),
    "brier": Measure(
        "Brier",
        "squared error of the probabilities, summed over classes",
        False,
        lambda judged: judged.brier,
        factor=1,
        digits=3,
        unit="",
    ),
    "ece": Measure(
        "ECE",
        f"gap between confidence and accuracy in {BINS} bins",
        False,
        lambda judged: judged.gaps.abs().sum(1) / judged.total,
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
        lambda judged: judged.exact,
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
    return accepted_measures(len(accepted), int(accepted.sum()), int(duo.correct[accepted].sum()))


def accepted_measures(count: float, accepted: float, right: float) -> dict[str, float]:
    """``coverage`` and ``selective_accuracy`` (NaN if nothing is accepted) of so many samples."""
    accuracy = right / accepted if accepted else math.nan
    return {"coverage": accepted / count, "selective_accuracy": accuracy}

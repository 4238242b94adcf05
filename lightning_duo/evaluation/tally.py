"""Measures of more samples than can be kept: sums that add up over batches and processes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_duo.evaluation.forms import Form, judge
from lightning_duo.evaluation.judged import BINS, Sums
from lightning_duo.evaluation.measures import MEASURES, accepted_measures
from lightning_duo.evaluation.predictions import Predictions, likeliest
from lightning_duo.selective import Threshold, ranking
from lightning_duo.selective.calibration import calibration_bins

TOTALS = ("count", "right", "nll", "brier", "accepted", "right_accepted", "items", "right_items")
DROPPED = 9  # of the 23 bits behind the point of a float32, as confidences are told apart
OCTAVES = 24  # below 1/2, on either side of it, in which they are
LEVELS = (2 * OCTAVES << (23 - DROPPED)) + 1


def confidence_levels(confidence: Tensor) -> Tensor:
    """Numbers that order confidences, surest first, and tell almost all of them apart.

    Each level holds confidences p of which the smaller of p and 1 - p agrees in its first 15
    binary digits. Above 0.998 float32 has no more, so no two different ones share a level there.

    Args:
        confidence: Probabilities, shape (N,), float32.

    Returns:
        Shape (N,), int64, from 0 to ``LEVELS - 1``.

    Example:
        >>> levels = confidence_levels(torch.tensor([1.0, 0.7, 0.5, 0.1, 0.0]))
        >>> bool((levels.diff() > 0).all()), int(levels[-1]) == LEVELS - 1
        (True, True)
    """
    smaller = torch.minimum(confidence, 1 - confidence).contiguous()
    # The bits of positive floating-point numbers are ordered as the numbers are.
    bits = (smaller.view(torch.int32) >> DROPPED).long() - ((126 - OCTAVES) << (23 - DROPPED))
    bits.clamp_(min=0)
    return torch.where(confidence < 0.5, LEVELS - 1 - bits, bits)


class Tally:
    """What forms are worth on samples that are not kept.

    All measures but those of a ranking are those of all samples. AUROC, AURC and their like take
    confidences for equal that share a level of `confidence_levels`.

    Args:
        forms: Name -> form.
        num_classes: K.
        threshold: What the form ``duo`` accepts, if that is to be measured too.

    Example:
        >>> from lightning_duo.evaluation import Weighted
        >>> tally = Tally({"base": Form("base", {"base": 1}, Weighted((1.0,)))}, 2)
        >>> for _ in range(3):
        ...     tally.update({"base": torch.tensor([[2.0, 0.0], [1.0, 0.0]])}, torch.tensor([0, 1]))
        >>> tally.compute()["base"]["accuracy"]
        0.5
    """

    def __init__(
        self, forms: Mapping[str, Form], num_classes: int, threshold: Threshold | None = None
    ) -> None:
        self.forms, self.num_classes, self.threshold = forms, num_classes, threshold
        self._sizes = [len(TOTALS), BINS, *[num_classes] * 3, *[LEVELS] * 2]
        self.sums = torch.zeros(len(forms), sum(self._sizes), dtype=torch.float64)
        """Of each form; NaN if a row had no softmax."""

    def update(
        self, members: Mapping[str, Tensor], targets: Tensor, *, items: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            members: Model -> its logits, shape (B, K).
            targets: True classes, shape (B,), or class probabilities, shape (B, K).
            items: Number of the item that each row belongs to, shape (B,); no item may have rows in
                several batches.
        """
        if not len(targets):
            return
        index, count = None, len(targets)
        if items is not None:
            found, index = torch.unique(items, return_inverse=True)
            count = len(found)
        for form, sums in zip(self.forms.values(), self.sums, strict=True):
            try:
                said = judge(form, members, targets)
            except ValueError:  # a row that has no softmax; the sums of all rows are none then
                sums.fill_(torch.nan)
            else:
                self._add(said, likeliest(targets), sums.split(self._sizes), index, count)

    def _add(
        self,
        said: Predictions,
        targets: Tensor,
        sums: tuple[Tensor, ...],
        index: Tensor | None,
        items: int,
    ) -> None:
        totals, gaps, of_right, of_targets, of_predictions, of_levels, of_wrong = sums
        confidence, right = said.confidence, said.correct
        one, hit = torch.ones_like(said.nll), right.double()
        accepted = confidence >= (math.inf if self.threshold is None else self.threshold.value)
        wrong = right.logical_not()
        all_right = right
        if index is not None:
            all_right = torch.ones(items, dtype=torch.bool, device=index.device)
            all_right[index[wrong]] = False
        accepted_right, brier = accepted & right, said.brier.double()
        columns = (one, hit, said.nll, brier, accepted, accepted_right)
        totals[:6] += torch.stack([column.double().sum() for column in columns])
        totals[6:] += torch.tensor([items, int(all_right.sum())], dtype=torch.float64)
        gaps.index_add_(0, calibration_bins(confidence, BINS), confidence.double() - hit)
        of_right.index_add_(0, targets, hit)
        of_targets.index_add_(0, targets, one)
        of_predictions.index_add_(0, said.prediction, one)
        levels = confidence_levels(confidence)
        of_levels.index_add_(0, levels, one)
        of_wrong.index_add_(0, levels[wrong], one[wrong])

    def compute(
        self, *, several: bool = False, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, dict[str, float]]:
        """Form -> metric -> value, of the samples of all processes.

        Args:
            several: Whether an item of any process has several rows.
            reduce: Sums a float64 tensor over all processes, each of which must call this.
        """
        results = {}
        for name, sums in zip(self.forms, reduce(self.sums), strict=True):
            tallied = Tallied(*sums[None].split(self._sizes, dim=1))
            results[name] = {
                metric: measure.of(tallied).item() if bool(sums[0] > 0) else math.nan  # type: ignore[arg-type]
                for metric, measure in MEASURES.items()
                if not measure.needs_samples and (several or not measure.needs_items)
            }
            if name == "duo" and self.threshold is not None:
                results[name] |= accepted_measures(*tallied.totals[0, [0, 4, 5]].tolist())
        return results


@dataclass(frozen=True)
class Tallied(Sums):
    """The sums of a `Tally` for one form, one row of each."""

    totals: Tensor
    """As `TOTALS` names them, shape (1, 8)."""
    of_bins: Tensor
    of_right: Tensor
    of_targets: Tensor
    of_predictions: Tensor
    of_levels: Tensor
    of_wrong: Tensor

    @property
    @override
    def counts(self) -> ranking.Counts:
        filled = self.of_levels[0] > 0
        counts = (self.of_levels[:, filled], self.of_wrong[:, filled])
        return ranking.Counts(*(count.long().cumsum(1) for count in counts))

    def _share(self, name: str, of: str = "count") -> Tensor:
        return self.totals[:, TOTALS.index(name)] / self.totals[:, TOTALS.index(of)]

    @property
    @override
    def accuracy(self) -> Tensor:
        return self._share("right")

    @property
    @override
    def nll(self) -> Tensor:
        return self._share("nll")

    @property
    @override
    def brier(self) -> Tensor:
        return self._share("brier")

    @property
    @override
    def gaps(self) -> Tensor:
        return self.of_bins

    @property
    @override
    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.of_right, self.of_targets, self.of_predictions

    @property
    @override
    def exact(self) -> Tensor:
        return self._share("right_items", "items")

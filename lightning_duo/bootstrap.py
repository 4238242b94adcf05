"""How sure the metrics are: bootstrap intervals, and paired differences between two models."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_duo.evaluation import HIGHER_IS_BETTER, Predictions, measure
from lightning_duo.selective import ranking
from lightning_duo.selective.functions import calibration_bins

CHUNK_WEIGHTS = 1 << 22  # multiplicities held at a time
BINS = 15
BIASED = ("ece", "f1")


class Interval(NamedTuple):
    """An estimate and where the bootstrap puts it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Metrics of several models on the same samples, and on resamples of them."""

    estimates: dict[str, dict[str, float]]
    """Model -> metric -> value on the samples."""
    resampled: dict[str, dict[str, Tensor]]
    """Model -> metric -> values on the resamples, shape (R,), float64."""

    def interval(self, model: str, metric: str, *, level: float = 0.95) -> Interval:
        """Interval of a metric: percentile, or for ECE and F1 basic, against their bias.

        ECE is biased upwards, the more so the fewer samples a bin has, and F1 downwards by rare
        classes; on a resample more than on the samples. The basic interval takes that off. Even so
        intervals of ECE, and of SAC98 where few thresholds reach it, can cover less than they say.

        Args:
            model: One of the models.
            metric: A key of `evaluation.HIGHER_IS_BETTER`.
            level: Its coverage, in (0, 1).

        Returns:
            The estimate and its interval; NaN where a metric is undefined on every resample.
        """
        self._check(metric, model)
        values = self.estimates[model][metric], self.resampled[model][metric]
        return _interval(*values, level, basic=metric in BIASED, floor=0.0)

    def difference(self, model: str, other: str, metric: str, *, level: float = 0.95) -> Interval:
        """Interval of ``model`` minus ``other``, paired: on the same resamples.

        Args:
            model: One of the models.
            other: Another.
            metric: A key of `evaluation.HIGHER_IS_BETTER`.
            level: Its coverage, in (0, 1).
        """
        self._check(metric, model, other)
        value = self.estimates[model][metric] - self.estimates[other][metric]
        apart = self.resampled[model][metric] - self.resampled[other][metric]
        return _interval(value, apart, level, basic=metric in BIASED, floor=-1.0)

    def _check(self, metric: str, *models: str) -> None:
        for model in models:
            if model not in self.estimates or metric not in self.estimates[model]:
                raise ValueError(
                    f"there is no {metric!r} of {model!r}; models are {sorted(self.estimates)}, "
                    f"metrics {sorted(self.estimates.get(model, HIGHER_IS_BETTER))}"
                )


def bootstrap(
    models: Mapping[str, Predictions],
    *,
    resamples: int = 1000,
    seed: int = 0,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Bootstrap:
    """Measure models on samples drawn with replacement, the same draw for all of them.

    A sample that is drawn several times is counted several times, so samples are ranked once and
    no resample is sorted. The intervals are for the models as they are: they say how the test
    samples vary, not how training would.

    Args:
        models: Name -> predictions, all of the same N samples in the same order.
        resamples: Number R of resamples.
        seed: Of the draws.
        metrics: Name -> function of (score (N,), correct (N,)), to measure these instead of the
            metrics of `evaluation.HIGHER_IS_BETTER`, such as
            ``{"sac95": lambda s, c: selective.coverage_at_accuracy(s, c, 0.95)}``. They are called
            on every resample, which sorts anew.

    Returns:
        The metrics and their values on the resamples.

    Raises:
        ValueError: If there is no model, their targets differ, or ``resamples`` is below 2.

    Example:
        >>> import torch
        >>> from lightning_duo import fit_temperatures
        >>> from lightning_duo.evaluation import DuoMetrics
        >>> base, sidekick = torch.eye(3).repeat(9, 1), torch.zeros(27, 3)
        >>> targets = torch.arange(27) % 4 % 3
        >>> metrics = DuoMetrics(3, fit_temperatures(base, sidekick, targets))
        >>> metrics.update(base, sidekick, targets)
        >>> found = bootstrap(metrics.predictions(), resamples=100)
        >>> low, high = found.interval("duo", "accuracy")[1:]
        >>> low < found.estimates["duo"]["accuracy"] < high
        True

    Source: Efron (1979), the percentile method; Davison and Hinkley (1997), the basic one.
    """
    if not models or resamples < 2:
        raise ValueError(f"expected models and at least 2 resamples, got {resamples}")
    targets = next(iter(models.values())).targets
    for name, predictions in models.items():
        if not torch.equal(predictions.targets, targets):
            raise ValueError(
                f"the targets of {name!r} are not those of {next(iter(models))!r}; a paired "
                "bootstrap needs all models on the same samples in the same order"
            )
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models}
    resamplers: dict[str, _Resampler | _Repeater] = {
        name: _Repeater(predictions, metrics) if metrics else _Resampler(predictions)
        for name, predictions in models.items()
    }
    for weights in _weights(len(targets), resamples, seed, targets.device):
        for name, resampler in resamplers.items():
            for metric, values in resampler.measure(weights).items():
                parts[name].setdefault(metric, []).append(values)
    return Bootstrap(
        {name: resampler.estimate() for name, resampler in resamplers.items()},
        {
            name: {metric: torch.cat(values).cpu() for metric, values in metrics.items()}
            for name, metrics in parts.items()
        },
    )


def _weights(samples: int, resamples: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """How often each sample is drawn: (R', N) int32, a few resamples at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK_WEIGHTS // samples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = torch.randint(samples, (count, samples), generator=generator)
        weights = torch.zeros(count, samples, dtype=torch.int32)
        yield weights.scatter_add_(1, drawn, torch.ones_like(weights)).to(device)


class _Resampler:
    """Metrics of one model for any multiplicities of its samples."""

    def __init__(self, predictions: Predictions) -> None:
        self.predictions = predictions
        correct = predictions.correct
        self.ranking = ranking.rank(predictions.score, correct)
        self.wrong = ~correct
        self.bin_of = calibration_bins(predictions.confidence, BINS)
        columns = (correct, predictions.nll, predictions.brier)
        self.columns = torch.stack([column.double() for column in columns], dim=1)
        self.gaps = predictions.confidence.double() - correct.double()

    def measure(self, weights: Tensor) -> dict[str, Tensor]:
        """Every metric, (R',) each, for multiplicities (R', N)."""
        counts = self.ranking.recount(weights, self.wrong)
        total = counts.total
        accuracy, nll, brier = ((weights.double() @ self.columns) / total[:, None]).unbind(1)
        gaps = _sums(weights * self.gaps, self.bin_of, BINS)
        risk = ranking.mean_risk(counts)
        ninety_eight = ranking.fraction(0.98, "accuracy")
        return {
            "accuracy": accuracy,
            "f1": self._f1(weights),
            "nll": nll,
            "brier": brier,
            "ece": gaps.abs().sum(1) / total,
            "auroc": ranking.right_above_wrong(counts),
            "fpr95": ranking.wrong_share(counts, ranking.fraction(0.95, "tpr")),
            "aurc": risk,
            "e_aurc": risk - ranking.oracle_risk(counts),
            "augrc": ranking.mean_undetected(counts),
            "sac98": ranking.most_accepted(counts, ninety_eight) / total.double(),
        }

    def estimate(self) -> dict[str, float]:
        """Every metric on the samples."""
        return measure(self.predictions)

    def _f1(self, weights: Tensor) -> Tensor:
        """Mean F1 over the classes that occur as target or prediction."""
        targets, prediction = self.predictions.targets, self.predictions.prediction
        classes = self.predictions.num_classes
        right = _sums(weights * ~self.wrong, targets, classes)
        either = _sums(weights, targets, classes) + _sums(weights, prediction, classes)
        f1 = 2 * right / either.clamp(min=1).double()
        return f1.sum(1) / (either > 0).sum(1)


class _Repeater:
    """Any functions of (score, correct), on samples repeated as often as they were drawn."""

    def __init__(
        self, predictions: Predictions, metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    ) -> None:
        self.score, self.correct = predictions.score, predictions.correct
        self.metrics = metrics

    def measure(self, weights: Tensor) -> dict[str, Tensor]:
        drawn = [torch.repeat_interleave(row) for row in weights]
        return {
            name: torch.stack([self._value(metric, rows) for rows in drawn])
            for name, metric in self.metrics.items()
        }

    def estimate(self) -> dict[str, float]:
        rows = torch.arange(len(self.score), device=self.score.device)
        return {name: float(self._value(metric, rows)) for name, metric in self.metrics.items()}

    def _value(self, metric: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
        return metric(self.score[rows], self.correct[rows]).double()


def _sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums of (R', N) values over the samples of each group: (R', groups)."""
    zeros = torch.zeros(len(values), groups, dtype=values.dtype, device=values.device)
    return zeros.index_add_(1, group, values)


def _interval(
    value: float, resampled: Tensor, level: float, *, basic: bool, floor: float
) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), such as 0.95; got {level}")
    tail = (1 - level) / 2
    low, high = torch.nanquantile(resampled, torch.tensor([tail, 1 - tail]).double()).tolist()
    if basic:
        low, high = max(floor, 2 * value - high), min(1.0, 2 * value - low)
    return Interval(value, low, high)

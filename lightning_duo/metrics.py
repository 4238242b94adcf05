"""torchmetrics over `lightning_duo.selective`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE, plot_curve
from typing_extensions import override

from lightning_duo import selective
from lightning_duo.selective.ranking import check_samples, fraction


class _SelectiveMetric(Metric):
    """Keeps (confidence, correct) of every sample: 5 bytes each for float32 confidences.

    Half-precision confidences are kept as float32, float64 as they are. Where some process may get
    no sample, float64 needs ``metric.set_dtype(torch.float64)``, so that all exchange one dtype.
    """

    full_state_update = False
    is_differentiable = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")
        self.reset()

    @override
    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process that gets no sample must still have something to exchange with the others.
        self.confidence.append(torch.zeros(0, dtype=self.dtype, device=self.device))
        self.correct.append(torch.zeros(0, dtype=torch.bool, device=self.device))

    @override
    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add a batch: scores (B,), higher is surer, and whether each prediction is right (B,)."""
        shapes = [tuple(getattr(x, "shape", ())) for x in (confidence, correct)]
        if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
            raise ValueError(
                f"{type(self).__name__} expects confidence and correct of one shape (B,), got "
                f"{shapes[0]} and {shapes[1]}; of probabilities take "
                "confidence, prediction = probs.max(1) and correct = prediction == targets"
            )
        if len(confidence):
            check_samples(confidence, correct)
            # Copies, as the caller's tensors may change, or hold a graph or a whole batch.
            dtype = torch.promote_types(confidence.dtype, self.dtype)
            self.confidence.append(confidence.detach().to(dtype, copy=True))
            self.correct.append(correct.detach().to(torch.bool, copy=True))

    def _samples(self) -> tuple[Tensor, Tensor]:
        # torch.cat promotes the empty float32 tensor that `reset` left.
        return dim_zero_cat(self.confidence), dim_zero_cat(self.correct)

    @override
    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot the value, or given values (over steps), as every torchmetrics metric does."""
        return self._plot(val, ax)


class AURC(_SelectiveMetric):
    """Area under the risk-coverage curve; see `lightning_duo.selective.aurc`.

    Example:
        >>> import torch
        >>> metric = AURC()
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, True, False]))
        >>> metric.compute()
        tensor(0.1111)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    @override
    def compute(self) -> Tensor:
        """AURC of all samples seen, a scalar."""
        return selective.aurc(*self._samples())


class ExcessAURC(_SelectiveMetric):
    """AURC in excess of the oracle's; see `lightning_duo.selective.e_aurc`.

    Example:
        >>> import torch
        >>> metric = ExcessAURC()
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, True, False]))
        >>> metric.compute()
        tensor(0.)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    @override
    def compute(self) -> Tensor:
        """E-AURC of all samples seen, a scalar."""
        return selective.e_aurc(*self._samples())


class AUGRC(_SelectiveMetric):
    """Area under the generalized risk-coverage curve; see `lightning_duo.selective.augrc`.

    Example:
        >>> import torch
        >>> metric = AUGRC()
        >>> metric.update(torch.tensor([0.9, 0.8]), torch.tensor([False, False]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 0.5

    @override
    def compute(self) -> Tensor:
        """AUGRC of all samples seen, a scalar."""
        return selective.augrc(*self._samples())


class SelectiveAccuracyConstraint(_SelectiveMetric):
    """Coverage at a target accuracy; see `lightning_duo.selective.coverage_at_accuracy`.

    Example:
        >>> import torch
        >>> metric = SelectiveAccuracyConstraint(accuracy=0.98)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, True, False]))
        >>> metric.compute()
        tensor(0.6667)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, accuracy: float = 0.98, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accuracy = float(fraction(accuracy, "accuracy"))

    @override
    def compute(self) -> Tensor:
        """Coverage over all samples seen, a scalar."""
        return selective.coverage_at_accuracy(*self._samples(), self.accuracy)


class CorrectnessAUROC(_SelectiveMetric):
    """AUROC of right against wrong predictions; see `lightning_duo.selective.correctness_auroc`.

    Example:
        >>> import torch
        >>> metric = CorrectnessAUROC()
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    @override
    def compute(self) -> Tensor:
        """AUROC over all samples seen, a scalar."""
        return selective.correctness_auroc(*self._samples())


class SelectiveAccuracy(_SelectiveMetric):
    """Accuracy at a coverage; see `lightning_duo.selective.accuracy_at_coverage`.

    Example:
        >>> import torch
        >>> metric = SelectiveAccuracy(coverage=0.5)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, True, False]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, coverage: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coverage = float(fraction(coverage, "coverage", positive=True))

    @override
    def compute(self) -> Tensor:
        """Accuracy among the accepted of all samples seen, a scalar."""
        return selective.accuracy_at_coverage(*self._samples(), self.coverage)


class FalsePositiveRate(_SelectiveMetric):
    """Wrong predictions accepted with 95 % of the right ones; see `selective.fpr_at_tpr`.

    Example:
        >>> import torch
        >>> metric = FalsePositiveRate(tpr=0.95)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(self, tpr: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tpr = float(fraction(tpr, "tpr", positive=True))

    @override
    def compute(self) -> Tensor:
        """False-positive rate over all samples seen, a scalar."""
        return selective.fpr_at_tpr(*self._samples(), self.tpr)


class RiskCoverageCurve(_SelectiveMetric):
    """Risk at every coverage; see `lightning_duo.selective.risk_coverage_curve`.

    Args:
        generalized: Whether to count the errors among all samples, not among the accepted; see
            `lightning_duo.selective.generalized_risk_coverage_curve`.

    Example:
        >>> import torch
        >>> metric = RiskCoverageCurve()
        >>> metric.update(torch.tensor([0.9, 0.6]), torch.tensor([True, False]))
        >>> metric.compute().risk
        tensor([0.0000, 0.5000])
    """

    def __init__(self, *, generalized: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generalized = generalized

    @override
    def compute(self) -> selective.RiskCoverageCurve:
        """The curve over all N samples seen, each part of shape (N,)."""
        if self.generalized:
            return selective.generalized_risk_coverage_curve(*self._samples())
        return selective.risk_coverage_curve(*self._samples())

    @override
    def plot(
        self, val: Any = None, ax: _AX_TYPE | None = None, *, score: bool = True
    ) -> _PLOT_OUT_TYPE:
        """Draw the curve, or the given one; with ``score``, its area (AURC or AUGRC) beside it."""
        curve = val or self.compute()
        risk = curve.risk.double()
        # The mean over coverages, and the trapezoids from (0, 0).
        area = (risk.sum() - risk[-1] / 2) / len(risk) if self.generalized else risk.mean()
        labels = ("Coverage", "Generalized risk" if self.generalized else "Risk")
        return plot_curve(
            curve,
            score=area if score else None,
            ax=ax,
            label_names=labels,
            name=type(self).__name__,
        )


class Brier(Metric):
    """Squared error of the probabilities, averaged over samples, lower is better.

    Args:
        mean_over_classes: Whether to average over the K classes, as the code of Asymmetric Duos
            does; by default their errors are summed (Brier 1950), in [0, 2].

    Example:
        >>> import torch
        >>> metric = Brier()
        >>> metric.update(torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2900)
    """

    full_state_update = False
    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0
    total: Tensor
    samples: Tensor

    def __init__(self, *, mean_over_classes: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean_over_classes = mean_over_classes
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (B, K), and true classes (B,) or soft targets (B, K)."""
        errors = selective.brier_scores(probs, targets)
        classes = probs.shape[1] if self.mean_over_classes else 1
        self.total += (errors.sum() / classes).to(self.total.dtype)
        self.samples += len(targets)

    @override
    def compute(self) -> Tensor:
        """Brier score over all samples seen, a scalar, float32; NaN if there were none."""
        return (self.total / self.samples).float()

    @override
    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot the value, or given values (over steps), as every torchmetrics metric does."""
        return self._plot(val, ax)

"""torchmetrics over `lightning_duo.selective`, and the metric set of a duo."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_duo import selective
from lightning_duo.temperature import UNWEIGHTED, TemperatureFit, Temperatures
from lightning_duo_kernels import duo_head


class _SelectiveMetric(Metric):
    """Keeps (confidence, correct) of every sample: 5 bytes each for float32 confidences."""

    full_state_update = False
    is_differentiable = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    @override
    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add a batch: scores (B,), higher is surer, and whether each prediction is right (B,)."""
        if confidence.shape != correct.shape or confidence.ndim != 1:
            raise ValueError(
                f"{type(self).__name__} expects confidence and correct of one shape (B,), got "
                f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
            )
        self.confidence.append(confidence)
        self.correct.append(correct.bool())

    def _samples(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.confidence), dim_zero_cat(self.correct)


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
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy must be a fraction in [0, 1], got {accuracy}")
        self.accuracy = accuracy

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


class DuoMetrics(Metric):
    """Base, sidekick and duo in every form, measured on the same samples.

    All seven are one weighted sum of logits with different temperatures: ``base`` (1, 0),
    ``base_scaled`` (t, 0), ``sidekick`` (0, 1), ``sidekick_scaled`` (0, t), ``unweighted``
    (0.5, 0.5), ``duo`` (fitted) and ``uq_only`` (fitted, but predicting with the base alone).

    Each has accuracy, f1 (macro), nll (nats), brier (summed over classes), ece (15 bins), auroc
    (of correctness), aurc and sac98. For ``uq_only`` nll and brier are those of ``duo``: both
    judge the probabilities, which the two share.

    Args:
        num_classes: K.
        fit: The fitted temperatures.

    Example:
        >>> import torch
        >>> from lightning_duo import fit_temperatures
        >>> base, sidekick = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)
        >>> targets = torch.tensor([0, 1])
        >>> metrics = DuoMetrics(2, fit_temperatures(base, sidekick, targets))
        >>> metrics.update(base, sidekick, targets)
        >>> metrics.compute()["duo"]["accuracy"]
        0.5

    Source: Asymmetric Duos, Sec. 3.1 (ablations) and Sec. 5 (metrics).
    """

    full_state_update = False
    confidence: list[Tensor]
    prediction: list[Tensor]
    targets: list[Tensor]
    nll: Tensor
    brier: Tensor

    def __init__(self, num_classes: int, fit: TemperatureFit, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.forms = {
            "base": Temperatures(1.0, 0.0),
            "base_scaled": fit.scaled_base,
            "sidekick": Temperatures(0.0, 1.0),
            "sidekick_scaled": fit.scaled_sidekick,
            "unweighted": UNWEIGHTED,
            "duo": fit.temperatures,
            "uq_only": fit.temperatures,
        }
        for name in ("confidence", "prediction", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")
        zeros = torch.zeros(len(self.forms), dtype=torch.float64)
        self.add_state("nll", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("brier", zeros.clone(), dist_reduce_fx="sum")
        self.reset()

    @override
    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process that gets no sample must still have something to exchange with the others.
        self.confidence.append(torch.zeros(0, len(self.forms), device=self.device))
        self.prediction.append(torch.zeros(0, len(self.forms), device=self.device).long())
        self.targets.append(torch.zeros(0, device=self.device).long())

    @override
    def update(self, base_logits: Tensor, sidekick_logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits of both models (B, K) and true classes (B,)."""
        base, sidekick = base_logits.float(), sidekick_logits.float()
        confidence, prediction = [], []
        for i, (form, temperatures) in enumerate(self.forms.items()):
            weights = torch.tensor(temperatures, dtype=torch.float32, device=base.device)
            head = duo_head(base, sidekick, weights, uq_only=form == "uq_only")
            assert head.probs is not None
            confidence.append(head.confidence)
            prediction.append(head.prediction)
            right = head.probs.gather(1, targets[:, None]).double().squeeze(1)
            self.brier[i] += (head.probs.double().square().sum(1) - 2 * right + 1).sum()
            self.nll[i] += _nll(base, sidekick, temperatures, targets)
        self.confidence.append(torch.stack(confidence, dim=1))
        self.prediction.append(torch.stack(prediction, dim=1))
        self.targets.append(targets)

    @override
    def compute(self) -> dict[str, dict[str, float]]:
        """Value of every metric of every form, e.g. ``compute()["duo"]["aurc"]``."""
        confidences, predictions = dim_zero_cat(self.confidence), dim_zero_cat(self.prediction)
        targets = dim_zero_cat(self.targets)
        results = {}
        for i, form in enumerate(self.forms):
            confidence, prediction = confidences[:, i], predictions[:, i]
            correct = prediction == targets
            values = {
                "accuracy": multiclass_accuracy(
                    prediction, targets, self.num_classes, average="micro"
                ),
                "f1": multiclass_f1_score(prediction, targets, self.num_classes, average="macro"),
                "nll": self.nll[i] / len(targets),
                "brier": self.brier[i] / len(targets),
                "ece": selective.expected_calibration_error(confidence, correct),
                "auroc": selective.correctness_auroc(confidence, correct),
                "aurc": selective.aurc(confidence, correct),
                "sac98": selective.coverage_at_accuracy(confidence, correct, 0.98),
            }
            results[form] = {name: float(value) for name, value in values.items()}
        return results


def _nll(base: Tensor, sidekick: Tensor, temperatures: Temperatures, targets: Tensor) -> Tensor:
    """Summed NLL in float64, so that it orders two models as the fit does."""
    masked = (base == -torch.inf) | (sidekick == -torch.inf)
    logits = temperatures.base * base.double() + temperatures.sidekick * sidekick.double()
    logits = logits.masked_fill(masked, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

"""Base, sidekick and duo measured on the same samples, in every form the paper compares."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_duo import selective
from lightning_duo.selective import Threshold
from lightning_duo.temperature import UNWEIGHTED, TemperatureFit, Temperatures
from lightning_duo.temperature.samples import check_samples
from lightning_duo_kernels import duo_head

Score: TypeAlias = Literal["confidence", "entropy"]

# What is measured, and whether higher is better.
HIGHER_IS_BETTER = {
    "accuracy": True,
    "f1": True,
    "nll": False,
    "brier": False,
    "ece": False,
    "auroc": True,
    "fpr95": False,
    "aurc": False,
    "e_aurc": False,
    "augrc": False,
    "sac98": True,
}


CHUNK_LOGITS = 1 << 22  # whose probabilities are held at a time


@dataclass(frozen=True)
class Predictions:
    """What one model says of N samples, without the (N, K) probabilities."""

    confidence: Tensor
    """Probability of the prediction, shape (N,)."""
    score: Tensor
    """What ranks the samples, higher is surer, shape (N,): the confidence, or minus entropy."""
    prediction: Tensor
    """Predicted class, shape (N,), int64."""
    targets: Tensor
    """True class, shape (N,), int64."""
    nll: Tensor
    """Negative log-likelihood of the target in nats, shape (N,), float64."""
    brier: Tensor
    """Squared error of the probabilities, summed over classes, shape (N,)."""
    num_classes: int
    """K."""

    @property
    def correct(self) -> Tensor:
        """Whether each prediction is right, shape (N,), bool."""
        return self.prediction == self.targets

    def cpu(self) -> "Predictions":
        """The same on the CPU."""
        return replace(self, **{k: v.cpu() for k, v in vars(self).items() if k != "num_classes"})


def measure(predictions: Predictions) -> dict[str, float]:
    """Every metric of `HIGHER_IS_BETTER`, as fractions (NLL in nats).

    ``auroc`` and ``fpr95`` are NaN where all predictions are right, or all wrong.
    """
    if not len(predictions.targets):
        raise ValueError("there are no samples to measure")
    confidence, score = predictions.confidence, predictions.score
    prediction, targets = predictions.prediction, predictions.targets
    correct, classes = predictions.correct, predictions.num_classes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is undefined")
        values = {
            "accuracy": multiclass_accuracy(prediction, targets, classes, average="micro"),
            "f1": multiclass_f1_score(prediction, targets, classes, average="macro"),
            "nll": predictions.nll.mean(),
            "brier": predictions.brier.double().mean(),
            "ece": selective.expected_calibration_error(confidence, correct),
            "auroc": selective.correctness_auroc(score, correct),
            "fpr95": selective.fpr_at_tpr(score, correct, 0.95),
            "aurc": selective.aurc(score, correct),
            "e_aurc": selective.e_aurc(score, correct),
            "augrc": selective.augrc(score, correct),
            "sac98": selective.coverage_at_accuracy(score, correct, 0.98),
        }
    return {name: float(value) for name, value in values.items()}


def measure_accepted(duo: Predictions, threshold: Threshold) -> dict[str, float]:
    """``coverage`` and ``selective_accuracy`` (NaN if nothing is accepted) at a threshold."""
    accepted = duo.confidence >= threshold.value
    return {
        "coverage": float(accepted.double().mean()),
        "selective_accuracy": float(duo.correct[accepted].double().mean()),
    }


class DuoMetrics(Metric):
    """Base, sidekick and duo in every form, measured on the same samples.

    All seven are one weighted sum of logits with different temperatures: ``base`` (1, 0),
    ``base_scaled`` (t, 0), ``sidekick`` (0, 1), ``sidekick_scaled`` (0, t), ``unweighted``
    (0.5, 0.5), ``duo`` (fitted) and ``uq_only`` (fitted, but predicting with the base alone).

    Each has accuracy, f1 (macro), nll (nats), brier (summed over classes), ece (15 bins), auroc (of
    correctness), fpr95, aurc, e_aurc, augrc and sac98. For ``uq_only`` nll and brier are those of
    ``duo``: both judge the probabilities, which the two share.

    Args:
        num_classes: K.
        fit: The fitted temperatures.
        score: What ranks the samples: the confidence, or the (negated) entropy of the
            probabilities. ECE is of the confidence in any case.

    Raises:
        ValueError: If the score is unknown.

    Example:
        >>> import torch
        >>> from lightning_duo import fit_temperatures
        >>> base, sidekick = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)
        >>> targets = torch.tensor([0, 1])
        >>> metrics = DuoMetrics(2, fit_temperatures(base, sidekick, targets))
        >>> metrics.update(base, sidekick, targets)
        >>> metrics.compute()["duo"]["accuracy"]
        0.5

    Source: Asymmetric Duos, Sec. 3.1 (ablations), Sec. 5 (metrics) and App. C (entropy).
    """

    full_state_update = False
    score: list[Tensor]
    confidence: list[Tensor]
    prediction: list[Tensor]
    nll: list[Tensor]
    brier: list[Tensor]
    targets: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        fit: TemperatureFit,
        *,
        score: Score = "confidence",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {get_args(Score)}, got {score!r}")
        self.num_classes, self.ranked_by = num_classes, score
        self.forms = {
            "base": Temperatures(1.0, 0.0),
            "base_scaled": fit.scaled_base,
            "sidekick": Temperatures(0.0, 1.0),
            "sidekick_scaled": fit.scaled_sidekick,
            "unweighted": UNWEIGHTED,
            "duo": fit.temperatures,
            "uq_only": fit.temperatures,
        }
        for name in ("score", "confidence", "prediction", "nll", "brier"):  # each (N, forms)
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")
        self.reset()

    @override
    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process that gets no sample must still have something to exchange with the others.
        none = torch.zeros(0, len(self.forms), device=self.device)
        self._append(none, none, none.int(), none.double(), none)
        self.targets.append(torch.zeros(0, device=self.device).long())

    @override
    def update(self, base_logits: Tensor, sidekick_logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits of both models (B, K) and true classes (B,)."""
        rows = max(1, CHUNK_LOGITS // base_logits.shape[1])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            base, sidekick = _single(base_logits[part]), _single(sidekick_logits[part])
            self._add(base, sidekick, targets[part].long())

    def _add(self, base: Tensor, sidekick: Tensor, targets: Tensor) -> None:
        parts = []
        for form, temperatures in self.forms.items():
            weights = torch.tensor(temperatures, dtype=torch.float32, device=base.device)
            head = duo_head(base, sidekick, weights, uq_only=form == "uq_only")
            assert head.probs is not None
            score = head.confidence if self.ranked_by == "confidence" else -head.entropy
            nll = _nll(base, sidekick, temperatures, targets)
            brier = selective.brier_scores(head.probs, targets).float()
            parts.append((score, head.confidence, head.prediction.int(), nll, brier))
        self._append(*(torch.stack(columns, dim=1) for columns in zip(*parts, strict=True)))
        self.targets.append(targets)

    def _append(
        self, score: Tensor, confidence: Tensor, prediction: Tensor, nll: Tensor, brier: Tensor
    ) -> None:
        """Keep 24 bytes a sample and form."""
        self.score.append(score)
        self.confidence.append(confidence)
        self.prediction.append(prediction)
        self.nll.append(nll)
        self.brier.append(brier)

    @override
    def compute(self) -> dict[str, dict[str, float]]:
        """Value of every metric of every form, e.g. ``compute()["duo"]["aurc"]``."""
        return {form: measure(predictions) for form, predictions in self._by_form().items()}

    def predictions(self) -> dict[str, Predictions]:
        """What each form says of the samples of all processes, in the order of the processes."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return {form: found.cpu() for form, found in self._by_form().items()}

    def _by_form(self) -> dict[str, Predictions]:
        score, confidence, nll = map(dim_zero_cat, (self.score, self.confidence, self.nll))
        prediction, brier = dim_zero_cat(self.prediction).long(), dim_zero_cat(self.brier)
        targets = dim_zero_cat(self.targets)
        return {
            form: Predictions(
                confidence=confidence[:, i],
                score=score[:, i],
                prediction=prediction[:, i],
                targets=targets,
                nll=nll[:, i],
                brier=brier[:, i],
                num_classes=self.num_classes,
            )
            for i, form in enumerate(self.forms)
        }


def evaluate(
    base_logits: Tensor,
    sidekick_logits: Tensor,
    targets: Tensor,
    fit: TemperatureFit,
    *,
    score: Score = "confidence",
) -> dict[str, Predictions]:
    """What base, sidekick and duo, in every form of `DuoMetrics`, say of these samples.

    Args:
        base_logits: Logits of the base, shape (N, K).
        sidekick_logits: Logits of the sidekick, shape (N, K).
        targets: True classes, shape (N,).
        fit: The temperatures.
        score: What ranks the samples; see `DuoMetrics`.

    Returns:
        Form -> predictions, for `measure`, `bootstrap` and `report.write_report`.

    Raises:
        ValueError: If samples do not fit, as in `fit_temperatures`.
    """
    check_samples(base_logits, sidekick_logits, targets)
    metrics = DuoMetrics(base_logits.shape[1], fit, score=score).to(base_logits.device)
    metrics.update(base_logits, sidekick_logits, targets.long())
    return metrics.predictions()


def _single(logits: Tensor) -> Tensor:
    """In float32; of float64 logits, whose size may hide their differences, below their largest."""
    if logits.dtype == torch.float64 and logits.numel():
        logits = logits - logits.amax(dim=1, keepdim=True)
    return logits.float()


def _nll(base: Tensor, sidekick: Tensor, temperatures: Temperatures, targets: Tensor) -> Tensor:
    """NLL of each sample in float64, so that it orders two models as the fit does."""
    masked = (base == -torch.inf) | (sidekick == -torch.inf)
    logits = temperatures.base * base.double() + temperatures.sidekick * sidekick.double()
    logits = logits.masked_fill(masked, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

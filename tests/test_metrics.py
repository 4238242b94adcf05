"""The duo's metric set against scikit-learn and torch, and the selective metrics over batches."""

import pytest
import torch
from helpers import make_logits
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from torch.nn.functional import one_hot

from lightning_duo import fit_temperatures, metrics, selective
from lightning_duo.evaluation import DuoMetrics

BASE, SIDEKICK, TARGETS = make_logits(300, 5, seed=4, margin=1.5)
FIT = fit_temperatures(BASE, SIDEKICK, TARGETS)


def test_duo_metrics_against_other_libraries() -> None:
    found = DuoMetrics(5, FIT)
    for rows in torch.arange(300).split(64):
        found.update(BASE[rows], SIDEKICK[rows], TARGETS[rows])
    results = found.compute()

    duo_weights = FIT.temperatures
    weights = {
        "base": (1.0, 0.0),
        "base_scaled": FIT.scaled_base,
        "sidekick": (0.0, 1.0),
        "sidekick_scaled": FIT.scaled_sidekick,
        "unweighted": (0.5, 0.5),
        "duo": duo_weights,
        "uq_only": duo_weights,
    }
    assert set(results) == set(weights)
    for form, (t_base, t_sidekick) in weights.items():
        probs = (t_base * BASE.double() + t_sidekick * SIDEKICK.double()).softmax(1)
        prediction = (BASE if form == "uq_only" else probs).argmax(1)
        confidence = probs.gather(1, prediction[:, None]).squeeze(1)
        correct = prediction == TARGETS
        expected = {
            "accuracy": accuracy_score(TARGETS, prediction),
            "f1": f1_score(TARGETS, prediction, average="macro"),
            "nll": log_loss(TARGETS, probs),
            "brier": float((probs - one_hot(TARGETS, 5)).square().sum(1).mean()),
            "ece": float(selective.expected_calibration_error(confidence, correct)),
            "auroc": roc_auc_score(correct, confidence),
            "fpr95": float(selective.fpr_at_tpr(confidence, correct)),
            "aurc": float(selective.aurc(confidence, correct)),
            "e_aurc": float(selective.e_aurc(confidence, correct)),
            "augrc": float(selective.augrc(confidence, correct)),
            "sac98": float(selective.coverage_at_accuracy(confidence, correct, 0.98)),
        }
        assert results[form] == pytest.approx(expected, rel=1e-5, abs=1e-6), form


def test_measured_nll_is_the_fitted_nll_and_orders_the_models() -> None:
    found = DuoMetrics(5, FIT)
    found.update(BASE, SIDEKICK, TARGETS)
    results = found.compute()
    assert results["duo"]["nll"] == pytest.approx(FIT.nll, rel=1e-12)
    assert results["base_scaled"]["nll"] == pytest.approx(FIT.nll_base, rel=1e-12)
    assert results["duo"]["nll"] <= results["base_scaled"]["nll"] <= results["base"]["nll"]


def test_reset_forgets() -> None:
    found = DuoMetrics(5, FIT)
    found.update(SIDEKICK, BASE, TARGETS)
    found.compute()
    found.reset()
    found.update(BASE, SIDEKICK, TARGETS)
    once = DuoMetrics(5, FIT)
    once.update(BASE, SIDEKICK, TARGETS)
    assert found.compute() == once.compute()


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (metrics.AURC(), selective.aurc),
        (metrics.ExcessAURC(), selective.e_aurc),
        (metrics.AUGRC(), selective.augrc),
        (metrics.CorrectnessAUROC(), selective.correctness_auroc),
        (
            metrics.SelectiveAccuracyConstraint(accuracy=0.9),
            lambda c, r: selective.coverage_at_accuracy(c, r, 0.9),
        ),
    ],
)
def test_selective_metrics_over_batches(metric: metrics.AURC, function: object) -> None:
    confidence, correct = torch.rand(100), torch.rand(100) < 0.7
    for rows in torch.arange(100).split(30):
        metric.update(confidence[rows], correct[rows])
    assert metric.compute() == function(confidence, correct)
    metric.reset()
    metric.update(confidence[:9], correct[:9])
    assert metric.compute() == function(confidence[:9], correct[:9])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="AURC expects confidence and correct of one shape"):
        metrics.AURC().update(torch.rand(3), torch.tensor([True]))
    with pytest.raises(ValueError, match="accuracy must be a fraction"):
        metrics.SelectiveAccuracyConstraint(accuracy=98)

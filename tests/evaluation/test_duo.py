"""The duo's metric set against scikit-learn, SciPy, torchmetrics and torch."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import make_logits
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import binary_calibration_error

from lightning_duo import fit_temperatures, selective
from lightning_duo.evaluation import DuoMetrics, Predictions, measure

BASE, SIDEKICK, TARGETS = make_logits(300, 5, seed=4, margin=1.5)
FIT = fit_temperatures(BASE, SIDEKICK, TARGETS)
WEIGHTS = {
    "base": (1.0, 0.0),
    "base_scaled": FIT.scaled_base,
    "sidekick": (0.0, 1.0),
    "sidekick_scaled": FIT.scaled_sidekick,
    "unweighted": (0.5, 0.5),
    "duo": FIT.temperatures,
    "uq_only": FIT.temperatures,
}


def judged(form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, predictions and their confidence in float64."""
    t_base, t_sidekick = WEIGHTS[form]
    probs = (t_base * BASE.double() + t_sidekick * SIDEKICK.double()).softmax(1)
    prediction = (BASE if form == "uq_only" else probs).argmax(1)
    return probs, prediction, probs.gather(1, prediction[:, None]).squeeze(1)


def in_batches(**options: object) -> DuoMetrics:
    found = DuoMetrics(5, FIT, **options)
    for rows in torch.arange(300).split(64):
        found.update(BASE[rows], SIDEKICK[rows], TARGETS[rows])
    return found


@pytest.mark.parametrize(
    ("options", "score_of"),
    [
        ({}, lambda probs, confidence: confidence),
        (
            {"score": "entropy"},
            lambda probs, confidence: torch.from_numpy(-scipy.stats.entropy(probs, axis=1)),
        ),
    ],
)
def test_duo_metrics_against_other_libraries(options: dict, score_of: Callable) -> None:
    results = in_batches(**options).compute()
    assert set(results) == set(WEIGHTS)
    for form, values in results.items():
        probs, prediction, confidence = judged(form)
        correct, score = prediction == TARGETS, score_of(probs, confidence)
        fpr, tpr, _ = roc_curve(correct, score, drop_intermediate=False)
        expected = {
            "accuracy": accuracy_score(TARGETS, prediction),
            "f1": f1_score(TARGETS, prediction, average="macro"),
            "nll": log_loss(TARGETS, probs),
            "brier": float((probs - one_hot(TARGETS, 5)).square().sum(1).mean()),
            "ece": float(binary_calibration_error(confidence, correct.long(), n_bins=15)),
            "auroc": roc_auc_score(correct, score),
            "fpr95": fpr[np.argmax(tpr >= 0.95)],
            "aurc": float(selective.aurc(score, correct)),
            "e_aurc": float(selective.e_aurc(score, correct)),
            "augrc": float(selective.augrc(score, correct)),
            "sac98": float(selective.coverage_at_accuracy(score, correct, 0.98)),
        }
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6), form


@pytest.mark.parametrize("score", ["confidence", "entropy"])
def test_predictions_are_what_each_form_says(score: str) -> None:
    found = in_batches(score=score).predictions()
    assert set(found) == set(WEIGHTS)
    rows = torch.arange(300)
    for form, predictions in found.items():
        probs, prediction, confidence = judged(form)
        entropy = torch.from_numpy(scipy.stats.entropy(probs, axis=1))
        expected = Predictions(
            confidence,
            confidence if score == "confidence" else -entropy,
            prediction,
            TARGETS,
            -probs[rows, TARGETS].log(),
            (probs - one_hot(TARGETS, 5)).square().sum(1),
            5,
        )
        for name, column in vars(expected).items():
            if torch.is_tensor(column):
                torch.testing.assert_close(
                    getattr(predictions, name), column, rtol=1e-5, atol=1e-6, check_dtype=False
                )
        members = {"base": ("base",), "sidekick": ("sidekick",)}.get(form.partition("_")[0])
        assert predictions.forwards == dict.fromkeys(members or ("base", "sidekick"), 1)
        assert predictions.label
        assert predictions.correct.equal(prediction == TARGETS)
        assert predictions.nll.dtype == torch.float64
        assert measure(predictions) == in_batches(score=score).compute()[form]


def test_entropy_and_confidence_differ_in_ranking_alone() -> None:
    sure, low_entropy = (in_batches(score=s).compute()["duo"] for s in ("confidence", "entropy"))
    ranked = {"auroc", "fpr95", "aurc", "e_aurc", "augrc", "sac98"}
    for metric, value in sure.items():
        assert metric in ranked or value == low_entropy[metric]
    assert all(sure[metric] != low_entropy[metric] for metric in ("auroc", "aurc", "augrc"))


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(ValueError, match=r"one of \('confidence', 'entropy'\), got 'margin'"):
        DuoMetrics(5, FIT, score="margin")


def test_measured_nll_is_the_fitted_nll_and_orders_the_models() -> None:
    found = DuoMetrics(5, FIT)
    found.update(BASE, SIDEKICK, TARGETS)
    results = found.compute()
    assert results["duo"]["nll"] == pytest.approx(FIT.nll, rel=1e-12)
    assert results["base_scaled"]["nll"] == pytest.approx(FIT.nll_base, rel=1e-12)
    assert results["duo"]["nll"] <= results["base_scaled"]["nll"] <= results["base"]["nll"]


def test_one_sided_predictions_have_no_auroc_and_no_warning(recwarn: object) -> None:
    right = DuoMetrics(5, FIT)
    right.update(20 * one_hot(TARGETS, 5), 20 * one_hot(TARGETS, 5), TARGETS)
    values = right.compute()["duo"]
    assert values["accuracy"] == values["f1"] == values["sac98"] == 1
    assert np.isnan([values["auroc"], values["fpr95"]]).all()
    assert not list(recwarn)


def test_reset_forgets() -> None:
    found = DuoMetrics(5, FIT)
    found.update(SIDEKICK, BASE, TARGETS)
    found.compute()
    found.reset()
    found.update(BASE, SIDEKICK, TARGETS)
    once = DuoMetrics(5, FIT)
    once.update(BASE, SIDEKICK, TARGETS)
    assert found.compute() == once.compute()


def test_float64_logits_may_be_far_from_zero() -> None:
    base, sidekick, targets = (x.double() for x in make_logits(300, 5, seed=0))
    targets = targets.to(torch.uint8)
    fit = fit_temperatures(base, sidekick, targets)
    near, far = DuoMetrics(5, fit), DuoMetrics(5, fit)
    near.update(base, sidekick, targets)
    far.update(base + 1e8, sidekick - 1e8, targets)
    for form, values in near.compute().items():
        assert far.compute()[form] == pytest.approx(values, rel=1e-5)


def test_no_samples_are_said() -> None:
    metrics = DuoMetrics(3, fit_temperatures(*make_logits(50, 3, seed=0)))
    with pytest.raises(ValueError, match="no samples"), pytest.warns(match="before the ``update"):
        metrics.compute()

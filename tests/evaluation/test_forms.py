"""Forms: one duo beside anything that has probabilities, a confidence and a cost."""

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import make_logits
from sklearn.metrics import f1_score, log_loss
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_duo import fit_temperatures, selective
from lightning_duo.bootstrap import bootstrap
from lightning_duo.evaluation import (
    DuoMetrics,
    Form,
    Predictions,
    Weighted,
    duo_forms,
    evaluate,
    judge,
    mean_probability,
    measure,
)

BASE, SIDEKICK, TARGETS = make_logits(300, 5, seed=4, margin=1.5)
SECOND = make_logits(300, 5, seed=9, margin=0.0)[0] + 1.5 * one_hot(TARGETS, 5)
FIT = fit_temperatures(BASE, SIDEKICK, TARGETS)
MEMBERS = {"base": BASE, "sidekick": SIDEKICK, "second": SECOND}
ENSEMBLE = Form("2 bases", {"base": 1, "second": 1}, mean_probability)


def mean_of(*logits: Tensor) -> Tensor:
    """The mean of the probabilities, in float64."""
    return torch.stack([x.double().softmax(1) for x in logits]).mean(0)


def check_says(found: Predictions, probs: Tensor, prediction: Tensor | None = None) -> None:
    """That these predictions are of these probabilities."""
    prediction = probs.argmax(1) if prediction is None else prediction
    rows = torch.arange(len(probs))
    torch.testing.assert_close(found.prediction, prediction)
    expected = {
        "confidence": probs[rows, prediction],
        "nll": -probs[rows, TARGETS].log(),
        "brier": (probs - one_hot(TARGETS, 5)).square().sum(1),
    }
    for name, column in expected.items():
        close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
        torch.testing.assert_close(getattr(found, name), column, **close)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_ensemble_predicts_the_mean_probability(count: int) -> None:
    names = ["base", "second", "sidekick"][:count]
    form = Form("some", dict.fromkeys(names, 1), mean_probability)
    found = judge(form, MEMBERS, TARGETS)
    check_says(found, mean_of(*(MEMBERS[name] for name in names)))
    assert found.score.equal(found.confidence)
    assert (found.label, found.forwards) == ("some", dict.fromkeys(names, 1))
    assert found.nll.dtype == torch.float64


def test_the_entropy_of_a_form_ranks() -> None:
    found = judge(ENSEMBLE, MEMBERS, TARGETS, score="entropy")
    entropy = torch.special.entr(mean_of(BASE, SECOND)).sum(1)
    torch.testing.assert_close(found.score.double(), -entropy, rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_of_three_members() -> None:
    form = Form("trio", {"sidekick": 1, "base": 0.4, "second": 1}, Weighted((0.5, 0.7, 0.3)))
    check_says(
        judge(form, MEMBERS, TARGETS), (0.5 * SIDEKICK + 0.7 * BASE + 0.3 * SECOND).softmax(1)
    )


@pytest.mark.parametrize(
    ("mix", "probs"),
    [
        (Weighted((0.5, 0.7)), (0.5 * BASE + 0.7 * SECOND).double().softmax(1)),
        (mean_probability, mean_of(BASE, SECOND)),
    ],
    ids=["weighted", "mean"],
)
@pytest.mark.parametrize("predicts", ["base", "second", "sidekick"])
def test_another_member_may_predict(mix: object, probs: Tensor, predicts: str) -> None:
    form = Form("UQ only", {"base": 1, "second": 1}, mix, predicts)
    check_says(judge(form, MEMBERS, TARGETS), probs, MEMBERS[predicts].argmax(1))


def test_forms_are_judged_beside_the_seven() -> None:
    alone = evaluate(BASE, SIDEKICK, TARGETS, FIT)
    found = evaluate(BASE, SIDEKICK, TARGETS, FIT, forms={"two": ENSEMBLE}, second=SECOND)
    assert list(found) == [*duo_forms(FIT), "two"]
    for name, predictions in alone.items():
        assert predictions.label == found[name].label == duo_forms(FIT)[name].label
        for column in ("confidence", "score", "prediction", "nll", "brier"):
            assert getattr(predictions, column).equal(getattr(found[name], column))
    check_says(found["two"], mean_of(BASE, SECOND))
    resampled = bootstrap(found, resamples=50)
    value, low, high = resampled.difference("two", "base", "aurc")
    assert low < value < high
    change = measure(found["two"])["aurc"] - measure(found["base"])["aurc"]
    assert value == pytest.approx(change)


def in_batches(metrics: DuoMetrics, rows: Tensor) -> DuoMetrics:
    for some in rows.split(64):
        metrics.update(BASE[some], SIDEKICK[some], TARGETS[some], second=SECOND[some])
    return metrics


def test_the_metric_takes_forms_and_their_members_in_batches() -> None:
    forms = {"two": ENSEMBLE}
    metrics = in_batches(DuoMetrics(5, FIT, forms=forms), torch.arange(300))
    whole = evaluate(BASE, SIDEKICK, TARGETS, FIT, forms=forms, second=SECOND)
    for name, found in metrics.predictions().items():
        assert (found.label, found.forwards) == (whole[name].label, whole[name].forwards)
        for column in ("confidence", "score", "prediction", "targets", "nll", "brier"):
            mine, its = getattr(found, column), getattr(whole[name], column)
            torch.testing.assert_close(mine, its)
        assert metrics.compute()[name] == pytest.approx(measure(whole[name]))


@pytest.mark.parametrize("first", [0, 37, 300])
def test_the_metric_gathers_the_samples_of_all_processes(first: int) -> None:
    forms = {"two": ENSEMBLE}
    other = in_batches(DuoMetrics(5, FIT, forms=forms), torch.arange(first, 300))
    of_other = iter([torch.cat(value) for value in other.metric_state.values()])
    mine = DuoMetrics(
        5,
        FIT,
        forms=forms,
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda part, group: [part, next(of_other)],
    )
    in_batches(mine, torch.arange(first))
    whole = in_batches(DuoMetrics(5, FIT, forms=forms), torch.arange(300))
    assert mine.compute() == whole.compute()


def test_the_metric_is_copied_whole() -> None:
    metrics = in_batches(DuoMetrics(5, FIT, forms={"two": ENSEMBLE}), torch.arange(300))
    assert pickle.loads(pickle.dumps(metrics)).compute() == metrics.compute()


def test_any_librarys_probabilities() -> None:
    probs = mean_of(BASE, SECOND)
    found = Predictions.of(probs, TARGETS.int(), label="theirs", forwards={"base": 2})
    check_says(found, probs)
    values = measure(found)
    assert values["nll"] == pytest.approx(log_loss(TARGETS, probs))
    assert values["f1"] == pytest.approx(f1_score(TARGETS, probs.argmax(1), average="macro"))
    assert found.score is found.confidence
    assert (found.label, found.forwards, found.num_classes) == ("theirs", {"base": 2}, 5)
    single = Predictions.of(probs.float(), TARGETS)
    assert {single.confidence.dtype, single.brier.dtype} == {torch.float32}
    assert single.nll.dtype == torch.float64
    beside = {**evaluate(BASE, SIDEKICK, TARGETS, FIT), "theirs": found}
    assert bootstrap(beside, resamples=10).estimates["theirs"] == values


def test_any_librarys_confidence() -> None:
    probs, prediction = BASE.softmax(1), SECOND.argmax(1)
    spread = (BASE.softmax(1) - SECOND.softmax(1)).abs().sum(1)
    found = Predictions.of(probs, TARGETS, prediction=prediction, score=-spread)
    check_says(found, probs, prediction)
    expected = float(selective.aurc(-spread, prediction == TARGETS))
    assert measure(found)["aurc"] == pytest.approx(expected, rel=1e-6)
    sure = torch.full((300,), 0.9)
    assert Predictions.of(probs, TARGETS, confidence=sure).score.equal(sure)


def test_a_target_thought_impossible_has_infinite_nll_and_no_interval() -> None:
    probs = one_hot(torch.tensor([0, 1, 1]), 2).double()
    found = Predictions.of(probs, torch.tensor([0, 1, 0]))
    assert measure(found)["nll"] == math.inf
    assert np.isnan(bootstrap({"a": found}, resamples=50).interval("a", "nll")[1:]).all()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"'2 bases' needs logits of \['second'\]; there are"):
        judge(ENSEMBLE, {"base": BASE}, TARGETS)
    with pytest.raises(ValueError, match=r"of one shape .* got \[\(300, 4\), \(300, 5\)\]"):
        judge(ENSEMBLE, {**MEMBERS, "second": SECOND[:, :4]}, TARGETS)
    with pytest.raises(ValueError, match="targets"):
        judge(ENSEMBLE, MEMBERS, TARGETS[:7])
    with pytest.raises(ValueError, match=r"mixes logits \(300, 5\) to \(300,\)"):
        judge(Form("sum", {"base": 1}, lambda x: x.sum(1)), MEMBERS, TARGETS)
    with pytest.raises(ValueError, match="1 temperatures for 2 members"):
        judge(Form("sum", {"base": 1, "second": 1}, Weighted((1.0,))), MEMBERS, TARGETS)
    broken = SECOND.clone()
    broken[[3, 9]] = math.nan
    with pytest.raises(ValueError, match="2 of 300 rows of the form '2 bases' hold NaN"):
        evaluate(BASE, SIDEKICK, TARGETS, FIT, forms={"two": ENSEMBLE}, second=broken)
    for call in (DuoMetrics, evaluate):
        arguments = (5, FIT) if call is DuoMetrics else (BASE, SIDEKICK, TARGETS, FIT)
        with pytest.raises(ValueError, match=r"are named \['duo'\] already"):
            call(*arguments, forms={"duo": ENSEMBLE})
    with pytest.raises(ValueError, match=r"confidence of shape \(300,\), got \(5,\)"):
        Predictions.of(BASE.softmax(1), TARGETS, confidence=torch.ones(5))
    with pytest.raises(ValueError, match="apply softmax"):
        Predictions.of(BASE, TARGETS)


def test_members_are_not_replaced_in_silence() -> None:
    with pytest.raises(ValueError, match=r"\['base'\] are given already"):
        evaluate(BASE, SIDEKICK, TARGETS, FIT, base=SECOND)
    with pytest.raises(ValueError, match=r"nobody.* has no members.*forwards"):
        judge(Form("nobody", {}, mean_probability), MEMBERS, TARGETS)

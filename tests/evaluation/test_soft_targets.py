"""What is measured against class probabilities, by written-out sums and other libraries."""

import math

import pytest
import torch
from helpers import INF, make_logits
from scipy.special import log_softmax, rel_entr
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lightning_duo import fit_temperatures, selective
from lightning_duo.evaluation import (
    DuoMetrics,
    Form,
    Predictions,
    evaluate,
    judge,
    mean_probability,
    measure,
)
from lightning_duo.metrics import Brier

BASE, SIDEKICK, TARGETS = make_logits(300, 5, seed=4, margin=1.5)
SOFT = 0.7 * one_hot(TARGETS, 5) + 0.3 * one_hot((TARGETS + 1) % 5, 5)
FIT = fit_temperatures(BASE, SIDEKICK, SOFT)
ALONE = Form("base", {"base": 1.0}, lambda x: x)
COLUMNS = ("confidence", "score", "prediction", "targets", "nll", "brier")


def check_judged_by(found: Predictions, probs: Tensor, q: Tensor) -> None:
    """NLL and Brier of the probabilities (N, K) under q, against PyTorch and plain sums."""
    nll = cross_entropy(probs.double().log(), q.double(), reduction="none")
    torch.testing.assert_close(found.nll, nll, rtol=1e-6, atol=1e-7)
    brier = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in zip(
        probs.tolist(), q.tolist(), strict=True)]  # fmt: skip
    torch.testing.assert_close(found.brier.double().tolist(), brier, rtol=1e-5, atol=1e-6)
    assert found.correct.equal(found.prediction == q.argmax(1))


def test_every_form_is_judged_by_the_distribution() -> None:
    found = evaluate(BASE, SIDEKICK, SOFT, FIT)
    z = FIT.temperatures.base * BASE.double() + FIT.temperatures.sidekick * SIDEKICK.double()
    check_judged_by(found["duo"], z.softmax(1), SOFT)
    check_judged_by(found["base"], BASE.double().softmax(1), SOFT)
    assert found["duo"].targets.equal(TARGETS)
    assert measure(found["duo"])["nll"] == pytest.approx(FIT.nll, rel=1e-9)
    assert measure(found["base_scaled"])["nll"] == pytest.approx(FIT.nll_base, rel=1e-9)
    hard = evaluate(BASE, SIDEKICK, TARGETS, FIT)
    for form, predictions in found.items():
        mine, other = measure(predictions), measure(hard[form])
        differing = {metric for metric, value in mine.items() if value != other[metric]}
        assert differing == {"nll", "brier"}


def test_nll_is_the_distance_to_the_distribution_and_its_entropy() -> None:
    q = BASE.double().softmax(1)
    found = Predictions.of(SIDEKICK.double().softmax(1), q)
    entropy = torch.distributions.Categorical(q).entropy()
    apart = rel_entr(q.numpy(), SIDEKICK.double().softmax(1).numpy()).sum(1)
    torch.testing.assert_close(found.nll, entropy + torch.from_numpy(apart))
    exact = Predictions.of(q, q)
    torch.testing.assert_close(exact.nll, entropy)
    assert float(exact.brier.max()) < 1e-30


def test_one_hot_targets_are_their_classes() -> None:
    hot = one_hot(TARGETS, 5).half()
    for mine, its in (
        (judge(ALONE, {"base": BASE}, hot), judge(ALONE, {"base": BASE}, TARGETS)),
        (Predictions.of(BASE.softmax(1), hot), Predictions.of(BASE.softmax(1), TARGETS)),
    ):
        for column in COLUMNS[:5]:
            assert getattr(mine, column).equal(getattr(its, column)), column
        torch.testing.assert_close(mine.brier, its.brier, rtol=1e-6, atol=1e-7)


def test_the_first_of_equal_classes_is_the_target() -> None:
    q = torch.tensor([[0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.2, 0.2, 0.6]])
    probs = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    found = Predictions.of(probs, q)
    assert found.targets.tolist() == [1, 0, 2]
    assert found.correct.tolist() == [False, True, True]
    assert judge(ALONE, {"base": probs.log()}, q).targets.tolist() == [1, 0, 2]


def test_batches_may_be_soft_or_hard() -> None:
    metrics = DuoMetrics(5, FIT)
    metrics.update(BASE[:100], SIDEKICK[:100], TARGETS[:100])
    metrics.update(BASE[100:], SIDEKICK[100:], SOFT[100:])
    mixed = torch.cat([one_hot(TARGETS[:100], 5).float(), SOFT[100:]])
    want = evaluate(BASE, SIDEKICK, mixed, FIT)
    for form, found in metrics.predictions().items():
        for column in COLUMNS:
            mine, its = getattr(found, column), getattr(want[form], column)
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


def test_masked_classes_cost_nothing_where_they_have_no_chance() -> None:
    masks = torch.zeros(300, 5, dtype=torch.bool)
    masks[torch.arange(300), (TARGETS + 2) % 5] = True
    logits = BASE.masked_fill(masks, -INF)
    found = judge(ALONE, {"base": logits}, SOFT)
    rest = log_softmax(logits.double().numpy(), axis=1)
    expected = [
        -sum(q * value for q, value in zip(*row, strict=True) if q > 0)
        for row in zip(SOFT.tolist(), rest.tolist(), strict=True)
    ]
    assert found.nll.tolist() == pytest.approx(expected, rel=1e-6)
    impossible = judge(ALONE, {"base": logits}, SOFT.roll(1, 1))
    assert impossible.nll.isposinf().all()
    certain = Predictions.of(one_hot(TARGETS, 5).double(), SOFT)
    assert measure(certain)["nll"] == math.inf


def test_brier_of_soft_targets_as_function_and_metric() -> None:
    probs = BASE.softmax(1)
    scores = selective.brier_scores(probs, 1.005 * SOFT)
    expected = (probs.double() - SOFT.double() / SOFT.double().sum(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(scores, expected)
    metric = Brier()
    metric.update(probs, SOFT)
    assert float(metric.compute()) == pytest.approx(float(expected.mean()))
    assert selective.brier_scores(probs[:0], SOFT[:0]).shape == (0,)


def test_an_ensemble_is_judged_by_the_distribution() -> None:
    forms = {"two": Form("2 bases", {"base": 1, "second": 1}, mean_probability)}
    found = evaluate(BASE, SIDEKICK, SOFT, FIT, forms=forms, second=SIDEKICK)["two"]
    check_judged_by(found, (BASE.double().softmax(1) + SIDEKICK.double().softmax(1)) / 2, SOFT)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (SOFT[:, :4], r"\(300, 4\)|no probabilities"),
        (SOFT.bool(), "bool|no probabilities"),
        (2 * SOFT, "sum (of|to) 1"),
    ],
)
def test_bad_targets_are_named(targets: Tensor, message: str) -> None:
    calls = [
        lambda: judge(ALONE, {"base": BASE}, targets),
        lambda: Predictions.of(BASE.softmax(1), targets),
        lambda: evaluate(BASE, SIDEKICK, targets, FIT),
        lambda: DuoMetrics(5, FIT).update(BASE, SIDEKICK, targets),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()

"""Selective metrics against brute force over ranks, published vectors and scikit-learn."""

import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lightning_duo import selective

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "aurc": selective.aurc,
    "e_aurc": selective.e_aurc,
    "augrc": selective.augrc,
    "sac": lambda c, r: selective.coverage_at_accuracy(c, r, 0.8),
    "accuracy_at_coverage": lambda c, r: selective.accuracy_at_coverage(c, r, 0.3),
    "ece": selective.expected_calibration_error,
    "auroc": selective.correctness_auroc,
    "fpr": lambda c, r: selective.fpr_at_tpr(c, r, 0.7),
    "curve": lambda c, r: torch.stack(selective.risk_coverage_curve(c, r)),
    "generalized_curve": lambda c, r: torch.stack(selective.generalized_risk_coverage_curve(c, r)),
}
ONE_SIDED = pytest.mark.filterwarnings("ignore:.*is undefined")
# Few distinct values, so that ties abound.
samples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.9, 1.0]), st.booleans()),
    min_size=1,
    max_size=30,
)


def split(pairs: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    confidence, correct = zip(*pairs, strict=True)
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct)


def errors_by_rank(pairs: list[tuple[float, bool]]) -> list[Fraction]:
    """Expected errors among the k surest when ties are broken at random, exactly."""
    found = []
    for k in range(1, len(pairs) + 1):
        limit = sorted((c for c, _ in pairs), reverse=True)[k - 1]
        surer = [not right for c, right in pairs if c > limit]
        tied = [not right for c, right in pairs if c == limit]
        found.append(sum(surer) + Fraction(k - len(surer), len(tied)) * sum(tied))
    return found


@given(samples)
def test_against_brute_force(pairs: list[tuple[float, bool]]) -> None:
    confidence, correct = split(pairs)
    count = len(pairs)
    errors = errors_by_rank(pairs)
    risks = [e / k for k, e in enumerate(errors, 1)]
    wrong = sum(not right for _, right in pairs)
    oracle = [Fraction(max(0, k - (count - wrong)), k) for k in range(1, count + 1)]
    area = sum((a + b) / 2 for a, b in zip([Fraction(0), *errors], errors, strict=False))

    curve = selective.risk_coverage_curve(confidence, correct)
    assert curve.risk.tolist() == pytest.approx([float(r) for r in risks])
    assert curve.coverage.tolist() == pytest.approx([k / count for k in range(1, count + 1)])
    aurc = sum(risks) / count
    assert float(selective.aurc(confidence, correct)) == pytest.approx(float(aurc))
    excess = float(aurc - sum(oracle) / count)
    assert float(selective.e_aurc(confidence, correct)) == pytest.approx(excess, abs=1e-12)
    assert float(selective.augrc(confidence, correct)) == pytest.approx(float(area / count**2))


@given(samples)
def test_generalized_curve_against_brute_force(pairs: list[tuple[float, bool]]) -> None:
    confidence, correct = split(pairs)
    curve = selective.generalized_risk_coverage_curve(confidence, correct)
    undetected = [float(e / len(pairs)) for e in errors_by_rank(pairs)]
    assert curve.risk.tolist() == pytest.approx(undetected, rel=1e-12)
    assert curve.coverage.tolist() == [k / len(pairs) for k in range(1, len(pairs) + 1)]
    assert curve.threshold.tolist() == sorted((c for c, _ in pairs), reverse=True)
    area = np.trapezoid([0, *curve.risk.tolist()], [0, *curve.coverage.tolist()])
    assert float(selective.augrc(confidence, correct)) == pytest.approx(area, rel=1e-12)


@given(samples, st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.98, 1.0]))
def test_coverage_at_accuracy_against_every_threshold(
    pairs: list[tuple[float, bool]], accuracy: float
) -> None:
    confidence, correct = split(pairs)
    best = 0.0
    for threshold in {c for c, _ in pairs}:
        accepted = [right for c, right in pairs if c >= threshold]
        if Fraction(sum(accepted), len(accepted)) >= Fraction(str(accuracy)):
            best = max(best, len(accepted) / len(pairs))
    assert float(selective.coverage_at_accuracy(confidence, correct, accuracy)) == pytest.approx(
        best
    )


@given(samples)
def test_correctness_auroc_against_scikit_learn(pairs: list[tuple[float, bool]]) -> None:
    confidence, correct = split(pairs)
    if correct.all() or not correct.any():
        with pytest.warns(UserWarning, match="undefined"):
            assert selective.correctness_auroc(confidence, correct).isnan()
    else:
        expected = roc_auc_score(correct.numpy(), confidence.numpy())
        assert float(selective.correctness_auroc(confidence, correct)) == pytest.approx(expected)


@given(samples, st.sampled_from([0.05, 0.5, 0.75, 0.8, 0.95, 1.0]))
@ONE_SIDED
def test_fpr_at_tpr_against_every_threshold(pairs: list[tuple[float, bool]], tpr: float) -> None:
    found = selective.fpr_at_tpr(*split(pairs), tpr)
    right, wrong = ([c for c, r in pairs if r == kind] for kind in (True, False))
    if not right or not wrong:
        assert found.isnan()
        return
    share = Fraction(str(tpr))
    threshold = max(t for t, _ in pairs if sum(c >= t for c in right) >= share * len(right))
    assert float(found) == sum(c >= threshold for c in wrong) / len(wrong)


@pytest.mark.parametrize("tpr", [0.3, 0.8, 0.95, 1.0])
def test_fpr_at_tpr_against_scikit_learn(tpr: float) -> None:
    confidence, correct = torch.rand(300).double(), torch.rand(300) < 0.7
    fpr, reached, _ = roc_curve(correct, confidence, drop_intermediate=False)
    expected = fpr[np.argmax(reached >= tpr - 1e-12)]
    assert float(selective.fpr_at_tpr(confidence, correct, tpr)) == pytest.approx(expected)


def test_brier_scores_against_one_hot_and_scikit_learn() -> None:
    probs, targets = torch.randn(200, 3).double().softmax(1), torch.randint(3, (200,))
    expected = ((probs.numpy() - np.eye(3)[targets]) ** 2).sum(1)
    np.testing.assert_allclose(selective.brier_scores(probs, targets), expected, rtol=1e-12)
    pair, label = probs[:, :2] / probs[:, :2].sum(1, keepdim=True), (targets == 1).long()
    summed = 2 * brier_score_loss(label, pair[:, 1])  # scikit-learn counts one of two classes
    assert float(selective.brier_scores(pair, label).mean()) == pytest.approx(summed, rel=1e-12)
    extremes = selective.brier_scores(torch.eye(2), torch.tensor([0, 0], dtype=torch.uint8))
    assert extremes.tolist() == [0, 2]
    assert selective.brier_scores(torch.zeros(0, 3), targets[:0]).shape == (0,)
    half = probs.bfloat16()
    half, exact = (selective.brier_scores(p, targets) for p in (half, half.double()))
    assert half.equal(exact)  # summed in float64


@given(samples, st.randoms())
@pytest.mark.parametrize("name", FUNCTIONS)
@ONE_SIDED
def test_order_of_the_samples_does_not_matter(name: str, pairs: list, random: object) -> None:
    before = FUNCTIONS[name](*split(pairs))
    random.shuffle(pairs)
    after = FUNCTIONS[name](*split(pairs))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("correct", "expected"),
    [  # aurc, e_aurc, augrc, coverage at 80 %, accuracy at 30 %, auroc, fpr
        ([True], (0, 0, 0, 1, 1, np.nan, np.nan)),
        ([False], (1, 0, 1 / 2, 0, 0, np.nan, np.nan)),
        ([True] * 5, (0, 0, 0, 1, 1, np.nan, np.nan)),
        ([False] * 5, (1, 0, 1 / 2, 0, 0, np.nan, np.nan)),
        ([False, True, True, True], (1 / 4, 3 / 16, 1 / 8, 0, 3 / 4, 1 / 2, 1)),
    ],
)
@ONE_SIDED
def test_degenerate_samples_all_tied(correct: list[bool], expected: tuple[float, ...]) -> None:
    names = ("aurc", "e_aurc", "augrc", "sac", "accuracy_at_coverage", "auroc", "fpr")
    confidence = torch.full((len(correct),), 0.5)
    found = [float(FUNCTIONS[name](confidence, torch.tensor(correct))) for name in names]
    assert found == pytest.approx(expected, nan_ok=True)


def test_undefined_fpr_says_why() -> None:
    with pytest.warns(UserWarning, match=r"FPR at 95 % TPR .*NaN.* 2 .*wrong"):
        selective.fpr_at_tpr(torch.tensor([0.9, 0.5]), torch.zeros(2))


def test_aurc_is_the_mean_risk_over_all_coverages() -> None:
    confidence = torch.tensor([0.6, 0.9, 0.7, 0.8])
    correct = torch.tensor([True, True, False, True])
    torch.testing.assert_close(selective.aurc(confidence, correct), torch.tensor(7 / 48))


def test_published_values() -> None:
    descending = torch.arange(8, 0, -1) / 8
    right = torch.tensor([1, 1, 0, 1, 1, 0, 1, 0])
    assert float(selective.aurc(descending, right)) == pytest.approx(0.222173, abs=1e-6)
    # Test vectors of fd-shifts (Traub et al. 2024): N = 100, every second prediction right.
    ascending, every_second = torch.linspace(0, 1, 100).double(), torch.arange(100) % 2
    assert float(selective.augrc(ascending, every_second)) == pytest.approx(0.2475)
    same = torch.full((100,), 0.3)
    assert float(selective.augrc(same, every_second)) == pytest.approx(0.25)
    assert float(selective.augrc(ascending, torch.zeros(100))) == pytest.approx(0.5)
    assert float(selective.aurc(ascending, every_second)) == pytest.approx(0.4853111257576254)


def test_the_target_accuracy_is_compared_exactly() -> None:
    confidence, correct = torch.linspace(1, 0, 50), torch.ones(50, dtype=torch.bool)
    correct[10] = False  # 49 of 50 is 98 %, not 97.99999...
    assert selective.coverage_at_accuracy(confidence, correct, 0.98) == 1
    assert selective.coverage_at_accuracy(confidence, correct, 0.981) == pytest.approx(0.2)
    assert selective.coverage_at_accuracy(-confidence, ~correct, 0.98) == 0
    third = torch.tensor([True, False, False])
    assert selective.coverage_at_accuracy(torch.tensor([0.9, 0.8, 0.7]), third, 1 / 3) == 1


def test_ece_is_torchmetrics_where_no_confidence_lies_on_an_edge() -> None:
    confidence, correct = torch.rand(500).double(), torch.rand(500) < 0.6
    expected = binary_calibration_error(confidence, correct.long(), n_bins=15)
    torch.testing.assert_close(
        selective.expected_calibration_error(confidence, correct), expected.double()
    )


def test_ece_bins_are_closed_on_the_right() -> None:
    # 1.0 shares the last bin with 0.95; 2/15 belongs to the second bin, not the third.
    assert selective.expected_calibration_error(
        torch.tensor([1.0, 0.95], dtype=torch.float64), torch.tensor([1, 0])
    ) == pytest.approx(abs(1 - 1.95) / 2)
    edge = torch.tensor([2 / 15, 0.1], dtype=torch.float64)
    assert selective.expected_calibration_error(edge, torch.tensor([0, 1])) == pytest.approx(
        abs(1 - 2 / 15 - 0.1) / 2
    )


def test_dtype_and_half_precision() -> None:
    correct = torch.tensor([True, False, True])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = selective.aurc(torch.tensor([0.9, 0.5, 0.25], dtype=dtype), correct)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(result) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_dtype_gives_what_its_values_give_in_float64(name: str, dtype: torch.dtype) -> None:
    confidence, correct = torch.rand(50).to(dtype), torch.rand(50) < 0.7
    found, exact = (FUNCTIONS[name](c, correct) for c in (confidence, confidence.double()))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("probs", "targets", "message"),
    [
        ([0.5, 0.5], [0, 1], r"probs \(N, K\)"),
        ([[0.5, 0.5]], [0.0], "integer targets"),
        ([[2.0, -1.0]], [0], "apply softmax"),
        ([[float("nan"), 1.0]], [0], "rows of probabilities"),
        ([[0.5, 0.5]], [-1], r"targets in 0\.\.1"),
    ],
)
def test_brier_scores_name_bad_input(probs: list, targets: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective.brier_scores(torch.tensor(probs), torch.tensor(targets))


@pytest.mark.parametrize("function", FUNCTIONS.values())
@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, 0.5], [True], "one shape"),
        ([], [], "N >= 1"),
        ([[0.5]], [[True]], "one shape"),
        ([0.5, float("nan")], [True, False], "NaN"),
        ([0.5], [2], "booleans"),
    ],
)
def test_bad_input_is_named(
    function: Callable, confidence: list, correct: list, message: str
) -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        function(torch.tensor(confidence), torch.tensor(correct))


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_fractions_out_of_range(value: float) -> None:
    confidence, correct = torch.tensor([0.5]), torch.tensor([True])
    with pytest.raises(ValueError, match=rf"accuracy .*\[0, 1\].* {value}"):
        selective.coverage_at_accuracy(confidence, correct, value)
    with pytest.raises(ValueError, match=rf"coverage .*\[0, 1\].* {value}"):
        selective.accuracy_at_coverage(confidence, correct, value)
    with pytest.raises(ValueError, match=rf"tpr .*\[0, 1\].* {value}"):
        selective.fpr_at_tpr(confidence, correct, value)
    with pytest.raises(ValueError, match=rf"probabilities .*\[0, 1\].* {value}"):
        selective.expected_calibration_error(torch.tensor([value]), correct)
    with pytest.raises(ValueError, match=r"coverage .*\(0, 1\].* 0"):
        selective.accuracy_at_coverage(confidence, correct, 0)
    with pytest.raises(ValueError, match=r"tpr .*\(0, 1\].* 0"):
        selective.fpr_at_tpr(confidence, correct, 0)

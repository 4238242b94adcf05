"""Thresholds against brute force, and their guarantee in simulations with a known truth."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import make_logits
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom
from torch import Tensor

from lightning_duo import Threshold, fit_temperatures, select_threshold
from lightning_duo.selective import select_thresholds
from lightning_duo.selective.threshold import binomial_tail, fewest_samples

Pairs = list[tuple[float, bool]]
NOTHING = pytest.mark.filterwarnings("ignore:no threshold reaches")
samples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.9, 1.0]), st.booleans()),
    min_size=1,
    max_size=30,
)


def split(pairs: Pairs) -> tuple[Tensor, Tensor]:
    confidence, correct = zip(*pairs, strict=True)
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct)


def drawn(count: int, levels: int, seed: int) -> Pairs:
    """Samples that are right as often as they are confident, many of them tied."""
    rng = np.random.default_rng(seed)
    confidence = np.ceil(rng.beta(4, 1, count) * levels) / levels
    return list(zip(confidence.tolist(), (rng.random(count) < confidence).tolist(), strict=True))


def exact_tail(errors: int, accepted: int, risk: Fraction) -> Fraction:
    return sum(
        math.comb(accepted, k) * risk**k * (1 - risk) ** (accepted - k) for k in range(errors + 1)
    )


def slow_thresholds(pairs: Pairs, accuracy: str, delta: float) -> float:
    """The tests in sequence as documented, one by one; the lowest accepted confidence."""
    target = Fraction(accuracy)
    values = sorted({c for c, _ in pairs}, reverse=True)
    accepted = [[right for c, right in pairs if c >= value] for value in values]

    def tail(group: int) -> float:
        return binom.cdf(accepted[group].count(False), len(accepted[group]), float(1 - target))

    fewest = 1
    while target**fewest > Fraction(delta) / 16:
        fewest += 1
    fewest, starts = min(fewest, len(pairs)), []
    for step in range(8):
        size = round(fewest * (len(pairs) / fewest) ** (step / 7))
        start = next(g for g, rights in enumerate(accepted) if len(rights) >= size)
        starts += [start] if start not in starts else []
    group = -1
    while starts and any(tail(start) <= delta / 2 / len(starts) for start in starts):
        group = starts.pop(0)
    if group < 0:
        return math.inf
    while group + 1 < len(values) and tail(group + 1) <= delta / 2:
        group += 1
    return values[group]


@given(samples, st.sampled_from(["0.1", "0.5", "0.75", "0.9", "0.98", "1.0"]))
@NOTHING
def test_without_delta_against_every_threshold(pairs: Pairs, accuracy: str) -> None:
    confidence, correct = split(pairs)
    found = select_threshold(confidence, correct, float(accuracy))
    reached = {}
    for value in {c for c, _ in pairs}:
        rights = [right for c, right in pairs if c >= value]
        if Fraction(sum(rights), len(rights)) >= Fraction(accuracy):
            reached[value] = len(rights) / len(pairs)
    if not reached:
        assert found[:2] == (math.inf, 0)
        assert math.isnan(found.accuracy_bound)
        return
    value = max(reached, key=reached.__getitem__)
    accepted = confidence >= found.value
    assert found[:2] == (value, reached[value])
    assert float(accepted.double().mean()) == pytest.approx(found.coverage, rel=1e-12)
    assert float(correct[accepted].double().mean()) == pytest.approx(
        found.accuracy_bound, rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_value_accepts_the_same_samples_in_any_dtype(dtype: torch.dtype) -> None:
    confidence, correct = split(drawn(500, 200, seed=1))
    confidence = confidence.to(dtype)
    for delta in (None, 0.1):
        found = select_threshold(confidence, correct, 0.85, delta=delta)
        accepted = confidence >= found.value
        assert int(accepted.sum()) / 500 == found.coverage > 0.5
        assert float(correct[accepted].double().mean()) >= found.accuracy_bound - 1e-12


def test_binomial_tail_against_exact_sums_and_scipy() -> None:
    for risk in (Fraction(1, 50), Fraction(1, 10), Fraction(1, 3)):
        pairs = [(errors, accepted) for accepted in (1, 7, 60, 300) for errors in range(accepted)]
        errors, accepted = torch.tensor(pairs).T
        found = binomial_tail(errors, accepted, float(risk))
        exact = [float(exact_tail(*pair, risk)) for pair in pairs]
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(exact, rel=1e-9)
        assert found.tolist() == pytest.approx(binom.cdf(errors, accepted, float(risk)), rel=1e-9)


@pytest.mark.parametrize("count", [1, 20, 49, 60, 150, 400])
@pytest.mark.parametrize("levels", [5, 30, 10**6])
@NOTHING
def test_with_delta_against_tests_one_by_one(count: int, levels: int) -> None:
    for seed in range(3):
        pairs = drawn(count, levels, seed)
        for accuracy, delta in (("0.6", 0.3), ("0.8", 0.05), ("0.85", 0.1), ("0.95", 0.2)):
            found = select_threshold(*split(pairs), float(accuracy), delta=delta)
            assert found.value == slow_thresholds(pairs, accuracy, delta)
            assert found.coverage == sum(c >= found.value for c, _ in pairs) / count
            if found.coverage:
                assert found.accuracy_bound == float(accuracy)


@given(st.integers(1, 300), st.sampled_from([4, 50, 10**6]), st.integers(0, 10**6))
@NOTHING
def test_a_guarantee_ignores_order_and_costs_coverage(count: int, levels: int, seed: int) -> None:
    confidence, correct = split(drawn(count, levels, seed))
    shuffled = torch.randperm(count)
    for accuracy in (0.5, 0.8, 0.9):
        found = [
            select_threshold(confidence, correct, accuracy, delta=delta)
            for delta in (None, 0.3, 0.01)
        ]
        again = select_threshold(confidence[shuffled], correct[shuffled], accuracy, delta=0.3)
        assert again[:2] == found[1][:2]
        assert found[0].coverage >= found[1].coverage >= found[2].coverage


def test_several_targets_are_each_what_they_are_alone() -> None:
    confidence, correct = split(drawn(500, 100, seed=2))
    targets = (0.7, 0.8, 0.85)
    for delta in (None, 0.1):
        alone = [select_threshold(confidence, correct, a, delta=delta) for a in targets]
        assert select_thresholds(confidence, correct, iter(targets), delta=delta) == alone
        assert len({found.value for found in alone}) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_thresholds(confidence, ~correct, [0.99])[0].coverage == 0


def true_accuracy(limit: float) -> float:
    """Of what is accepted from ``limit`` on, if confidence is Beta(4, 1) and calibrated."""
    return 0.8 * (1 - limit**5) / (1 - limit**4) if limit < 1 else 1.0


def violations(
    found: Iterable[Threshold], accuracy: Callable[[float], float], target: float
) -> tuple[int, float]:
    """How many thresholds miss the target on new data, and the mean coverage of all."""
    kept = list(found)
    missed = sum(accuracy(one.value) < target for one in kept if one.coverage)
    return missed, sum(one.coverage for one in kept) / len(kept)


@pytest.mark.parametrize(
    ("count", "target", "delta", "decimals", "lost"),
    [(1000, 0.9, 0.1, None, 0.15), (300, 0.85, 0.1, None, 0.27), (1000, 0.85, 0.1, 2, 0.12)],
)
def test_the_guarantee_holds_in_simulation(
    count: int, target: float, delta: float, decimals: int | None, lost: float
) -> None:
    """Of 2000 draws at most a share delta misses the target, but for Monte-Carlo error."""
    rng = np.random.default_rng(0)
    confidence = torch.from_numpy(rng.beta(4, 1, (2000, count)))
    correct = torch.from_numpy(rng.random((2000, count))) < confidence
    half = 0.0
    if decimals is not None:
        confidence, half = confidence.round(decimals=decimals), 0.5 * 10**-decimals
    limit = brentq(lambda t: true_accuracy(t) - target, 0, 0.999)
    draws = list(zip(confidence, correct, strict=True))

    def simulate(delta: float | None) -> tuple[int, float]:
        found = (select_thresholds(c, r, [target], delta=delta)[0] for c, r in draws)
        return violations(found, lambda value: true_accuracy(value - half), target)

    missed, coverage = simulate(delta)
    assert missed <= binom.ppf(0.999, 2000, delta)
    assert 1 - limit**4 - lost < coverage < 1 - limit**4
    assert simulate(None)[0] > 0.3 * 2000  # so a broken guarantee would be seen


@pytest.mark.parametrize("levels", [20, 10**6])
def test_the_guarantee_holds_where_every_threshold_just_misses(levels: int) -> None:
    rng = np.random.default_rng(0)
    confidence = torch.from_numpy(rng.integers(levels, size=(2000, 300)) / levels)
    correct = torch.from_numpy(rng.random((2000, 300)) < 0.9 - 1e-9)
    accepted = {
        delta: sum(
            select_thresholds(*draw, [0.9], delta=delta)[0].coverage > 0
            for draw in zip(confidence, correct, strict=True)
        )
        for delta in (0.1, None)
    }
    assert accepted[0.1] <= binom.ppf(0.999, 2000, 0.1)
    assert accepted[None] > 0.8 * 2000


def test_a_small_part_that_can_be_accepted_is_found() -> None:
    confidence = torch.from_numpy(np.random.default_rng(0).random(50_000))
    right = torch.where(confidence > 0.88, 0.97, 0.8)  # accuracy 0.95 down to coverage 0.136
    correct = torch.from_numpy(np.random.default_rng(1).random(50_000)) < right
    (found,) = select_thresholds(confidence, correct, [0.95], delta=0.05)
    assert 0.12 < found.coverage < 0.136


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Thousands of small operations, which waiting for a second thread only slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_the_guarantee_survives_temperatures_fitted_on_the_same_samples() -> None:
    def judged(base: Tensor, sidekick: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = fit.temperatures.base * base + fit.temperatures.sidekick * sidekick
        confidence, prediction = logits.softmax(1).max(1)
        return confidence, prediction == targets

    fresh = make_logits(100_000, 4, seed=10**6, margin=1.5)
    missed, coverage = {0.1: 0, None: 0}, {0.1: 0.0, None: 0.0}
    for seed in range(200):
        data = make_logits(1000, 4, seed=seed, margin=1.5)
        fit = fit_temperatures(*data)
        confidence, correct = judged(*fresh)
        for delta in missed:
            (found,) = select_thresholds(*judged(*data), [0.85], delta=delta)
            accepted = confidence >= found.value
            missed[delta] += bool(correct[accepted].double().mean() < 0.85)
            coverage[delta] += found.coverage / 200
    (oracle,) = select_thresholds(confidence, correct, [0.85])
    assert missed[0.1] <= binom.ppf(0.999, 200, 0.1)
    assert oracle.coverage - 0.15 < coverage[0.1] < oracle.coverage
    assert missed[None] > 0.3 * 200


@pytest.mark.parametrize(
    ("accuracy", "delta", "message"),
    [
        (0, None, r"accuracy .*\(0, 1\].* 0"),
        (1.2, None, r"accuracy .*\[0, 1\].* 1\.2"),
        (math.nan, None, r"accuracy .*\[0, 1\].* nan"),
        (0.9, 0, r"delta .*\(0, 1\).* 0\b"),
        (0.9, 1, r"delta .*\(0, 1\).* 1 "),
        (0.9, -1, r"delta .*\(0, 1\).* -1\b"),
        (1, 0.1, r"accuracy of 1\b.*delta"),
    ],
)
def test_impossible_targets_are_named(accuracy: float, delta: float | None, message: str) -> None:
    confidence, correct = split(drawn(50, 10, seed=0))
    with pytest.raises(ValueError, match=message):
        select_threshold(confidence, correct, accuracy, delta=delta)
    with pytest.raises(ValueError, match=message):
        select_thresholds(confidence, correct, [0.5, accuracy], delta=delta)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, 0.5], [True], "one shape"),
        ([], [], "N >= 1"),
        ([0.5, math.nan], [True, True], "NaN"),
        ([0.5], [3], "booleans"),
    ],
)
def test_bad_samples_are_named(confidence: list, correct: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_threshold(torch.tensor(confidence), torch.tensor(correct), 0.9)


def test_nothing_accepted_says_why_and_how_many_samples_it_takes() -> None:
    confidence = torch.linspace(0, 1, 28)
    with pytest.warns(UserWarning, match=r"0\.9 on 28 samples.*lower the target"):
        select_threshold(confidence, confidence < 0, 0.9)
    with pytest.warns(
        UserWarning, match=r"0\.9 on 28 samples.*probability 0\.9.*at least 29 samples"
    ):
        select_threshold(confidence, confidence >= 0, 0.9, delta=0.1)
    assert fewest_samples(0.9, 0.1) == 29  # 0.9 ** 28 > 0.1 / 2 > 0.9 ** 29
    enough = torch.linspace(0, 1, 29)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = select_threshold(enough, enough >= 0, 0.9, delta=0.1)
    assert found == Threshold(0.0, 1.0, 0.9)
    with pytest.warns(UserWarning, match=r"0\.9 on 29 samples.*delta.*more samples"):
        select_threshold(enough, enough > 0.2, 0.9, delta=0.1)


@pytest.mark.parametrize(("target", "bound"), [(1e-10, 0), (1 - 1e-10, 1)])
def test_targets_too_near_to_0_and_1_are_named(target: float, bound: int) -> None:
    confidence, correct = torch.rand(100), torch.ones(100, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"accuracy {target} .*{bound}:"):
        select_threshold(confidence, correct, target, delta=0.05)

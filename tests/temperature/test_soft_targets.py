"""Fits to class probabilities against SciPy on the same loss, and against fits to classes."""

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import INF, make_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_duo import fit_temperatures
from lightning_duo.tasks import Labels

Case = tuple[Tensor, Tensor, Tensor]
A, B, Y = make_logits(600, 6, seed=6)
HARD = one_hot(Y, 6).float()
OTHER = HARD.roll(1, 0)
ANNOTATORS = torch.distributions.Multinomial(5, logits=2 * A.double())
EQUAL = torch.full((600, 6), 1 / 6)


def smoothed(share: float) -> Tensor:
    return (1 - share) * HARD + share / 6


def votes() -> Tensor:
    torch.manual_seed(0)
    return ANNOTATORS.sample() / 5


def masked() -> Case:
    """Two classes that cannot be, other ones in each half; nor has the target any of them."""
    masks = torch.zeros(600, 6, dtype=torch.bool)
    masks[:300, 0], masks[300:, 4] = True, True
    q = smoothed(0.3).masked_fill(masks, 0.0)
    return A.masked_fill(masks, -INF), B.masked_fill(masks, -INF), q / q.sum(1, keepdim=True)


CASES: dict[str, Callable[[], Case]] = {
    "smoothed": lambda: (A, B, smoothed(0.1)),
    "hardly smoothed": lambda: (A, B, smoothed(1e-5)),
    "mixed": lambda: (A, B, 0.7 * HARD + 0.3 * OTHER),
    "votes": lambda: (A, B, votes()),
    "some are one class": lambda: (A, B, torch.where(Y[:, None] < 3, HARD, smoothed(0.4))),
    "the sidekick's probabilities": lambda: (A, B, B.softmax(1)),
    "sure models": lambda: (A + 20 * HARD, B + 20 * HARD, smoothed(0.2)),
    "useless sidekick": lambda: (A, -B, smoothed(0.1)),
    "constant sidekick": lambda: (A, torch.full_like(A, 3.0), smoothed(0.1)),
    "identical models": lambda: (A, A.clone(), votes()),
    "equal": lambda: (A, B, EQUAL),
    "offsets by row": lambda: (A.double() + 1e6 * A.double()[:, :1], B - 1e3, votes()),
    "scales": lambda: (1e4 * A, 1e-4 * B, votes()),
    "one sample": lambda: (A[:1], B[:1], smoothed(0.1)[:1]),
    "two classes": lambda: (A[:, :2], B[:, :2], votes()[:, :1] * torch.tensor([[1.0, -1.0]])
                            + torch.tensor([[0.0, 1.0]])),
    "half precision": lambda: (A.half(), B.bfloat16(), smoothed(0.1).bfloat16()),
    "masked": masked,
}  # fmt: skip


def nll_of(base: Tensor, sidekick: Tensor, targets: Tensor) -> Callable:
    """(T_base, T_sidekick) -> NLL and its slopes, in numpy float64."""
    hidden = (base == -INF).numpy()
    a, b = (np.where(hidden, 0.0, x.double().numpy()) for x in (base, sidekick))
    q = targets.double().numpy()
    q = q / q.sum(1, keepdims=True)
    a, b = (m - (q * m).sum(1, keepdims=True) for m in (a, b))

    def nll(t: tuple[float, float]) -> tuple[float, np.ndarray]:
        z = np.where(hidden, -np.inf, t[0] * a + t[1] * b)
        top = z.max(1, keepdims=True)
        e = np.exp(z - top)
        total = e.sum(1, keepdims=True)
        slopes = [(e / total * m).sum(1).mean() for m in (a, b)]
        return float((np.log(total) + top).mean()), np.array(slopes)

    return nll


def scipy_optimum(*case: Tensor) -> float:
    """Lowest NLL on T >= 0, over temperatures in units of the logits' own scale."""
    nll, scales = nll_of(*case), [float(x[x > -INF].double().std()) or 1.0 for x in case[:2]]
    scales = [scale if math.isfinite(scale) else 1.0 for scale in scales]

    def scaled(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, slopes = nll(u / scales)
        return value, slopes / scales

    options = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 1000}
    bounds = [(0, 1e5)] * 2
    return min(
        minimize(scaled, x, jac=True, bounds=bounds, method="L-BFGS-B", options=options).fun
        for x in ([1.0, 1.0], [0.05, 0.05], [5.0, 0.5])
    )


@pytest.mark.parametrize("name", CASES)
def test_fit_reaches_the_scipy_optimum(name: str) -> None:
    case = CASES[name]()
    fit = fit_temperatures(*case)
    nll = nll_of(*case)
    assert fit.status == "converged"
    assert fit.nll == pytest.approx(nll(fit.temperatures)[0], abs=1e-9)
    assert fit.nll <= scipy_optimum(*case) + 1e-7
    zero = torch.zeros_like(case[0]).masked_fill(case[0] == -INF, -INF)
    assert fit.nll_base <= scipy_optimum(case[0], zero, case[2]) + 1e-7
    assert fit.nll <= min(fit.nll_base, fit.nll_sidekick)


def test_edge_cases_have_the_promised_temperatures() -> None:
    def temperatures(name: str) -> tuple[float, float]:
        return fit_temperatures(*CASES[name]()).temperatures

    assert temperatures("useless sidekick").sidekick == 0
    assert temperatures("constant sidekick").sidekick == 0
    same = temperatures("identical models")
    assert same.base == pytest.approx(same.sidekick, rel=1e-6)
    assert temperatures("the sidekick's probabilities") == pytest.approx((0, 1), abs=1e-4)
    equal = fit_temperatures(A, B, EQUAL)
    # Nothing is as good as to know nothing.
    assert equal.nll == pytest.approx(math.log(6), abs=1e-12)
    assert equal.temperatures == pytest.approx((0, 0), abs=1e-4)


@pytest.mark.parametrize("size", [600, 2**18])  # in float64, in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_one_hot_targets_are_their_classes(size: int, dtype: torch.dtype) -> None:
    rows = torch.arange(size) % 600
    a, b, y = A[rows], B[rows], Y[rows]
    assert fit_temperatures(a, b, HARD[rows].to(dtype)) == fit_temperatures(a, b, y)


def test_only_one_hot_targets_can_be_separated() -> None:
    sure = 5 * HARD + 0.1 * A
    assert fit_temperatures(sure, sure, HARD).status == "separable"
    fit = fit_temperatures(sure, sure, smoothed(0.01))
    assert fit.status == "converged"
    entropy = float(torch.distributions.Categorical(smoothed(0.01).double()).entropy().mean())
    assert entropy < fit.nll < entropy + 0.1


def test_sums_near_one_are_taken_as_one() -> None:
    scale = torch.linspace(0.991, 1.009, 600)[:, None]
    want = fit_temperatures(A, B, smoothed(0.2).double())
    found = fit_temperatures(A, B, scale * smoothed(0.2).double())
    assert found.temperatures == pytest.approx(want.temperatures, rel=1e-9)
    assert found.nll == pytest.approx(want.nll, rel=1e-12)


def test_many_logits_are_fitted_in_float32() -> None:
    rows = torch.arange(2**18) % 600
    want = fit_temperatures(A, B, votes())
    found = fit_temperatures(A[rows], B[rows], votes()[rows])
    nll = nll_of(A[rows], B[rows], votes()[rows])
    exact = fit_temperatures(A[rows].double(), B[rows], votes()[rows])
    assert found != exact
    assert nll(found.temperatures)[0] <= exact.nll + 2e-7
    assert found.nll == pytest.approx(want.nll, abs=1e-3)
    far = fit_temperatures(A[rows] + 1e3, B[rows] - 1e3, votes()[rows])
    assert far.nll == pytest.approx(found.nll, abs=2e-6)


def test_the_mean_over_copies_with_each_class_is_that_of_the_shares() -> None:
    """A row of two equal halves is half a row of either class."""
    twice = [torch.cat([x, x]) for x in (A, B)]
    both = fit_temperatures(*twice, torch.cat([Y, (Y + 1) % 6]))
    found = fit_temperatures(A, B, 0.5 * HARD + 0.5 * one_hot((Y + 1) % 6, 6))
    assert found.temperatures == pytest.approx(both.temperatures, rel=1e-6)
    assert found.nll == pytest.approx(both.nll, abs=1e-12)


@pytest.mark.parametrize("kinds", ["soft", "soft and hard"])
def test_processes_together_fit_what_one_would(kinds: str) -> None:
    """Uneven parts, one of them empty and so of no kind, as threads around a barrier."""
    parts = [slice(0, 500), slice(500, 600), slice(0, 0)]
    soft, hard = smoothed(0.1), Y
    given_targets = [soft[:500], hard[500:] if "hard" in kinds else soft[500:], hard[:0]]
    barrier = threading.Barrier(3, timeout=60)
    board: dict[int, Tensor] = {}
    found: dict[int, object] = {}

    def work(rank: int) -> None:
        def reduce(sums: Tensor) -> Tensor:
            board[rank] = sums
            barrier.wait()
            total = board[0] + board[1] + board[2]
            barrier.wait()
            return total

        part = parts[rank]
        found[rank] = fit_temperatures(A[part], B[part], given_targets[rank], reduce=reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found[0] == found[1] == found[2]
    together = torch.cat([soft[:500], HARD[500:] if "hard" in kinds else soft[500:]])
    alone = fit_temperatures(A, B, together)
    assert found[0].temperatures == pytest.approx(alone.temperatures, rel=1e-6)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 60),
    classes=st.integers(2, 12),
    margins=st.tuples(st.floats(-1, 6), st.floats(-1, 6)),
    scales=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    sharpness=st.floats(0, 6),
)
def test_fit_is_the_optimum_of_any_targets(
    seed: int,
    count: int,
    classes: int,
    margins: tuple[float, float],
    scales: tuple[float, float],
    sharpness: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = (sharpness * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(
        1
    )
    models = [
        (torch.randn(count, classes, generator=generator) + margin * q.float()) * 10**scale
        for margin, scale in zip(margins, scales, strict=True)
    ]
    fit = fit_temperatures(*models, q)
    assert fit.nll <= min(fit.nll_base, fit.nll_sidekick)
    assert fit.nll == pytest.approx(nll_of(*models, q)(fit.temperatures)[0], abs=1e-9)
    assert fit.nll <= scipy_optimum(*models, q) + 1e-6


def test_finite_masks_count_as_masks() -> None:
    base, sidekick, q = masked()
    far = [x.masked_fill(x == -INF, number) for x, number in ((base, -1e9), (sidekick, -1e8))]
    assert fit_temperatures(*far, q) == fit_temperatures(base, sidekick, q)
    with pytest.warns(UserWarning, match=r"-1e9.* targets too.*-inf"):
        fit_temperatures(*far, smoothed(0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[:, :5], r"class probabilities .*\(600, 6\).*float32 of shape \(600, 5\)"),
        (lambda q: q[:300], r"\(600, 6\).*\(300, 6\)"),
        (lambda q: q > 0.5, r"torch\.bool of shape \(600, 6\)"),
        (lambda q: 100 * q, "600 of 600 .*no probabilities.*sum of 1"),
        (lambda q: q.index_fill(0, torch.tensor([4]), 0.5), r"1 of 600 .*probabilities.*\[4\]"),
        (lambda q: q.index_fill(0, torch.tensor([4]), math.nan), r"1 of 600 .*\[4\]"),
        (lambda q: torch.cat([q[:, :4], q[:, 4:] + torch.tensor([-1.0, 1.0])], 1), "600 of 600"),
    ],
)
def test_bad_targets_are_named(change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperatures(A, B, change(smoothed(0.1)))


def test_a_chance_of_a_masked_class_is_an_error() -> None:
    base, sidekick, q = masked()
    q[7] = smoothed(0.3)[7]
    with pytest.raises(ValueError, match=r"1 of 600 .*target .*-inf.*\[7\]"):
        fit_temperatures(base, sidekick, q)


def test_rows_of_labels_are_the_remedy_for_multi_label_targets() -> None:
    labels = HARD.long() | OTHER.long()
    with pytest.raises(ValueError, match=r"multi-label .*tasks\.Labels\(\)\.rows"):
        fit_temperatures(A, B, labels)
    base, sidekick = (Labels().rows(x, labels) for x in (A, B))
    fit = fit_temperatures(base.logits, sidekick.logits, base.targets)
    assert fit.status == "converged"

"""fit_temperatures against scipy on the same problem, and against its own promises."""

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import make_logits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lightning_duo import Temperatures, fit_temperatures
from lightning_duo.temperature import fit as temperature

Case = tuple[Tensor, Tensor, Tensor]
A, B, Y = make_logits(1500, 10, seed=6)
TRUE = one_hot(Y, 10).float()


def many(base: Tensor, sidekick: Tensor, targets: Tensor) -> Case:
    """The same samples so often that there are over 2^20 logits, which are fitted in float32."""
    times = 2**20 // base.numel() + 1
    return base.repeat(times, 1), sidekick.repeat(times, 1), targets.repeat(times)


def few(*case: Tensor) -> Case:
    return case


def few_wrong(classes: int, margin: float) -> Case:
    """A strong model beside a few confident mistakes."""
    a, b, y = make_logits(3000, classes, seed=8, margin=margin)
    a = 5 * a
    y = y.clone()
    y[:30] = (y[:30] + 1) % classes
    return a, b, y


def heavy_tailed() -> Case:
    a, b, y = make_logits(5000, 100, seed=12, margin=3.0)
    scale = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)).mul(2).exp()
    return 4 * a * scale, 2 * b * scale, y


def ties_with_the_target() -> Case:
    logits = 4 * TRUE
    logits[:300] += 4 * one_hot((Y[:300] + 1) % 10, 10)
    return logits, logits.clone(), Y


def masked() -> Case:
    a, b = A.clone(), B.clone()
    a[:, 3] = b[:, 3] = -torch.inf
    return a, b, torch.where(Y == 3, 4, Y)


CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: (A, B, Y),
    "two classes": lambda: make_logits(2000, 2, seed=1, margin=1.5),
    "1000 classes": lambda: make_logits(1000, 1000, seed=2, margin=5.0),
    "99.99 % accurate": lambda: make_logits(20000, 10, seed=14, margin=6.5),
    "scale 1e4": lambda: (1e4 * A, 1e4 * B, Y),
    "scale 1e-4": lambda: (1e-4 * A, 1e-4 * B, Y),
    "scales 1e4 and 1e-4": lambda: (1e4 * A, 1e-4 * B, Y),
    "offset 1e4": lambda: (A.double() + 1e4, B.double() - 1e4, Y),
    "offsets by row": lambda: (A.double() + 1e4 * A.double()[:, :1], B, Y),
    "useless sidekick": lambda: (A, torch.randn(A.shape, generator=torch.Generator()), Y),
    "anti-correlated sidekick": lambda: (A, -B, Y),
    "both anti-correlated": lambda: (-A, -B, Y),
    "opposite models": lambda: (A, -A, Y),
    "identical models": lambda: (A, A.clone(), Y),
    "collinear models": lambda: (A, 2 * A, Y),
    "constant sidekick": lambda: (A, torch.full_like(A, 3.0), Y),
    "constant base": lambda: (torch.ones_like(A), B, Y),
    "both constant": lambda: (torch.ones_like(A), torch.zeros_like(B), Y),
    "separable": lambda: (5 * TRUE + 0.1 * A, B, Y),
    "separable by the sidekick": lambda: (A, 20 * TRUE, Y),
    "separable only together": lambda: (
        TRUE * (torch.arange(1500) < 700)[:, None],
        TRUE * (torch.arange(1500) >= 700)[:, None],
        Y,
    ),
    "one sample": lambda: (A[:1], B[:1], Y[:1]),
    "two samples": lambda: (A[:2], B[:2], Y[:2]),
    "a missing class": lambda: (A[Y != 3], B[Y != 3], Y[Y != 3]),
    "float16 and bfloat16": lambda: (A.half(), B.bfloat16(), Y),
    "int32 targets": lambda: (A, B, Y.int()),
    "a single class": lambda: (A[:, :1], B[:, :1], torch.zeros_like(Y)),
    "confident mistakes": lambda: few_wrong(10, 4.0),
    "confident mistakes, 100 classes": lambda: few_wrong(100, 8.0),
    "heavy tails": heavy_tailed,
    "ties with the target": ties_with_the_target,
    "masked class": masked,
}


def reference_nll(base: Tensor, sidekick: Tensor, targets: Tensor, t: tuple[float, float]) -> float:
    a, b = base.double(), sidekick.double()
    z = (t[0] * a + t[1] * b).masked_fill(a == -torch.inf, -torch.inf)
    return float(cross_entropy(z, targets.long()))


def scipy_optimum(base: Tensor, sidekick: Tensor, targets: Tensor, start: Temperatures) -> float:
    """Lowest NLL that L-BFGS-B finds on T >= 0 from several starts, in numpy float64.

    Up to 1e5 times the logits' scale: temperatures beyond that make a difference of what was
    rounded in the logits, and break ties.
    """
    keep = ~(base == -torch.inf).any(0)
    rows = np.arange(len(targets))
    y = (keep.cumsum(0) - 1)[targets.long()].numpy()
    models = [m[:, keep].double().numpy() for m in (base, sidekick)]
    models = [m - m[rows, y][:, None] for m in models]
    scales = [float(m.std()) or 1.0 for m in models]

    def nll(u: np.ndarray) -> tuple[float, np.ndarray]:
        z = sum(v / s * m for v, s, m in zip(u, scales, models, strict=True))
        top = z.max(1, keepdims=True)
        e = np.exp(z - top)
        total = e.sum(1, keepdims=True)
        p = e / total
        slopes = [(p * m).sum(1).mean() / s for s, m in zip(scales, models, strict=True)]
        return float((top + np.log(total)).mean()), np.array(slopes)

    starts = [
        [1.0, 1.0],
        [0.05, 0.05],
        [5.0, 0.5],
        [t * s for t, s in zip(start, scales, strict=True)],
    ]
    options = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 1000}
    return min(
        minimize(nll, x, jac=True, bounds=[(0, 1e5)] * 2, method="L-BFGS-B", options=options).fun
        for x in starts
    )


@pytest.mark.parametrize("name", CASES)
def test_fit_reaches_the_scipy_optimum_in_at_most_12_passes(name: str) -> None:
    base, sidekick, targets = CASES[name]()
    fit = fit_temperatures(base, sidekick, targets)

    assert all(math.isfinite(t) and t >= 0 for t in fit.temperatures)
    assert fit.nll == pytest.approx(
        reference_nll(base, sidekick, targets, fit.temperatures), abs=1e-9
    )
    assert fit.nll <= scipy_optimum(base, sidekick, targets, fit.temperatures) + 1e-6
    assert fit.passes <= 12
    assert fit.nll <= fit.nll_base
    assert fit.nll <= fit.nll_sidekick
    alone = reference_nll(base, sidekick, targets, fit.scaled_base)
    assert fit.nll_base == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(
    "name", ["useless sidekick", "anti-correlated sidekick", "identical models"]
)
def test_base_alone_is_scaled_to_its_own_optimum(name: str) -> None:
    base, sidekick, targets = CASES[name]()
    fit = fit_temperatures(base, sidekick, targets)
    zero = torch.zeros_like(base)
    assert fit.scaled_base.sidekick == 0
    assert fit.nll_base <= scipy_optimum(base, zero, targets, fit.scaled_base) + 1e-6


def test_edge_cases_have_the_promised_temperatures() -> None:
    def fit(name: str) -> temperature.TemperatureFit:
        return fit_temperatures(*CASES[name]())

    assert fit("anti-correlated sidekick").temperatures.sidekick == 0
    assert fit("constant sidekick").temperatures.sidekick == 0
    assert fit("constant base").temperatures.base == 0
    assert fit("both constant").temperatures == (0, 0)
    assert fit("both anti-correlated").temperatures == (0, 0)
    same = fit("identical models").temperatures
    assert same.base == pytest.approx(same.sidekick, rel=1e-6)
    assert same.base > 0
    collinear = fit("collinear models").temperatures
    assert collinear.base == pytest.approx(2 * collinear.sidekick, rel=1e-6)
    together = fit("separable only together")
    assert together.status == "separable"
    assert min(together.temperatures) > 0
    assert fit("separable").nll < 1e-6
    assert fit("plain").status == "converged"


def test_temperatures_follow_the_scale_of_the_logits() -> None:
    plain, scaled = fit_temperatures(A, B, Y), fit_temperatures(100 * A, B / 100, Y)
    assert scaled.temperatures.base == pytest.approx(plain.temperatures.base / 100, rel=1e-5)
    assert scaled.temperatures.sidekick == pytest.approx(
        plain.temperatures.sidekick * 100, rel=1e-5
    )


def test_a_masked_class_is_as_if_it_did_not_exist() -> None:
    base, sidekick, targets = masked()
    keep = [k for k in range(10) if k != 3]
    without = fit_temperatures(base[:, keep], sidekick[:, keep], targets - (targets > 3).long())
    fit = fit_temperatures(base, sidekick, targets)
    assert fit.temperatures == pytest.approx(without.temperatures, rel=1e-9)


def test_chunks_do_not_matter() -> None:
    """Megabytes of logits are worked on one after the other."""
    whole, parts = fit_temperatures(A, B, Y), fit_temperatures(*many(A.double(), B.double(), Y))
    assert parts.temperatures == pytest.approx(whole.temperatures, rel=1e-6)


def test_a_subsample_only_shortens_the_way() -> None:
    base, sidekick, targets = make_logits(40000, 10, seed=3)
    fit = fit_temperatures(base, sidekick, targets)
    assert fit.passes <= 4
    assert fit.nll <= scipy_optimum(base, sidekick, targets, fit.temperatures) + 1e-9


@pytest.mark.parametrize("masks", ["none", "in one process", "unlike in one process"])
@pytest.mark.filterwarnings("ignore:logits are far below")
def test_processes_together_fit_what_one_would(masks: str) -> None:
    """Three processes with uneven parts, one of them empty, as threads around a barrier."""
    parts = [slice(0, 1000), slice(1000, 1500), slice(0, 0)]
    a, b = A.clone(), B.clone()
    if masks != "none":
        wrong = TRUE[:1000].roll(1, 1).bool()
        a[:1000][wrong], b[:1000][wrong] = -1e9, -1e9
    if masks == "unlike in one process":
        a[1200, (Y[1200] + 2) % 5] = -1e9
    barrier = threading.Barrier(len(parts), timeout=60)
    board: dict[int, Tensor] = {}
    found: dict[int, temperature.TemperatureFit] = {}

    def work(rank: int) -> None:
        def reduce(sums: Tensor) -> Tensor:
            board[rank] = sums
            barrier.wait()
            total = sum(board[r] for r in range(len(parts)))
            barrier.wait()
            return total

        part = parts[rank]
        found[rank] = fit_temperatures(a[part], b[part], Y[part], reduce=reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found[0] == found[1] == found[2]
    alone = fit_temperatures(a, b, Y)
    assert found[0].temperatures == pytest.approx(alone.temperatures, rel=1e-6)


@settings(max_examples=60)
@example(seed=4201660, count=28, classes=10, margins=(0, 3), scales=(0, -0.5), rounded=True)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 60),
    classes=st.integers(2, 12),
    margins=st.tuples(st.floats(-1, 6), st.floats(-1, 6)),
    scales=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    rounded=st.booleans(),
)
def test_fit_is_never_worse_than_either_model_alone(
    seed: int,
    count: int,
    classes: int,
    margins: tuple[float, float],
    scales: tuple[float, float],
    rounded: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    models = []
    for margin, scale in zip(margins, scales, strict=True):
        logits = torch.randn(count, classes, generator=generator)
        logits[torch.arange(count), targets] += margin
        models.append((logits.double().round() if rounded else logits) * 10**scale)
    fit = fit_temperatures(*models, targets)
    assert fit.nll <= min(fit.nll_base, fit.nll_sidekick)
    assert fit.passes <= 12
    assert fit.nll <= scipy_optimum(*models, targets, fit.temperatures) + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, y: (a, b[:, :5], y), r"\(N, K\).*\(1500, 10\) and \(1500, 5\)"),
        (lambda a, b, y: (a.numpy(), b, y), r"torch\.from_numpy.*ndarray, Tensor, Tensor"),
        (lambda a, b, y: (a.long(), b, y), r"floating-point.*int64 and torch\.float32"),
        (lambda a, b, y: (a, b, y[:3]), r"targets .*\(1500,\).*\(3,\)"),
        (lambda a, b, y: (a, b, one_hot(y, 10)), r"int64 .*\(1500, 10\).*multi-label"),
        (lambda a, b, y: (a, b, y.float()), r"integer targets.*float32"),
        (lambda a, b, y: (a, b, y + 1), r"\d+ of 1500 .*targets .*0\.\.9"),
        (lambda a, b, y: (a, b, y - 1), r"\d+ of 1500 .*targets .*0\.\.9"),
        (
            lambda a, b, y: (a.where(y[:, None] != 4, torch.nan), b, y),
            r"1500 .*NaN .*base logits",
        ),
        (lambda a, b, y: (a, b.where(y[:, None] != 4, torch.inf), y), r"\+inf sidekick logits"),
        (
            lambda a, b, y: (a, b.where(torch.arange(10) != 4, -torch.inf), y),
            "1500 of 1500 .*-inf .*one model",
        ),
        (lambda a, b, y: (a[:0], b[:0], y[:0]), "at least one sample"),
        (lambda a, b, y: (a[:, :0], b[:, :0], y), r"\(N, K\).*\(1500, 0\)"),
    ],
)
def test_bad_input_is_named(change: Callable[..., Case], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperatures(*change(A, B, Y))


def test_a_masked_target_is_an_error() -> None:
    base, sidekick, targets = masked()
    targets[5] = 3
    with pytest.raises(ValueError, match=r"1 of 1500 .*target .*-inf.*\[5\]"):
        fit_temperatures(base, sidekick, targets)


SINGLE_CASES = {
    "plain": (A, B, Y),
    "heavy-tailed": heavy_tailed(),
    "few wrong": few_wrong(10, 4.0),
    "offsets": (A + 1e3, B - 1e3, Y),
    "scales": (A * 1e4, B * 1e-4, Y),
    "half precision": (A.bfloat16(), B.half(), Y),
    "masked": (A.masked_fill(TRUE.roll(1, 1).bool(), -torch.inf),
               B.masked_fill(TRUE.roll(1, 1).bool(), -torch.inf), Y),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE_CASES)
def test_many_logits_are_fitted_in_float32(name: str) -> None:
    case = SINGLE_CASES[name]
    want, found = fit_temperatures(*case), fit_temperatures(*many(*case))
    base, sidekick, targets = many(*case)
    assert found != fit_temperatures(base.double(), sidekick.double(), targets)
    assert found.status == want.status
    at = [scipy_nll(*case, t) for t in (found.temperatures, want.temperatures)]
    assert at[0] <= at[1] + 2e-7
    assert found.nll == pytest.approx(at[0], abs=1e-6)
    assert found.nll_base == pytest.approx(scipy_nll(*case, found.scaled_base), abs=1e-6)
    assert found.nll <= min(found.nll_base, found.nll_sidekick)
    assert found.passes <= want.passes + 2


@pytest.mark.parametrize("count", [63, 64, 65, 100, 127, 128, 700])
def test_passes_are_those_over_all_logits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    sums = temperature.nll_sums
    monkeypatch.setattr(
        temperature, "nll_sums", lambda *a, **k: (read.append(len(a[0])), sums(*a, **k))[1]
    )
    fit = fit_temperatures(*make_logits(count, 5, seed=0))
    assert read.count(count) == fit.passes


def scipy_nll(base: Tensor, sidekick: Tensor, targets: Tensor, t: Temperatures) -> float:
    """The NLL of some temperatures, in float64."""
    masked = base == -torch.inf
    a, b = (x.double().masked_fill(masked, 0.0) for x in (base, sidekick))
    z = (t.base * a + t.sidekick * b).masked_fill(masked, -torch.inf)
    return float(cross_entropy(z, targets))


@pytest.mark.parametrize("change", ["double", "huge"])
def test_float32_is_left_where_it_would_not_do(change: str) -> None:
    a = A.double() if change == "double" else A.clone()
    if change == "huge":
        a = 1e20 * a
    want, found = fit_temperatures(a, B, Y), fit_temperatures(*many(a, B, Y))
    assert found.nll == pytest.approx(want.nll, abs=1e-11)  # float32 gives a few 1e-6
    assert found.temperatures == pytest.approx(want.temperatures, rel=1e-6)
    assert want.temperatures.base > 0


def test_float32_sees_the_spread_of_one_logit_among_thousands() -> None:
    """At T = 0 the variance is 5e-5 of the squares that it is the difference of."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(21841, (150,), generator=generator)
    wrong = torch.rand(2, 150, generator=generator) < torch.tensor([[0.2], [0.4]])
    predicted = torch.where(wrong, torch.randint(21841, (2, 150), generator=generator), targets)
    base, sidekick = (10 * one_hot(chosen, 21841).float() for chosen in predicted)
    want = fit_temperatures(base.double(), sidekick.double(), targets)
    found = fit_temperatures(base, sidekick, targets)
    assert found.temperatures == pytest.approx(want.temperatures, rel=1e-3)
    assert found.nll == pytest.approx(want.nll, abs=1e-5)


@pytest.mark.parametrize("size", [few, many])
@pytest.mark.parametrize("number", [-1e7, -1e9, -1e15, torch.finfo(torch.float32).min])
def test_masks_that_are_finite_count_as_masks(number: float, size: Callable) -> None:
    base, sidekick, targets = size(*make_logits(300, 12, seed=2))
    masks = torch.rand(base.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    masks[torch.arange(len(masks)), targets] = False
    want = fit_temperatures(*(x.masked_fill(masks, -torch.inf) for x in (base, sidekick)), targets)
    assert want.status == "converged"
    for other in (2 * max(number, -1e38), -1e4):
        given_logits = base.masked_fill(masks, number), sidekick.masked_fill(masks, other)
        assert fit_temperatures(*given_logits, targets) == want
        assert fit_temperatures(*given_logits[::-1], targets).nll == pytest.approx(want.nll)
        assert torch.equal(given_logits[0] == number, masks)  # the caller's are as they were


@pytest.mark.parametrize("size", [few, many])
@pytest.mark.parametrize("number", [-1e3, -65504.0, -1e6, -3e6])
def test_nearer_masks_are_logits_like_others(number: float, size: Callable) -> None:
    base, sidekick, targets = size(*make_logits(300, 12, seed=2))
    base, sidekick = 10 * base, 10 * sidekick
    masks = torch.rand(base.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    masks[torch.arange(len(masks)), targets] = False
    a, b = (x.masked_fill(masks, -torch.inf) for x in (base, sidekick))
    c, d = (x.masked_fill(masks, number) for x in (base, sidekick))
    want, found = fit_temperatures(a, b, targets), fit_temperatures(c, d, targets)
    assert found.status == "converged"
    assert reference_nll(c, d, targets, found.temperatures) <= want.nll + 1e-6


def test_finite_masks_that_cannot_be_masks_are_warned_of() -> None:
    base, sidekick, targets = make_logits(50, 5, seed=2)
    masks = torch.zeros(50, 5, dtype=torch.bool)
    masks[torch.arange(50), (targets + 1) % 5] = True
    with pytest.warns(UserWarning, match=r"-1e9.*classes in both.*-inf"):
        fit_temperatures(base.masked_fill(masks, -1e9), sidekick, targets)
    masks[0, targets[0]] = True
    hidden = base.masked_fill(masks, -1e9), sidekick.masked_fill(masks, -1e9)
    with pytest.warns(UserWarning, match=r"-1e9.* targets too.*-inf"):
        fit_temperatures(*hidden, targets)


@given(st.integers(0, 1000), st.floats(-30, 30))
def test_wide_logits_have_no_masks(seed: int, power: float) -> None:
    """Temperatures scale inversely with logits, however large: none is taken for a mask."""
    data = make_logits(60, 4, seed=seed)
    base, sidekick = (x.double() for x in data[:2])
    want = fit_temperatures(base, sidekick, data[2])
    found = fit_temperatures(10**power * base, sidekick, data[2])
    assert found.status == want.status
    if want.status == "converged":
        assert found.nll == pytest.approx(want.nll, abs=1e-10)


def test_processes_agree_on_the_precision() -> None:
    """An empty process has float64 logits; the sums over processes tell the other."""
    base, sidekick, targets = many(A, B, Y)
    flags = []

    def reduce(sums: Tensor) -> Tensor:
        if sums.shape == (1,) and float(sums) in (0.0, 1.0):
            flags.append(float(sums))
            return sums + 1  # the empty process needs double
        return sums

    found = fit_temperatures(base, sidekick, targets, reduce=reduce)
    assert found == fit_temperatures(base.double(), sidekick.double(), targets)
    assert flags == [0.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_targets_may_be_of_every_integer_dtype(dtype: torch.dtype) -> None:
    base, sidekick, targets = make_logits(200, 5, seed=0)
    assert fit_temperatures(base, sidekick, targets.to(dtype)) == fit_temperatures(
        base, sidekick, targets
    )
    with pytest.raises(ValueError, match=r"integer targets.*torch\.bool"):
        fit_temperatures(base, sidekick, targets > 2)

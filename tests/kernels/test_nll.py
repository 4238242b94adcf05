"""The fit's pass against automatic differentiation in float64, in plain PyTorch and as a kernel.

The kernel runs on CUDA where there is a GPU; without one, test_triton.py beside it runs this file
again under Triton's interpreter, where the same calls go through the kernel.
"""

import pytest
import torch
from helpers import DEVICES, INF, INTERPRETED, make_logits
from torch import Tensor

from lightning_duo import fit_temperatures
from lightning_duo_kernels.nll import NllSums, Point, nll_sums

BOTH = (True, True)


def reference(base: Tensor, sidekick: Tensor, targets: Tensor, t: tuple[float, float]) -> Tensor:
    """The seven sums, from PyTorch's own loss and its derivatives."""
    a, b, y = base.double().cpu(), sidekick.double().cpu(), targets.cpu()
    soft = y.ndim == 2
    y = y.double() / y.double().sum(1, keepdim=True) if soft else y.long()
    masked = a == -INF
    a, b = a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)

    def loss(t: Tensor) -> Tensor:
        z = (t[0] * a + t[1] * b).masked_fill(masked, -INF)
        if soft:
            return -(y * z.log_softmax(1).masked_fill(masked, 0.0)).sum(1)
        return torch.nn.functional.cross_entropy(z, y, reduction="none")

    at = torch.tensor(t, dtype=torch.float64)
    each = loss(at)
    slopes = torch.func.jacfwd(lambda t: loss(t).sum())(at)
    bends = torch.func.jacfwd(torch.func.jacrev(lambda t: loss(t).sum()))(at)
    several = (y > 0).sum(1) > 1 if soft else torch.zeros(len(a), dtype=torch.bool)
    unsure = ((each.neg().exp() <= 0.5) | several).sum()
    return torch.stack([each.sum(), *slopes, bends[0, 0], bends[0, 1], bends[1, 1], unsure])


def assert_sums(
    base: Tensor, sidekick: Tensor, targets: Tensor, at: list[tuple[float, float]]
) -> None:
    found = nll_sums(base, sidekick, targets, [Point(t, BOTH) for t in at])
    assert found.shape == (len(at), 7)
    assert found.dtype == torch.float64
    assert found.is_contiguous()  # processes add it up in place
    assert not found.is_inference()
    for mine, t in zip(found.cpu(), at, strict=True):
        want = reference(base, sidekick, targets, t)
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-8 * len(base))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 10, 257, 600])
def test_against_automatic_differentiation(classes: int, dtype: torch.dtype, device: str) -> None:
    base, sidekick, targets = make_logits(12, classes, seed=classes, device=device)
    base, sidekick = base.to(dtype), sidekick.to(dtype)
    assert_sums(base, sidekick, targets, [(1.3, 0.4)])
    assert_sums(base, sidekick, targets, [(0.0, 0.0), (0.7, 0.0), (0.0, 0.9), (30.0, 2.0), (1, 1)])


@pytest.mark.parametrize("classes", [2, 257, 21841])
@pytest.mark.skipif(INTERPRETED, reason="the kernel computes in float64")
def test_float32_arithmetic(classes: int) -> None:
    base, sidekick, targets = make_logits(40, classes, seed=classes)
    at = [Point((1.3, 0.4), BOTH), Point((0.1, 0.1), BOTH), Point((30.0, 2.0), BOTH)]
    found = nll_sums(base, sidekick, targets, at, dtype=torch.float32).cpu()
    for mine, point in zip(found, at, strict=True):
        want = reference(base, sidekick, targets, point.temperatures)
        torch.testing.assert_close(mine[:3], want[:3], rtol=1e-6, atol=1e-6 * len(base))
        torch.testing.assert_close(mine[3:6], want[3:6], rtol=1e-4, atol=1e-4 * len(base))
        assert mine[6] == want[6]


@pytest.mark.skipif(INTERPRETED, reason="the kernel computes in float64")
def test_float32_keeps_the_digits_of_small_slopes() -> None:
    """A sure and right duo of a base that is wrong: its slopes are tiny, its logits are not."""
    base, sidekick, targets = make_logits(30, 200, seed=0)
    base[torch.arange(30), (targets + 1) % 200] += 9.0
    sidekick[torch.arange(30), targets] += 20.0
    at = [Point((1.0, 1.0), BOTH), Point((0.5, 1.2), BOTH)]
    found = nll_sums(base, sidekick, targets, at, dtype=torch.float32).cpu()
    for mine, point in zip(found, at, strict=True):
        want = reference(base, sidekick, targets, point.temperatures)
        assert 1e-9 < want[1].abs() < 1e-2
        torch.testing.assert_close(mine[1:6], want[1:6], rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_masked_classes_layouts_and_kinds_of_targets(device: str) -> None:
    base, sidekick, targets = make_logits(40, 33, seed=0, device=device)
    base, sidekick = base * 100, sidekick * 100  # also where one class has all the probability
    hidden = torch.rand(40, 33, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    hidden[torch.arange(40), targets] = False
    base[hidden], sidekick[hidden] = -INF, -INF
    at = [(0.01, 0.02), (1.0, 0.5)]
    assert_sums(base, sidekick, targets.to(torch.uint8), at)
    assert_sums(base.t().contiguous().t(), torch.cat([sidekick] * 2, 1)[:, :33], targets, at)
    pairs = torch.stack([targets, targets], 1)
    assert_sums(base[::3], sidekick[::3], pairs[::3, 1], at)
    assert_sums(base + 1e4, sidekick - 1e4, targets, at[:1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_soft_targets(dtype: torch.dtype, device: str) -> None:
    base, sidekick, targets = make_logits(40, 33, seed=0, device=device)
    base, sidekick = base * 30, sidekick * 30  # also where one class has all the probability
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(40, 33, generator=generator).to(device)
    hidden = torch.rand(40, 33, generator=generator).to(device) < 0.3
    hidden[torch.arange(40), targets] = False
    q[:5] = torch.nn.functional.one_hot(targets[:5], 33).float()
    at = [(0.0, 0.0), (0.02, 0.05), (1.0, 0.5)]
    for masks in (torch.zeros_like(hidden), hidden):
        some = q.masked_fill(masks, 0.0)
        some = (some / some.sum(1, keepdim=True)).to(dtype)
        hide = [x.masked_fill(masks, -INF) for x in (base, sidekick)]
        assert_sums(*hide, some, at)
        assert_sums(*hide, some.t().contiguous().t(), at)
    assert_sums(base.double() + 1e3, sidekick.double() - 1e3, some, at)


@pytest.mark.skipif(INTERPRETED, reason="the kernel takes classes alone")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_hot_rows_have_the_sums_of_their_classes(dtype: torch.dtype) -> None:
    base, sidekick, targets = make_logits(300, 7, seed=0)
    one_hot = torch.nn.functional.one_hot(targets, 7).half()
    at = [Point((0.0, 0.0), BOTH), Point((1.3, 0.4), BOTH), Point((300.0, 0.0), BOTH)]
    found, want = (nll_sums(base, sidekick, y, at, dtype=dtype) for y in (one_hot, targets))
    assert found.equal(want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_beyond_what_exponentials_hold(dtype: torch.dtype, device: str) -> None:
    base, sidekick = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    base[:4, 0] += 900.0  # sure of one class, and the sidekick of another
    sidekick[:4, 1] += 901.0
    data = base.to(device), sidekick.to(device), torch.tensor([0, 1, 2, 0, 3, 4], device=device)
    at = [(1.0, 1.0), (1.0, 0.0), (0.5, 2.0)]
    found = nll_sums(*data, [Point(t, BOTH) for t in at], dtype=dtype).cpu()
    # float32 rounds logits of 900, and variances of them, which only guide the search, much more.
    columns, tolerance = (7, 1e-9) if dtype == torch.float64 else (3, 1e-3)
    for mine, t in zip(found[:, :columns], at, strict=True):
        want = reference(*data, t)[:columns]
        torch.testing.assert_close(mine, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_programs_take_several_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("plain PyTorch on the CPU; the interpreter runs this with the kernel")
    monkeypatch.setattr("lightning_duo_kernels.nll_triton.PROGRAMS", 7)
    base, sidekick, targets = make_logits(20, 3, seed=0, device=device)
    assert_sums(base, sidekick, targets, [(1.0, 0.5)])


@pytest.mark.parametrize("device", DEVICES)
def test_no_samples(device: str) -> None:
    empty, none = torch.zeros(0, 4, device=device), torch.zeros(0, device=device).long()
    sums = nll_sums(empty, empty, none, [Point((1.0, 1.0), BOTH)] * 3)
    assert torch.equal(sums.cpu(), torch.zeros(3, len(NllSums._fields), dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_gives_the_optimum(device: str) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("plain PyTorch on the CPU; the interpreter runs this with the kernel")
    data = [x.to(device) for x in make_logits(40, 5, seed=3)]
    fit = fit_temperatures(*data)
    assert fit_temperatures(*data) == fit
    assert fit.status == "converged"
    loss, *slopes = reference(*data, fit.temperatures)[:3] / 40
    assert fit.nll == pytest.approx(float(loss), abs=1e-12)
    assert min(fit.temperatures) > 0
    assert [float(slope) for slope in slopes] == pytest.approx([0, 0], abs=1e-8)

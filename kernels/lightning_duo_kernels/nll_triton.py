"""The temperature fit's pass as a Triton kernel: every logit is read once, for all points at once.

A program takes every `PROGRAMS`-th row and goes through its classes in blocks, with an online
softmax per point: a tile of points times classes is in registers at a time. It writes its own sums,
which are then added in a fixed order, so that a fit gives the same temperatures every time.

Arithmetic is in float64, as the fit compares losses that differ by 1e-12. On GPUs with few float64
units the exponentials bound the time, not the memory.

Traffic: 2 * N * K * itemsize bytes in, PROGRAMS * points * 56 out.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4096  # about as many one-warp programs as the largest GPUs hold
TILE = 256  # points times classes: 8 a lane, in up to 168 registers without spills
LOWEST = tl.constexpr(-1e300)  # below every logit, and its difference to itself is not NaN


@triton.jit
def nll_kernel(
    base,
    sidekick,
    targets,
    temperatures,
    sums,
    rows,
    classes,
    points,
    stride_base,
    column_base,
    stride_sidekick,
    column_sidekick,
    stride_targets,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of `lightning_duo_kernels.nll.NllSums` over a program's rows, for every point.

    Invariant over the blocks of a row, per point: top is the largest z seen, at least LOWEST, and
    norm, a1, b1, aa, ab, bb are the sums of exp(z - top) times 1, a, b, a * a, a * b and b * b.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    base += program * stride_base
    sidekick += program * stride_sidekick
    targets += program * stride_targets
    point = tl.arange(0, POINTS)
    real = point < points
    t_base = tl.load(temperatures + 2 * point, mask=real, other=0.0)[:, None]
    t_sidekick = tl.load(temperatures + 2 * point + 1, mask=real, other=0.0)[:, None]
    nothing = tl.zeros([POINTS], tl.float64)
    loss, unsure, grad_a, grad_b = nothing, nothing, nothing, nothing
    var_a, cov, var_b = nothing, nothing, nothing
    for _ in range(program, rows, programs):
        target = tl.load(targets).to(tl.int64)
        a_target = tl.load(base + target * column_base).to(tl.float64)
        b_target = tl.load(sidekick + target * column_sidekick).to(tl.float64)
        top = nothing + LOWEST
        norm, a1, b1, aa, ab, bb = nothing, nothing, nothing, nothing, nothing, nothing
        for start in range(0, classes, BLOCK):
            column = (start + tl.arange(0, BLOCK)).to(tl.int64)
            inside = column < classes
            a = tl.load(base + column * column_base, mask=inside, other=float("-inf"))
            b = tl.load(sidekick + column * column_sidekick, mask=inside, other=0.0)
            seen = a != float("-inf")
            a = tl.where(seen, a.to(tl.float64) - a_target, 0.0)[None, :]
            b = tl.where(seen, b.to(tl.float64) - b_target, 0.0)[None, :]
            z = tl.where(seen[None, :], t_base * a + t_sidekick * b, float("-inf"))
            higher = tl.maximum(top, tl.max(z, axis=1))
            scale = tl.exp(top - higher)
            e = tl.exp(z - higher[:, None])
            ea, eb = e * a, e * b
            norm = norm * scale + tl.sum(e, axis=1)
            a1 = a1 * scale + tl.sum(ea, axis=1)
            b1 = b1 * scale + tl.sum(eb, axis=1)
            aa = aa * scale + tl.sum(ea * a, axis=1)
            ab = ab * scale + tl.sum(ea * b, axis=1)
            bb = bb * scale + tl.sum(eb * b, axis=1)
            top = higher
        mean_a, mean_b = a1 / norm, b1 / norm
        loss += top + tl.log(norm)
        grad_a += mean_a
        grad_b += mean_b
        var_a += aa / norm - mean_a * mean_a
        cov += ab / norm - mean_a * mean_b
        var_b += bb / norm - mean_b * mean_b
        unsure += (2 * tl.exp(-top) <= norm).to(tl.float64)
        base += programs * stride_base
        sidekick += programs * stride_sidekick
        targets += programs * stride_targets
    out = sums + (program * points + point) * 7
    tl.store(out, loss, mask=real)
    tl.store(out + 1, grad_a, mask=real)
    tl.store(out + 2, grad_b, mask=real)
    tl.store(out + 3, var_a, mask=real)
    tl.store(out + 4, cov, mask=real)
    tl.store(out + 5, var_b, mask=real)
    tl.store(out + 6, unsure, mask=real)


def plan(points: int, classes: int) -> dict[str, int]:
    """Compile-time constants and number of warps for a number of points and of classes."""
    padded = triton.next_power_of_2(points)
    block = min(max(TILE // padded, 1), triton.next_power_of_2(classes))
    return {"POINTS": padded, "BLOCK": block, "num_warps": 1}


def launch_nll(
    base: Tensor, sidekick: Tensor, targets: Tensor, points: Sequence[tuple[float, float]]
) -> Tensor:
    """Run the kernel; as `nll_sums`, with both models at every point."""
    (rows, classes), device = base.shape, base.device
    programs = min(rows, PROGRAMS)
    temperatures = torch.tensor(points, dtype=torch.float64, device=device)
    sums = torch.empty(programs, len(points), 7, dtype=torch.float64, device=device)
    if rows:
        with torch.cuda.device(device) if base.is_cuda else nullcontext():
            nll_kernel[(programs,)](
                base,
                sidekick,
                targets,
                temperatures,
                sums,
                rows,
                classes,
                len(points),
                *base.stride(),
                *sidekick.stride(),
                targets.stride(0),
                **plan(len(points), classes),
            )
    return sums.sum(dim=0)

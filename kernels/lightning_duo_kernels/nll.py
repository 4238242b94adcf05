"""One pass of the temperature fit: all it needs to know of the samples at some temperatures."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 21  # of one model's logits that are worked on at a time: they stay in the cache
LOG_2 = math.log(2.0)
_HAS_TRITON = find_spec("triton") is not None


class Point(NamedTuple):
    """Two temperatures, and which of the two models take part there."""

    temperatures: tuple[float, float]
    """Multipliers (base, sidekick); that of a model that takes no part is 0."""
    models: tuple[bool, bool]
    """Whether base and sidekick take part; where one does not, its sums mean nothing."""


class NllSums(NamedTuple):
    """Sums over samples at one point; they add up over chunks and processes.

    With p the duo's probabilities of a sample, and a, b the logits of base and sidekick less that
    of the target class: what is written below, summed over the samples.
    """

    loss: float
    """-log p of the target, in nats."""
    grad_base: float
    """E[a] under p: the slope of the loss in the base's temperature."""
    grad_sidekick: float
    """E[b]."""
    curvature_base: float
    """Var[a] under p."""
    curvature_cross: float
    """Cov[a, b]."""
    curvature_sidekick: float
    """Var[b]."""
    unsure: float
    """1 if the target has a probability of at most 1/2, else 0."""


def nll_sums(
    base: Tensor,
    sidekick: Tensor,
    targets: Tensor,
    points: Sequence[Point],
    *,
    masked: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Evaluate the NLL, its gradient and its curvature at all points in one read of the logits.

    On CUDA this is one Triton kernel; elsewhere plain PyTorch over chunks that stay in the cache,
    which `torch.compile` does not beat: the time goes into the exponentials. The sums are float64;
    the extra memory is a few tens of MB whatever the number of samples.

    Args:
        base: Logits of the base, shape (N, K), any floating dtype, no NaN.
        sidekick: Logits of the sidekick, same shape and device.
        targets: True classes, shape (N,), an integer dtype, in [0, K), not masked.
        points: Where to evaluate.
        masked: Whether any logit is ``-inf``; both models must mask the same classes.
        dtype: Arithmetic within a chunk of rows in plain PyTorch. float32 takes less than half of
            the time and leaves an error of about 1e-6 in each sample's loss, which averages out.
            The kernel always computes in float64.

    Returns:
        Shape (points, 7), float64, in the order of `NllSums`.

    Source: Asymmetric Duos, Sec. 3.1: the objective of the fit.
    """
    if _HAS_TRITON:
        from triton import knobs

        if base.is_cuda or knobs.runtime.interpret:
            from lightning_duo_kernels.nll_triton import launch_nll

            at = [point.temperatures for point in points]
            return launch_nll(base, sidekick, targets, at)
    return _in_chunks(base, sidekick, targets, points, masked, dtype)


def _in_chunks(
    base: Tensor,
    sidekick: Tensor,
    targets: Tensor,
    points: Sequence[Point],
    masked: bool,
    dtype: torch.dtype,
) -> Tensor:
    shape = len(points), len(NllSums._fields)
    total = torch.zeros(shape, dtype=torch.float64, device=base.device)
    rows = max(1, CHUNK_BYTES // (dtype.itemsize * base.shape[1]))
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        a, b, y = base[chunk].to(dtype), sidekick[chunk].to(dtype), targets[chunk, None].long()
        # Logits relative to the target's: its own are 0, so loss = log sum exp.
        a, b = a - a.gather(1, y), b - b.gather(1, y)
        hidden = a == -torch.inf if masked else None
        if hidden is not None:
            a, b = a.masked_fill_(hidden, 0.0), b.masked_fill_(hidden, 0.0)
        for i, ((t_base, t_sidekick), (use_base, use_sidekick)) in enumerate(points):
            z = a * t_base if use_base else b * t_sidekick
            if use_base and use_sidekick:
                z.add_(b, alpha=t_sidekick)
            if hidden is not None:
                z.masked_fill_(hidden, -torch.inf)
            total[i] += _row_sums(z, a if use_base else None, b if use_sidekick else None)
    return total


def _row_sums(z: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Sums over one chunk's rows, shape (7,), in the order of `NllSums`.

    ``z`` are the weighted logits, ``a`` and ``b`` those of base and sidekick (None where the point
    leaves that model out), all relative to the target's. ``z`` is overwritten.
    """
    top = z.amax(dim=1)
    p = torch.softmax(z, dim=1)
    # Over many classes PyTorch's softmax in float32 adds up to a little more or less than 1.
    total = p.sum(dim=1).double()
    loss = top.double() - (p.amax(dim=1) / total).log()
    sums = torch.zeros(len(NllSums._fields), dtype=torch.float64, device=z.device)
    sums[0], sums[6] = loss.sum(), (loss >= LOG_2).sum()
    if a is not None:
        pa = torch.mul(p, a, out=z) if b is not None else p.mul_(a)
        mean_a = pa.sum(dim=1).double() / total
        sums[1], sums[3] = mean_a.sum(), _covariance(pa, a, mean_a, mean_a)
    if b is not None:
        pb = p.mul_(b)
        mean_b = pb.sum(dim=1).double() / total
        sums[2], sums[5] = mean_b.sum(), _covariance(pb, b, mean_b, mean_b)
    if a is not None and b is not None:
        sums[4] = _covariance(pb, a, mean_a, mean_b)
    return sums


def _covariance(px: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor) -> Tensor:
    """Sum over rows of E[xy] - E[x]E[y], from p * x and y."""
    return torch.dot(px.flatten(), y.flatten()).double() - torch.dot(mean_x, mean_y)

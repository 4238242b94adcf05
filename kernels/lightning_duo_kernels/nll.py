"""One pass of the temperature fit: all it needs to know of the samples at some temperatures."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 21  # of one model's logits that are worked on at a time: they stay in the cache
LOG_2 = math.log(2.0)
TINY = 1e-30  # a target's probability below which float32 begins to lose it
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
    t = torch.tensor([point.temperatures for point in points], dtype=dtype, device=base.device)
    groups = _neighbours(points)
    most = max(group.stop - group.start for group, _ in groups)
    rows = max(1, CHUNK_BYTES // (dtype.itemsize * base.shape[1] * most))
    rows = max(1, min(rows, len(targets)))
    # Written over by each chunk: fresh memory would cost as much as the arithmetic.
    room = torch.empty(2 * most + 2, rows, base.shape[1], dtype=dtype, device=base.device)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        y = targets[chunk, None].long()
        here = room[:, : len(y)]
        a = _relative(base[chunk].to(dtype), y, here[0])
        b = _relative(sidekick[chunk].to(dtype), y, here[1])
        hidden = a == -torch.inf if masked else None
        if hidden is not None:
            a, b = a.masked_fill_(hidden, 0.0), b.masked_fill_(hidden, 0.0)
        of_rows, of_squares = _moments(a, b, y, t, groups, hidden, here[2:])
        loss = _losses(of_rows[0], of_rows[1], a, b, t, hidden)
        means = of_rows[2:].double() / of_rows[0].double()
        total[:, 0] += loss.sum(dim=1)
        total[:, 1:3] += means.sum(dim=2).T
        products = torch.stack([means[0] * means[0], means[0] * means[1], means[1] * means[1]])
        total[:, 3:6] += (of_squares.double() - products.sum(dim=2)).T
        total[:, 6] += (loss >= LOG_2).sum(dim=1)
    return total


def _relative(logits: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Logits less that of the target: its own are 0, so loss = log sum exp."""
    return torch.sub(logits, logits.gather(1, y), out=out)


def _neighbours(points: Sequence[Point]) -> list[tuple[slice, tuple[bool, bool]]]:
    """Runs of points with the same models; each run is evaluated at once."""
    starts = [i for i in range(len(points)) if not i or points[i].models != points[i - 1].models]
    stops = [*starts[1:], len(points)]
    return [(slice(i, j), points[i].models) for i, j in zip(starts, stops, strict=True)]


def _moments(
    a: Tensor,
    b: Tensor,
    y: Tensor,
    t: Tensor,
    groups: list[tuple[slice, tuple[bool, bool]]],
    hidden: Tensor | None,
    room: Tensor,
) -> tuple[Tensor, Tensor]:
    """All that takes a look at every logit of a chunk, in as few operations as can be.

    Args:
        a: Logits of the base relative to the target's, shape (rows, K).
        b: Those of the sidekick.
        y: Targets, shape (rows, 1).
        t: Temperatures of the points, shape (points, 2).
        groups: Of `_neighbours`.
        hidden: Which logits are masked, shape (rows, K), if any is.
        room: Two matrices of shape (rows, K) for each point of the longest run, to work in.

    Returns:
        For each row the sum of p, p of the target, sum of p * a and of p * b, shape
        (4, points, rows); and sums over the rows of E[aa], E[ab], E[bb], shape (3, points).
    """
    of_rows = a.new_zeros(4, len(t), len(a))
    of_squares = a.new_zeros(3, len(t))
    flat_a, flat_b = a.flatten(), b.flatten()
    for run, (use_base, use_sidekick) in groups:
        sums, squares = of_rows[:, run], of_squares[:, run]
        t_base, t_sidekick = t[run].T[:, :, None, None]
        z, p = room[: 2 * len(t_base)].chunk(2)
        torch.mul(*((a, t_base) if use_base else (b, t_sidekick)), out=z)
        if use_base and use_sidekick:
            z.addcmul_(b, t_sidekick)
        if hidden is not None:
            z.masked_fill_(hidden, -torch.inf)
        torch.softmax(z, dim=2, out=p)
        torch.sum(p, dim=2, out=sums[0])
        torch.gather(p, 2, y.expand(len(p), -1, 1), out=sums[1, :, :, None])
        if use_base:
            pa = torch.mul(p, a, out=z)
            torch.sum(pa, dim=2, out=sums[2])
            _dots(pa.flatten(1), flat_a, squares[0])
        if use_sidekick:
            pb = p.mul_(b)
            torch.sum(pb, dim=2, out=sums[3])
            _dots(pb.flatten(1), flat_b, squares[2])
        if use_base and use_sidekick:
            _dots(pb.flatten(1), flat_a, squares[1])
    return of_rows, of_squares


def _dots(rows: Tensor, vector: Tensor, out: Tensor) -> None:
    """Each row times the vector: one by one, as a product with a matrix keeps to one thread."""
    for i in range(len(rows)):
        torch.dot(rows[i], vector, out=out[i])


def _losses(
    total: Tensor, target: Tensor, a: Tensor, b: Tensor, t: Tensor, hidden: Tensor | None
) -> Tensor:
    """-log p of the target, shape (points, rows), float64; see `_moments`.

    Over many classes PyTorch's softmax in float32 adds up to a little more or less than 1.
    """
    loss = (total.double() / target.double()).log()
    i, row = (target < TINY).nonzero(as_tuple=True)
    if len(i):
        z = t[i, :1] * a[row] + t[i, 1:] * b[row]
        if hidden is not None:
            z = z.masked_fill_(hidden[row], -torch.inf)
        loss[i, row] = z.double().logsumexp(dim=1)
    return loss

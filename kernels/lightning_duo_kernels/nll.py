"""One pass of the temperature fit: all it needs to know of the samples at some temperatures."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 21  # of one model's logits that are worked on at a time: they stay in the cache
ALIGNED = 16  # matrices begin at multiples of so many numbers; else dot products take far longer
LOG_2 = math.log(2.0)
HUGE = 1e30  # a sum of 2^z near which float32 would overflow
_HAS_TRITON = find_spec("triton") is not None


class Point(NamedTuple):
    """Two temperatures, and which of the two models take part there."""

    temperatures: tuple[float, float]
    """Multipliers (base, sidekick), not negative; that of a model that takes no part is 0."""
    models: tuple[bool, bool]
    """Whether base and sidekick take part; where one does not, its sums mean nothing."""


class NllSums(NamedTuple):
    """Sums over samples at one point; they add up over chunks and processes.

    With p the duo's probabilities of a sample, and a, b the logits of base and sidekick less that
    of the target class, or less their mean under a soft target q: what is written below, summed
    over the samples.
    """

    loss: float
    """-log p of the target, or the mean of -log p under q, in nats."""
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
    """1 if the target has a probability of at most 1/2, or is soft: with several classes of which
    none can become sure. Else 0."""


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

    On CUDA this is one Triton kernel; elsewhere, and for soft targets, plain PyTorch over chunks
    that stay in the cache. The sums are float64; the extra memory is a few tens of MB whatever the
    number of samples.

    Args:
        base: Logits of the base, shape (N, K), any floating dtype, no NaN.
        sidekick: Logits of the sidekick, same shape and device.
        targets: True classes, shape (N,), an integer dtype, in [0, K), not masked; or class
            probabilities, shape (N, K), any floating dtype, 0 where masked. Each row is divided by
            its sum. One-hot rows have the sums of their classes, bit by bit.
        points: Where to evaluate.
        masked: Whether any logit is ``-inf``; both models must mask the same classes.
        dtype: Arithmetic within a chunk of rows in plain PyTorch. float32 takes less than half of
            the time and leaves an error of about 1e-6 in each sample's loss, which averages out.
            The kernel always computes in float64.

    Returns:
        Shape (points, 7), float64, in the order of `NllSums`.

    Source: Asymmetric Duos, Sec. 3.1: the objective of the fit.
    """
    if _HAS_TRITON and targets.ndim == 1:
        from triton import knobs

        if base.is_cuda or knobs.runtime.interpret:
            from lightning_duo_kernels.nll_triton import launch_nll

            at = [point.temperatures for point in points]
            return launch_nll(base, sidekick, targets, at)
    sums = _in_chunks(base, sidekick, targets, points, masked, dtype)
    # A copy, as what is made in inference mode must not be written to outside of it.
    return sums.clone(memory_format=torch.contiguous_format)


@torch.inference_mode()  # which views and small operations are quicker in
def _in_chunks(
    base: Tensor,
    sidekick: Tensor,
    targets: Tensor,
    points: Sequence[Point],
    masked: bool,
    dtype: torch.dtype,
) -> Tensor:
    t = torch.tensor([point.temperatures for point in points], dtype=dtype, device=base.device)
    t = t / LOG_2  # as exp2 takes a third as long as exp, and half as long as softmax
    runs = [(t[run, :, None, None].unbind(1), models) for run, models in _neighbours(points)]
    most = max(len(at[0]) for at, _ in runs)
    classes = base.shape[1]
    chunks = max(1, round(len(targets) * classes * most * dtype.itemsize / CHUNK_BYTES))
    rows = max(1, -(-len(targets) // chunks))
    # Written over by each chunk: fresh memory would cost as much as the arithmetic.
    size = -(-rows * classes // ALIGNED) * ALIGNED
    room = torch.empty(2 * most + 2, size, dtype=dtype, device=base.device)
    room = room[:, : rows * classes].view(-1, rows, classes)
    sums = torch.zeros(len(NllSums._fields), len(points), dtype=torch.float64, device=base.device)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        given = targets[chunk]
        here = room[:, : len(given)]
        relative, free = here[:2], here[2:]
        hidden = _centre(base[chunk], sidekick[chunk], given, relative, free[:2], masked=masked)
        found = [_moments(relative[0], relative[1], *run, hidden, free) for run in runs]
        of_rows = torch.cat([of_run for of_run, _ in found], dim=1).double()
        dots = torch.stack([dot for _, dots in found for dot in dots]).view(-1, 3).T
        loss = LOG_2 * (of_rows[0].log2() + of_rows[1])
        mean, other = of_rows[2:].unbind()
        products = torch.stack([mean * mean, mean * other, other * other])
        first, second = of_rows[2:].sum(dim=2), dots.double() - products.sum(dim=2)
        unsure = loss >= LOG_2
        if given.ndim == 2:
            unsure |= (given > 0).sum(dim=1) > 1
        sums += torch.cat([loss.sum(dim=1)[None], first, second, unsure.sum(dim=1)[None]])
    return sums.T


def _centre(
    base: Tensor, sidekick: Tensor, targets: Tensor, out: Tensor, free: Tensor, *, masked: bool
) -> Tensor | None:
    """Write the logits of a chunk less those of their targets, so small slopes keep their digits.

    Args:
        base: Logits of the base, shape (rows, K).
        sidekick: Those of the sidekick.
        targets: Classes (rows,), or probabilities (rows, K).
        out: Where to, shape (2, rows, K); finite where masked.
        free: Room of the same shape.
        masked: Whether any logit may be masked.

    Returns:
        Which logits are masked, shape (rows, K), if any may be.
    """
    soft = targets.ndim == 2
    y = targets.argmax(1, keepdim=True) if soft else targets[:, None].long()
    for logits, each in zip((base, sidekick), out.unbind(), strict=True):
        x = logits.to(out.dtype)
        torch.sub(x, x.gather(1, y), out=each)
    hidden = out[0] == -torch.inf if masked else None
    if hidden is not None:
        out.masked_fill_(hidden, 0.0)
    if soft:
        q = targets.to(out.dtype) / targets.sum(dim=1, keepdim=True, dtype=out.dtype)
        out.sub_(torch.mul(out, q, out=free).sum(dim=2, keepdim=True))
    return hidden


def _neighbours(points: Sequence[Point]) -> list[tuple[slice, tuple[bool, bool]]]:
    """Runs of points with the same models; each run is evaluated at once."""
    starts = [i for i in range(len(points)) if not i or points[i].models != points[i - 1].models]
    stops = [*starts[1:], len(points)]
    return [(slice(i, j), points[i].models) for i, j in zip(starts, stops, strict=True)]


def _moments(
    a: Tensor,
    b: Tensor,
    t: Sequence[Tensor],
    models: tuple[bool, bool],
    hidden: Tensor | None,
    free: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """All that takes a look at every logit of a chunk, in as few operations as can be.

    Args:
        a: Logits of the base less that of the target, or less their mean under a soft one, shape
            (rows, K), finite where masked too.
        b: Those of the sidekick.
        t: Temperatures for base and sidekick over log 2, each of shape (points, 1, 1).
        models: Which of the two take part; the sums of the other are 0.
        hidden: Which logits are masked, shape (rows, K), if any is.
        free: Two matrices of shape (rows, K) or more for each point, to work in.

    Returns:
        With z = t * a + t * b, which is 0 of the target, less its largest in a row where any is
        large: for each row the sum of 2^z, what was taken off z, E[a] and E[b], shape (4, points,
        rows); and for each point in turn the sums over the rows of E[aa], E[ab], E[bb].
    """
    use_base, use_sidekick = models
    points = len(t[0])
    p, px = free[:points], free[points : 2 * points]
    z = torch.mul(a, t[0], out=px) if use_base else torch.mul(b, t[1], out=px)
    if use_base and use_sidekick:
        z.addcmul_(b, t[1])
    if hidden is not None:
        z.masked_fill_(hidden, -torch.inf)
    total = torch.exp2(z, out=p).sum(dim=2)
    none = torch.zeros_like(total)
    top = none
    if not total.amax() < HUGE:
        top = z.amax(dim=2)
        z.sub_(top[:, :, None])
        total = torch.exp2(z, out=p).sum(dim=2)
    p.mul_(total.reciprocal()[:, :, None])
    of_rows = [total, top, none, none]
    dots = [[none[0, 0]] * 3 for _ in range(points)]
    if use_base:
        torch.mul(p, a, out=px)
        of_rows[2] = px.sum(dim=2)
        _dots(px, a, dots, 0)
    if use_base and use_sidekick:
        _dots(px, b, dots, 1)
    if use_sidekick:
        p.mul_(b)
        of_rows[3] = p.sum(dim=2)
        _dots(p, b, dots, 2)
    return torch.stack(of_rows), [dot for of_point in dots for dot in of_point]


def _dots(matrices: Tensor, other: Tensor, dots: list[list[Tensor]], place: int) -> None:
    """Sums of products with another matrix, one by one: a matrix product keeps to one thread."""
    vector = other.flatten()
    for row, found in zip(matrices.flatten(1).unbind(), dots, strict=True):
        found[place] = torch.dot(row, vector)

"""The duo head as a Triton kernel: both logit tensors are read once, by one program per row block.

Up to `BLOCK_CLASSES` classes (`LEAN_CLASSES` without probabilities) a row is held in registers;
above, it is streamed with an online softmax, whose state every lane keeps for the classes it has
seen. Both kernels

- read in the input dtype and compute in float32;
- count NaN as +inf, so that every maximum is a number; a row without a softmax (NaN, +inf, all
  -inf) then gets a NaN confidence by itself, as inf - inf;
- read aligned granules of ``VECTOR`` elements (16 bytes) even where rows do not start at one: the
  first and last granule of a row may hold elements of its neighbours, which are left out.

Traffic: 2 * B * K * itemsize bytes in (twice that above `BLOCK_CLASSES` with probabilities),
4 * B * K out with probabilities, and 16 bytes a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK_CLASSES = 16384  # above, a row in registers spills
LEAN_CLASSES = 8192  # the same without probabilities, where a stream reads the logits once too
STREAM_CLASSES = 4096  # classes per step of a streamed row
TILE = 1024  # logits of one model per program, where several rows fit
LOWEST = tl.constexpr(-1e4)  # exp of it is 0, and its product with 0 is not NaN


@triton.jit
def _temperatures(temperatures):
    """Both multipliers; a negative one counts as NaN, which the composite path does too."""
    base, sidekick = tl.load(temperatures), tl.load(temperatures + 1)
    nan = float("nan")
    return tl.where(base >= 0, base, nan), tl.where(sidekick >= 0, sidekick, nan)


@triton.jit
def _load(logits, start, lanes, end, extent, whole, VECTOR: tl.constexpr, EVEN: tl.constexpr):
    """Logits at ``start + lanes`` as float32, in granules, as far as these begin before ``end``.

    Args:
        logits: Pointer to the first logit.
        start: Offsets of the rows, rounded down to a granule.
        lanes: Offsets in a row; each granule of VECTOR lanes begins at a multiple of VECTOR.
        end: Lane after a row's last class.
        extent: Number of elements of the tensor.
        whole: Whether all granules lie in the tensor. Elsewhere (in the last programs, if the
            tensor's last granule is cut) the elements of that one granule are read one by one.
        VECTOR: Elements of a granule.
        EVEN: All rows of the tensor begin and end with a granule, so all lie in it.
    """
    granules = lanes // VECTOR * VECTOR
    if EVEN:
        x = tl.load(logits + start + lanes, mask=granules < end, other=0.0).to(tl.float32)
    else:
        # The granule that the tensor ends in, if it is cut, is at this lane of a row that has it.
        edge, rest = extent // VECTOR * VECTOR, (extent % VECTOR).to(tl.int32)
        cut = tl.minimum(edge - start, end).to(tl.int32)
        x = tl.load(logits + start + lanes, mask=granules < cut, other=0.0).to(tl.float32)
        if not whole:
            for i in tl.static_range(VECTOR - 1):
                own = tl.load(logits + edge + i, mask=i < rest, other=0.0).to(tl.float32)
                x = tl.where((granules == cut) & (lanes % VECTOR == i), own, x)
    return x


@triton.jit
def _extent(row, stride, classes):
    """Offset after the last class of a row, in 64 bits."""
    return (tl.zeros([], tl.int64) + row) * stride + classes


@triton.jit
def _classes(lanes, shift, classes, VECTOR: tl.constexpr, EVEN: tl.constexpr):
    """Class of each lane of rows that begin at lane ``shift``, and whether there is one."""
    if EVEN:  # written so that stores of whole granules are seen to be possible
        return lanes, lanes // VECTOR * VECTOR < classes
    else:
        column = lanes - shift
        return column, (column >= 0) & (column < classes)


@triton.jit
def _weigh(base, sidekick, t_base, t_sidekick, valid):
    """Duo logits; masked classes and lanes outside the row are -inf, NaN counts as +inf."""
    z = t_base * base + t_sidekick * sidekick
    z = tl.where(z != z, float("inf"), z)
    masked = (base == float("-inf")) | (sidekick == float("-inf")) | (valid == 0)
    return tl.where(masked, float("-inf"), z)


@triton.jit
def _ranked(base, valid):
    """Base logits to take the maximum of: NaN counts as +inf, lanes outside the row as -inf."""
    return tl.where(valid, tl.where(base != base, float("inf"), base), float("-inf"))


@triton.jit
def block_kernel(
    base,
    sidekick,
    temperatures,
    probs,
    prediction,
    confidence,
    entropy,
    rows,
    stride_base,
    stride_sidekick,
    classes: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RETURN_PROBS: tl.constexpr,
    UQ_ONLY: tl.constexpr,
):
    """ROWS whole rows per program."""
    program = tl.program_id(0)
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < rows
    t_base, t_sidekick = _temperatures(temperatures)
    # Both tensors have the same shift: the launcher sees to it.
    shift = (row * stride_base % VECTOR).to(tl.int32)[:, None]
    start_base = (row * stride_base // VECTOR * VECTOR)[:, None]
    start_sidekick = (row * stride_sidekick // VECTOR * VECTOR)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    end = tl.where(real[:, None], shift + classes, 0)
    extent_base = _extent(rows - 1, stride_base, classes)
    extent_sidekick = _extent(rows - 1, stride_sidekick, classes)
    highest = tl.minimum(program * ROWS + ROWS, rows) - 1
    whole = (_extent(highest, stride_base, classes) + (VECTOR - 1) <= extent_base) & (
        _extent(highest, stride_sidekick, classes) + (VECTOR - 1) <= extent_sidekick
    )
    a = _load(base, start_base, lanes, end, extent_base, whole, VECTOR, EVEN)
    b = _load(sidekick, start_sidekick, lanes, end, extent_sidekick, whole, VECTOR, EVEN)
    column, valid = _classes(lanes, shift, classes, VECTOR, EVEN)
    valid &= real[:, None]

    if UQ_ONLY:  # first, so that the base's logits need no registers later on
        a = _ranked(a, valid)
        hit = (a == tl.max(a, axis=1)[:, None]) & valid
        predicted = tl.min(tl.where(hit, column, classes), axis=1)
    z = _weigh(a, b, t_base, t_sidekick, valid)
    top = tl.max(z, axis=1)
    if UQ_ONLY:
        own = tl.max(tl.where(column == predicted[:, None], z, float("-inf")), axis=1)
    else:
        own = top
        hit = (z == top[:, None]) & valid
        predicted = tl.min(tl.where(hit, column, classes), axis=1)
    d = z - top[:, None]
    e = tl.exp(d)
    total = tl.sum(e, axis=1)
    spread = tl.sum(e * tl.maximum(d, LOWEST), axis=1)
    if UQ_ONLY:
        sure = tl.exp(own - top) / total
    else:
        sure = 1.0 / total
    tl.store(prediction + row, predicted.to(tl.int64), mask=real)
    tl.store(confidence + row, sure, mask=real)
    tl.store(entropy + row, tl.log(total) - spread / total, mask=real)
    if RETURN_PROBS:
        out = (row * classes)[:, None] + column
        tl.store(probs + out, e / total[:, None], mask=valid)


@triton.jit
def stream_kernel(
    base,
    sidekick,
    temperatures,
    probs,
    prediction,
    confidence,
    entropy,
    rows,
    stride_base,
    stride_sidekick,
    classes: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    RETURN_PROBS: tl.constexpr,
    UQ_ONLY: tl.constexpr,
):
    """One row per program, BLOCK classes at a time.

    Invariant, per lane: top is the largest logit seen, total = sum exp(z - top) and
    spread = sum exp(z - top) * (z - top) over the logits seen.
    """
    row = tl.program_id(0).to(tl.int64)
    t_base, t_sidekick = _temperatures(temperatures)
    shift = (row * stride_base % VECTOR).to(tl.int32)
    start_base = row * stride_base // VECTOR * VECTOR
    start_sidekick = row * stride_sidekick // VECTOR * VECTOR
    end = shift + classes
    extent_base = _extent(rows - 1, stride_base, classes)
    extent_sidekick = _extent(rows - 1, stride_sidekick, classes)
    whole = (start_base + end + (VECTOR - 1) <= extent_base) & (
        start_sidekick + end + (VECTOR - 1) <= extent_sidekick
    )

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    own = tl.full([BLOCK], float("-inf"), tl.float32)
    predicted = tl.zeros([BLOCK], tl.int32)
    for step in range(0, end, BLOCK):
        lanes = step + tl.arange(0, BLOCK)
        column, valid = _classes(lanes, shift, classes, VECTOR, EVEN)
        a = _load(base, start_base, lanes, end, extent_base, whole, VECTOR, EVEN)
        b = _load(sidekick, start_sidekick, lanes, end, extent_sidekick, whole, VECTOR, EVEN)
        z = _weigh(a, b, t_base, t_sidekick, valid)
        if UQ_ONLY:
            ranked = _ranked(a, valid)
            better = ranked > best
            best = tl.where(better, ranked, best)
            own = tl.where(better, z, own)
        else:
            better = z > top
        predicted = tl.where(better, column, predicted)
        # One exponential a logit: either it or what was summed so far is scaled down.
        higher = z > top
        d = tl.where(z == float("-inf"), float("-inf"), z - top)
        e = tl.exp(-tl.abs(d))
        bounded = tl.maximum(tl.minimum(d, -LOWEST), LOWEST)
        spread = tl.where(higher, e * (spread - total * bounded), spread + e * bounded)
        total = tl.where(higher, e * total + 1.0, total + e)
        top = tl.maximum(top, z)

    peak = tl.max(top, axis=0)
    d = top - peak
    scale = tl.exp(d)
    norm = tl.sum(total * scale, axis=0)
    moment = tl.sum(scale * (spread + total * tl.maximum(d, LOWEST)), axis=0)
    if UQ_ONLY:
        highest = tl.max(best, axis=0)
        winner = tl.min(tl.where(best == highest, predicted, classes), axis=0)
        chosen = tl.where((best == highest) & (predicted == winner), own, float("-inf"))
        sure = tl.exp(tl.max(chosen, axis=0) - peak) / norm
    else:
        winner = tl.min(tl.where(top == peak, predicted, classes), axis=0)
        sure = 1.0 / norm
    tl.store(prediction + row, winner.to(tl.int64))
    tl.store(confidence + row, sure)
    tl.store(entropy + row, tl.log(norm) - moment / norm)
    if RETURN_PROBS:
        for step in range(0, end, BLOCK):
            lanes = step + tl.arange(0, BLOCK)
            column, valid = _classes(lanes, shift, classes, VECTOR, EVEN)
            a = _load(base, start_base, lanes, end, extent_base, whole, VECTOR, EVEN)
            b = _load(sidekick, start_sidekick, lanes, end, extent_sidekick, whole, VECTOR, EVEN)
            z = _weigh(a, b, t_base, t_sidekick, valid)
            tl.store(probs + row * classes + column, tl.exp(z - peak) / norm, mask=valid)


def plan(
    classes: int, itemsize: int, stride_base: int, stride_sidekick: int, return_probs: bool
) -> dict[str, int]:
    """Compile-time constants and number of warps for one shape.

    Args:
        classes: K.
        itemsize: Bytes of a logit.
        stride_base: Elements between two rows of the base's logits.
        stride_sidekick: The same of the sidekick's.
        return_probs: Whether probabilities are written.

    Returns:
        Keyword arguments of the kernel; with ``ROWS`` it is `block_kernel`, else `stream_kernel`.
    """
    vector = 16 // itemsize
    while stride_base % vector != stride_sidekick % vector:
        vector //= 2
    streamed = classes > (BLOCK_CLASSES if return_probs else LEAN_CLASSES)
    block = STREAM_CLASSES if streamed else triton.next_power_of_2(classes)
    # A row may begin anywhere in its first granule; that must not double the block.
    while not streamed and stride_base % vector and classes + vector - 1 > block:
        vector //= 2
    even = stride_base % vector == 0 and classes % vector == 0
    constants = {"BLOCK": block, "VECTOR": vector, "EVEN": even}
    share = 8 * (64 if torch.version.hip else 32)  # of a warp: 8 logits a lane, 16 bytes at least
    if streamed:
        return {**constants, "num_warps": block // share}
    rows = max(1, TILE // block)
    return {**constants, "ROWS": rows, "num_warps": min(rows * block // share, 16)}


def launch_head(
    base: Tensor, sidekick: Tensor, temperatures: Tensor, return_probs: bool, uq_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel; arguments and results as those of the operator."""
    rows, classes = base.shape[0], int(base.shape[1])
    base = base if base.stride(1) == 1 or classes == 1 else base.contiguous()
    sidekick = sidekick if sidekick.stride(1) == 1 or classes == 1 else sidekick.contiguous()
    probs = base.new_empty((rows, classes) if return_probs else (0,), dtype=torch.float32)
    prediction = base.new_empty(rows, dtype=torch.int64)
    confidence = base.new_empty(rows, dtype=torch.float32)
    entropy = base.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return probs, prediction, confidence, entropy
    strides = int(base.stride(0)), int(sidekick.stride(0))
    constants = plan(classes, base.element_size(), *strides, return_probs)
    kernel = block_kernel if "ROWS" in constants else stream_kernel
    wrap_triton(kernel)[(triton.cdiv(rows, constants.get("ROWS", 1)),)](
        base,
        sidekick,
        temperatures.contiguous(),
        probs,
        prediction,
        confidence,
        entropy,
        rows,
        *strides,
        classes=classes,
        **constants,
        RETURN_PROBS=return_probs,
        UQ_ONLY=uq_only,
    )
    return probs, prediction, confidence, entropy

"""The duo head against float64, on every path: plain PyTorch, compiled, and the Triton kernel.

The kernel runs on CUDA where there is a GPU; without one, test_triton.py beside it runs this file
again under Triton's interpreter, where the same calls go through the kernel.
"""

import pytest
import torch
from helpers import DEVICES, INF, INTERPRETED, NAN, edge_rows, make_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_duo_kernels import duo_head

not_interpreted = pytest.mark.skipif(
    INTERPRETED, reason="torch.compile and the interpreter do not go together"
)


def float64_head(
    base: Tensor, sidekick: Tensor, t: Tensor, uq_only: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = t[0].double() * base.double() + t[1].double() * sidekick.double()
    probs = torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True))
    prediction = (base if uq_only else logits).argmax(1)
    confidence = probs.gather(1, prediction[:, None]).squeeze(1)
    return probs, prediction, confidence, -(probs * probs.clamp_min(1e-300).log()).sum(1)


def assert_same_as_float64(base: Tensor, sidekick: Tensor, t: Tensor, uq_only: bool) -> None:
    head = duo_head(base, sidekick, t, uq_only=uq_only)
    probs, prediction, confidence, entropy = float64_head(base, sidekick, t, uq_only)
    torch.testing.assert_close(head.probs.double(), probs, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(head.confidence.double(), confidence, rtol=2e-6, atol=0)
    torch.testing.assert_close(head.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert torch.equal(head.prediction, prediction)
    without = duo_head(base, sidekick, t, uq_only=uq_only, return_probs=False)
    assert without.probs is None
    for mine, theirs in zip(without[1:], head[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("uq_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 16, 257, 1000, 1001, 16384, 16385, 151936])
def test_against_float64(classes: int, dtype: torch.dtype, uq_only: bool, device: str) -> None:
    rows = 70 if classes <= 10 else 5 if classes <= 1001 else 2
    base, sidekick, _ = make_logits(rows, classes, seed=classes, device=device)
    t = torch.tensor([1.3, 0.4], device=device)
    assert_same_as_float64(base.to(dtype), sidekick.to(dtype), t, uq_only)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("uq_only", [False, True])
@pytest.mark.parametrize("return_probs", [False, True])
def test_many_rows_give_what_each_gives_alone(
    return_probs: bool, uq_only: bool, device: str
) -> None:
    base, sidekick, _ = make_logits(70, 4099, seed=5, device=device)
    base[40:60, ::3], sidekick[:, 500:510], base[::7, 3] = -INF, -INF, NAN
    t = torch.tensor([1.3, 0.4], device=device)
    how = {"return_probs": return_probs, "uq_only": uq_only}
    # Every other row of taller tensors, so that rows are not next to each other.
    tall = [torch.stack([x, -x], dim=1).flatten(0, 1)[::2] for x in (base, sidekick)]
    found = duo_head(*tall, t, **how)
    assert (found.probs is not None) == return_probs
    for row in (0, 7, 31, 32, 50, 69):
        alone = duo_head(base[row : row + 1], sidekick[row : row + 1], t, **how)
        for result, expected in zip(found, alone, strict=True):
            if expected is not None:
                here = result[row : row + 1]
                torch.testing.assert_close(here, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [7, 1000, 1003, 20001])
@pytest.mark.parametrize("layout", ["padded", "unlike", "transposed", "expanded", "offset"])
def test_strided_logits(layout: str, classes: int, device: str) -> None:
    rows = 3
    base, sidekick, _ = make_logits(rows, classes + 9, seed=classes, device=device)
    if layout == "padded":
        base, sidekick = base[:, :classes], sidekick[:, :classes]
    elif layout == "unlike":
        base, sidekick = base[:, :classes], sidekick[:, :classes].contiguous()
    elif layout == "transposed":
        base, sidekick = base[:, :classes].t().contiguous().t(), sidekick[:, :classes]
    elif layout == "expanded":
        base, sidekick = base[:1, :classes].expand(rows, -1), sidekick[:, 1 : classes + 1]
    else:
        base, sidekick = base[1:, 2 : classes + 2], sidekick[:-1, 5 : classes + 5]
    assert_same_as_float64(base, sidekick, torch.tensor([0.7, 1.1], device=device), False)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_32_bit_offsets(device: str) -> None:
    # 4 GiB of addresses; on the CPU only the pages of the three rows are ever touched.
    far = torch.empty((1 << 31) + 8, dtype=torch.bfloat16, device=device)
    rows = far.as_strided((3, 8), (1 << 30, 1))
    rows.copy_(make_logits(3, 8, seed=0, device=device)[0])
    assert_same_as_float64(rows, rows, torch.tensor([1.0, 0.5], device=device), False)


def test_nothing_beyond_the_tensor_is_used() -> None:
    # The kernel reads whole granules of 16 bytes; what the neighbours hold must not matter.
    for classes in (5, 257, 1001, 17001):
        around = torch.full((2, 3 * classes + 16), NAN)
        logits = make_logits(3, classes, seed=0)[:2]
        base, sidekick = (
            row[8 : 8 + 3 * classes].view(3, classes).copy_(values)
            for row, values in zip(around, logits, strict=True)
        )
        assert_same_as_float64(base, sidekick, torch.tensor([1.0, 0.5]), False)


@settings(max_examples=30)
@given(
    st.integers(0, 1000), st.integers(1, 40), st.floats(-1e3, 1e3), st.floats(0, 5), st.floats(0, 5)
)
def test_properties(
    seed: int, classes: int, shift: float, t_base: float, t_sidekick: float
) -> None:
    base, sidekick, _ = make_logits(8, classes, seed=seed)
    t = torch.tensor([t_base, t_sidekick])
    head = duo_head(base, sidekick, t)
    torch.testing.assert_close(head.probs.sum(1), torch.ones(8))
    torch.testing.assert_close(head.confidence, head.probs.amax(1))
    assert (head.entropy >= -1e-5).all()
    shifted = duo_head(base + shift, sidekick - shift, t)
    torch.testing.assert_close(shifted.probs, head.probs, rtol=0, atol=5e-3)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    permuted = duo_head(base[:, order], sidekick[:, order], t)
    torch.testing.assert_close(permuted.probs, head.probs[:, order])
    torch.testing.assert_close(permuted.confidence, head.confidence)
    torch.testing.assert_close(permuted.entropy, head.entropy)
    alone = duo_head(base, sidekick, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(alone.probs, base.softmax(1))


EDGE_CLASSES = (6, 1001, 17000)


def check_edges(head: object, uq_only: bool, want: dict[str, tuple[int, int, bool]]) -> None:
    for row, (name, (weighted, alone, exists)) in enumerate(want.items()):
        expected = alone if uq_only else weighted
        assert head.prediction[row] == expected, name
        assert head.confidence[row].isnan() == (not exists), name
        assert head.entropy[row].isnan() == (not exists), name
        if head.probs is not None:
            assert head.probs[row].isnan().all() == (not exists), name
            if exists:
                torch.testing.assert_close(
                    head.confidence[row], head.probs[row, expected], rtol=2e-6, atol=0, msg=name
                )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("uq_only", [False, True])
@pytest.mark.parametrize("classes", EDGE_CLASSES)
def test_edges_are_the_same_on_all_paths(classes: int, uq_only: bool, device: str) -> None:
    base, sidekick, want = edge_rows(classes)
    t = torch.tensor([1.5, 1.0], device=device)
    for return_probs in (True, False):
        head = duo_head(
            base.to(device), sidekick.to(device), t, return_probs=return_probs, uq_only=uq_only
        )
        check_edges(head, uq_only, want)
    masked = duo_head(base.to(device), sidekick.to(device), torch.tensor([0.0, 1.0], device=device))
    assert masked.probs[5, 1] == 0
    assert masked.confidence[5].isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batches(device: str) -> None:
    empty = torch.zeros(0, 3, device=device)
    head = duo_head(empty, empty, torch.ones(2, device=device))
    assert head.probs.shape == (0, 3)
    assert head.prediction.shape == head.confidence.shape == head.entropy.shape == (0,)
    assert head.prediction.dtype == torch.int64


def test_probabilities_that_round_to_the_same_do_not_hide_the_prediction() -> None:
    close = torch.tensor([[1e-9, 2e-9, 0.0]])
    assert duo_head(close, close, torch.tensor([1.0, 0.0])).prediction == 1


@pytest.mark.parametrize("uq_only", [False, True])
@pytest.mark.parametrize("return_probs", [False, True])
def test_gradcheck(return_probs: bool, uq_only: bool) -> None:
    base, sidekick, _ = make_logits(4, 6, seed=1)
    base[0, 2] = sidekick[1, 3] = -30.0
    t = torch.tensor([1.3, 0.4])
    inputs = [x.double().requires_grad_() for x in (base, sidekick, t)]

    def differentiable(*args: Tensor) -> tuple[Tensor, ...]:
        head = duo_head(*args, return_probs=return_probs, uq_only=uq_only)
        return tuple(x for x in head if x is not None and x.is_floating_point())

    assert torch.autograd.gradcheck(differentiable, inputs)
    assert torch.autograd.gradgradcheck(differentiable, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_autograd_in_float64(dtype: torch.dtype, device: str) -> None:
    base, sidekick, targets = make_logits(5, 12, seed=1, device=device)
    base[:, 3], sidekick[:, 3] = -INF, -INF  # a masked class
    targets[targets == 3] = 0
    t = torch.tensor([1.3, 0.4], device=device)
    leaves = [base.to(dtype), sidekick.to(dtype), t]
    mine = [x.clone().requires_grad_() for x in leaves]
    theirs = [x.double().requires_grad_() for x in leaves]

    head = duo_head(*mine)
    index = targets[:, None]
    (head.probs.gather(1, index).sum() + 2 * head.confidence.sum() - head.entropy.sum()).backward()
    keep = [k for k in range(12) if k != 3]
    logits = theirs[2][0] * theirs[0][:, keep] + theirs[2][1] * theirs[1][:, keep]
    probs = logits.softmax(1)
    picked = probs.gather(1, torch.where(index > 3, index - 1, index))
    (picked.sum() + 2 * probs.amax(1).sum() - torch.special.entr(probs).sum()).backward()

    for x, y in zip(mine, theirs, strict=True):
        want = y.grad.to(x.dtype)
        torch.testing.assert_close(
            x.grad, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
        )
    assert (mine[0].grad[:, 3] == 0).all()


@not_interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("return_probs", [False, True])
def test_opcheck(return_probs: bool, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (3, 0):
            base, sidekick, _ = make_logits(rows, 11, seed=0, device=device)
            logits = [x.to(dtype).requires_grad_() for x in (base, sidekick)]
            t = torch.tensor([1.0, 0.5], device=device, requires_grad=True)
            for uq_only in (False, True):
                torch.library.opcheck(
                    torch.ops.lightning_duo.head.default, (*logits, t, return_probs, uq_only)
                )


@not_interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("uq_only", [False, True])
def test_compiled_for_any_batch(uq_only: bool, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: duo_head(*args, uq_only=uq_only), fullgraph=True, dynamic=True
    )
    t = torch.tensor([1.5, 1.0], device=device)
    for classes in EDGE_CLASSES[:2]:
        base, sidekick, want = edge_rows(classes)
        check_edges(compiled(base.to(device), sidekick.to(device), t), uq_only, want)
    for rows in (2, 5, 1, 0):
        base, sidekick, _ = make_logits(rows, 1001, seed=rows, device=device)
        mine, theirs = compiled(base, sidekick, t), duo_head(base, sidekick, t, uq_only=uq_only)
        assert torch.equal(mine.prediction, theirs.prediction)
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)


@not_interpreted
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_many_classes_against_float64(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(duo_head, fullgraph=True)
    base, sidekick, _ = make_logits(2, 151936, seed=0, device=device)
    t = torch.tensor([1.3, 0.4], device=device)
    head = compiled(base, sidekick, t)
    probs, prediction, confidence, _ = float64_head(base, sidekick, t)
    torch.testing.assert_close(head.probs.double(), probs, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(head.confidence.double(), confidence, rtol=2e-6, atol=0)
    assert torch.equal(head.prediction, prediction)


@not_interpreted
def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    base, sidekick, _ = make_logits(6, 9, seed=0)
    leaves = [base, sidekick, torch.tensor([1.3, 0.4])]
    grads = []
    for head in (torch.compile(duo_head, fullgraph=True), duo_head):
        inputs = [x.clone().requires_grad_() for x in leaves]
        output = head(*inputs)
        (output.confidence.sum() + output.entropy.sum() + output.probs[:, 0].sum()).backward()
        grads.append([x.grad for x in inputs])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


BAD = [
    (torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2), "one shape"),
    (torch.zeros(3), torch.zeros(3), torch.ones(2), "one shape"),
    (torch.zeros(2, 0), torch.zeros(2, 0), torch.ones(2), "K >= 1"),
    (torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.ones(2), "one dtype"),
    (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), torch.ones(2), "one dtype"),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), "temperatures"),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2).double(), "temperatures"),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, device="meta"), "one device"),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, -0.5]), "at least 0"),
]


@pytest.mark.parametrize(("base", "sidekick", "t", "message"), BAD)
def test_bad_input_is_named(base: Tensor, sidekick: Tensor, t: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duo_head(base, sidekick, t)


@not_interpreted
def test_bad_input_of_compiled_code() -> None:
    compiled = torch.compile(duo_head, fullgraph=True)
    for base, sidekick, t, message in BAD[:-1]:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            compiled(base, sidekick, t)
    torch._dynamo.reset()
    base, sidekick, t, _ = BAD[-1]
    assert compiled(base, sidekick, t).confidence.isnan().all()

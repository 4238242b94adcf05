"""The composite head against float64, and its properties."""

import pytest
import torch
from helpers import make_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_duo_kernels import duo_head


def float64_head(base: Tensor, sidekick: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    logits = t[0].double() * base.double() + t[1].double() * sidekick.double()
    probs = torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True))
    return probs, -(probs * probs.clamp_min(1e-300).log()).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 10, 257, 1000])
def test_against_float64(classes: int, dtype: torch.dtype) -> None:
    base, sidekick, _ = make_logits(64, classes, seed=classes)
    base, sidekick, t = base.to(dtype), sidekick.to(dtype), torch.tensor([1.3, 0.4])
    head = duo_head(base, sidekick, t)
    probs, entropy = float64_head(base, sidekick, t)
    torch.testing.assert_close(head.probs.double(), probs, rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(head.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert torch.equal(head.prediction, probs.argmax(1))
    torch.testing.assert_close(head.confidence.double(), probs.amax(1), rtol=2e-6, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(-1e3, 1e3), st.floats(0, 5), st.floats(0, 5))
def test_properties(seed: int, shift: float, t_base: float, t_sidekick: float) -> None:
    base, sidekick, _ = make_logits(8, 6, seed=seed)
    t = torch.tensor([t_base, t_sidekick])
    head = duo_head(base, sidekick, t)
    torch.testing.assert_close(head.probs.sum(1), torch.ones(8))
    shifted = duo_head(base + shift, sidekick - shift, t)
    torch.testing.assert_close(shifted.probs, head.probs, rtol=0, atol=5e-3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted = duo_head(base[:, order], sidekick[:, order], t)
    torch.testing.assert_close(permuted.probs, head.probs[:, order])
    alone = duo_head(base, sidekick, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(alone.probs, base.softmax(1))


def test_uq_only_predicts_with_the_base() -> None:
    base, sidekick, _ = make_logits(200, 5, seed=0, margin=0.5)
    t = torch.tensor([0.3, 2.0])
    head = duo_head(base, sidekick, t, uq_only=True, return_probs=False)
    probs, _ = float64_head(base, sidekick, t)
    assert head.probs is None
    assert torch.equal(head.prediction, base.argmax(1))
    expected = probs.gather(1, base.argmax(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(head.confidence.double(), expected, rtol=2e-6, atol=0)
    assert not torch.equal(head.prediction, probs.argmax(1))


def test_masks_ties_nan_and_empty_batches() -> None:
    t = torch.tensor([1.0, 0.0])
    masked = torch.tensor([[1.0, -torch.inf, 0.0]])
    assert duo_head(torch.zeros(1, 3), masked, t).probs[0, 1] == 0
    assert duo_head(torch.zeros(1, 3), torch.zeros(1, 3), t).prediction == 0
    assert duo_head(torch.full((1, 3), torch.nan), masked, t).confidence.isnan()
    empty = duo_head(torch.zeros(0, 3), torch.zeros(0, 3), t)
    assert empty.probs.shape == (0, 3)
    assert empty.prediction.shape == empty.confidence.shape == empty.entropy.shape == (0,)


def test_probabilities_that_round_to_the_same_do_not_hide_the_prediction() -> None:
    close = torch.tensor([[1e-9, 2e-9, 0.0]])
    assert duo_head(close, close, torch.tensor([1.0, 0.0])).prediction == 1


def test_gradients_reach_logits_and_temperatures() -> None:
    base, sidekick, _ = make_logits(4, 3, seed=1)
    t = torch.tensor([1.0, 0.5])
    inputs = [x.requires_grad_() for x in (base, sidekick, t)]
    duo_head(*inputs).confidence.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in inputs)


@pytest.mark.parametrize(
    ("base", "sidekick", "t", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2), "one shape"),
        (torch.zeros(2, 0), torch.zeros(2, 0), torch.ones(2), "K >= 1"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.ones(2), "one dtype"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), torch.ones(2), "one dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), "temperatures"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, device="meta"), "one device"),
    ],
)
def test_bad_input_is_named(base: Tensor, sidekick: Tensor, t: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duo_head(base, sidekick, t)

"""The duo head in plain PyTorch: what the Triton kernel is held against, and the path elsewhere.

It runs on devices without Triton, is what `torch.compile` turns into C++ on the CPU, and what an
exported program holds, so that the program loads where this package is not installed.
"""

import torch
from torch import Tensor

CHUNK = 1 << 17  # logits of one model that `head_by_rows` works on at a time


def weighted_sum(base: Tensor, sidekick: Tensor, temperatures: Tensor) -> Tensor:
    """Duo logits, in the dtype of the temperatures.

    A class that either model masks with ``-inf`` is masked, whatever its temperature
    (``0 * -inf`` would be NaN).

    Args:
        base: Logits of the base, shape (B, K).
        sidekick: Logits of the sidekick, shape (B, K).
        temperatures: The two multipliers, shape (2,). A negative one counts as NaN.

    Returns:
        Shape (B, K).

    Source: Asymmetric Duos, Sec. 3.1.
    """
    base, sidekick = base.to(temperatures.dtype), sidekick.to(temperatures.dtype)
    weights = torch.where(temperatures >= 0, temperatures, torch.nan)
    total = weights[0] * base + weights[1] * sidekick
    return torch.where(torch.minimum(base, sidekick) == -torch.inf, -torch.inf, total)


def _nan_as_inf(x: Tensor) -> Tensor:
    """So that every maximum is a number; ``inf - inf`` then makes the softmax of the row NaN."""
    # Inductor does not vectorise isnan on the CPU; this is the same.
    return torch.where(x != x, torch.inf, x)


def _lowest_at(logits: Tensor, maximum: Tensor) -> Tensor:
    """Lowest class that holds its row's maximum, shape (B,), as a floating-point number.

    Inductor vectorises this on the CPU, where its argmax takes more time than all the rest.
    """
    classes = logits.shape[1]
    dtype = torch.float32 if classes <= 1 << 24 else torch.float64
    numbers = torch.arange(classes, device=logits.device, dtype=dtype)
    return torch.where(logits == maximum, numbers, classes - 1.0).amin(dim=1)


def head(
    base: Tensor, sidekick: Tensor, temperatures: Tensor, return_probs: bool, uq_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, prediction, confidence and entropy; as the operator, in its argument order.

    Without ``return_probs`` the first result is an empty tensor.
    """
    logits = _nan_as_inf(weighted_sum(base, sidekick, temperatures))
    top = logits.amax(dim=1, keepdim=True)
    ranked = _nan_as_inf(base) if uq_only else logits
    lowest = _lowest_at(ranked, ranked.amax(dim=1, keepdim=True) if uq_only else top)
    below = logits - top
    exps = below.exp()
    total = exps.sum(dim=1, keepdim=True)
    # Masked classes are -inf below the top and have probability 0; no finite class is as far.
    moment = (exps * below.clamp_min(-1e4)).sum(dim=1)
    probs = exps / total if return_probs else logits.new_empty(0)
    # Inductor's C++ works row by row, each row in cache, unless results of shape (B,) follow from
    # the sums; those of shape (B, 2) stay in the row's loop. Hence all are computed twice.
    twice = logits.new_zeros(2)
    total_2 = total + twice
    prediction = (lowest.unsqueeze(1) + twice).long()[:, 0]
    if uq_only:
        own = prediction.unsqueeze(1)
        chosen = _nan_as_inf(
            weighted_sum(base.gather(1, own), sidekick.gather(1, own), temperatures)
        )
        confidence = (chosen - top + twice).exp() / total_2
    else:
        confidence = total_2.reciprocal()
    entropy = total_2.log() - (moment.unsqueeze(1) + twice) / total_2
    return probs, prediction, confidence[:, 0], entropy[:, 0]


def head_by_rows(
    base: Tensor, sidekick: Tensor, temperatures: Tensor, return_probs: bool, uq_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`head`, a few rows at a time: what it makes on the way stays in the cache.

    For calls as they are, on the CPU; the compilers make such loops themselves.
    """
    rows = max(1, CHUNK // base.shape[1])
    parts = [
        head(*chunk, temperatures, return_probs, uq_only)
        for chunk in zip(torch.split(base, rows), torch.split(sidekick, rows), strict=True)
    ]
    probs, prediction, confidence, entropy = map(torch.cat, zip(*parts, strict=True))
    return probs, prediction, confidence, entropy


def head_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    base: Tensor,
    sidekick: Tensor,
    temperatures: Tensor,
    prediction: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the logits and the temperatures, from those of the head's results.

    The probabilities are computed anew from the logits, so the forward keeps nothing of size K.

    Args:
        grads: Gradients of probabilities (B, K), confidence (B,) and entropy (B,), or None.
        base: Logits of the base, shape (B, K).
        sidekick: Logits of the sidekick, shape (B, K).
        temperatures: The two multipliers, shape (2,).
        prediction: Predicted classes, shape (B,), whose probability the confidence is.
    """
    grad_probs, grad_confidence, grad_entropy = grads
    logits = weighted_sum(base, sidekick, temperatures)
    log_probs = torch.log_softmax(logits, dim=1)
    probs = log_probs.exp()
    possible = probs > 0
    grad = torch.zeros_like(probs) if grad_probs is None else grad_probs
    if grad_confidence is not None:
        classes = torch.arange(probs.shape[1], device=probs.device)
        chosen = classes == prediction.unsqueeze(1)
        grad = grad + torch.where(chosen, grad_confidence.unsqueeze(1), 0.0)
    if grad_entropy is not None:
        # d(-sum p log p)/dp = -log p - 1; the 1 falls out below, as softmax is shift-invariant.
        grad = grad - grad_entropy.unsqueeze(1) * torch.where(possible, log_probs, 0.0)
    inner = (grad * probs).sum(dim=1, keepdim=True)
    grad_logits = probs * (grad - inner)
    # A masked class has no probability to change, and -inf times its zero gradient is NaN.
    base_ = torch.where(possible, base.to(probs.dtype), 0.0)
    sidekick_ = torch.where(possible, sidekick.to(probs.dtype), 0.0)
    grad_temperatures = torch.stack([(grad_logits * base_).sum(), (grad_logits * sidekick_).sum()])
    return (
        (temperatures[0] * grad_logits).to(base.dtype),
        (temperatures[1] * grad_logits).to(sidekick.dtype),
        grad_temperatures,
    )

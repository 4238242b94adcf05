"""Readable composite of the duo head: the reference every faster kernel is held against."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HeadOutput(NamedTuple):
    """What the head says of each row."""

    probs: Tensor | None
    """Softmax of the duo logits, shape (B, K), float32; None with ``return_probs=False``."""
    prediction: Tensor
    """Predicted class, shape (B,), int64."""
    confidence: Tensor
    """Probability of the prediction, shape (B,), float32."""
    entropy: Tensor
    """Entropy of ``probs`` in nats, shape (B,), float32."""


def duo_head(
    base_logits: Tensor,
    sidekick_logits: Tensor,
    temperatures: Tensor,
    *,
    return_probs: bool = True,
    uq_only: bool = False,
) -> HeadOutput:
    """Weigh, add and soften the logits of the two models.

    A class that either model masks with ``-inf`` is masked in the duo, whatever its temperature
    (``0 * -inf`` would be NaN). NaN logits give a NaN confidence. Of equal maxima the lowest
    class wins.

    Args:
        base_logits: Logits of the base, shape (B, K), float32, bfloat16 or float16.
        sidekick_logits: Logits of the sidekick, same shape, dtype and device.
        temperatures: The two multipliers (base, sidekick), shape (2,), float32, same device.
        return_probs: Whether to return the (B, K) probabilities.
        uq_only: Predict with the base alone; the duo only says how sure it is of that prediction.

    Returns:
        ``(probs, prediction, confidence, entropy)``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.

    Example:
        >>> import torch
        >>> base, sidekick = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> duo_head(base, sidekick, torch.tensor([0.5, 1.0])).confidence
        tensor([0.5000])

    Source: Asymmetric Duos, Sec. 3.1 (weighted sum, UQ only) and Eq. 1 (confidence).
    """
    _check(base_logits, sidekick_logits, temperatures)
    base, sidekick = base_logits.float(), sidekick_logits.float()
    masked = (base == -torch.inf) | (sidekick == -torch.inf)
    weighted = temperatures[0] * base + temperatures[1] * sidekick
    logits = weighted.masked_fill(masked, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    # Of the logits, as probabilities that differ may round to the same number.
    prediction = (base if uq_only else logits).argmax(dim=-1)
    confidence = probs.gather(-1, prediction.unsqueeze(-1)).squeeze(-1)
    entropy = torch.special.entr(probs).sum(dim=-1)
    return HeadOutput(probs if return_probs else None, prediction, confidence, entropy)


def _check(base: Tensor, sidekick: Tensor, temperatures: Tensor) -> None:
    if base.ndim != 2 or base.shape != sidekick.shape or base.shape[1] == 0:
        raise ValueError(
            "duo_head expects base and sidekick logits of one shape (B, K) with K >= 1, "
            f"got {tuple(base.shape)} and {tuple(sidekick.shape)}"
        )
    if base.dtype not in FLOATS or base.dtype != sidekick.dtype:
        raise ValueError(
            "duo_head expects base and sidekick logits of one dtype out of float32, bfloat16 and "
            f"float16, got {base.dtype} and {sidekick.dtype}; convert one with .to(dtype)"
        )
    if temperatures.shape != (2,) or temperatures.dtype != torch.float32:
        raise ValueError(
            "duo_head expects temperatures (base, sidekick) as a float32 tensor of shape (2,), "
            f"got {temperatures.dtype} of shape {tuple(temperatures.shape)}"
        )
    if not base.device == sidekick.device == temperatures.device:
        raise ValueError(
            "duo_head expects both logits and the temperatures on one device, got "
            f"{base.device}, {sidekick.device} and {temperatures.device}"
        )

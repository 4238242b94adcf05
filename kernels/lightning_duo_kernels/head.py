"""The duo head as one operator, ``lightning_duo::head``, and the function that calls it."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_duo_kernels import composite

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HAS_TRITON = find_spec("triton") is not None


class HeadOutput(NamedTuple):
    """What the head says of each row; float64 where the logits are, else float32."""

    probs: Tensor | None
    """Softmax of the duo logits, shape (B, K); None with ``return_probs=False``."""
    prediction: Tensor
    """Predicted class, shape (B,), int64."""
    confidence: Tensor
    """Probability of the prediction, shape (B,)."""
    entropy: Tensor
    """Entropy of ``probs`` in nats, shape (B,)."""


def duo_head(
    base_logits: Tensor,
    sidekick_logits: Tensor,
    temperatures: Tensor,
    *,
    return_probs: bool = True,
    uq_only: bool = False,
) -> HeadOutput:
    """Weigh, add and soften the logits of the two models, and say how sure they are.

    On CUDA this is one Triton kernel that reads both logit tensors once (twice for the
    probabilities of more than 16384 classes); elsewhere, and with float64 logits, it is plain
    PyTorch. Arithmetic is in float32, or float64 for float64 logits. All paths agree on the edges:

    - Of equal maxima the lowest class wins.
    - A class that either model masks with ``-inf`` is masked, whatever its temperature.
    - NaN counts as ``+inf`` in the prediction. A row that has either in a class that is not masked,
      or nothing but ``-inf``, has no softmax: its probabilities, confidence and entropy are NaN (so
      no threshold accepts it), and it predicts the lowest class that holds NaN or ``+inf`` (of the
      base, with ``uq_only``), or else class 0.
    - Negative temperatures are an error on the CPU; where looking at them would stall the device,
      and in compiled code, they count as NaN.

    Differentiable in the logits and the temperatures.

    Args:
        base_logits: Logits of the base, shape (B, K), float32, bfloat16, float16 or float64.
        sidekick_logits: Logits of the sidekick, same shape, dtype and device.
        temperatures: The two multipliers (base, sidekick), shape (2,), on the same device, float32
            (float64 for float64 logits).
        return_probs: Whether to return the (B, K) probabilities; without them nothing of that
            size is written.
        uq_only: Predict with the base alone; the duo only says how sure it is of that prediction.

    Returns:
        ``(probs, prediction, confidence, entropy)``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, K is 0, or a temperature is
            negative.

    Example:
        >>> import torch
        >>> base, sidekick = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> duo_head(base, sidekick, torch.tensor([0.5, 1.0])).confidence
        tensor([0.5000])

    Source: Asymmetric Duos, Sec. 3.1 (weighted sum, UQ only) and Eq. 1 (confidence).
    """
    _check(base_logits, sidekick_logits, temperatures)
    arguments = (base_logits, sidekick_logits, temperatures, return_probs, uq_only)
    if torch.compiler.is_exporting():
        # A program that holds the operator would only load where this package is.
        results = composite.head(*arguments)
    elif base_logits.is_cuda and not torch.compiler.is_compiling():
        with torch.cuda.device(base_logits.device):  # Triton launches on the current device
            results = head_operator(*arguments)
    else:
        results = head_operator(*arguments)
    probs, prediction, confidence, entropy = results
    return HeadOutput(probs if return_probs else None, prediction, confidence, entropy)


@torch.library.triton_op("lightning_duo::head", mutates_args={})
def head_operator(
    base: Tensor, sidekick: Tensor, temperatures: Tensor, return_probs: bool, uq_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`duo_head` without its checks; the first result is empty without ``return_probs``."""
    if _HAS_TRITON and base.dtype != torch.float64:
        from triton import knobs

        if base.is_cuda or knobs.runtime.interpret:
            from lightning_duo_kernels.head_triton import launch_head

            return launch_head(base, sidekick, temperatures, return_probs, uq_only)
    plain = type(base) is Tensor and base.device.type == "cpu"  # not so where it is compiled
    if plain and base.numel() > composite.CHUNK:
        return composite.head_by_rows(base, sidekick, temperatures, return_probs, uq_only)
    return composite.head(base, sidekick, temperatures, return_probs, uq_only)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    base, sidekick, temperatures, ctx.return_probs, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(base, sidekick, temperatures, output[1])


def _backward(
    ctx: Any,
    grad_probs: Tensor | None,
    grad_prediction: None,
    grad_confidence: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    grads = (grad_probs if ctx.return_probs else None, grad_confidence, grad_entropy)
    if all(grad is None for grad in grads):
        return None, None, None, None, None
    return *composite.head_backward(grads, *ctx.saved_tensors), None, None


head_operator.register_autograd(_backward, setup_context=_setup_context)


def _check(base: Tensor, sidekick: Tensor, temperatures: Tensor) -> None:
    if base.ndim != 2 or base.shape != sidekick.shape or base.shape[1] == 0:
        raise ValueError(
            "duo_head expects base and sidekick logits of one shape (B, K) with K >= 1, "
            f"got {tuple(base.shape)} and {tuple(sidekick.shape)}"
        )
    if base.dtype not in FLOATS or base.dtype != sidekick.dtype:
        raise ValueError(
            "duo_head expects base and sidekick logits of one dtype out of float32, bfloat16, "
            f"float16 and float64, got {base.dtype} and {sidekick.dtype}; convert with .to(dtype)"
        )
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    if temperatures.shape != (2,) or temperatures.dtype != dtype:
        raise ValueError(
            f"duo_head expects temperatures (base, sidekick) as a {dtype} tensor of shape (2,) "
            f"for {base.dtype} logits, got {temperatures.dtype} of shape "
            f"{tuple(temperatures.shape)}"
        )
    if not base.device == sidekick.device == temperatures.device:
        raise ValueError(
            "duo_head expects both logits and the temperatures on one device, got "
            f"{base.device}, {sidekick.device} and {temperatures.device}"
        )
    looking_is_free = temperatures.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking_is_free and type(temperatures) in (Tensor, torch.nn.Parameter):
        values = temperatures.detach()
        if bool((values < 0).any()):
            raise ValueError(
                "duo_head expects temperatures of at least 0 (they multiply the logits), got "
                f"{values.tolist()}"
            )

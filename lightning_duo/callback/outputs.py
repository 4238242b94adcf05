"""What the sidekick returns, and the logits in it."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call, logits_in, logits_like
from lightning_duo.batch import describe
from lightning_duo.callback.refusals import REMEDY
from lightning_duo.nested import Path, leaves
from lightning_duo.tasks import Classes, Task


def run_sidekick(model: nn.Module, call: Call) -> Any:
    """What the sidekick returns.

    Raises:
        ValueError: If it cannot run these inputs.
    """
    try:
        return call.of(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model may raise
        seen = [describe(leaf) for _, leaf in leaves(call)][:3]
        takes = _takes(model)
        raise ValueError(
            f"the sidekick cannot run the base's inputs, {' and '.join(seen) or 'no tensor'}: "
            f"{type(error).__name__}: {error}{f'; {takes}' if takes else ''}. Pass as sidekick a "
            "module, or a function num_classes -> nn.Module, that takes these inputs, or pass "
            "sidekick_transform=..., such as lambda x: x.expand(-1, 3, -1, -1) for gray images; "
            f"{REMEDY}"
        ) from error


def _takes(model: nn.Module) -> str:
    """What the first layer of a model takes, as far as it tells."""
    kinds = (nn.Conv2d, nn.Embedding, nn.Linear)
    first = next(((n, part) for n, part in model.named_modules() if isinstance(part, kinds)), None)
    if first is None:
        return ""
    name, layer = first
    if isinstance(layer, nn.Conv2d):
        what = f"images (N, {layer.in_channels}, H, W)"
    elif isinstance(layer, nn.Embedding):
        what = f"token ids (N, T) below {layer.num_embeddings}"
    else:
        what = f"(..., {layer.in_features})"
    return f"its first layer{f', {name},' if name else ''} takes {what}"


def sidekick_logits(output: Any, base: Tensor | None, logits_at: Path, task: Task) -> Tensor:
    """The logits in what the sidekick returned, in the shape of the base's if they are given.

    Raises:
        ValueError: If there are none, of another shape, or probabilities of classes.
    """
    if base is None:
        logits = logits_in(output, logits_at, fewest=3)
    else:
        try:
            logits = logits_like(base, output, logits_at)
        except ValueError as error:
            found = logits_in(output, logits_at, fewest=base.ndim + 1)
            assert found is not None
            raise ValueError(_other_shape(found, base, task)) from error
    if logits is None:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the sidekick must return floating-point logits, or an object or mapping with them "
            f"under 'logits', got {what}; pass a module whose forward returns its logits alone"
        )
    return logits.as_subclass(Tensor)  # one with metadata would carry them along


def _other_shape(found: Tensor, base: Tensor, task: Task) -> str:
    """What to do about logits of the sidekick that have another shape than the base's."""
    wanted = task.outputs(base)
    what = f"the sidekick gives logits {tuple(found.shape)} but the base {tuple(base.shape)}"
    if found.ndim > 1 and task.outputs(found) == wanted:
        return f"{what}; both must decide the same things, in the same order; {REMEDY}"
    return (
        f"{what}; give it a head with {wanted} output{'s'[: wanted != 1]}, or pass a name or a "
        "callable num_classes -> nn.Module"
    )


def check_no_probabilities(logits: Tensor, task: Task) -> None:
    """Raise ValueError if a sidekick for classes ends in softmax.

    Args:
        logits: What it gave.
        task: The task.
    """
    if not isinstance(task, Classes) or not logits.numel():
        return
    with torch.no_grad():
        total = logits.float().sum(task.dim)
        if bool((logits >= 0).all()) and bool((total - 1).abs().max() < 1e-3):
            raise ValueError(
                "the sidekick gives probabilities (numbers >= 0 that sum to 1 over the classes) "
                "where logits belong; take the softmax off its end"
            )

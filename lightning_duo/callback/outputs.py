"""What the sidekick returns, and the logits in it."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call, logits_in, logits_like
from lightning_duo.batch import describe
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
        raise ValueError(
            f"the sidekick cannot run the base's inputs ({', '.join(seen)}): "
            f"{type(error).__name__}: {error}; pass DuoCallback(..., sidekick_transform=...) that "
            "makes of them what it takes, such as lambda x: x.expand(-1, 3, -1, -1) for gray "
            "images, or another sidekick"
        ) from error


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
            raise ValueError(
                f"the sidekick gives logits {() if found is None else tuple(found.shape)} but the "
                f"base {tuple(base.shape)}: give it a head with {task.outputs(base)} outputs, or "
                "pass a name or a callable num_classes -> nn.Module"
            ) from error
    if logits is None:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the sidekick must return floating-point logits, or an object or mapping with them "
            f"under 'logits', got {what}"
        )
    return logits


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

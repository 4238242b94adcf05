"""Logits of two trained models on the same samples, from the models."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_duo.base import Call
from lightning_duo.batch import BatchFn, describe, read_batch
from lightning_duo.isolation import evaluating
from lightning_duo.logits.check import Logits
from lightning_duo.module import DuoModule
from lightning_duo.nested import Path, mapped
from lightning_duo.tasks import Classes, Task


@torch.no_grad()
def collect_logits(
    base: nn.Module,
    sidekick: nn.Module,
    data: Iterable[Any],
    *,
    batch_fn: BatchFn = read_batch,
    task: Task | None = None,
    logits_at: Path = (),
) -> Logits:
    """Run two trained models over a DataLoader, in eval mode.

    Args:
        base: Maps inputs to logits (B, K), or to a mapping or object with ``logits``.
        sidekick: The same for the same inputs, on the same device; put what it needs in front of
            it, as in ``nn.Sequential(Resize(96), model)``.
        data: Batches, ``(inputs, targets)`` or a mapping with usual keys.
        batch_fn: ``batch -> (inputs, targets)``, for other batches. If the models take several
            arguments, the inputs are a `Call`, as for `DuoPredictor`.
        task: What the logits decide: `Classes` or `Labels` of `lightning_duo.tasks`. By default one
            class of each sample, ``Classes()``, if shapes and dtypes leave no doubt.
        logits_at: As of `DuoModule`.

    Returns:
        Logits (R, K) and targets of all R decisions that have a target, on the CPU, in float32.

    Raises:
        ValueError: If a batch cannot be read, a model gives no logits, it is not clear what they
            decide, or there is no batch.

    Example:
        >>> import torch
        >>> batches = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
        >>> found = collect_logits(torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), batches)
        >>> found.base.shape
        torch.Size([4, 3])
        >>> from lightning_duo.tasks import Labels
        >>> batches = [(torch.randn(4, 8), torch.randint(2, (4, 3)))]
        >>> models = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> collect_logits(*models, batches, task=Labels()).base.shape
        torch.Size([12, 2])
    """
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    duo = DuoModule(base, sidekick, (1.0, 1.0), logits_at=logits_at)
    parts: list[Logits] = []
    with evaluating(duo):
        for batch in data:
            inputs, targets = batch_fn(batch)
            call = Call.with_input(mapped(inputs, lambda x: x.to(device)))
            first, second = (x.float().cpu() for x in call.of(duo.member_logits))
            parts.append(_rows(first, second, targets, task))
    if not parts:
        raise ValueError("the data hold no batch, so there is nothing to fit or measure")
    if any(part.targets.is_floating_point() for part in parts):
        parts = [part._replace(targets=_as_probabilities(*part)) for part in parts]
    return Logits(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _rows(base: Tensor, sidekick: Tensor, targets: Any, task: Task | None) -> Logits:
    """The decisions of a batch."""
    if not isinstance(targets, Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with a tensor of targets, got "
            f"{describe(targets)}"
        )
    if task is None and (base.ndim != 2 or base.shape[1] == 1 or targets.shape == base.shape):
        raise ValueError(
            f"logits {tuple(base.shape)} with {targets.dtype} targets {tuple(targets.shape)} may "
            "decide several things; pass task=Classes() if dimension 1 of the logits holds the "
            "classes, task=Classes(dim=-1) if the last one does, or task=Labels() if each value is "
            "the logit of a label; both are in lightning_duo.tasks"
        )
    if targets.shape[:1] != base.shape[:1]:
        raise ValueError(
            f"a batch has {len(targets) if targets.ndim else 'no'} targets, but the base gives "
            f"logits of shape {tuple(base.shape)} for it"
        )
    task, targets = task or Classes(), targets.cpu()
    rows = task.rows(base, targets, "base")
    assert rows.targets is not None
    return Logits(rows.logits, task.rows(sidekick, targets, "sidekick").logits, rows.targets)


def _as_probabilities(base: Tensor, sidekick: Tensor, targets: Tensor) -> Tensor:
    """Targets (N, K), also of a batch whose targets were all 0 or 1."""
    return one_hot(targets, base.shape[1]).float() if targets.ndim == 1 else targets.float()

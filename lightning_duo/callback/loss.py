"""The loss that the sidekick learns with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_duo.callback.reading import Example
from lightning_duo.tasks import NEAREST, Labels, Task, check_targets


def task_loss(
    logits: Tensor, targets: Tensor, task: Task, options: Mapping[str, Any], *, member: str
) -> Tensor:
    """The sidekick's loss: cross-entropy, of classes or of labels, with the base's own weights.

    Args:
        logits: What the sidekick gives.
        targets: In the places of the logits; see `tasks`.
        task: The task.
        options: What the base's loss was given: ``weight``, ``label_smoothing``, ``pos_weight``.
        member: "sidekick", whose outputs may be probabilities of labels.

    Returns:
        In nats per decision, a scalar.
    """
    logits = logits.float()
    options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
    if isinstance(task, Labels):
        if member in task.probabilities:
            logits = logits.clamp(NEAREST, 1 - NEAREST).logit()
        y = targets.reshape(logits.shape).float()
        known = ~y.isnan()
        loss = F.binary_cross_entropy_with_logits(
            logits, y.nan_to_num(), pos_weight=options.get("pos_weight"), reduction="none"
        )
        return (loss * known).sum() / known.sum().clamp(min=1)
    logits = logits.movedim(task.dim, 1)
    if targets.is_floating_point():
        soft = targets.movedim(task.dim, 1)
        return F.cross_entropy(logits, soft.float(), **options)
    targets = targets.long().reshape(logits.shape[:1] + logits.shape[2:])  # masks (N, 1, H, W)
    if task.ignore_index is None:
        return F.cross_entropy(logits, targets, **options)
    weight = options.get("weight")
    index = {"ignore_index": task.ignore_index, "reduction": "sum"}
    total = F.cross_entropy(logits, targets, **options, **index)  # type: ignore[arg-type]
    counted = (targets != task.ignore_index).float()
    if weight is not None:
        counted = counted * weight[targets.clamp(0, len(weight) - 1)]
    return total / counted.sum().clamp(min=1e-12)


def check_range(example: Example, task: Task, outputs: int) -> None:
    """Raise ValueError if targets are none of the task's.

    Args:
        example: What the base's step made of its batch.
        task: The task.
        outputs: K, where the logits are not known.
    """
    targets, classes = example.targets, outputs
    if isinstance(task, Labels) or targets.is_floating_point():
        if example.logits is not None:
            task.rows(example.logits, targets)
        return
    if example.logits is not None:
        classes = task.outputs(example.logits)
    flat = targets.reshape(-1)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < classes:
        check_targets(flat[flat != task.ignore_index], classes)

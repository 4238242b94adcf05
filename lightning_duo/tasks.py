"""What a task's targets are: class indices, or class probabilities in training."""

import torch
from torch import Tensor


def check_soft_targets(targets: Tensor, num_classes: int) -> Tensor | None:
    """Return targets that are class probabilities, as MixUp makes them, or None if they are none.

    Args:
        targets: Shape (N, K), a floating dtype, for probabilities.
        num_classes: K.
    """
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return None
    if targets.ndim != 2 or targets.shape[1] != num_classes:
        return None
    if targets.device.type == "cpu":
        total = targets.float().sum(1)
        if bool((targets < 0).any()) or bool(((total - 1).abs() > 0.01).any()):
            return None  # several labels, perhaps
    return targets


def check_targets(targets: Tensor, num_classes: int, *, values: bool = True) -> Tensor:
    """Return the targets as int64 class indices of shape (N,), or say why they are none.

    Args:
        targets: True classes, shape (N,), an integer dtype.
        num_classes: K.
        values: Whether to look at the values too.

    Raises:
        ValueError: If they are soft, one-hot, multi-label, or outside 0..K-1.
    """
    if not isinstance(targets, Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with targets as a tensor of class indices, got "
            f"{type(targets).__name__}"
        )
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"a duo needs one class index per sample: targets of shape (N,) and an integer dtype, "
            f"got {targets.dtype} of shape {tuple(targets.shape)}; pass DuoCallback(..., "
            "batch_fn=lambda batch: (inputs, indices)); soft, one-hot and multi-label targets are "
            "not supported, but for class probabilities (N, K) in training, as MixUp makes them"
            + (" (here targets.squeeze(1))" if targets.ndim == 2 and targets.shape[1] == 1 else "")
        )
    targets = targets.long()  # PyTorch cannot compare unsigned numbers
    if values and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"targets must be in 0..{num_classes - 1} for {num_classes} classes, got "
            f"{int(targets.min())}..{int(targets.max())}; where the step shifts, drops or picks "
            "labels, do so in DuoCallback(..., batch_fn=lambda batch: (inputs, targets)) too"
        )
    return targets

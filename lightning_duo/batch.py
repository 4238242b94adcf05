"""From a user's batch to inputs and targets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

INPUT_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs", "img")
TARGET_KEYS = ("label", "labels", "y", "target", "targets")

BatchFn = Callable[[Any], tuple[Any, Tensor]]


def read_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch into inputs and targets.

    Args:
        batch: ``(inputs, targets, ...)``, or a mapping with one of `INPUT_KEYS` and one of
            `TARGET_KEYS`.

    Returns:
        Inputs as the base's forward takes them, and the targets.

    Raises:
        ValueError: If the batch has another form.

    Example:
        >>> import torch
        >>> _, targets = read_batch({"image": torch.zeros(2, 3, 8, 8), "label": torch.ones(2)})
        >>> targets
        tensor([1., 1.])
    """
    if isinstance(batch, Mapping):
        inputs = next((batch[key] for key in INPUT_KEYS if key in batch), None)
        targets = next((batch[key] for key in TARGET_KEYS if key in batch), None)
        seen = f"a mapping with the keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        inputs, targets = batch[:2] if len(batch) >= 2 else (None, None)
        seen = f"a {type(batch).__name__} of {[describe(part) for part in batch]}"
    else:
        inputs, targets, seen = None, None, describe(batch)
    if inputs is None or not isinstance(targets, Tensor):
        raise ValueError(
            f"cannot find inputs and targets in the batch: expected (inputs, targets) "
            f"or a mapping with one of {INPUT_KEYS} and one of {TARGET_KEYS}, got {seen}; pass "
            "batch_fn=lambda batch: (inputs, targets)"
        )
    return inputs, targets


def read_inputs(batch: Any) -> Any:
    """Inputs of a batch that may have no targets.

    Args:
        batch: A tensor, ``(inputs, ...)``, or a mapping with one of `INPUT_KEYS`.

    Raises:
        ValueError: If the batch has another form.

    Example:
        >>> import torch
        >>> read_inputs({"pixel_values": torch.zeros(2, 3, 8, 8)}).shape
        torch.Size([2, 3, 8, 8])
    """
    if isinstance(batch, Mapping):
        inputs = next((batch[key] for key in INPUT_KEYS if key in batch), None)
        seen = f"a mapping with the keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        inputs, seen = (batch[0] if batch else None), f"an empty {type(batch).__name__}"
    else:
        inputs, seen = batch if isinstance(batch, Tensor) else None, describe(batch)
    if inputs is None:
        raise ValueError(
            f"cannot find the inputs in the batch: expected a tensor, (inputs, ...) or a mapping "
            f"with one of {INPUT_KEYS}, got {seen}; pass inputs_fn=lambda batch: inputs"
        )
    return inputs


def check_read(found: Any) -> None:
    """Raise ValueError if what ``batch_fn`` returned is no (inputs, targets)."""
    if not isinstance(found, tuple | list) or len(found) != 2 or found[0] is None:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else describe(found)
        raise ValueError(f"batch_fn must return (inputs, targets), got {what}")
    if not isinstance(found[1], Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with targets as a tensor of class indices, got "
            f"{type(found[1]).__name__}"
        )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether the values are equal, NaN to NaN too."""
    return one.shape == other.shape and bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())


class Snapshot:
    """The tensors of a batch before a step, to tell whether the step changes them in place.

    Args:
        batch: Inputs and targets, nested as they come.
        copy: Whether to compare values too: tensors made in inference mode count no changes, nor
            do others where they are changed behind autograd's back.
    """

    def __init__(self, batch: Any, *, copy: bool) -> None:
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._counted = [(t, t._version) for t in tensors if not t.is_inference()]
        whole = [t for t in tensors if copy and t.layout == torch.strided]
        self._copied = [(t, t.clone()) for t in whole]

    def check(self, module: nn.Module) -> None:
        """Raise ValueError if a tensor is not what it was."""
        changed = [t for t, version in self._counted if t._version != version]
        changed += [t for t, copy in self._copied if not same_values(t, copy)]
        if changed:
            raise ValueError(
                f"{type(module).__name__} changed the batch in place (the tensor of shape "
                f"{tuple(changed[0].shape)}), so the sidekick would see other data than the base "
                "got; work on a copy in the step (x = x.clone()), or pass DuoCallback(..., "
                "batch_fn=lambda batch: (batch[0].clone(), batch[1].clone())), which is called "
                "before the step"
            )


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


def describe(value: Any) -> str:
    """What a value is, in a few words for an error."""
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor {tuple(value.shape)}"
    return type(value).__name__

"""From a user's batch to inputs and targets."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any

from torch import Tensor, nn

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


def check_read(found: Any) -> tuple[Any, Tensor]:
    """What ``batch_fn`` returned, if it is (inputs, targets).

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(found, tuple | list) or len(found) != 2 or found[0] is None:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else describe(found)
        raise ValueError(
            f"batch_fn must return (inputs, targets), got {what}; return two values, as in "
            "batch_fn=lambda batch: (batch[0], batch[1])"
        )
    if not isinstance(found[1], Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with a tensor of targets, got "
            f"{type(found[1]).__name__}; make one of them, as in torch.tensor(batch[1])"
        )
    return found[0], found[1]


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
            f"with one of {INPUT_KEYS}, got {seen}; pass inputs_fn=lambda batch: inputs, which may "
            "be Call(args, kwargs) of lightning_duo.base where the models take several arguments"
        )
    return inputs


def arguments_of(model: nn.Module) -> Mapping[str, Parameter]:
    """The arguments of a model's forward, by name; any at all of one that does not tell.

    Args:
        model: Also one that `torch.compile` has made, which is looked into.

    Example:
        >>> list(arguments_of(nn.Bilinear(2, 2, 2)))
        ['input1', 'input2']
    """
    try:
        return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    except ValueError:  # of a traced one
        return inspect.signature(lambda *args, **kwargs: None).parameters


def describe(value: Any) -> str:
    """What a value is, in a few words for an error."""
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor {tuple(value.shape)}"
    return type(value).__name__

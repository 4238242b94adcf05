"""From a user's batch to the call of a base and its targets, where no training step tells."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.batch import INPUT_KEYS, TARGET_KEYS, arguments_of, describe, read_batch
from lightning_duo.logits.messages import warn
from lightning_duo.nested import parts, without

REMEDY = (
    "pass batch_fn=lambda batch: (inputs, targets), whose inputs are Call(args, kwargs) of "
    "lightning_duo.base if the base takes several"
)


class Takes(NamedTuple):
    """What the forward of a base takes."""

    names: tuple[str, ...]
    """Of its arguments."""
    required: tuple[str, ...]
    """Of those that it cannot do without."""
    most: float
    """How many it takes by position."""
    any_name: bool
    """Whether it takes others by name."""

    @classmethod
    def of(cls, base: nn.Module) -> "Takes":
        """What the base's forward says of itself."""
        found = arguments_of(base).values()
        named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        any_place = any(p.kind is p.VAR_POSITIONAL for p in found)
        by_place = [p for p in named if p.kind is not p.KEYWORD_ONLY]
        return cls(
            tuple(p.name for p in named if p.kind is not p.POSITIONAL_ONLY),
            tuple(p.name for p in named if p.default is inspect.Parameter.empty),
            math.inf if any_place else len(by_place),
            any(p.kind is p.VAR_KEYWORD for p in found),
        )


def read_call(batch: Any, base: nn.Module) -> tuple[Call, Tensor]:
    """How the base is called for a batch, and the targets in it.

    Args:
        batch: ``(inputs, targets)``; ``(x1, x2, targets)`` for a base that takes two arguments; or
            a mapping, a graph or another object with one of `TARGET_KEYS`. Of these the base gets
            by name what its forward names; else one of `INPUT_KEYS`; else, if it takes one
            argument, all but the targets.
        base: The base.

    Returns:
        The call, without targets, and the targets.

    Raises:
        ValueError: If it is not clear what the inputs or the targets are.

    Example:
        >>> batch = {"pixel_values": torch.zeros(2, 8), "labels": torch.tensor([0, 1])}
        >>> call, targets = read_call(batch, nn.Linear(8, 2))
        >>> call.of(nn.Linear(8, 2)).shape, targets
        (torch.Size([2, 2]), tensor([0, 1]))
    """
    takes = Takes.of(base)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _of_places(batch, takes)
    named = dict(parts(batch))
    key = _target_key(named, takes)
    if key is None:
        seen = f" with {sorted(map(str, named))}" if named else ""
        raise ValueError(
            "cannot find inputs and targets in the batch: expected (inputs, targets), or a mapping "
            f"or object with one of {TARGET_KEYS}, got {describe(batch)}{seen}; {REMEDY}"
        )
    targets = named.pop(key)
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"the targets {key!r} of a batch must be a tensor, got {describe(targets)}; {REMEDY}"
        )
    call = None
    if takes.required != ("batch",):
        call = _of_names(named, takes)
        if call is None and (isinstance(batch, Mapping) or is_dataclass(batch)):
            call = _of_one(named, takes)
    if call is None and len(takes.required) == 1:
        call = Call((_left(batch, key),), {})
    if call is None:
        raise ValueError(
            f"it is not clear which of {sorted(map(str, named))} the base takes, whose forward "
            f"has the arguments {list(takes.names)}; {REMEDY}"
        )
    _refuse_some(named, targets, call)
    return call, targets


def _of_places(batch: Sequence[Any], takes: Takes) -> tuple[Call, Tensor]:
    """The call for a tuple, of which the targets follow the inputs."""
    most, fewest = min(takes.most, len(batch) - 1), max(1, len(takes.required))
    if len(batch) == 2 or most < 2:
        inputs, targets = read_batch(batch)
        _warn_of_others(batch, 1)
        return _of_inputs(inputs, takes), targets
    places = [i for i in range(fewest, int(most) + 1) if isinstance(batch[i], Tensor)]
    if len(places) != 1:
        raise ValueError(
            f"a batch has {len(batch)} parts and the forward of the base has the arguments "
            f"{list(takes.names)}, so it is not clear which part is the tensor of targets; {REMEDY}"
        )
    (place,) = places
    _warn_of_others(batch, place)
    return Call(tuple(batch[:place]), {}), batch[place]


def _of_inputs(inputs: Any, takes: Takes) -> Call:
    """The call for what stands before the targets."""
    if isinstance(inputs, Mapping):
        return _of_names(dict(inputs), takes) or Call((inputs,), {})
    several = isinstance(inputs, tuple | list) and 1 < len(takes.required) <= len(inputs)
    return Call(tuple(inputs), {}) if several and len(inputs) <= takes.most else Call((inputs,), {})


def _of_names(named: Mapping[Any, Any], takes: Takes) -> Call | None:
    """The call with what the base's forward names; None if something is missing."""
    if takes.any_name and not takes.names and takes.most == 0:  # forward(**inputs)
        return Call((), {k: v for k, v in named.items() if isinstance(v, Tensor)})
    found = {name: named[name] for name in takes.names if name in named}
    if not found or not set(takes.required) <= found.keys():
        return None
    if len(found) == 1 and takes.names[0] in found and takes.most:
        return Call(tuple(found.values()), {})
    return Call((), found)


def _of_one(named: Mapping[Any, Any], takes: Takes) -> Call | None:
    """The call with the only input that has a usual name, beside what the forward names."""
    key = next((key for key in INPUT_KEYS if key in named), None)
    if key is not None:
        others = {name: named[name] for name in takes.names[1:] if name in named and name != key}
        return Call((named[key],), others)
    if takes.any_name and not takes.names:  # forward(*args, **kwargs)
        return Call((), {k: v for k, v in named.items() if isinstance(v, Tensor)})
    return None


def _target_key(named: Mapping[Any, Any], takes: Takes) -> str | None:
    """The name of the targets; None if there is none.

    Raises:
        ValueError: If there are several.
    """
    found = [key for key in TARGET_KEYS if named.get(key) is not None]
    found = [key for key in found if key not in takes.required] or found
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(repr, found))} may both be the targets; {REMEDY}")
    return found[0] if found else None


def _left(batch: Any, key: str) -> Any:
    """A batch without its targets, if they can be taken out."""
    try:
        return without(batch, (key,))
    except LookupError:
        return batch


def _warn_of_others(batch: Sequence[Any], place: int) -> None:
    """Say which part is taken for the targets, where a later one may be them."""
    y = batch[place]
    others = [x for x in batch[place + 1 :] if isinstance(x, Tensor) and x.shape == y.shape]
    if any(not x.is_floating_point() for x in others):
        warn(
            f"part {place} of a batch (counted from 0) is taken for the targets, although others "
            "have its shape; pass batch_fn=lambda batch: (inputs, targets) if one of them is meant"
        )


def _refuse_some(named: Mapping[Any, Any], targets: Tensor, call: Call) -> None:
    """Refuse batches of which only some targets count, and the base is not told which."""
    masks = [
        key
        for key, x in named.items()
        if isinstance(x, Tensor) and x.dtype == torch.bool and x.shape == targets.shape
    ]
    if masks := [key for key in masks if key not in call.kwargs]:
        raise ValueError(
            f"the batch has masks of the targets' shape ({', '.join(map(str, masks))}), so only "
            "some targets may count; pass batch_fn=lambda batch: (inputs, targets) with the target "
            "-100 where none counts, as in torch.where(batch.val_mask, batch.y, -100)"
        )
    count = named.get("batch_size")
    if "input_id" in named and isinstance(count, int) and count < len(targets):
        raise ValueError(
            f"only the first {count} of {len(targets)} nodes of the batch were asked for, others "
            "are their neighbours; pass batch_fn=lambda batch: (inputs, targets) with the target "
            "-100 for these"
        )

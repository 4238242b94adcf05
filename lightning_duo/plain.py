"""Calls and transforms in plain types, as checkpoints keep them, and back."""

import inspect
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call

LIBRARIES = ("torch.nn.", "torchvision.transforms.")  # whose classes a checkpoint may name
_VALUES = (bool, int, float, str, type(None))


def transform_state(transform: Any) -> dict[str, Any] | None:
    """A transform by the name of its class and its arguments.

    Args:
        transform: Any transform.

    Returns:
        What `transform_of` makes the same transform of; None unless it is a module of PyTorch or
        torchvision without weights, hooks and functions of the user's, whose arguments are its
        attributes.
    """
    if not isinstance(transform, nn.Module) or transform.state_dict():
        return None
    cls = type(transform)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not name.startswith(LIBRARIES):
        return None
    inside: Any = getattr(transform, "transforms", None)  # of torchvision's Compose
    if isinstance(transform, nn.Sequential):
        inside = list(transform)
    state: dict[str, Any] = {"class": name}
    if isinstance(inside, list):
        state["parts"] = [transform_state(part) for part in inside]
    else:
        known = inspect.signature(cls).parameters.values()
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        state["values"] = {
            p.name: _plain(getattr(transform, p.name, p.default))
            for p in known
            if p.kind not in several
        }
    try:
        again = transform_of(state).train(transform.training)
        same = _own(again) == _own(transform)
    except Exception:  # whatever a constructor says of values that it did not get
        same = False
    return state if same else None


def _own(transform: nn.Module) -> dict[str, Any]:
    """The attributes of a module, its hooks among them, without the modules in it."""
    inside = ("_modules", "transforms")
    return {key: value for key, value in vars(transform).items() if key not in inside}


def transform_of(state: dict[str, Any]) -> nn.Module:
    """The transform that `transform_state` described.

    Raises:
        ValueError: If it is no module of these libraries.
    """
    name: str = state["class"]
    module, _, cls = name.rpartition(".")
    make = getattr(import_module(module), cls, None) if name.startswith(LIBRARIES) else None
    if not (isinstance(make, type) and issubclass(make, nn.Module)):
        raise ValueError(f"a transform of a checkpoint is of PyTorch or torchvision, got {name}")
    if "parts" in state:
        parts = [transform_of(part) for part in state["parts"]]
        return make(*parts) if make is nn.Sequential else make(parts)
    return make(**{k: _value(v) for k, v in state["values"].items()})


def _plain(value: Any) -> Any:
    """A value in plain types, of which `_value` makes it again, if it can."""
    if isinstance(value, Enum):
        return {"interpolation": value.value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in (list, tuple):
        return type(value)(_plain(part) for part in value)
    if isinstance(value, float):  # also NumPy's, which no plain checkpoint may hold
        return float(value)
    return value if type(value) in _VALUES else {"unknown": repr(value)}


def _value(plain: Any) -> Any:
    if type(plain) in (list, tuple):
        return type(plain)(_value(part) for part in plain)
    if not isinstance(plain, dict):
        return plain
    if "dtype" in plain:
        return getattr(torch, plain["dtype"])
    if "interpolation" in plain:
        from torchvision.transforms import InterpolationMode

        return InterpolationMode(plain["interpolation"])
    raise ValueError(f"there is no {plain}")


def call_state(call: Call | None) -> dict[str, Any] | None:
    """What the arguments of a call look like, without their values.

    Args:
        call: A call for one sample.

    Returns:
        What `call_of` makes such a call of; None if there is no call, or it holds something else
        than tensors and plain values in tuples, lists and dicts.
    """
    try:
        return None if call is None else {"args": _look(call.args), "kwargs": _look(call.kwargs)}
    except Exception:  # a checkpoint is saved in any case
        return None


def call_of(state: dict[str, Any], samples: int) -> Call:
    """A call like the one described, for so many samples: random numbers, valid whole ones."""
    generator = torch.Generator().manual_seed(0)
    args, kwargs = (_like(state[key], samples, generator) for key in ("args", "kwargs"))
    return Call(args, kwargs)


def _look(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        seen: dict[str, Any] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        if not value.is_floating_point():  # an index that every table of the model has
            seen["largest"] = int(value.max()) if value.numel() else 0
        return seen
    if type(value) in _VALUES:
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_look(part) for part in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _look(part) for key, part in value.items()}}
    raise TypeError(f"a {type(value).__name__} has no plain types")


def _like(seen: dict[str, Any], samples: int, generator: torch.Generator) -> Any:
    if "value" in seen:
        return seen["value"]
    if "dict" in seen:
        return {key: _like(part, samples, generator) for key, part in seen["dict"].items()}
    for kind in (tuple, list):
        if kind.__name__ in seen:
            return kind(_like(part, samples, generator) for part in seen[kind.__name__])
    dtype = getattr(torch, seen["dtype"])
    shape = [samples, *seen["shape"][1:]] if seen["shape"] else []
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator).to(dtype)
    return torch.full(shape, seen["largest"], dtype=dtype)

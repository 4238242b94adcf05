"""Calls of a user's models, and the logits in what they return."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_duo.batch import arguments_of, describe
from lightning_duo.nested import Path, at, leaves

LogitsFn = Callable[..., Tensor]
POSITIONS = {"[:, -1]": -1, "[:, 0]": 0}
"""Last keys of a path to logits -> which position of dimension 1 is meant."""


class Call(NamedTuple):
    """Arguments of one call, ``model(*args, **kwargs)``.

    Functions that take one input of a model take a `Call` in its place if the model has several
    arguments.

    Example:
        >>> import torch
        >>> Call((torch.ones(2, 2),), {"other": torch.eye(2)}).of(torch.add)
        tensor([[2., 1.],
                [1., 2.]])
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def with_input(cls, value: Any) -> "Call":
        """The call with one input, if the value is not a call already."""
        return value if isinstance(value, Call) else cls((value,), {})

    def of(self, function: Callable[..., Any]) -> Any:
        """What the function, or the model, returns for these arguments."""
        return function(*self.args, **self.kwargs)


def logits_in(output: Any, path: Path = (), *, fewest: int = 2) -> Tensor | None:
    """Find the logits in what a model returned; None if there are none.

    Args:
        output: A tensor, which is the logits; or a structure that holds them where the path leads,
            or else under the key or attribute ``logits``.
        path: Keys, positions and names of attributes. The last may be ``"[:, -1]"`` or
            ``"[:, 0]"``: the logits are at the last or first position of dimension 1 of that
            tensor, or of the output if that is a tensor.
        fewest: Dimensions that a tensor has at least where a position is taken of it; one with
            fewer is that of a position already.

    Returns:
        A floating-point tensor of at least one dimension. The task judges its shape.

    Example:
        >>> import torch
        >>> steps, state = torch.zeros(2, 7, 3), torch.zeros(2, 5)
        >>> logits_in((steps, state), (0, "[:, -1]")).shape
        torch.Size([2, 3])
    """
    found = _found(output, path)
    return found if found is None or found.ndim < fewest else _at_position(found, path)


def logits_like(base: Tensor, output: Any, path: Path = ()) -> Tensor | None:
    """Find the sidekick's logits in what it returned, in the shape of the base's.

    The sidekick may return another structure than the base, and with or without the dimension 1
    of which the path takes a position.

    Args:
        base: Logits of the base, as `logits_in` finds them.
        output: What the sidekick returned.
        path: As in `logits_in`.

    Returns:
        None if there are no logits.

    Raises:
        ValueError: If they have another shape, apart from dimensions of size 1, and are not those
            of tokens (N, T, K) for a base that gives (N * T, K).

    Example:
        >>> import torch
        >>> logits_like(torch.zeros(2, 1), {"logits": torch.ones(2)}).shape
        torch.Size([2, 1])
    """
    found = _found(output, path)
    if found is None or found.shape == base.shape:
        return found
    for logits in (found, _at_position(found, path)):
        tokens = logits.ndim == 3 and base.ndim == 2 and logits.shape[2] == base.shape[1]
        if _long(logits) == _long(base) or (tokens and logits.numel() == base.numel()):
            return logits.reshape(base.shape)
    raise ValueError(
        f"base and sidekick must give logits of one shape, got {tuple(base.shape)} and "
        f"{tuple(found.shape)}; give both the same number of classes"
    )


def _found(output: Any, path: Path) -> Tensor | None:
    """The first tensor of floating-point numbers where logits may be."""
    keys = path[:-1] if path and path[-1] in POSITIONS else path
    for way in ((),) if isinstance(output, Tensor) else (keys, ("logits",)):
        try:
            found = at(output, way)
        except LookupError:
            continue
        if isinstance(found, Tensor) and found.ndim and found.is_floating_point():
            return found
    return None


def _at_position(logits: Tensor, path: Path) -> Tensor:
    """Logits at the position that ends the path, if one does."""
    positions = [POSITIONS[str(key)] for key in path[-1:] if key in POSITIONS]
    return logits[:, positions[0]] if positions and logits.ndim > 1 else logits


def _long(logits: Tensor) -> list[int]:
    """Sizes of the dimensions that hold more than one value."""
    return [size for size in logits.shape if size != 1]


def as_logits(output: Any) -> Tensor | None:
    """Find (N, K) logits in what a forward or a step returned; None if there are none.

    Args:
        output: A tensor, a mapping with the key ``logits`` or an object with that attribute.
    """
    logits = logits_in(output)
    return logits if logits is not None and logits.ndim == 2 else None


class LogitsOf(nn.Module):
    """A base whose logits a ``logits_fn`` computes, as it is part of a duo.

    Args:
        logits_fn: ``(module, inputs) -> logits``; with several inputs
            ``(module, *args, **kwargs) -> logits``.
        module: The base.

    Example:
        >>> import torch
        >>> base = LogitsOf(lambda module, x: 2 * module(x), nn.Linear(4, 3))
        >>> base(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, logits_fn: LogitsFn, module: nn.Module) -> None:
        super().__init__()
        self.logits_fn, self.module = logits_fn, module

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.logits_fn(self.module, *args, **kwargs)


class Function(nn.Module):
    """A plain callable as a module: a transform, say, or the client of a model behind a service.

    Args:
        function: It is called with what the module is called with. Where it returns an array of
            NumPy, or numbers in lists, the module returns a tensor of them; in a mapping too.

    Example:
        >>> Function(lambda x: [[0.5, 2.0]])(None)
        tensor([[0.5000, 2.0000]])
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.function(*args, **kwargs)
        if isinstance(output, Mapping):
            return {key: _as_tensor(part) for key, part in output.items()}
        return _as_tensor(output)


def _as_tensor(output: Any) -> Any:
    """Numbers in an array or in lists as a tensor; anything else as it is."""
    if isinstance(output, np.ndarray | list) and not any(leaves(output)):
        with suppress(TypeError, ValueError, RuntimeError):  # of what are no numbers
            return torch.as_tensor(output)
    return output


def as_module(model: Callable[..., Any]) -> nn.Module:
    """A model as a module; another callable in a `Function`."""
    return model if isinstance(model, nn.Module) else Function(model)


def _without_prefix(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        state[prefix + name.removeprefix(f"{prefix}model.")] = state.pop(name)


def _with_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)


class Fitting(nn.Module):
    """A sidekick that is called as the base is, but without what it does not take.

    Its weights have the names that they have in the model itself. An argument that is left alone,
    and that its forward names otherwise, goes by position.

    Args:
        model: The model.
        dropped: Names of arguments that are left out.

    Example:
        >>> import torch
        >>> Fitting(nn.Linear(4, 3), ["mask"])(x=torch.zeros(2, 4), mask=None).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, dropped: Iterable[str] = ()) -> None:
        super().__init__()
        self.model, self.dropped = model, set(dropped)
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]
        taken = arguments_of(model)
        any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        self._names = None if any_name else frozenset(taken)

    def call(self, call: Call) -> Call:
        """The model's call for one of the base; the same if it takes that."""
        kwargs = {name: value for name, value in call.kwargs.items() if name not in self.dropped}
        lone = not call.args and len(kwargs) == 1
        if lone and self._names is not None and not self._names & set(kwargs):
            return Call(tuple(kwargs.values()), {})
        return call if len(kwargs) == len(call.kwargs) else Call(call.args, kwargs)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(Call(args, kwargs)).of(self.model)


def has_forward(module: nn.Module) -> bool:
    """Whether the user's class defines a forward (`LightningModule` only inherits an empty one)."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner is not nn.Module and not owner.__module__.startswith("lightning.")


def call_base(module: nn.Module, inputs: Any) -> Tensor:
    """Run the module's own forward and return its logits, of any shape.

    Raises:
        ValueError: If it has no forward, or one that gives no logits.
    """
    if not has_forward(module):
        raise ValueError(
            f"{type(module).__name__} has no forward, so its logits cannot be computed; define "
            "forward(x) or pass DuoCallback(..., logits_fn=lambda module, inputs: ...)"
        )
    output = module(inputs)
    logits = logits_in(output)
    if logits is None:
        raise ValueError(
            f"the forward of {type(module).__name__} must give floating-point logits, or a mapping "
            f"or object with them under 'logits', got {describe(output)}; pass DuoCallback(..., "
            "logits_fn=lambda module, inputs: ...) that returns them"
        )
    return logits

"""Tensors within whatever holds them: tuples, mappings, dataclasses, graphs, other objects."""

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

DEEPEST = 8  # levels that are looked into
Key: TypeAlias = str | int
Path: TypeAlias = tuple[Key, ...]
"""Keys, positions and names of attributes that lead to a part, from the outside in."""
_PLAIN = (str, bytes, int, float, complex, type(None), type, nn.Module, torch.dtype)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in a structure, each with the path that leads to it.

    Args:
        value: A tensor; or tuples, lists, mappings (also `collections.UserDict`), dataclasses,
            graphs of PyTorch Geometric and other objects with attributes, nested as they come.
        path: What stands before all paths.

    Example:
        >>> [path for path, _ in leaves({"x": torch.zeros(2), "y": [torch.ones(2)]})]
        [('x',), ('y', 0)]
    """
    if isinstance(value, Tensor):
        yield path, value
    elif len(path) < DEEPEST:
        for key, part in parts(value):
            yield from leaves(part, (*path, key))


def parts(value: Any) -> Iterator[tuple[Key, Any]]:
    """Key and value of everything directly in a structure; nothing of what has no parts."""
    if isinstance(value, (*_PLAIN, *_CODE, Tensor, Iterator)):  # what it will give is no part yet
        return
    if isinstance(value, Mapping):
        yield from value.items()
    elif _is_graph(value):
        yield from value.to_dict().items()
    elif isinstance(value, Sequence):
        yield from enumerate(value)
    else:
        yield from _attributes(value).items()


def at(value: Any, path: Path) -> Any:
    """The part of a structure that a path leads to.

    Raises:
        LookupError: If there is none.
    """
    for key in path:
        try:
            by_place = isinstance(value, Sequence) and isinstance(key, int)
            indexed = by_place or isinstance(value, Mapping) or _is_graph(value)
            value = value[key] if indexed else getattr(value, str(key))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise LookupError(f"there is no {path_text(path)}: {error}") from error
    return value


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed; the given one stays as it is.

    Args:
        value: As in `leaves`.
        change: Tensor -> what takes its place.

    Example:
        >>> mapped({"x": torch.zeros(1), "name": "a"}, lambda x: x + 1)
        {'x': tensor([1.]), 'name': 'a'}
    """
    return _mapped(value, change, 0)


def _mapped(value: Any, change: Callable[[Tensor], Any], depth: int) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (*_PLAIN, *_CODE)) or depth >= DEEPEST:
        return value
    if _is_graph(value):
        return copy.copy(value).apply(change)
    old = dict(parts(value))
    new = {key: _mapped(part, change, depth + 1) for key, part in old.items()}
    same = [new[key] is part for key, part in old.items()]
    return value if all(same) else _rebuilt(value, new)


def kept(value: Any) -> Any:
    """A copy of a structure that holds the same tensors, whatever becomes of the given one."""
    if isinstance(value, Tensor) or isinstance(value, (*_PLAIN, *_CODE)):
        return value
    if _is_graph(value):
        return copy.copy(value)
    return _rebuilt(value, {key: kept(part) for key, part in parts(value)})


def every_part(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in a structure, tensors and what holds them, the outer before the inner."""
    yield path, value
    if not isinstance(value, Tensor) and len(path) < DEEPEST:
        for key, part in parts(value):
            yield from every_part(part, (*path, key))


def without(value: Any, path: Path) -> Any:
    """A copy of a mapping, graph or object that lacks the part at a path.

    Raises:
        LookupError: If no part can be taken out there: of a tuple, say, whose places have meanings.
    """
    *outer, last = path
    inner = at(value, tuple(outer))
    if not isinstance(inner, MutableMapping) and not _is_graph(inner):
        raise LookupError(f"{path_text(path)} cannot be taken out of a {type(inner).__name__}")
    inner = copy.copy(inner)
    del inner[last]
    for depth in reversed(range(len(outer))):
        inner = _rebuilt(at(value, tuple(outer[:depth])), {outer[depth]: inner})
    return inner


def path_text(path: Path, of: Any = None) -> str:
    """A path as Python would write it behind a name.

    Args:
        path: The path.
        of: What it leads into, whose mappings are written with brackets.

    Example:
        >>> path_text(("images", 0)), path_text(("images", 0), {"images": [1]})
        ('.images[0]', "['images'][0]")
    """
    texts = []
    for key in path:
        attribute = isinstance(key, str) and key.isidentifier() and not isinstance(of, Mapping)
        texts.append(f".{key}" if attribute else f"[{key!r}]")
        of = None if of is None else at(of, (key,))
    return "".join(texts)


def _is_graph(value: Any) -> bool:
    """Whether this is one of PyTorch Geometric's graphs, or made in their manner."""
    wanted = ("to_dict", "apply", "__getitem__", "__delitem__")
    return all(callable(getattr(type(value), name, None)) for name in wanted)


def _attributes(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    slots = [name for kind in type(value).__mro__ for name in _slots_of(kind)]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}


def _slots_of(kind: type) -> tuple[str, ...]:
    """Attributes for which a class keeps places, as those of attrs do."""
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _rebuilt(value: Any, new: Mapping[Any, Any]) -> Any:
    """A structure of the same type with other parts."""
    if type(value) is dict:  # torch.compile cannot look into copy
        return {**value, **new}
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, part in new.items():
            made[key] = part
        return made
    if isinstance(value, Mapping):
        return type(value)({**value, **new})  # type: ignore[call-arg]
    if isinstance(value, tuple | list) or isinstance(value, Sequence):
        items = [new.get(i, part) for i, part in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # type: ignore[call-arg]
    made = copy.copy(value)
    for name, part in new.items():
        object.__setattr__(made, str(name), part)
    return made

"""A batch as its step gets it, and which parts of it the step calls its modules with."""

from collections.abc import Collection
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from lightning_duo.base import Call
from lightning_duo.nested import Path, every_part, kept, leaves

Template: TypeAlias = tuple[tuple[Path, Path], ...]
"""Argument of a call -> part of the batch that it is."""


class Taken:
    """A batch as a step gets it, whatever the step does with what holds its tensors.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Any) -> None:
        self._parts = list(every_part(batch))  # which keep their identity as long as they live
        self.batch = kept(batch)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [part for _, part in self._parts if isinstance(part, Tensor)]

    @cached_property
    def _paths(self) -> dict[int, Path]:
        """Identity of each part that is no plain value -> where it is."""
        return {id(part): path for path, part in reversed(self._parts) if not is_plain(part)}

    def path_of(self, value: Any) -> Path | None:
        """Where in the batch an object is; None if it is no part of it, or a plain value."""
        return self._paths.get(id(value))

    def parts_of(self, call: Call) -> Template | None:
        """Which part of the batch each argument of a call is; None if any is none."""
        found = []
        for where, value in _given(call):
            path = self.path_of(value)
            if path is not None:
                found.append((where, path))
            elif any(True for _ in leaves(value)):
                return None
        return tuple(found)

    def parts_like(self, call: Call, but: Collection[Path | None]) -> Template | None:
        """Parts of the batch that are like the arguments of a call; None if it is not clear which.

        Args:
            call: The call.
            but: Parts that are something else.
        """
        found = []
        for where, value in _given(call):
            path = self.path_of(value)
            if path is None and isinstance(value, Tensor):
                like = [
                    there
                    for there, leaf in leaves(self.batch)
                    if leaf.shape == value.shape and leaf.dtype == value.dtype and there not in but
                ]
                path = like[0] if len(like) == 1 else None
            if path is None and any(True for _ in leaves(value)):
                return None
            if path is not None:
                found.append((where, path))
        return tuple(found)


def _given(call: Call) -> list[tuple[Path, Any]]:
    given: list[tuple[Path, Any]] = [(("args", i), v) for i, v in enumerate(call.args)]
    return given + [(("kwargs", k), v) for k, v in call.kwargs.items()]


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or None, so that its identity tells nothing."""
    return isinstance(value, bool | int | float | str | type(None))


def constants_of(call: Call) -> tuple[tuple[Path, Any], ...]:
    """Arguments of a call that are plain values."""
    return tuple((where, value) for where, value in _given(call) if is_plain(value))

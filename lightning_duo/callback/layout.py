"""Where the decisions of an output are, and their targets in the same places."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_duo.base import POSITIONS
from lightning_duo.nested import Path, at, path_text
from lightning_duo.tasks import Classes, Labels, Task

Spread: TypeAlias = Literal["", "repeat", "interleave"]
"""How views of one item, several for each target, follow each other."""
IGNORED = -100  # target of rows that the loss does not see


def tensor_at(output: Any, path: Path) -> Tensor:
    """The tensor in a module's output that a path leads to.

    Raises:
        LookupError: If there is none.
    """
    picked = path[-1] if path and path[-1] in POSITIONS else None
    found = at(output, path[:-1] if picked else path)
    if not isinstance(found, Tensor) or (picked and found.ndim < 3):
        raise LookupError(f"the output has no tensor at {path_text(path) or 'its top'}")
    found = _plain(found)  # one with metadata would carry them along
    return found[:, POSITIONS[str(picked)]] if picked else found


def _plain(tensor: Tensor) -> Tensor:
    """The same without what a subclass adds."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def places_of(logits: Tensor, task: Task) -> torch.Size:
    """The shape that targets have: one for each decision."""
    if isinstance(task, Labels):
        return logits.shape
    shape = list(logits.shape)
    del shape[task.dim]
    return torch.Size(shape)


def fitted(leaf: Tensor, logits: Tensor, task: Task, spread: Spread = "") -> Tensor | None:
    """A part of the batch as targets in the places of the logits; None if it cannot be."""
    places = places_of(logits, task)
    if not isinstance(leaf, Tensor):
        return None
    if leaf.layout != torch.strided or leaf.is_nested:
        return None
    leaf = _plain(leaf)
    if spread:
        times, rest = divmod(places.numel(), max(1, leaf.numel()))
        if rest or leaf.ndim != 1:
            return None
        leaf = leaf.repeat(times) if spread == "repeat" else leaf.repeat_interleave(times)
    if isinstance(task, Classes) and leaf.is_floating_point() and leaf.shape == logits.shape:
        return leaf
    if leaf.numel() != places.numel():
        return None
    if isinstance(task, Classes) and leaf.is_floating_point():
        if bool((leaf != leaf.round()).any()):
            return None
    if isinstance(task, Classes) and leaf.dtype != torch.int64:
        leaf = leaf.long()
    return leaf if leaf.shape == places else leaf.reshape(places)


def only(targets: Tensor, rows: Tensor, task: Task) -> Tensor:
    """Targets that count for some rows alone."""
    if isinstance(task, Labels):
        blank = torch.full_like(targets, torch.nan, dtype=torch.float32)
    else:
        blank = torch.full_like(
            targets, IGNORED if task.ignore_index is None else task.ignore_index
        )
    blank.reshape(-1)[rows] = targets.reshape(-1)[rows].to(blank.dtype)
    return blank


def in_places(values: Tensor, rows: Tensor | None, logits: Tensor, task: Task) -> Tensor:
    """Targets of some rows, one after the other, in the places of all logits.

    Args:
        values: Shape (R,), or (R, K) probabilities.
        rows: Which rows of the logits they are for; None for all.
        logits: The logits.
        task: The task.
    """
    places = places_of(logits, task)
    if values.ndim == 2 and isinstance(task, Classes):  # probabilities
        return task.back(values, logits)
    if rows is None:
        return values.reshape(places)
    fill: float = torch.nan
    dtype = torch.float32
    if isinstance(task, Classes):
        fill, dtype = IGNORED if task.ignore_index is None else task.ignore_index, torch.int64
    blank = torch.full((places.numel(),), fill, dtype=dtype, device=logits.device)
    blank[rows] = values.to(dtype)
    return blank.reshape(places)

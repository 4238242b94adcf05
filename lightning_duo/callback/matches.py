"""Which output of a module the logits of a loss are."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_duo.callback.loss_calls import Loss
from lightning_duo.callback.taken import Taken
from lightning_duo.callback.watch import Called, Seen
from lightning_duo.nested import Path, leaves


class Match(NamedTuple):
    """An output of a module that the logits of a loss are."""

    called: Called
    at: Path
    """Where in its output, with what is picked of it."""
    output: Tensor
    dim: int
    """Dimension of its classes."""
    rows: Tensor | None
    """Which of its rows the loss was given; None for all, in their order."""
    exact: bool = True
    """Whether the numbers are the same, and not scaled or shifted."""


def match_of(loss: Loss, seen: Seen, taken: Taken) -> Match | None:
    """The module's output that a loss was given; None if there is none."""
    for z in _ancestors(loss.logits, seen):
        every = []
        for called in reversed(seen.calls):
            match = _in_output(z, loss, called, taken)
            if match is None:
                continue
            every.append(match)
            if shares(match.output, z) and taken.parts_of(called.call) is not None:
                return match
        # Equal numbers may be chance, as of two heads that start from zero.
        every = [m for m in every if shares(m.output, z)] or every
        of_batch = [m for m in every if taken.parts_of(m.called.call) is not None]
        made = [m for m in every if not _is_of_features(m.called, seen)]
        if of_batch or made:
            return (of_batch or made)[0]
    if loss.targets is None:
        return None
    scaled = [m for called in seen.calls if (m := _scaled_in_output(loss, called))]
    return next((m for m in reversed(scaled) if not _is_of_features(m.called, seen)), None)


def _ancestors(z: Tensor, seen: Seen) -> Iterator[Tensor]:
    """What the loss was given, then what softmax and logarithm made that of."""
    for _ in range(4):
        yield z
        source = next((x for result, x in seen.sources if result is z and x is not z), None)
        if source is None:
            return
        z = source


def _is_of_features(called: Called, seen: Seen) -> bool:
    """Whether a module was called with what another module with weights has made."""
    given = {memory(leaf) for _, leaf in leaves(called.call)}
    if any(seen.lineage.is_learnt(leaf) for _, leaf in leaves(called.call)):
        return True
    for other in seen.calls:
        if other is called:
            break
        if not other.weighted:
            continue
        inputs = {memory(x) for _, x in leaves(other.call)}
        for _, leaf in leaves(other.output):
            if memory(leaf) in given and memory(leaf) not in inputs:
                return True
    return False


def memory(tensor: Tensor) -> int:
    """Tells the memory of a tensor, and of its views, from that of others."""
    strided = tensor.layout == torch.strided
    return (tensor.untyped_storage().data_ptr() if strided else 0) or id(tensor)


def _in_output(z: Tensor, loss: Loss, called: Called, taken: Taken) -> Match | None:
    layout_of = _of_classes if loss.kind == "classes" else _of_labels
    found = [
        (path, leaf)
        for path, leaf in leaves(called.output)
        if leaf.layout == torch.strided
        and not leaf.is_nested
        and leaf.is_floating_point()
        and leaf.ndim
        and leaf.numel() >= z.numel()
    ]
    for part_of in (None, taken):
        for path, leaf in found:
            for suffix, x in _picked(leaf):
                layout = layout_of(z, x, part_of)
                if layout is not None:
                    return Match(called, (*path, *suffix), x, *layout)
    return None


def _picked(leaf: Tensor) -> Iterator[tuple[Path, Tensor]]:
    yield (), leaf
    if leaf.ndim == 3 and leaf.shape[1]:
        yield ("[:, -1]",), leaf[:, -1]
        yield ("[:, 0]",), leaf[:, 0]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether these are the same numbers, with the least work."""
    if a is b:
        return True
    return a.shape == b.shape and torch.equal(a.detach().to(b.dtype), b.detach())


def _of_classes(z: Tensor, x: Tensor, taken: Taken | None) -> tuple[int, Tensor | None] | None:
    """Dimension of the classes, and rows if a batch is given: else all of them are meant."""
    if z.ndim < 2 or x.ndim < 2:
        return None
    classes = z.shape[1]
    dims = [d for d in dict.fromkeys((1, x.ndim - 1, *range(2, x.ndim))) if x.shape[d] == classes]
    for dim in dims:
        named = -1 if dim == x.ndim - 1 and dim != 1 else dim
        if z is x and dim == 1:
            return named, None
        mine = z.movedim(1, -1).reshape(-1, classes)
        theirs = x.movedim(dim, -1).reshape(-1, classes)
        if taken is None and len(mine) == len(theirs) and same(mine, theirs):
            return named, None
        if taken is not None and len(mine) < len(theirs):
            rows = _subset(mine, theirs, taken)
            if rows is not None:
                return named, rows
    return None


def _of_labels(z: Tensor, x: Tensor, taken: Taken | None) -> tuple[int, Tensor | None] | None:
    mine, theirs = z.reshape(-1), x.reshape(-1)
    if taken is None:
        return (1, None) if len(mine) == len(theirs) and same(mine, theirs) else None
    some = len(theirs) > len(mine) > 1
    rows = _subset(mine[:, None], theirs[:, None], taken) if some else None
    return None if rows is None else (1, rows)


def _subset(some: Tensor, all_rows: Tensor, taken: Taken) -> Tensor | None:
    """Positions of some rows among all; None if any is missing or they cannot be told apart."""
    some, all_rows = some.detach().to(all_rows.dtype), all_rows.detach()
    if not len(some) or not bool((all_rows == some[0]).all(dim=1).any()):
        return None
    for mask in masks_of(taken, len(all_rows), len(some), all_rows.shape[1]):
        if torch.equal(all_rows[mask], some):
            return mask.nonzero().flatten()
    both = torch.unique(torch.cat([all_rows, some]), dim=0, return_inverse=True)[1]
    ids, wanted = both[: len(all_rows)], both[len(all_rows) :]
    place = ids.new_full((int(both.max()) + 1,), -1)
    place[ids] = torch.arange(len(ids), device=ids.device)
    if len(torch.unique(ids)) != len(ids):
        return None
    rows = place[wanted]
    return None if bool((rows < 0).any()) else rows


def masks_of(taken: Taken, count: int, wanted: int, classes: int) -> Iterator[Tensor]:
    """Masks that the batch knows: its own, or where a value of it is not.

    Args:
        taken: The batch.
        count: How many places they have.
        wanted: How many of these they leave.
        classes: K; places with class indices are a mask too.
    """
    for _, leaf in leaves(taken.batch):
        if leaf.numel() != count or leaf.is_floating_point():
            continue
        flat = leaf.reshape(-1)
        masks = [flat.bool(), (flat >= 0) & (flat < classes)]
        if flat.dtype != torch.bool:
            values = torch.unique(flat)
            masks += [flat != value for value in (values if len(values) < 300 else ())]
        yield from (mask for mask in masks if int(mask.sum()) == wanted)


def _scaled_in_output(loss: Loss, called: Called) -> Match | None:
    """An output that the loss's logits are, but for a scale, a constant for each class or a margin.

    As in ``cross_entropy(z / T, y)``, in adjusted logits and in margins on the target's class.
    """
    z, y = loss.logits, loss.targets
    if loss.kind != "classes" or z.ndim < 2 or y is None or y.is_floating_point():
        return None
    classes = z.shape[1]
    for path, leaf in leaves(called.output):
        if leaf.shape != z.shape or not leaf.is_floating_point() or len(z) < 2:
            continue
        a = z.detach().double().movedim(1, -1).reshape(-1, classes)
        b = leaf.detach().double().movedim(1, -1).reshape(-1, classes)
        rows = y.reshape(-1).clamp(0, classes - 1)
        if len(rows) != len(a) or not bool((a.isfinite() & b.isfinite()).all()):
            continue
        others = torch.ones_like(a).scatter(1, rows[:, None], 0.0)
        count = others.sum(0).clamp(min=1)
        a = (a - (a * others).sum(0) / count) * others
        b = (b - (b * others).sum(0) / count) * others
        scale = (a * b).sum() / (b * b).sum().clamp(min=1e-30)
        if scale > 0 and (a - scale * b).norm() <= 1e-4 * a.norm():
            return Match(called, path, leaf, 1, None, exact=False)
    return None


def shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of one."""
    return one is other or (
        one.numel() > 0
        and one.layout == other.layout == torch.strided
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    )


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have values in common, and not only the memory that they are parts of."""
    if one is other or not shares(one, other) or one.dtype != other.dtype:
        return one is other or shares(one, other)
    size = one.untyped_storage().nbytes() // one.element_size()
    taken = torch.zeros(size, dtype=torch.bool, device=one.device)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())

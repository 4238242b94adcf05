"""Which part of the batch the targets of a loss are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_duo.callback.layout import IGNORED, fitted
from lightning_duo.callback.loss_calls import Loss
from lightning_duo.callback.matches import Match, masks_of, same, shares
from lightning_duo.callback.reading import Piece
from lightning_duo.callback.taken import Taken
from lightning_duo.nested import Path, at, leaves
from lightning_duo.tasks import Classes, Labels, Task


class Target(NamedTuple):
    """The targets of a loss, and where they come from."""

    loss: Loss
    match: Match
    piece: Piece
    task: Task
    values: Tensor
    """One after the other, in the order of the rows of the logits that count."""
    rows: Tensor | None
    """Which rows of the logits they are for; None for all."""


def target_of(loss: Loss, match: Match, taken: Taken, *, training: bool) -> Target:
    """The targets of a loss whose logits are known.

    Args:
        loss: The loss.
        match: The output of a module that its logits are.
        taken: The batch.
        training: Whether samples and their targets may be mixed.

    Raises:
        LookupError: If they are not seen, and several parts of the batch may be them.
    """
    task = task_of(loss, match)
    if loss.targets is None:
        y, piece = only_targets(match.output, task, taken, loss.factors)
        masks = [by.reshape(-1) != 0 for by in loss.factors if not _is_or_is_not(y, by)]
        masks += [] if loss.counts is None else [loss.counts]
        some = torch.stack(masks).all(0) if masks else None
        if some is None or bool(some.all()) or match.rows is not None:
            return Target(loss, match, piece, task, y, None)
        places = some.nonzero().flatten()
        piece, _ = piece_of(y[places], places, match.output, task, taken)
        return Target(loss, match, piece, task, y[places], places)
    y, rows = flat_targets(loss), match.rows
    counts = _counting(loss, len(y))
    if counts is not None:
        y, rows = y[counts], counts if rows is None else rows[counts]
    piece, its_task = piece_of(y, rows, match.output, task, taken)
    if piece.targets is not None and _is_one_hot(loss, at(taken.batch, piece.targets)) and training:
        return Target(loss, match, Piece(None), task, y, rows)  # others may be mixed
    if piece.targets is None and isinstance(task, Labels) and rows is None:
        inside = _one_hot_inside(loss, match, taken)
        if inside is not None:
            piece, its_task, y = inside
            piece = Piece(None) if training else piece
    if piece.targets is None and rows is None and isinstance(task, Classes) and y.ndim == 1:
        if loss.targets.is_floating_point():  # one-hot rows that are in the batch as they are
            soft = loss.targets.movedim(1, -1).reshape(-1, loss.targets.shape[1])
            piece, its_task = piece_of(soft, None, match.output, task, taken)
    return Target(loss, match, piece, its_task, y, rows)


class StepTarget(NamedTuple):
    """The targets of a loss whose logits the step makes."""

    piece: Piece
    task: Task
    values: Tensor
    logits: Tensor
    """The loss's, detached; with zeros in the places that the step left out of it."""
    rows: Tensor | None
    """Which places the values are for; None for all."""


def target_of_step(loss: Loss, taken: Taken) -> StepTarget:
    """The targets of a loss whose logits are no output of a module.

    Args:
        loss: The loss; it has targets.
        taken: The batch.
    """
    task: Task = Classes(1, ignored(loss))
    if loss.kind != "classes":
        task = Labels(("base",) if loss.kind == "probabilities" else ())
    y, z = flat_targets(loss), loss.logits.detach()
    piece, its_task = piece_of(y, None, z, task, taken)
    counts = _counting(loss, len(y))
    if counts is not None:
        some, some_task = piece_of(y[counts], counts, z, task, taken)
        return StepTarget(some, some_task, y[counts], z, counts)
    if piece.targets is None and isinstance(task, Classes) and z.ndim == 2 and y.ndim == 1:
        for count in {leaf.numel() for _, leaf in leaves(taken.batch)}:
            for mask in masks_of(taken, count, len(y), z.shape[1]) if count > len(y) else ():
                full, rows = z.new_zeros(count, z.shape[1]), mask.nonzero().flatten()
                full[rows] = z
                some, its_task = piece_of(y, rows, full, task, taken)
                if some.targets is not None:
                    return StepTarget(some, its_task, y, full, rows)
    return StepTarget(piece, its_task, y, z, None)


def task_of(loss: Loss, match: Match) -> Task:
    """What a loss says of the logits that it is given."""
    if loss.kind == "classes":
        return Classes(match.dim, ignored(loss))
    from_module = loss.kind == "probabilities" and match.exact
    return Labels(("base",) if from_module else ())


def ignored(loss: Loss) -> int:
    """The target that the loss ignores: what it was told, else what PyTorch's ignore."""
    return int(loss.options.get("ignore_index", IGNORED))


def flat_targets(loss: Loss) -> Tensor:
    """Targets one after the other, in the order of the rows of the logits."""
    y = loss.targets
    assert y is not None
    if loss.kind == "classes" and y.is_floating_point() and y.shape == loss.logits.shape:
        soft = y.movedim(1, -1).reshape(-1, y.shape[1])
        hard = bool(((soft == 0) | (soft == 1)).all()) and bool((soft.sum(1) == 1).all())
        return soft.argmax(1) if hard else soft
    return y.reshape(-1)


def _is_one_hot(loss: Loss, leaf: Tensor) -> bool:
    """Whether the step has made one-hot targets of the batch's class indices."""
    y = loss.targets
    made = y is not None and loss.kind == "classes" and y.is_floating_point() and y.ndim > 1
    return made and not leaf.is_floating_point()


def _counting(loss: Loss, count: int) -> Tensor | None:
    """Which rows the loss counts, of those that it was given; None for all."""
    for weight in (loss.counts, loss.options.get("weight") if loss.kind != "classes" else None):
        if isinstance(weight, Tensor) and weight.numel() == count and bool((weight == 0).any()):
            return weight.reshape(-1).nonzero().flatten()
    return None


def only_targets(
    logits: Tensor, task: Task, taken: Taken, factors: Sequence[Tensor] = ()
) -> tuple[Tensor, Piece]:
    """The only part of the batch that can be the targets of these logits.

    Args:
        logits: The logits.
        task: The task.
        taken: The batch.
        factors: What they, or what they are not, is one of; by default anything.
    """
    fits = []
    for path, leaf in leaves(taken.batch):
        found = fitted(leaf, logits, task)
        if found is None or (isinstance(task, Classes) and leaf.is_floating_point()):
            continue
        low, high = (float(found.min()), float(found.max())) if found.numel() else (0.0, 0.0)
        top = logits.shape[task.dim] - 1 if isinstance(task, Classes) else 1
        whole = not found.is_floating_point() or bool((found == found.round()).all())
        used = not factors or any(_is_or_is_not(found, one) for one in factors)
        if low >= 0 and high <= top and whole and used:
            fits.append((path, found))
    if len(fits) > 1:  # what is no weight is there as yes and as no
        fits = [one for one in fits if len(_alike(one[1], factors)) > 1] or fits
    if len(fits) != 1:
        raise LookupError(
            f"{len(fits)} parts of the batch could be the targets of the logits "
            f"{tuple(logits.shape)}"
        )
    return fits[0][1].reshape(-1), Piece(fits[0][0])


def _is_or_is_not(y: Tensor, factor: Tensor) -> bool:
    """Whether a factor is these labels, or 1 where they are 0."""
    return bool(_alike(y, [factor]))


def _alike(y: Tensor, factors: Sequence[Tensor]) -> set[bool]:
    """Whether these labels are among the factors, and whether 1 where they are 0 is."""
    y, found = y.reshape(-1).double(), set()
    for factor in factors:
        factor = factor.detach().reshape(-1).double()
        found |= {yes for yes in (True, False) if same(y if yes else 1 - y, factor)}
    return found


def _one_hot_inside(loss: Loss, match: Match, taken: Taken) -> tuple[Piece, Task, Tensor] | None:
    """Targets of several classes that the loss has made one-hot; the batch has their indices."""
    y, z = loss.targets, loss.logits
    if y is None or y.ndim < 2 or y.shape != z.shape or y.shape[1] < 2:
        return None
    task, hard = Classes(match.dim), y.argmax(1).reshape(-1)
    piece, _ = piece_of(hard, None, match.output, task, taken)
    return None if piece.targets is None else (piece, task, hard)


def piece_of(
    y: Tensor, rows: Tensor | None, logits: Tensor, task: Task, taken: Taken
) -> tuple[Piece, Task]:
    """Where in the batch the targets of a loss are, flat as they were given to it."""
    best: tuple[int, Piece, Task] | None = None
    for path, leaf in leaves(taken.batch):
        for spread in ("", "repeat", "interleave"):
            found = fitted(leaf, logits, task, spread)
            if found is None:
                continue
            rank = 0 if shares(leaf, y) else 1 if not spread else 2
            if best is not None and rank >= best[0]:
                continue
            piece = _if_equal(y, rows, found, task, taken)
            if piece is not None:
                made, its_task = piece
                piece_here = Piece(path, spread, made.offset, made.mask)
                best = (rank, piece_here, its_task)
    if best is None:
        return Piece(None), task
    return best[1], best[2]


def _if_equal(
    y: Tensor, rows: Tensor | None, found: Tensor, task: Task, taken: Taken
) -> tuple[Piece, Task] | None:
    soft = isinstance(task, Classes) and found.is_floating_point()
    if soft:
        if y.ndim != 2 or rows is not None:
            return None
        flat = found.movedim(task.dim, -1).reshape(-1, y.shape[1])  # type: ignore[union-attr]
        return (Piece(()), task) if same(flat, y) else None
    if y.ndim != 1:
        return None
    flat = found.reshape(-1)
    picked = flat if rows is None else flat[rows]
    difference = y.double() - picked.double()
    known = difference[~picked.isnan()] if picked.is_floating_point() else difference
    if not len(known) or not bool((known == known[0]).all()):
        return None
    offset = int(known[0])
    if offset and (isinstance(task, Labels) or int(picked.min()) == int(picked.max())):
        return None
    if rows is None:
        return Piece((), offset=offset), task
    left_out = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    left_out[rows] = False
    mask = _mask_of(rows, left_out, taken)
    if mask is not None:
        return Piece((), offset=offset, mask=mask), task
    ignored = torch.unique(flat[left_out])
    one = len(ignored) == 1 and not bool((picked == ignored).any())
    if offset or not one or isinstance(task, Labels):
        return None
    return Piece(()), Classes(task.dim, int(ignored))


def _mask_of(rows: Tensor, left_out: Tensor, taken: Taken) -> Path | None:
    if not bool((rows[1:] > rows[:-1]).all()):
        return None
    for path, leaf in leaves(taken.batch):
        if leaf.numel() == len(left_out):
            flat = leaf.reshape(-1)
            if leaf.is_floating_point() and bool(((flat != 0) & (flat != 1)).any()):
                continue
            if torch.equal(flat.bool(), ~left_out):
                return path
    return None

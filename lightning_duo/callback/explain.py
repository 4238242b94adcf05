"""From what was seen of a step to what is learnt of it: whose logits, which targets."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.callback.reading import (
    IGNORED,
    Example,
    Piece,
    Reading,
    Taken,
    constants_of,
    fitted,
    in_places,
    tensor_at,
)
from lightning_duo.callback.watch import Called, Loss, Seen
from lightning_duo.nested import Path, at, leaves, path_text
from lightning_duo.tasks import Classes, Labels, Task

SUPPORTED = (
    "a duo needs a classification: logits of classes or labels, given to cross-entropy or binary "
    "cross-entropy with targets from the batch"
)
REMEDY = (
    "if this is one, pass DuoCallback(..., batch_fn=lambda batch: (inputs, targets), "
    "logits_fn=lambda module, inputs: logits)"
)


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


class Found(NamedTuple):
    """A loss of which it is known where its logits come from."""

    loss: Loss
    match: Match | None
    """None: the step makes them."""


# ---- logits ----


def match_of(loss: Loss, seen: Seen, taken: Taken) -> Match | None:
    """The module's output that a loss was given; None if there is none."""
    found: Match | None = None
    for z in _ancestors(loss.logits, seen):
        for called in reversed(seen.calls):
            match = _in_output(z, loss, called, taken)
            if match is None:
                continue
            if taken.parts_of(called.call) is not None:
                return match
            if found is None and not _is_of_features(called, seen):
                found = match
        if found is not None:
            return found
    if loss.targets is None:
        return None
    for called in reversed(seen.calls):
        match = _scaled_in_output(loss, called)
        if match is not None and not _is_of_features(called, seen):
            return match
    return None


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
    given = {_memory(leaf) for _, leaf in leaves(called.call)}
    for _, leaf in leaves(called.call):
        if leaf.grad_fn is not None:
            return True
    for other in seen.calls:
        if other is called:
            break
        if not other.weighted:
            continue
        inputs = {_memory(x) for _, x in leaves(other.call)}
        for _, leaf in leaves(other.output):
            if _memory(leaf) in given and _memory(leaf) not in inputs:
                return True
    return False


def _memory(tensor: Tensor) -> int:
    strided = tensor.layout == torch.strided
    return (tensor.untyped_storage().data_ptr() if strided else 0) or id(tensor)


def _in_output(z: Tensor, loss: Loss, called: Called, taken: Taken) -> Match | None:
    layout_of = _of_classes if loss.kind == "classes" else _of_labels
    found = [
        (path, leaf)
        for path, leaf in leaves(called.output)
        if leaf.is_floating_point() and leaf.ndim and leaf.numel() >= z.numel()
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


def _same(a: Tensor, b: Tensor) -> bool:
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
        if taken is None and len(mine) == len(theirs) and _same(mine, theirs):
            return named, None
        if taken is not None and len(mine) < len(theirs):
            rows = _subset(mine, theirs, taken)
            if rows is not None:
                return named, rows
    return None


def _of_labels(z: Tensor, x: Tensor, taken: Taken | None) -> tuple[int, Tensor | None] | None:
    mine, theirs = z.reshape(-1), x.reshape(-1)
    if taken is None:
        return (1, None) if len(mine) == len(theirs) and _same(mine, theirs) else None
    some = len(theirs) > len(mine) > 1
    rows = _subset(mine[:, None], theirs[:, None], taken) if some else None
    return None if rows is None else (1, rows)


def _subset(some: Tensor, all_rows: Tensor, taken: Taken) -> Tensor | None:
    """Positions of some rows among all; None if any is missing or they cannot be told apart."""
    some, all_rows = some.detach().to(all_rows.dtype), all_rows.detach()
    if not len(some) or not bool((all_rows == some[0]).all(dim=1).any()):
        return None
    for mask in _masks(taken, len(all_rows), len(some), all_rows.shape[1]):
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


def _masks(taken: Taken, count: int, wanted: int, classes: int) -> Iterator[Tensor]:
    """Masks of so many of the places that the batch knows: its own, or where a value is not."""
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


# ---- targets ----


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
            rank = 0 if _shares(leaf, y) else 1 if not spread else 2
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


def _shares(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.numel() > 0
        and one.layout == other.layout == torch.strided
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    )


def _if_equal(
    y: Tensor, rows: Tensor | None, found: Tensor, task: Task, taken: Taken
) -> tuple[Piece, Task] | None:
    soft = isinstance(task, Classes) and found.is_floating_point()
    if soft:
        if y.ndim != 2 or rows is not None:
            return None
        flat = found.movedim(task.dim, -1).reshape(-1, y.shape[1])  # type: ignore[union-attr]
        return (
            (
                Piece(
                    (),
                ),
                task,
            )
            if _same(flat, y)
            else None
        )
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
    if (
        offset
        or not isinstance(task, Classes)
        or len(ignored) != 1
        or bool((picked == ignored).any())
    ):
        return None
    return Piece(()), Classes(task.dim, int(ignored))


def _mask_of(rows: Tensor, left_out: Tensor, taken: Taken) -> Path | None:
    if not bool((rows[1:] > rows[:-1]).all()):
        return None
    for path, leaf in leaves(taken.batch):
        if leaf.numel() == len(left_out) and not leaf.is_floating_point():
            if torch.equal(leaf.reshape(-1).bool(), ~left_out):
                return path
    return None


# ---- what is no classification ----


def refuse(losses: Sequence[Loss], found: Sequence[Piece], call: Call) -> None:
    """Raise ValueError if what looks like a classification is something else."""
    for loss, piece in zip(losses, found, strict=True):
        y = loss.targets
        if y is None or not y.numel():
            continue
        inputs = [leaf for _, leaf in leaves(call)]
        if inputs and all(_shares(leaf, y) or _is_next(leaf, y) for leaf in inputs):
            raise ValueError(
                f"the step's targets are its inputs (a reconstruction, or a language model?); "
                f"{SUPPORTED}; {REMEDY}"
            )
        if loss.kind == "classes" and piece.targets is None and y.ndim == 1:
            square = loss.logits.ndim == 2 and loss.logits.shape[0] == loss.logits.shape[1]
            if square and torch.equal(y, torch.arange(len(y), device=y.device).to(y.dtype)):
                raise ValueError(
                    "the step's targets are 0, 1, 2, ..., each sample a class of its own (a "
                    f"contrastive loss?); {SUPPORTED}; {REMEDY}"
                )
        if loss.kind != "classes" and piece.targets is not None:
            if bool(((y != 0) & (y != 1) & ~y.isnan()).any()):
                raise ValueError(
                    "the step's targets are no 0 and 1 (a regression, or a reconstruction?); "
                    f"{SUPPORTED}; {REMEDY}"
                )
    constants = [
        loss.targets.flatten()[0]
        for loss, piece in zip(losses, found, strict=True)
        if piece.targets is None and loss.targets is not None and is_constant(loss.targets)
    ]
    if len(constants) == len(losses) > 1 and len({float(c) for c in constants}) > 1:
        raise ValueError(
            f"the step makes its targets itself, all alike (a discriminator?); {SUPPORTED}; "
            f"{REMEDY}"
        )


def _is_next(inputs: Tensor, y: Tensor) -> bool:
    """Whether targets are the inputs that follow, as in a language model."""
    if inputs.is_floating_point() or inputs.ndim != 2 or inputs.numel() != y.numel():
        return False
    rows = y.reshape(inputs.shape)
    return inputs.shape[1] > 2 and torch.equal(rows[:, :-1].to(inputs.dtype), inputs[:, 1:])


def is_constant(y: Tensor) -> bool:
    """Whether all targets are one."""
    return y.numel() > 1 and bool((y == y.flatten()[0]).all())


# ---- all together ----


def learn(
    seen: Seen, taken: Taken, base: nn.Module, *, head: str | None, training: bool
) -> tuple[Reading, list[Example]]:
    """What a step was seen to do with its batch.

    Args:
        seen: What was seen of it; at least one loss.
        taken: Its batch.
        base: The user's module.
        head: The user's choice of several.
        training: Whether it is a training step, which may mix samples and their targets.

    Returns:
        What was learnt, and what it gives for this batch.

    Raises:
        ValueError: If the step is no classification, or there is no such head.
        LookupError: If it is one that cannot be followed.
    """
    every = [Found(loss, match_of(loss, seen, taken)) for loss in _distinct(seen.losses)]
    if seen.by_hand:
        every = [found for found in every if found.match is not None][:1]
        if not every:
            raise LookupError("no loss was seen whose logits are the output of a module")
    heads: dict[tuple[Any, ...], list[Found]] = {}
    for found in every:
        heads.setdefault(_head_of(found), []).append(found)
    chosen = _chosen(heads, head, seen)
    if chosen[0].match is None:
        return _of_the_step(chosen, seen, taken, base)
    return _of_a_module(chosen, seen.calls, taken, base, training=training)


def _distinct(losses: Sequence[Loss]) -> list[Loss]:
    kept: dict[tuple[int, int], Loss] = {}
    for loss in losses:
        kept.setdefault((id(loss.logits), id(loss.targets)), loss)
    return list(kept.values())


def _head_of(found: Found) -> tuple[Any, ...]:
    loss, match = found
    if match is None:
        return (loss.kind, *loss.logits.shape[1:2])
    return loss.kind, match.called.name, match.at


def _names(key: tuple[Any, ...], losses: Sequence[Found], seen: Seen) -> list[str]:
    """What a user may call a head."""
    if losses[0].match is None:
        return []
    names = []
    for called in seen.calls:
        if any(leaf is losses[0].match.output for _, leaf in leaves(called.output)):
            names += [called.name, called.name.rpartition(".")[2]]
    path = losses[0].match.at
    names += [path_text(path), path_text(path).strip(".[]'")]
    return [name for name in dict.fromkeys(names) if name]


def _chosen(heads: dict[tuple[Any, ...], list[Found]], head: str | None, seen: Seen) -> list[Found]:
    if head is None:
        return next(iter(heads.values()))
    names = {key: _names(key, losses, seen) for key, losses in heads.items()}
    for key, known in names.items():
        if head in known:
            return heads[key]
    listed = "; ".join(" or ".join(map(repr, known)) for known in names.values() if known)
    raise ValueError(f"the step has no head {head!r}; it has {listed or 'none with a name'}")


def _task_of(loss: Loss, match: Match) -> Task:
    if loss.kind == "classes":
        return Classes(match.dim, _ignored(loss))
    from_module = loss.kind == "probabilities" and match.exact
    return Labels(("base",) if from_module else ())


def _ignored(loss: Loss) -> int:
    """The target that the loss ignores: what it was told, else what PyTorch's ignore."""
    return int(loss.options.get("ignore_index", IGNORED))


def _flat(loss: Loss) -> Tensor:
    """Targets one after the other, in the order of the rows of the logits."""
    y = loss.targets
    assert y is not None
    if loss.kind == "classes" and y.is_floating_point() and y.shape == loss.logits.shape:
        soft = y.movedim(1, -1).reshape(-1, y.shape[1])
        hard = bool(((soft == 0) | (soft == 1)).all()) and bool((soft.sum(1) == 1).all())
        return soft.argmax(1) if hard else soft
    return y.reshape(-1)


def _options(loss: Loss) -> dict[str, Any]:
    names = ("weight", "label_smoothing", "pos_weight")
    found = {k: v for k, v in loss.options.items() if k in names and v is not None}
    weight = found.get("weight")
    if isinstance(weight, Tensor) and loss.kind != "classes":
        del found["weight"]  # of the elements of one batch
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in found.items()}


class _Target(NamedTuple):
    """The targets of a loss, and where they come from."""

    found: Found
    match: Match
    piece: Piece
    task: Task
    values: Tensor
    """One after the other, in the order of the rows of the logits that count."""
    rows: Tensor | None
    """Which rows of the logits they are for; None for all."""


def _number(calls: Sequence[Called], called: Called) -> int:
    """Which of several calls this is."""
    return next(i for i, one in enumerate(calls) if one is called)


def _of_a_module(
    chosen: list[Found],
    calls: Sequence[Called],
    taken: Taken,
    base: nn.Module,
    *,
    training: bool,
) -> tuple[Reading, list[Example]]:
    every = [
        _target_of(found, found.match, taken, training=training)
        for found in chosen
        if found.match is not None
    ]
    every = [one for one in every if one.piece.targets is not None] or every
    first = every[0]
    called, task = first.match.called, first.task
    mine = [one for one in calls if one.name == called.name]
    pieces = [replace(o.piece, number=_number(mine, o.match.called)) for o in every]
    refuse([one.found.loss for one in every], [one.piece for one in every], called.call)
    labels = _labels(called.call, [one.values for one in every], [o.piece for o in every], taken)
    part = base.get_submodule(called.name) if called.name else base
    reading = Reading(
        called.name,
        first.match.at,
        task,
        tuple(pieces),
        len(mine),
        labels,
        _positional(part),
        taken.parts_of(called.call),
        constants_of(called.call),
        options=_options(first.found.loss),
    )
    examples = []
    for one, piece in zip(every, pieces, strict=True):
        output = one.match.output.detach().as_subclass(Tensor)
        if piece.targets is None:
            targets = in_places(one.values, one.rows, output, task)
        else:
            targets = piece.read(taken.batch, output, task)
        where = (piece.targets or ())[:1] if len(every) > 1 else ()
        items = piece.items(taken.batch, output)
        bare = reading.bare(one.match.called.call)
        examples.append(Example(bare, output, targets, where, items, one.match.called.versions))
    return reading, examples


def _target_of(found: Found, match: Match, taken: Taken, *, training: bool) -> _Target:
    loss, task = found.loss, _task_of(found.loss, match)
    if loss.targets is None:
        y, piece = _only_targets(match.output, task, taken)
        return _Target(found, match, piece, task, y, None)
    y, rows = _flat(loss), match.rows
    counts = _counting(loss, len(y))
    if counts is not None:
        y, rows = y[counts], counts if rows is None else rows[counts]
    piece, its_task = piece_of(y, rows, match.output, task, taken)
    if piece.targets is not None and _is_one_hot(loss, at(taken.batch, piece.targets)) and training:
        return _Target(found, match, Piece(None), task, y, rows)  # others may be mixed
    if piece.targets is None and isinstance(task, Labels) and rows is None:
        inside = _one_hot_inside(loss, match, taken)
        if inside is not None:
            piece, its_task, y = inside
            piece = Piece(None) if training else piece
    if piece.targets is None and rows is None and isinstance(task, Classes) and y.ndim == 1:
        if loss.targets.is_floating_point():  # one-hot rows that are in the batch as they are
            soft = loss.targets.movedim(1, -1).reshape(-1, loss.targets.shape[1])
            piece, its_task = piece_of(soft, None, match.output, task, taken)
    return _Target(found, match, piece, its_task, y, rows)


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


def _only_targets(logits: Tensor, task: Task, taken: Taken) -> tuple[Tensor, Piece]:
    """The only part of the batch that can be the targets of these logits."""
    fits = []
    for path, leaf in leaves(taken.batch):
        found = fitted(leaf, logits, task)
        if found is None or (isinstance(task, Classes) and leaf.is_floating_point()):
            continue
        low, high = (float(found.min()), float(found.max())) if found.numel() else (0.0, 0.0)
        top = logits.shape[task.dim] - 1 if isinstance(task, Classes) else 1
        whole = not found.is_floating_point() or bool((found == found.round()).all())
        if low >= 0 and high <= top and whole:
            fits.append((path, found))
    if len(fits) != 1:
        raise LookupError(
            f"{len(fits)} parts of the batch could be the targets of the logits "
            f"{tuple(logits.shape)}"
        )
    return fits[0][1].reshape(-1), Piece(fits[0][0])


def with_targets(reading: Reading, calls: Sequence[Called], taken: Taken) -> Reading:
    """A reading whose targets the step makes, with the only part of the batch that they can be.

    Raises:
        LookupError: If there is none, or several.
    """
    if all(piece.targets is not None for piece in reading.pieces):
        return reading
    mine = [called for called in calls if called.name == reading.module]
    if not mine:
        raise LookupError(f"the step does not call {reading.name}")
    logits = tensor_at(mine[-1].output, reading.logits_at)
    _, piece = _only_targets(logits, reading.task, taken)
    piece = replace(piece, number=len(mine) - 1)
    return replace(reading, pieces=(piece,), calls=len(mine))


def _one_hot_inside(loss: Loss, match: Match, taken: Taken) -> tuple[Piece, Task, Tensor] | None:
    """Targets of several classes that the loss has made one-hot; the batch has their indices."""
    y, z = loss.targets, loss.logits
    if y is None or y.ndim != 2 or y.shape != z.shape or y.shape[1] < 2:
        return None
    task, hard = Classes(match.dim), y.argmax(1)
    piece, _ = piece_of(hard, None, match.output, task, taken)
    return None if piece.targets is None else (piece, task, hard)


def _labels(
    call: Call, targets: Sequence[Tensor], pieces: Sequence[Piece], taken: Taken
) -> tuple[Path, ...]:
    """Arguments that hold the targets."""
    known = [at(taken.batch, piece.targets) for piece in pieces if piece.targets is not None]
    known += targets
    found: list[Path] = [
        (call._fields[int(path[0])], *path[1:])
        for path, leaf in leaves(call)
        if any(_shares(leaf, y) for y in known)
    ]
    if "labels" in call.kwargs and ("kwargs", "labels") not in found:
        found.append(("kwargs", "labels"))
    return tuple(found)


def _positional(part: nn.Module) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(part.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def _of_the_step(
    chosen: list[Found], seen: Seen, taken: Taken, base: nn.Module
) -> tuple[Reading, list[Example]]:
    """Logits that the step computes itself, from what modules give it."""
    loss = chosen[0].loss
    inputs = next(
        (
            called
            for called in sorted(seen.calls, key=lambda called: called.depth)
            if taken.parts_of(called.call) and any(True for _ in leaves(called.call))
        ),
        None,
    )
    if inputs is None or loss.targets is None:
        raise LookupError(
            f"the logits {tuple(loss.logits.shape)} that the loss was given are no output of a "
            "module that the step calls with parts of its batch"
        )
    z = loss.logits.detach()
    task: Task = Classes(1, _ignored(loss))
    if loss.kind != "classes":
        task = Labels(("base",) if loss.kind == "probabilities" else ())
    y = _flat(loss)
    piece, task = piece_of(y, None, z, task, taken)
    refuse([loss], [piece], inputs.call)
    labels = _labels(inputs.call, [y], [piece], taken)
    part = base.get_submodule(inputs.name) if inputs.name else base
    reading = Reading(
        inputs.name,
        (),
        task,
        (piece,),
        len([called for called in seen.calls if called.name == inputs.name]),
        labels,
        _positional(part),
        taken.parts_of(inputs.call),
        constants_of(inputs.call),
        whole=True,
        options=_options(loss),
    )
    targets = in_places(y, None, z, task)
    items = piece.items(taken.batch, z)
    bare = reading.bare(inputs.call)
    return reading, [Example(bare, z, targets, (), items, inputs.versions)]

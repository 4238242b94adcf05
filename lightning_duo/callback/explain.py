"""From what was seen of a step to what is learnt of it: whose logits, which targets."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.callback.layout import in_places, tensor_at
from lightning_duo.callback.loss_calls import Loss
from lightning_duo.callback.matches import Match, match_of, shares
from lightning_duo.callback.reading import Example, Piece, Reading
from lightning_duo.callback.refusals import refuse
from lightning_duo.callback.taken import Taken, constants_of
from lightning_duo.callback.targets import (
    flat_targets,
    ignored,
    only_targets,
    piece_of,
    target_of,
)
from lightning_duo.callback.watch import Called, Seen
from lightning_duo.nested import Path, at, leaves, path_text
from lightning_duo.tasks import Classes, Labels, Task


class Found(NamedTuple):
    """A loss of which it is known where its logits come from."""

    loss: Loss
    match: Match | None
    """None: the step makes them."""


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
    chosen = _chosen(heads, head, seen, taken)
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


def _chosen(
    heads: dict[tuple[Any, ...], list[Found]], head: str | None, seen: Seen, taken: Taken
) -> list[Found]:
    if len(heads) == 1 and head is None:
        return next(iter(heads.values()))
    if head is None:  # the first of those that look most like the main one
        return min(heads.values(), key=lambda losses: _doubt(losses[0], seen, taken))
    names = {key: _names(key, losses, seen) for key, losses in heads.items()}
    for key, known in names.items():
        if head in known:
            return heads[key]
    listed = "; ".join(" or ".join(map(repr, known)) for known in names.values() if known)
    raise ValueError(f"the step has no head {head!r}; it has {listed or 'none with a name'}")


def _doubt(found: Found, seen: Seen, taken: Taken) -> int:
    """How little a loss, one of several, looks like that of the main head.

    0 where its targets are a part of the batch, 1 where the step makes them (an auxiliary task of
    its own, a discriminator), 2 where they are inputs (a reconstruction).
    """
    loss, match = found
    if loss.targets is None:
        return 1
    if match is None:
        task: Task = Classes(1, ignored(loss)) if loss.kind == "classes" else Labels()
        piece, _ = piece_of(flat_targets(loss), None, loss.logits, task, taken)
    else:
        piece = target_of(loss, match, taken, training=False).piece
    if piece.targets is None:
        return 1
    target = at(taken.batch, piece.targets)
    inputs = [leaf for called in seen.calls for _, leaf in leaves(called.call.args[:1])]
    return 2 if any(shares(target, leaf) for leaf in inputs) else 0


def _options(loss: Loss) -> dict[str, Any]:
    names = ("weight", "label_smoothing", "pos_weight")
    found = {k: v for k, v in loss.options.items() if k in names and v is not None}
    weight = found.get("weight")
    if isinstance(weight, Tensor) and loss.kind != "classes":
        del found["weight"]  # of the elements of one batch
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in found.items()}


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
        target_of(found.loss, found.match, taken, training=training)
        for found in chosen
        if found.match is not None
    ]
    told, every = every, [one for one in every if one.piece.targets is not None] or every
    first = every[0]
    called, task = first.match.called, first.task
    mine = [one for one in calls if one.name == called.name]
    pieces = [replace(o.piece, number=_number(mine, o.match.called)) for o in every]
    refuse([one.loss for one in every], [one.piece for one in every], called.call)
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
        options=_options(first.loss),
    )
    if training and len(every) == 1 and any(o.match.output is first.match.output for o in told[1:]):
        reading = _before_mixing(reading, called.call, taken)
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
        bare = reading.call_of(taken.batch) if reading.unmixed else bare
        examples.append(Example(bare, output, targets, where, items, one.match.called.versions))
    return reading, examples


def _before_mixing(reading: Reading, call: Call, taken: Taken) -> Reading:
    """A reading of what the batch was before its samples were mixed, if that can be told.

    One set of logits with several targets, of which one is in the batch, is MixUp or CutMix: the
    sidekick learns from the samples and targets that are in the batch.
    """
    parts = taken.parts_like(call, {piece.targets for piece in reading.pieces})
    return reading if parts is None else replace(reading, template=parts, unmixed=True)


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
    _, piece = only_targets(logits, reading.task, taken)
    piece = replace(piece, number=len(mine) - 1)
    return replace(reading, pieces=(piece,), calls=len(mine))


def _labels(
    call: Call, targets: Sequence[Tensor], pieces: Sequence[Piece], taken: Taken
) -> tuple[Path, ...]:
    """Arguments that hold the targets."""
    known = [at(taken.batch, piece.targets) for piece in pieces if piece.targets is not None]
    known += targets
    found: list[Path] = [
        (call._fields[int(path[0])], *path[1:])
        for path, leaf in leaves(call)
        if any(shares(leaf, y) for y in known)
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
    task: Task = Classes(1, ignored(loss))
    if loss.kind != "classes":
        task = Labels(("base",) if loss.kind == "probabilities" else ())
    y = flat_targets(loss)
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

"""From what was seen of a step to what is learnt of it: whose logits, which targets."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.callback.heads import Found, check_head, chosen_of, heads_of, is_among
from lightning_duo.callback.layout import in_places, tensor_at
from lightning_duo.callback.loss_calls import Loss, number_of
from lightning_duo.callback.matches import overlap
from lightning_duo.callback.reading import Example, Piece, Reading
from lightning_duo.callback.refusals import refuse
from lightning_duo.callback.taken import Taken, constants_of
from lightning_duo.callback.targets import (
    Target,
    only_targets,
    target_of,
    target_of_step,
)
from lightning_duo.callback.watch import Called, Seen
from lightning_duo.nested import Path, at, leaves, path_text


def learn(
    seen: Seen,
    taken: Taken,
    base: nn.Module,
    *,
    head: str | None,
    training: bool,
    known: Reading | None = None,
    other: Reading | None = None,
) -> tuple[Reading, list[Example]]:
    """What a step was seen to do with its batch.

    Args:
        seen: What was seen of it; at least one loss.
        taken: Its batch.
        base: The user's module.
        head: The user's choice of several.
        training: Whether it is a training step, which may mix samples and their targets.
        known: What is known of earlier steps; of several heads theirs is taken.
        other: What is known of any steps, whose head this one must have too.

    Returns:
        What was learnt, and what it gives for this batch.

    Raises:
        ValueError: If the step is no classification, or there is no such head.
        LookupError: If it is one that cannot be followed; `AnotherHead` if the loss is that of
            another head.
    """
    heads = heads_of(seen, taken)
    chosen = chosen_of(heads, head, known, seen, taken)
    if chosen[0].match is None:
        reading, examples = _of_the_step(chosen[0], seen, taken, base)
    else:
        reading, examples = _of_a_module(chosen, seen, taken, base, training=training)
    reading = replace(reading, heads=len(heads))
    among = other is None or is_among(other, heads, taken)
    # What a validation before all training took of several heads is no choice yet.
    if other is not None and not among and not (training and other.heads > 1):
        check_head(reading, other, examples[0], taken)
    if seen.by == "metrics" and other is not None and not (among and reading.task == other.task):
        raise LookupError("only metrics compute losses, and of something else")
    return reading, examples


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
    seen: Seen,
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
    if seen.by == "hand":
        every = _only_one(every, taken)
    first = every[0]
    called, task = first.match.called, first.task
    mine = [one for one in seen.calls if one.name == called.name]
    pieces = [replace(o.piece, number=_number(mine, o.match.called)) for o in every]
    refuse([one.loss for one in every], [one.piece for one in every], called.call, seen.lineage)
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


def _only_one(every: list[Target], taken: Taken) -> list[Target]:
    """The targets of a loss that a step writes out itself, which may use them several times.

    Raises:
        LookupError: If several parts of the batch may be them.
    """
    paths = {one.piece.targets for one in every}
    if len(paths) > 1:
        texts = " and ".join(sorted(f"batch{path_text(path or (), taken.batch)}" for path in paths))
        raise LookupError(f"the step's own loss picks its probabilities by {texts}")
    return every[:1]


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
        if any(overlap(leaf, y) for y in known)
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
    chosen: Found, seen: Seen, taken: Taken, base: nn.Module
) -> tuple[Reading, list[Example]]:
    """Logits that the step computes itself, from what modules give it."""
    loss = chosen.loss
    of_batch = [c for c in seen.calls if taken.parts_of(c.call) and any(leaves(c.call))]
    if not of_batch or loss.targets is None:
        raise LookupError(
            f"the logits {tuple(loss.logits.shape)} that the loss was given are no output of a "
            "module that the step calls with parts of its batch"
        )
    inputs = min(of_batch, key=lambda called: called.depth)
    piece, task, y, z, rows = target_of_step(loss, taken)
    piece = replace(piece, number=number_of(loss, seen.losses))
    refuse([loss], [piece], inputs.call, seen.lineage)
    labels = frozenset({piece.targets}) if piece.targets else seen.lineage.of(loss.targets).parts
    made_of = seen.lineage.of(loss.logits).parts
    given = [seen.lineage.of(leaf).parts for _, leaf in leaves(inputs.call)]
    reading = Reading(
        inputs.name,
        (),
        task,
        (piece,),
        len([called for called in seen.calls if called.name == inputs.name]),
        _labels(inputs.call, [y], [piece], taken),
        _positional(base.get_submodule(inputs.name) if inputs.name else base),
        taken.parts_of(inputs.call),
        constants_of(inputs.call),
        whole=True,
        options=_options(loss),
        shared=made_of & labels,
        others=made_of.difference(labels, *given, {piece.mask} if piece.mask else ()),
    )
    known = piece.targets is not None
    targets = piece.read(taken.batch, z, task) if known else in_places(y, rows, z, task)
    items = piece.items(taken.batch, z)
    return reading, [Example(reading.bare(inputs.call), z, targets, (), items, inputs.versions)]

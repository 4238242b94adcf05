"""From what was seen of a step to what is learnt of it: whose logits, which targets."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.callback.layout import fitted, in_places, tensor_at
from lightning_duo.callback.loss_calls import Loss, number_of, of_one_output
from lightning_duo.callback.matches import Match, match_of, shares
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


class AnotherHead(LookupError):
    """A step computes a loss, but not that of the head that other steps told of."""


class Found(NamedTuple):
    """A loss of which it is known where its logits come from."""

    loss: Loss
    match: Match | None
    """None: the step makes them."""
    head: tuple[Any, ...]
    """The same for all losses of one head."""


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
    every = [_found(loss, seen, taken) for loss in _distinct(seen.losses)]
    if seen.by == "hand":
        every = _followed(every, taken)
    heads: dict[tuple[Any, ...], list[Found]] = {}
    for found in every:
        heads.setdefault(found.head, []).append(found)
    chosen = _chosen(heads, head, known, seen, taken)
    if chosen[0].match is None:
        reading, examples = _of_the_step(chosen[0], seen, taken, base)
    else:
        reading, examples = _of_a_module(chosen, seen, taken, base, training=training)
    reading = replace(reading, heads=len(heads))
    among = other is None or any(_is_of(other, losses[0], taken) for losses in heads.values())
    # What a validation before all training took of several heads is no choice yet.
    if other is not None and not among and not (training and other.heads > 1):
        _check_head(reading, other, examples[0], taken)
    if seen.by == "metrics" and other is not None and not (among and reading.task == other.task):
        raise LookupError("only metrics compute losses, and of something else")
    return reading, examples


def _check_head(reading: Reading, other: Reading, example: Example, taken: Taken) -> None:
    """Raise AnotherHead if other steps have another head and other targets, which are here too."""
    if other.guessed or reading.pieces[0].targets is None or example.logits is None:
        return
    mine, theirs = reading.pieces[0].targets, other.pieces[0].targets
    one_module = not reading.whole and reading.module == other.module
    if theirs is None or mine == theirs or (one_module and reading.logits_at == other.logits_at):
        return
    try:
        fits = fitted(at(taken.batch, theirs), example.logits, reading.task) is not None
    except LookupError:
        fits = False
    if fits:
        raise AnotherHead(
            f"its loss is of batch{path_text(mine)}, that of other steps of batch"
            f"{path_text(theirs)}"
        )


def _found(loss: Loss, seen: Seen, taken: Taken) -> Found:
    match = match_of(loss, seen, taken)
    if match is not None:
        return Found(loss, match, (loss.kind, match.called.name, match.at))
    width, piece = loss.logits.shape[1:2], None
    if loss.targets is not None:
        piece = target_of_step(loss, taken).piece
    return Found(loss, None, (loss.kind, *width, piece and piece.targets))


def _distinct(losses: Sequence[Loss]) -> list[Loss]:
    kept: dict[tuple[int, int], Loss] = {}
    for loss in of_one_output(losses):
        kept.setdefault((id(loss.logits), id(loss.targets)), loss)
    return list(kept.values())


def _followed(every: Sequence[Found], taken: Taken) -> list[Found]:
    """Of what may be losses written out by the step those whose logits and targets are known.

    Raises:
        LookupError: If there are none.
    """
    problem = LookupError("no loss was seen whose logits are the output of a module")
    followed = []
    for found in every:
        if found.match is None:
            continue
        try:
            _targets(found, taken)
        except LookupError as error:
            problem = error
        else:
            followed.append(found)
    if not followed:
        raise problem
    return followed


def _names(losses: Sequence[Found], seen: Seen, taken: Taken) -> list[str]:
    """What a user may call a head: its module, its key in the output, its targets."""
    names, paths = [], [_targets(losses[0], taken)]
    match = losses[0].match
    if match is not None:
        for called in seen.calls:
            if any(leaf is match.output for _, leaf in leaves(called.output)):
                names += [called.name, called.name.rpartition(".")[2]]
        paths.insert(0, match.at)
    for path in paths:
        names += [path_text(path), path_text(path).strip(".[]'")] if path else []
    return [name for name in dict.fromkeys(names) if name]


def _targets(found: Found, taken: Taken) -> Path | None:
    """Where in the batch the targets of a loss are; None if they are nowhere."""
    if found.match is None:
        if found.loss.targets is None:
            return None
        return target_of_step(found.loss, taken).piece.targets
    return target_of(found.loss, found.match, taken, training=False).piece.targets


def _chosen(
    heads: dict[tuple[Any, ...], list[Found]],
    head: str | None,
    known: Reading | None,
    seen: Seen,
    taken: Taken,
) -> list[Found]:
    if len(heads) == 1 and head is None:
        return next(iter(heads.values()))
    if head is None:
        for losses in heads.values():
            if known is not None and _is_of(known, losses[0], taken):
                return losses
        # The first of those that look most like the main one.
        return min(heads.values(), key=lambda losses: _doubt(losses[0], seen, taken))
    names = {key: _names(losses, seen, taken) for key, losses in heads.items()}
    for key, those in names.items():
        if head in those:
            return heads[key]
    listed = "; ".join(" or ".join(map(repr, those)) for those in names.values() if those)
    raise ValueError(f"the step has no head {head!r}; it has {listed or 'none with a name'}")


def _is_of(known: Reading, found: Found, taken: Taken) -> bool:
    """Whether a loss is of the head that is known."""
    if found.match is not None:
        return (known.module, known.logits_at) == (found.match.called.name, found.match.at)
    targets = _targets(found, taken)
    return known.whole and targets is not None and targets == known.pieces[0].targets


def _doubt(found: Found, seen: Seen, taken: Taken) -> int:
    """How little a loss, one of several, looks like that of the main head.

    0 where its targets are a part of the batch, 1 where the step makes them (an auxiliary task of
    its own, a discriminator), 2 where they are inputs (a reconstruction).
    """
    path = _targets(found, taken)
    if path is None:
        return 1
    target = at(taken.batch, path)
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
        every = _only_one(every)
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


def _only_one(every: list[Target]) -> list[Target]:
    """The targets of a loss that a step writes out itself, which may use them several times.

    Raises:
        LookupError: If several parts of the batch may be them.
    """
    paths = {one.piece.targets for one in every}
    if len(paths) > 1:
        texts = " and ".join(sorted(f"batch{path_text(path or ())}" for path in paths))
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
        shared=seen.lineage.of(loss.logits).parts & labels,
    )
    known = piece.targets is not None
    targets = piece.read(taken.batch, z, task) if known else in_places(y, rows, z, task)
    items = piece.items(taken.batch, z)
    return reading, [Example(reading.bare(inputs.call), z, targets, (), items, inputs.versions)]

"""The heads that a step computes losses of, and which of them is the duo's."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from lightning_duo.callback.layout import fitted
from lightning_duo.callback.loss_calls import Loss, of_one_output
from lightning_duo.callback.matches import Match, match_of, overlap
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.taken import Taken
from lightning_duo.callback.targets import target_of, target_of_step
from lightning_duo.callback.watch import Seen
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


Heads: TypeAlias = dict[tuple[Any, ...], list[Found]]
"""Each head with its losses, in the order of the step."""


def heads_of(seen: Seen, taken: Taken) -> Heads:
    """The heads of which a step was seen to compute a loss.

    Args:
        seen: What was seen of it; at least one loss.
        taken: Its batch.

    Raises:
        LookupError: If the step writes its losses out, and none can be followed.
    """
    every = [_found(loss, seen, taken) for loss in _distinct(seen.losses)]
    if seen.by == "hand":
        every = _followed(every, taken)
    heads: Heads = {}
    for found in every:
        heads.setdefault(found.head, []).append(found)
    return heads


def chosen_of(
    heads: Heads, head: str | None, known: Reading | None, seen: Seen, taken: Taken
) -> list[Found]:
    """The losses of the duo's head.

    Args:
        heads: Those of the step.
        head: The user's choice.
        known: What is known of earlier steps; of several heads theirs is taken.
        seen: What was seen of the step.
        taken: Its batch.

    Raises:
        ValueError: If there is no such head.
    """
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


def is_among(known: Reading, heads: Heads, taken: Taken) -> bool:
    """Whether the head that is known is among these."""
    return any(_is_of(known, losses[0], taken) for losses in heads.values())


def check_head(reading: Reading, other: Reading, example: Example, taken: Taken) -> None:
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
            f"its loss is of batch{path_text(mine, taken.batch)}, that of other steps of batch"
            f"{path_text(theirs, taken.batch)}"
        )


def _found(loss: Loss, seen: Seen, taken: Taken) -> Found:
    match = match_of(loss, seen, taken)
    width, piece = loss.logits.shape[1:2], None
    if loss.targets is not None and (match is None or match.rows is not None):
        piece = target_of_step(loss, taken).piece
    if match is not None:
        one = piece is not None and piece.targets is not None and loss.kind != "classes"
        if not one or _targets(Found(loss, match, ()), taken) is not None:
            return Found(loss, match, (loss.kind, match.called.name, match.at))
        # One label of several, with targets of its own.
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
        plain = path_text(path).strip(".[]'") if path else ""
        names += [plain, path_text(path)] if path else []
    return [name for name in dict.fromkeys(names) if name]


def _targets(found: Found, taken: Taken) -> Path | None:
    """Where in the batch the targets of a loss are; None if they are nowhere."""
    if found.match is None:
        if found.loss.targets is None:
            return None
        return target_of_step(found.loss, taken).piece.targets
    return target_of(found.loss, found.match, taken, training=False).piece.targets


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
    return 2 if any(overlap(target, leaf) for leaf in inputs) else 0

"""A step of which the user tells the inputs, targets or logits, or of which nothing is seen."""

from collections.abc import Sequence
from typing import Any

from lightning_duo.callback.guess import Guess
from lightning_duo.callback.learnt import Learnt, Stage
from lightning_duo.callback.options import Options
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.watch import Called, Seen
from lightning_duo.tasks import task_of


def read_told(
    guess: Guess,
    outputs: Any,
    calls: Sequence[Called],
    options: Options,
    learnt: Learnt,
    *,
    stage: Stage,
    classes: int | None,
) -> list[Example]:
    """The example that a batch is, by what the user told of it, or what is usual.

    Args:
        guess: How the batch is read.
        outputs: What the step returned.
        calls: The calls of modules during the step.
        options: The user's.
        learnt: What is known of such steps; this one adds to it.
        stage: Which step.
        classes: How many outputs a head has, if it is known.

    Raises:
        ValueError: If no logits can be found, or it is not clear what they decide.
    """
    if stage == "training" and classes and learnt.reading is not None:
        logits = None  # nothing more is to be known of them
        task = learnt.reading.task
    else:
        logits = guess.logits(outputs, calls, classes=classes or 0)
        task = options.task or task_of(
            logits, guess.targets, labels=learnt.kind in ("labels", "probabilities")
        )
    learnt.reading = Reading("", (), task, (), template=(), guessed=True)
    learnt.looks += 1
    return [Example(guess.call, logits, guess.targets, ())]


def note_kind(seen: Seen, learnt: Learnt) -> None:
    """Note of which kind the loss of a step is, if one was seen."""
    kinds = [loss.kind for loss in seen.losses if seen.by != "hand"]
    learnt.kind = next(iter(kinds), learnt.kind)

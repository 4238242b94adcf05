"""What both models say of a batch."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_duo.base import Call
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.outputs import run_sidekick, sidekick_logits
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.run import Run
from lightning_duo.isolation import evaluating
from lightning_duo.logits import Logits
from lightning_duo.nested import Path, leaves, mapped
from lightning_duo.tasks import Labels, Rows, Task


class Found(NamedTuple):
    """What both models say of a batch, on the CPU."""

    logits: Logits
    """Of each decision, (R, K), and its target."""
    items: Tensor | None
    """Which item of the batch each belongs to; None where decision i is of item i, or unknown."""
    part: Path
    """Which of several loaders, combined in one batch, they come from."""


def both(run: Run, trainer: Trainer, reading: Reading, example: Example) -> Found:
    """Let the sidekick judge what the base has judged.

    Args:
        run: The run, which learns what a sample is.
        trainer: The user's.
        reading: How the step was read.
        example: A call of the base in it, with logits and targets.
    """
    base, task = example.logits, reading.task
    assert base is not None
    rows = task.rows(base, example.targets, "base")
    check_no_softmax(run.messages, rows, task)
    sidekick = run.ready_sidekick(trainer, task.outputs(base), example)
    # A transform may have modes too.
    precision: AbstractContextManager[Any] = trainer.precision_plugin.val_step_context()
    with evaluating(sidekick.deployable()), precision:
        call = sidekick.call(example.call, reading.part_of(run.base))
        output = run_sidekick(sidekick.model, call)
    logits = sidekick_logits(output, base, reading.logits_at, task)
    sidekick.look(logits, task)
    theirs = run.with_member(task).rows(logits, example.targets, "sidekick")
    if not reading.whole:  # else a part of the base is not all that it costs
        run.example = one_sample(example.call, len(base)) or run.example
    assert rows.targets is not None
    found = Logits(rows.logits.float(), theirs.logits.float(), rows.targets)
    items = _items(run, rows, example)
    return Found(Logits(*(part.cpu() for part in found)), items, example.part)


def _items(run: Run, rows: Rows, example: Example) -> Tensor | None:
    """Which item of the batch each row belongs to, where that is another than its number."""
    if rows.items is None and example.items is None:
        return None
    check_independent(run.options.delta)
    items = rows.items
    if example.items is not None:
        items = example.items if items is None else example.items[items]
    return None if items is None else items.cpu()


def together(found: list[Found], part: Path) -> Found:
    """What was found of one loader in several calls of the base."""
    if len(found) == 1:
        return found[0]._replace(part=part)
    columns = zip(*(one.logits for one in found), strict=True)
    items = [
        torch.arange(len(one.logits.targets)) if one.items is None else one.items for one in found
    ]
    return Found(Logits(*(torch.cat(column) for column in columns)), torch.cat(items), part)


def check_independent(delta: float | None) -> None:
    """Raise ValueError if a guarantee is asked for where several decisions are of one item."""
    if delta is not None:
        raise ValueError(
            f"delta={delta} asks for a guarantee, which needs independent decisions, but several "
            "are of one item here (pixels of an image, tokens, labels, views); leave delta out, or "
            "decide once for each item"
        )


def check_no_softmax(messages: Messages, rows: Rows, task: Task) -> None:
    """Warn, once, of a base that gives probabilities where logits belong."""
    logits = rows.logits
    if isinstance(task, Labels) or not len(logits) or not bool((logits >= 0).all()):
        return
    if messages.first("probabilities?") and bool((logits.float().sum(1) - 1).abs().max() < 1e-3):
        messages.warn(
            "the base seems to give probabilities (non-negative rows that sum to 1) where logits "
            "belong; give it logits, or pass DuoCallback(..., logits_fn=...), or the temperatures "
            "will mean little"
        )


def one_sample(call: Call, count: int) -> Call | None:
    """A call for the first of several samples; None if it cannot be told from the others."""
    tensors = [leaf for _, leaf in leaves(call)]
    if not count or not tensors or any(t.layout != torch.strided or t.is_nested for t in tensors):
        return None  # sparse and nested tensors cannot be cut
    if any(t.ndim and len(t) != count for t in tensors):
        return None
    # An image with metadata may refuse to be sliced.
    return mapped(call, lambda t: (t.narrow(0, 0, 1) if t.ndim else t).detach())  # type: ignore[no-any-return]

"""What both models say of a batch."""

from typing import NamedTuple

import torch

from lightning_duo.base import Call
from lightning_duo.callback.messages import Messages
from lightning_duo.logits import Logits
from lightning_duo.nested import Path, leaves, mapped
from lightning_duo.tasks import Labels, Rows, Task


class Found(NamedTuple):
    """What both models say of a batch, on the CPU."""

    logits: Logits
    """Of each decision, (R, K), and its target."""
    items: torch.Tensor | None
    """Which item of the batch each belongs to; None where decision i is of item i, or unknown."""
    part: Path
    """Which of several loaders, combined in one batch, they come from."""


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

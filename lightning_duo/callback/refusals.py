"""What only looks like a classification, and what to say of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_duo.base import Call
from lightning_duo.callback.lineage import Lineage
from lightning_duo.callback.loss_calls import Loss
from lightning_duo.callback.matches import overlap
from lightning_duo.callback.reading import Piece
from lightning_duo.nested import leaves

SUPPORTED = (
    "a duo needs a classification: logits of classes or labels, given to cross-entropy or binary "
    "cross-entropy with targets from the batch"
)
REMEDY = (
    "to say yourself which inputs, targets and logits are meant, pass DuoCallback(..., "
    "batch_fn=lambda batch: (inputs, targets), logits_fn=lambda module, inputs: logits)"
)


def refuse(losses: Sequence[Loss], found: Sequence[Piece], call: Call, lineage: Lineage) -> None:
    """Raise ValueError if what looks like a classification is something else."""
    inputs = [leaf for _, leaf in leaves(call)]
    made_of = {lineage.of(leaf).parts for leaf in inputs} - {frozenset()}
    for loss, piece in zip(losses, found, strict=True):
        y = loss.targets
        if y is not None and not y.numel():
            continue
        same = inputs and y is not None and all(overlap(x, y) or _is_next(x, y) for x in inputs)
        if same or (piece.targets and made_of == {frozenset({piece.targets})}):
            raise ValueError(
                f"the step's targets are its inputs (a reconstruction, or a language model?); "
                f"{SUPPORTED}; {REMEDY}"
            )
        if y is None:
            continue
        if loss.kind == "classes" and piece.targets is None and y.ndim == 1:
            square = loss.logits.ndim == 2 and loss.logits.shape[0] == loss.logits.shape[1]
            if square and torch.equal(y, torch.arange(len(y), device=y.device).to(y.dtype)):
                raise ValueError(
                    "the step's targets are 0, 1, 2, ..., each sample a class of its own (a "
                    f"contrastive loss?); {SUPPORTED}; {REMEDY}"
                )
        if loss.kind != "classes" and piece.targets is not None:
            others = y[(y != 0) & (y != 1) & ~y.isnan()]
            if len(others):
                raise ValueError(
                    f"the step's targets are no 0 and 1 but {float(others[0]):g}, say (a "
                    "regression, or a reconstruction? Labels such as 1 and 2 must become 0 and 1 "
                    "first); "
                    f"{SUPPORTED}; {REMEDY}"
                )
    if len(losses) > 1 and all(piece.targets is None for piece in found):
        if len({id(loss.logits) for loss in losses}) == 1:
            raise ValueError(
                "the step makes several targets of the same logits, and none is in the batch (a "
                f"distribution over the values of a regression?); {SUPPORTED}; {REMEDY}"
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

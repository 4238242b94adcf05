"""The base once more: for logits that its step does not show, or that do not know the labels."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_duo.base import Call, logits_in
from lightning_duo.callback.learnt import Learnt, Stage
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.replay import knows_labels
from lightning_duo.isolation import evaluating, unnoticed


def logits_of(reading: Reading, base: LightningModule, call: Call) -> Tensor:
    """What the module that a reading names gives for a call, in eval mode.

    Raises:
        LookupError: If it gives no logits.
    """
    part = reading.part_of(base)
    with evaluating(base), unnoticed(base):
        logits = logits_in(call.of(part), reading.logits_at)
    if logits is None:
        raise LookupError(f"{reading.name} returns no logits without the labels")
    return logits.detach()


def without_labels(
    examples: list[Example],
    base: LightningModule,
    learnt: Learnt,
    messages: Messages,
    batch: Any,
    *,
    stage: Stage,
) -> list[Example]:
    """The same with logits that do not know the labels, if those of the step do.

    Args:
        examples: What a step made of its batch.
        base: The base.
        learnt: What is known of such steps; that its logits know the labels is added to it.
        messages: Where to warn of that.
        batch: The batch.
        stage: Which step.

    Raises:
        ValueError: If the base cannot run without the labels, or the step itself makes logits that
            know them.
    """
    reading = learnt.reading
    if reading is not None and reading.whole and reading.shared and learnt.leaks is None:
        _refuse_leak(reading, base, examples[0], batch, stage=stage)
        learnt.leaks = False
    if reading is None or not reading.labels or reading.whole or learnt.leaks is False:
        return examples
    try:
        again = [e._replace(logits=logits_of(reading, base, e.call)) for e in examples]
    except Exception as error:  # whatever the user's model may raise
        raise ValueError(
            f"{reading.name} is called with the labels and cannot run without them "
            f"({type(error).__name__}: {error}), as a deployed duo will have to; give them a "
            "default of None in its forward, or pass DuoCallback(..., "
            "logits_fn=lambda module, inputs: ...)"
        ) from error
    if learnt.leaks is None:
        pairs = zip(again, examples, strict=True)
        learnt.leaks = not all(close(a.logits, e.logits) for a, e in pairs)
        if learnt.leaks:
            messages.warn(
                f"the logits of {reading.name} depend on the labels that it is called with (a "
                "margin?); the duo uses those without labels, which takes one more forward per "
                f"{stage} batch",
                once="leaks",
            )
    return again if learnt.leaks else examples


def _refuse_leak(
    reading: Reading, base: LightningModule, example: Example, batch: Any, *, stage: Stage
) -> None:
    assert example.logits is not None
    if knows_labels(base, reading, batch, reading.task.outputs(example.logits)):
        raise ValueError(
            f"the logits that the {stage} step computes depend on its targets (a margin?), which a "
            "deployed duo does not have; compute them without in validation, or pass "
            "DuoCallback(..., batch_fn=lambda batch: (inputs, targets), "
            "logits_fn=lambda module, inputs: logits)"
        )


def close(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two sets of logits are the same but for rounding."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-4, equal_nan=True)

"""Steps that compute no loss: they are read as those of another stage, or an earlier one, were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_duo.base import logits_in
from lightning_duo.callback.explain import with_targets
from lightning_duo.callback.guess import plain_logits
from lightning_duo.callback.learnt import Learnt, Stage
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.refusals import REMEDY
from lightning_duo.callback.rerun import close, logits_of
from lightning_duo.callback.taken import Taken
from lightning_duo.callback.watch import Called


@dataclass(frozen=True)
class Lossless:
    """A step that computed no loss, and what is known of steps that do."""

    base: LightningModule
    known: Reading
    """Of steps with a loss."""
    learnt: Learnt
    """What is known of steps like this one, which adds to it."""
    messages: Messages
    stage: Stage
    taken: Taken
    """The batch."""
    calls: Sequence[Called]
    """Of modules, during the step."""

    def returned(self, outputs: Any) -> list[Example] | None:
        """Logits that the step returns by that name, or makes itself; None if it returns none.

        Args:
            outputs: What the step returned.
        """
        known, batch = self.known, self.taken.batch
        logits = plain_logits(outputs)
        if logits is None or (isinstance(outputs, Tensor) and not known.whole):
            return None
        try:
            call = known.call_of(batch)
            targets = known.pieces[0].read(batch, logits, known.task)
        except LookupError:
            return None
        self.learnt.reading = known
        if not known.whole and self.messages.first("logits compared"):
            self._compare(logits)
        return [Example(call, logits.detach(), targets)]

    def _compare(self, returned: Tensor) -> None:
        """Warn where the step returns other logits than the duo will see."""
        known = self.known
        own = [called.output for called in self.calls if called.name == known.module]
        found = [logits_in(output, known.logits_at) for output in own]
        if not any(close(one, returned) for one in found):
            self.messages.warn(
                f"the {self.stage} step returns other logits {tuple(returned.shape)} than "
                f"{known.name}, which the duo will call, gives for the same inputs; what it "
                "returns is taken for the base's logits. Pass DuoCallback(..., "
                "logits_fn=lambda module, inputs: ...) that gives the logits which are meant"
            )

    def called(self) -> tuple[Reading, list[Example]]:
        """Logits of a module that the step calls, else of one more forward.

        Raises:
            ValueError: If there are none.
        """
        if self.known.whole:
            raise ValueError(
                f"the {self.stage} step computes no loss and returns no logits, which no module "
                f"gives: the training step makes them of what {self.known.name} gives; return "
                f'{{"logits": ...}} from the {self.stage} step; {REMEDY}'
            )
        try:
            reading = with_targets(self.known, self.calls, self.taken)
            return reading, reading.read(self.calls, self.taken.batch)
        except LookupError:
            return self._of_another_module() or self._of_one_more_forward()

    def _of_another_module(self) -> tuple[Reading, list[Example]] | None:
        """Logits of another module than in steps with a loss, such as an average."""
        known = self.known
        for called in reversed(self.calls):
            if called.name == known.module or self.taken.parts_of(called.call) is None:
                continue
            first = replace(known.pieces[0], number=0)
            reading = replace(known, module=called.name, pieces=(first,), calls=1)
            try:
                return reading, reading.read([called], self.taken.batch)
            except (LookupError, ValueError):
                continue
        return None

    def _of_one_more_forward(self) -> tuple[Reading, list[Example]]:
        known, batch = self.known, self.taken.batch
        try:
            call = known.call_of(batch)
            logits = logits_of(known, self.base, call)
            targets = known.pieces[0].read(batch, logits, known.task)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's model may raise
            raise ValueError(
                f"the {self.stage} step computes no loss of what {known.name} gives, as the "
                f"training step does, and {known.name} gives no logits for its batch "
                f"({type(error).__name__}: {error}); {REMEDY}"
            ) from error
        self.messages.info(
            f"the {self.stage} step does not call {known.name}, or is compiled, so it runs once "
            "more per batch for its logits",
            once="extra forward",
        )
        self.learnt.reruns = True
        return known, [Example(call, logits, targets)]


def may_skip(outputs: Any, known: Reading | None, *, stage: Stage) -> bool:
    """Whether a step that calls no module has left out its batch: one without objects, say.

    Args:
        outputs: What the step returned.
        known: What is known of steps with a loss.
        stage: Which step.
    """
    nothing = outputs is None or (isinstance(outputs, Mapping) and not outputs)
    lost = known is not None and known.template is None  # one more forward is not possible
    return nothing and (stage == "training" or lost)

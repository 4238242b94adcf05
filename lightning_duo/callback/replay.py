"""A duo whose logits the base's own step makes: it takes a batch, as the step does."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_duo.callback.guess import plain_logits
from lightning_duo.callback.loss_calls import Loss, LossMode, width_of
from lightning_duo.callback.reading import Reading
from lightning_duo.isolation import unnoticed
from lightning_duo.module import DuoModule
from lightning_duo.nested import at, mapped
from lightning_duo.tasks import Classes


class _LossReached(Exception):
    """The step has its logits."""


class _Until(LossMode):
    """Ends the step at the loss of the duo's logits.

    Args:
        wanted: Whether a loss may be it.
        number: Which of those it is.
    """

    def __init__(self, wanted: Callable[[Loss], bool], number: int) -> None:
        super().__init__()
        self.wanted, self.left = wanted, number

    @override
    def note(self, loss: Loss) -> None:
        super().note(loss)
        if self.wanted(loss):
            if self.left == 0:
                raise _LossReached
            self.left -= 1


class StepLogits(nn.Module):
    """The validation step of a module, up to the logits that it computes its loss of.

    Args:
        module: The base.
        reading: What was learnt of its step.
        outputs: How many outputs the logits have.
    """

    def __init__(self, module: LightningModule, reading: Reading, outputs: int) -> None:
        super().__init__()
        self.module, self.reading, self.outputs = module, reading, outputs

    @override
    def forward(self, batch: Any) -> Tensor:
        mode = _Until(self._is_wanted, self.reading.pieces[0].number)
        step = self.module.validation_step
        names = inspect.signature(step).parameters
        rest = {name: 0 for name in ("batch_idx", "dataloader_idx") if name in names}
        positional = [0] if len(names) > 1 and not rest else []
        try:
            batch = self._with_every_target(batch)
            with unnoticed(self.module), mode:
                returned = plain_logits(step(batch, *positional, **rest))
        except _LossReached:
            return mode.losses[-1].logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's step may raise
            raise ValueError(
                f"the validation step of {type(self.module).__name__}, the base of this duo, fails "
                f"on this batch ({type(error).__name__}: {error}); give it a batch as in "
                "validation, with any labels"
            ) from error
        of_metrics = [loss for loss in mode.of_metrics if self._is_wanted(loss)]
        if returned is not None or len(of_metrics) > mode.left:
            return of_metrics[mode.left].logits if returned is None else returned
        raise ValueError(
            f"the validation step of {type(self.module).__name__} neither computes a loss of "
            f"logits with {self.outputs} outputs from this batch nor returns them; give "
            "it a batch as in validation"
        )

    def _with_every_target(self, batch: Any) -> Any:
        """A batch in which no place is without a target, or the step might leave it out."""
        piece, task = self.reading.pieces[0], self.reading.task
        if piece.targets is None or not isinstance(task, Classes):
            return batch
        try:
            leaf = at(batch, piece.targets)
        except LookupError:
            return batch
        known = leaf + piece.offset
        if known.is_floating_point() or bool(((known >= 0) & (known < self.outputs)).all()):
            return batch
        filled = torch.where((known >= 0) & (known < self.outputs), leaf, -piece.offset)
        return mapped(batch, lambda x: filled if x is leaf else x)

    def _is_wanted(self, loss: Loss) -> bool:
        classes = isinstance(self.reading.task, Classes)
        of_kind = (loss.kind == "classes") is classes
        return of_kind and width_of(loss) == self.outputs


class StepDuo(DuoModule):
    """A duo that takes a batch, since only the base's step makes its logits of it."""

    @property
    @override
    def cannot_export(self) -> str:
        return (
            "the base of this duo is the validation step of your module, which runs in Python "
            "only; write its logits as a function and export DuoModule(LogitsOf(logits_fn, model), "
            "sidekick, temperatures), all three of lightning_duo"
        )

    @override
    def member_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        base = self.base_logits(*args, **kwargs)
        assert isinstance(self.base, StepLogits)
        (batch,) = (*args, *kwargs.values())
        call = self.base.reading.call_of(batch)
        sidekick = self.sidekick_logits(*call.args, **call.kwargs).to(base.device)
        mask = self.base.reading.pieces[0].mask
        if mask is not None and sidekick.numel() > base.numel():  # the step left places out
            sidekick = sidekick.reshape(-1, base.shape[1])[at(batch, mask).reshape(-1).bool()]
        return base.float(), sidekick.float().reshape(base.shape)


def knows_labels(module: LightningModule, reading: Reading, batch: Any, outputs: int) -> bool:
    """Whether the logits that a validation step makes are others for other labels.

    Args:
        module: The base.
        reading: What was learnt of its step.
        batch: A batch as in validation; it stays as it is.
        outputs: How many outputs the logits have.
    """
    step = StepLogits(module, reading, outputs)
    offset = reading.pieces[0].offset
    count = outputs if isinstance(reading.task, Classes) else 2

    def other(leaf: Tensor) -> Tensor:
        label = leaf + offset
        valid = (label >= 0) & (label < count) & (label == label.round())
        return torch.where(valid, (label + 1) % count - offset, leaf).to(leaf.dtype)

    with torch.no_grad():
        logits = step(mapped(batch, torch.clone))
        changed = mapped(batch, torch.clone)
        for path in reading.shared:
            at(changed, path).copy_(other(at(changed, path)))
        again = step(changed)
    same = logits.shape == again.shape
    return not same or not torch.allclose(logits, again, rtol=1e-3, atol=1e-4, equal_nan=True)

"""A duo whose logits the base's own step makes: it takes a batch, as the step does."""

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_duo.callback.guess import plain_logits
from lightning_duo.callback.loss_calls import Loss, LossMode
from lightning_duo.callback.reading import Reading
from lightning_duo.isolation import unnoticed
from lightning_duo.module import DuoModule
from lightning_duo.tasks import Classes


class _LossReached(Exception):
    """The step has its logits."""


class _Until(LossMode):
    """Ends the step at the first loss that is of the duo's logits."""

    def __init__(self, wanted: Callable[[Loss], bool]) -> None:
        super().__init__()
        self.wanted = wanted

    @override
    def note(self, loss: Loss) -> None:
        super().note(loss)
        if self.wanted(loss):
            raise _LossReached


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
        mode = _Until(self._is_wanted)
        step = self.module.validation_step
        names = inspect.signature(step).parameters
        rest = {name: 0 for name in ("batch_idx", "dataloader_idx") if name in names}
        positional = [0] if len(names) > 1 and not rest else []
        try:
            with unnoticed(self.module), mode:
                returned = plain_logits(step(batch, *positional, **rest))
        except _LossReached:
            return mode.losses[-1].logits
        if returned is not None:
            return returned
        raise ValueError(
            f"the validation step of {type(self.module).__name__} neither computes a loss of "
            f"logits with {self.outputs} outputs from this batch nor returns them; give "
            "it a batch as in validation"
        )

    def _is_wanted(self, loss: Loss) -> bool:
        classes = isinstance(self.reading.task, Classes)
        of_kind = (loss.kind == "classes") is classes
        width = loss.logits.shape[1] if loss.logits.ndim > 1 else 1
        return of_kind and width == self.outputs


class StepDuo(DuoModule):
    """A duo that takes a batch, since only the base's step makes its logits of it."""

    @override
    def member_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        base = self.base_logits(*args, **kwargs)
        assert isinstance(self.base, StepLogits)
        (batch,) = (*args, *kwargs.values())
        call = self.base.reading.call_of(batch)
        sidekick = self.sidekick_logits(*call.args, **call.kwargs)
        return base.float(), sidekick.float().reshape(base.shape)

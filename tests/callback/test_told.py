"""Runs whose inputs, targets or logits the user tells, beside a step that is compiled."""

import pytest
import torch
from helpers import VAL, Classifier, loader
from runs import fitted, make_duo
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

from lightning_duo import DuoCallback
from lightning_duo.tasks import Labels

TOLD = {
    "batch_fn": lambda batch: (batch[0], batch[1]),
    "logits_fn": lambda module, inputs: module.net(inputs),
}


class Labelled(Classifier):
    """Labels that each hold or not, of which nothing is logged: that would take long to compile."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class Broken(Labelled):
    """Cannot run twice, and so not once more without compilation."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError("it is not compiled")
        return super().training_step(batch, batch_idx)


def of_labels(count: int, module: type[Labelled] = Labelled, **options: object) -> DuoCallback:
    x, y = VAL.tensors
    targets = (y[:, None] + torch.arange(count)).remainder(2).float()
    data = loader(TensorDataset(x, targets))
    base = torch.compile(module(count), backend="eager")
    duo, *_ = fitted(make_duo(**options), base, train=data, val=data, max_epochs=1)
    assert len(duo.predictions["val"]["duo"].targets) == targets.numel()
    return duo


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("told", [["batch_fn"], ["logits_fn"], ["batch_fn", "logits_fn"]])
def test_the_task_of_a_compiled_step_need_not_be_told(told: list[str], count: int) -> None:
    duo = of_labels(count, **{name: TOLD[name] for name in told})
    assert isinstance(duo.module.task, Labels)


def test_the_task_is_told_where_the_step_cannot_run_once_more() -> None:
    with pytest.raises(ValueError, match=r"pass task=lightning_duo.tasks.Labels\(\)"):
        of_labels(1, Broken, **TOLD)
    duo = of_labels(1, Broken, **TOLD, task=Labels())
    probs = duo.module(VAL.tensors[0][:5]).probs
    assert probs.shape == (5, 1)

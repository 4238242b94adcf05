"""What the callback leaves on the user's module, strategy and loaders: nothing."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from helpers import TRAIN, VAL, Classifier, loader, make_trainer
from runs import make_duo
from torch import Tensor, nn


def hooks_of(module: nn.Module) -> list[str]:
    """Names of parts with hooks or with a forward of their own, one for each."""
    found = []
    for name, part in module.named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
        found += [name] * sum(map(len, hooks))
        found += [name] * ("forward" in vars(part))
    return found


def marks(trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
    """Whatever a callback could leave: attributes and hooks."""
    loaders = [trainer.train_dataloader, trainer.val_dataloaders]
    owners = [*module.modules(), trainer.strategy, trainer.precision_plugin, *loaders]
    attributes = [sorted(vars(owner)) for owner in owners if owner is not None]
    return [attributes, hooks_of(module)]


class Spy(L.Callback):
    """Notes the marks whenever no step runs."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.seen.append(marks(trainer, pl_module))

    on_train_batch_end = on_validation_batch_end = on_validation_epoch_end = look
    on_train_epoch_end = on_fit_end = look


class Fails(Classifier):
    """Raises in a step; which one, and of which batch, is said."""

    def __init__(self, stage: str, batch: int, error: type[BaseException] | None) -> None:
        super().__init__()
        self.stage, self.batch, self.error = stage, batch, error
        self.inside: list[int] = []

    def _perhaps(self, stage: str, batch_idx: int) -> None:
        if stage == "fit":
            self.inside.append(len(hooks_of(self)))
        if self.error and (stage, batch_idx) == (self.stage, self.batch):
            raise self.error("on purpose")

    def forward(self, x: Tensor) -> Tensor:
        if self.error and self.stage == "forward" and self.trainer.global_step == self.batch:
            raise self.error("on purpose")
        return super().forward(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        self._perhaps("fit", batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self._perhaps("val", batch_idx)
        super().validation_step(batch, batch_idx)


def run(
    stage: str, batch: int, error: type[BaseException] | None, *callbacks: L.Callback
) -> tuple[list[Any], Fails]:
    torch.manual_seed(0)
    module, spy = Fails(stage, batch, error), Spy()
    trainer = make_trainer(*callbacks, spy, num_sanity_val_steps=0)
    raised: type[BaseException] | None = None
    try:
        trainer.fit(module, loader(TRAIN), loader(VAL))
    except (RuntimeError, KeyboardInterrupt, SystemExit) as found:
        raised = type(found)
    assert (raised is None) == (error is None)
    return [*spy.seen, marks(trainer, module)], module


ERRORS: dict[str, tuple[str, int, type[BaseException] | None]] = {
    "none": ("", 0, None),
    "first training step": ("fit", 0, RuntimeError),
    "watched training step": ("fit", 1, RuntimeError),
    "later training step": ("fit", 5, RuntimeError),
    "within the forward": ("forward", 1, RuntimeError),
    "validation step": ("val", 0, RuntimeError),
    "later validation step": ("val", 4, RuntimeError),
    "interrupted in a watched step": ("fit", 1, KeyboardInterrupt),
    "interrupted in a forward": ("forward", 5, KeyboardInterrupt),
    "interrupted in validation": ("val", 1, KeyboardInterrupt),
}


@pytest.mark.parametrize("case", ERRORS)
def test_nothing_is_left_between_steps_and_after_the_run(case: str) -> None:
    alone, _ = run(*ERRORS[case])
    beside, module = run(*ERRORS[case], make_duo())
    assert beside == alone
    assert hooks_of(module) == []


def test_known_steps_run_with_one_hook() -> None:
    """The first of every epoch are watched, the others replayed."""
    _, module = run("", 0, None, make_duo())
    assert len(module.inside) == 14
    assert module.inside[2:7] == [1] * 5
    assert module.inside[8:] == [1] * 6


class Remembers(Classifier):
    """Knows which of its outputs are still somewhere in the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.outputs.append(weakref.ref(output))
        return output

    def alive(self) -> int:
        return sum(output() is not None for output in self.outputs)


class Alive(L.Callback):
    """The most outputs of the module that lived at the start of a batch."""

    most = 0

    def look(self, trainer: L.Trainer, pl_module: Remembers, *_: object) -> None:
        self.most = max(self.most, pl_module.alive())

    on_train_batch_start = on_validation_batch_start = look


@pytest.fixture
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collection")
def test_outputs_go_with_their_batch() -> None:
    """Without a garbage collection, which large outputs would have to wait for."""
    module, alive = Remembers(), Alive()
    trainer = make_trainer(make_duo(), alive)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    assert len(module.outputs) > 20
    assert alive.most <= 1
    assert module.alive() == 0

"""A base that is trained already: fit teaches its sidekick alone, and does not run the base."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

MARK = "lightning_duo"  # in the optimizer that only counts, and so in checkpoints
# What a module does around its own training, which does not happen.
HOOKS = (
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "backward",
)


def is_trained(module: LightningModule) -> bool:
    """Whether no parameter of a module is to be trained, and it has some."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and not any(flags)


class Trained:
    """A module that a Trainer fits without training it, from set-up to the end of fit.

    Its steps in training do nothing, its modes are those of evaluation, and an optimizer of a
    number that belongs to nobody counts the steps, so that ``max_steps``, checkpoints and loggers
    work as ever.

    Args:
        module: The user's; none of its parameters wants a gradient.
        trainer: The user's, about to set up its strategy.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self.module, self.strategy = module, trainer.strategy
        self._modes = [(part, part.training) for part in module.modules()]
        self._before = dict(vars(module))
        self._automatic = module.automatic_optimization
        module.eval()
        module.automatic_optimization = True
        own = vars(module)
        for name in HOOKS:
            own[name] = MethodType(getattr(LightningModule, name), module)
        step = module.training_step
        number: list[Tensor] = []

        @functools.wraps(step)
        def no_step(*_: Any, **__: Any) -> Tensor:
            return number[0] * 0

        def counting() -> torch.optim.Optimizer:
            number[:] = [torch.zeros((), device=module.device, requires_grad=True)]
            return torch.optim.SGD([{"params": number, MARK: True}], lr=0.0)

        no_step.of_user = step  # type: ignore[attr-defined]
        own.update(training_step=no_step, configure_optimizers=counting)
        if hasattr(self.strategy, "configure_ddp"):  # there is no gradient to exchange
            vars(self.strategy)["configure_ddp"] = _nothing

    def leave(self) -> None:
        """Give the module back as it was."""
        own = vars(self.module)
        for name in (*HOOKS, "training_step", "configure_optimizers"):
            own.pop(name, None)
            if name in self._before:
                own[name] = self._before[name]
        self.module.automatic_optimization = self._automatic
        vars(self.strategy).pop("configure_ddp", None)
        for part, training in self._modes:
            part.training = training


def _nothing() -> None:
    """There is nothing to do."""


def step_of_user(module: LightningModule) -> Callable[..., Any] | None:
    """The training step that a trained module does not take; None for one that is trained now."""
    found: Callable[..., Any] | None = getattr(vars(module).get("training_step"), "of_user", None)
    return found


@contextmanager
def untouched_metrics(module: LightningModule) -> Iterator[None]:
    """Around a step that nobody is to notice: its metrics count nothing."""
    kept = []
    for part in module.modules():
        if isinstance(part, Metric):
            names = [*part._defaults, "_update_count", "_computed"]
            kept.append((part, {name: copy.deepcopy(getattr(part, name)) for name in names}))
    try:
        yield
    finally:
        for part, values in kept:
            for name, value in values.items():
                setattr(part, name, value)

"""A base that is trained already: fit teaches its sidekick alone, and does not run the base."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torchmetrics import Metric

from lightning_duo.callback.fingerprint import is_sharded

MARK = "lightning_duo"  # in the optimizer that only counts, and so in checkpoints
STAYS = "_lightning_duo_stays"  # in a module that is not to be trained, whatever it wants
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
    """Whether a module is not to be trained: it is said so, or no parameter wants a gradient."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return STAYS in vars(module) or (bool(flags) and not any(flags))


@contextmanager
def staying(module: LightningModule, checkpoint: dict[str, Any] | None = None) -> Iterator[None]:
    """Around a fit that leaves a module as it is, whatever its parameters want.

    They are not frozen for it: a module may save the weights that want gradients only, or make
    them in its own set-up.

    Args:
        module: The module.
        checkpoint: Of a Trainer; its weights are loaded where the module is set up.
    """
    vars(module)[STAYS] = checkpoint
    try:
        yield
    finally:
        del vars(module)[STAYS]


class Trained:
    """A module that a Trainer fits without training it, from set-up to the end of fit.

    Its steps in training do nothing, its modes are those of evaluation, and an optimizer of a
    number that belongs to nobody counts the steps, so that ``max_steps``, checkpoints and loggers
    work as ever.

    Args:
        module: The user's.
        trainer: The user's, about to set up its strategy.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self.module, self.strategy = module, trainer.strategy
        self.fingerprint: int | None = None
        """Of the module where its training would begin."""
        self._checkpoint: dict[str, Any] | None = vars(module).get(STAYS)
        self._modes: list[tuple[nn.Module, bool]] = []
        self._precision = _precision(module)
        self._before = dict(vars(module))
        self._automatic = module.automatic_optimization
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
        if isinstance(self.strategy, ModelParallelStrategy):  # it seeks the number in the module
            mine = {"optimizer_state": _state_of, "load_checkpoint": self._without_optimizers}
            vars(self.strategy).update(mine)

    def begin(self) -> bool:
        """Load the weights of the module, which is set up by now, and put it in eval mode.

        Returns:
            Whether the Trainer's precision has rounded its weights.
        """
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            _load(self.module, checkpoint)
            vars(self.module)[STAYS] = None  # copies of the module need not carry it
        self._modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        return _precision(self.module) > self._precision

    def _without_optimizers(self, path: Any, **how: Any) -> Any:
        """Load a checkpoint without the state of an optimizer that has none."""
        strategy: Any = self.strategy
        optimizers, strategy.optimizers = strategy.optimizers, []
        try:
            return type(strategy).load_checkpoint(strategy, path, **how)
        finally:
            strategy.optimizers = optimizers

    def leave(self) -> None:
        """Give the module back as it was."""
        own = vars(self.module)
        for name in (*HOOKS, "training_step", "configure_optimizers"):
            own.pop(name, None)
            if name in self._before:
                own[name] = self._before[name]
        self.module.automatic_optimization = self._automatic
        for name in ("configure_ddp", "optimizer_state", "load_checkpoint"):
            vars(self.strategy).pop(name, None)
        for part, training in self._modes:
            part.training = training


def _load(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load weights as the Trainer does, also into a module of which this process has a shard."""
    module.on_load_checkpoint(checkpoint)
    weights, strict = checkpoint["state_dict"], module.strict_loading
    if is_sharded(module):
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(module, weights, options=options)
    else:
        try:
            module.load_state_dict(weights, strict=strict)
        except RuntimeError as error:
            raise ValueError(
                f"ckpt_path holds other weights than this {type(module).__name__}; build it as it "
                f"was when the checkpoint was saved: {' '.join(str(error).split())[:800]}"
            ) from error


def _precision(module: LightningModule) -> float:
    """Relative distance of the values that its most precise parameter can have."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return min((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, whatever it optimizes."""
    return optimizer.state_dict()


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

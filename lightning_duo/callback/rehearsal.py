"""Seeing a step that is compiled: it runs once more without compilation, and without a trace."""

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_duo.callback.loss_calls import LossMode
from lightning_duo.callback.refusals import REMEDY
from lightning_duo.callback.sidekick import copies
from lightning_duo.callback.taken import Taken
from lightning_duo.callback.trained import step_of_user, untouched_metrics
from lightning_duo.callback.watch import Seen, Watch
from lightning_duo.isolation import evaluating, own_stream, unnoticed
from lightning_duo.nested import kept


class _BackwardReached(Exception):
    """The step has computed its losses."""


class _UntilBackward(LossMode):
    """Ends a step where it begins to learn by itself."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            raise _BackwardReached
        return super().__torch_function__(func, types, args, kwargs)


def _end(*_: Any, **__: Any) -> None:
    raise _BackwardReached


def is_compiled(module: LightningModule, stage: str) -> bool:
    """Whether a step of the module is compiled as a whole, so that nothing of it can be seen.

    Args:
        module: The user's.
        stage: "training", "validation" or "test".
    """
    return hasattr(getattr(module, f"{stage}_step"), "_torchdynamo_orig_callable")


def has_compiled() -> bool:
    """Whether this process has compiled anything."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["stats"])


def rehearse(
    trainer: Trainer, module: LightningModule, stage: str, batch: Any, given: tuple[Any, ...]
) -> tuple[Seen, Taken]:
    """See what a step does with a batch, in one more evaluation that nobody notices.

    A copy of the module runs it without compilation, up to where it would learn from its losses;
    a module that is not trained runs it itself.

    Args:
        trainer: The user's.
        module: Theirs too.
        stage: "training", "validation" or "test".
        batch: The batch, as the step got it.
        given: What the step was given besides: the numbers of the batch and of the loader.

    Returns:
        What the step did, and the batch that it did it with.

    Raises:
        ValueError: If it cannot run once more.
    """
    batch = kept(batch)
    taken = Taken(batch)
    plugin = trainer.precision_plugin
    context = plugin.train_step_context if stage == "training" else plugin.val_step_context
    own = step_of_user(module) if stage == "training" else None
    try:
        copied = _twin(module) if own is None else module
        step = own or getattr(copied, f"{stage}_step")
        watch = Watch(copied, names=None, losses=True, mode=_UntilBackward)
        with ExitStack() as stack:
            if own is None:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            else:
                stack.enter_context(_still(module))
            stack.enter_context(own_stream(module.device))
            stack.enter_context(context())
            stack.enter_context(unnoticed(copied))
            stack.enter_context(watch.looking(batch))
            stack.enter_context(suppress(_BackwardReached))
            step(batch, *given)
    except Exception as error:  # whatever the user's step may raise
        why = "compiled, so it has to run once more without compilation"
        if own is not None:
            why = "that of a base which is not trained, so it has to run once"
        raise ValueError(
            f"the {stage} step is {why} to be seen, and that fails ({type(error).__name__}: "
            f"{error}); {REMEDY}"
        ) from error
    return watch.seen, taken


@contextmanager
def _still(module: LightningModule) -> Iterator[None]:
    """Around a step of a module that is not to learn, nor to count in its metrics."""
    before = vars(module).get("manual_backward")
    with evaluating(module), untouched_metrics(module):
        vars(module)["manual_backward"] = _end
        try:
            yield
        finally:
            del vars(module)["manual_backward"]
            if before is not None:
                vars(module)["manual_backward"] = before


def _twin(module: LightningModule) -> LightningModule:
    """A copy of a module that is still with its Trainer, but does not learn."""
    (copied,) = copies(module)
    assert isinstance(copied, LightningModule)
    pairs = zip(module.parameters(), copied.parameters(), strict=True)
    twins = {id(parameter): twin for parameter, twin in pairs}
    optimizers = []
    for optimizer in module.trainer.optimizers:
        optimizers.append(copy.copy(optimizer))
        optimizers[-1].param_groups = [
            {**group, "params": [twins.get(id(p), p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]

    def given(**_: Any) -> Any:
        return optimizers[0] if len(optimizers) == 1 else optimizers

    vars(copied).update(_trainer=module.trainer, manual_backward=_end, optimizers=given)
    return copied

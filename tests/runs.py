"""Runs that tests share: a duo beside a classifier, alone and compared, and what it must be."""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from helpers import (
    TRAIN,
    VAL,
    Classifier,
    Restless,
    digest,
    loader,
    make_trainer,
    small_net,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_duo import DuoCallback, TemperatureFit, fit_temperatures

INFO = "lightning.pytorch.utilities.rank_zero"


def fast_adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_duo(sidekick: object = small_net, **options: object) -> DuoCallback:
    return DuoCallback(sidekick, **{"optimizer": fast_adam, "summary": False, **options})


class Fitted(NamedTuple):
    duo: DuoCallback
    module: L.LightningModule
    trainer: L.Trainer


def fitted(
    duo: DuoCallback | None = None,
    module: L.LightningModule | None = None,
    *beside: L.Callback,
    train: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    **options: object,
) -> Fitted:
    """Fit with a duo, and other callbacks behind it."""
    duo = make_duo() if duo is None else duo
    module = Classifier() if module is None else module
    trainer = make_trainer(duo, *beside, **options)
    train, val = (loader(d) if x is None else x for x, d in ((train, TRAIN), (val, VAL)))
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return Fitted(duo, module, trainer)


class StopAfter(L.Callback):
    """Ends training after some epochs, whatever was planned."""

    def __init__(self, epochs: int = 1) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True


@torch.no_grad()
def logits_of(model: Callable[[Tensor], Tensor], data: TensorDataset = VAL) -> Tensor:
    """Logits of a model in eval mode, or of a function, one batch after the other."""
    if isinstance(model, nn.Module):
        model.eval()
    return torch.cat([model(x) for x, _ in loader(data)]).float()


def reference_fit(
    duo: DuoCallback, base: Callable[[Tensor], Tensor], data: TensorDataset = VAL
) -> TemperatureFit:
    """The fit to logits of both models, computed apart."""
    return fit_temperatures(logits_of(base, data), logits_of(duo.sidekick, data), data.tensors[1])


def check_duo(
    duo: DuoCallback,
    module: L.LightningModule,
    logits: Callable[[Tensor], Tensor] | None = None,
    rel: float = 1e-4,
    data: TensorDataset = VAL,
) -> None:
    """The temperatures are those of these models, and the deployed duo is made of them."""
    module.eval()
    logits = logits or module
    fit = reference_fit(duo, logits, data)
    assert duo.fit.temperatures == pytest.approx(tuple(fit.temperatures), rel=rel, abs=1e-6)
    assert duo.fit.nll == pytest.approx(fit.nll, rel=rel)
    x = VAL.tensors[0][:32]
    with torch.no_grad():
        sidekick = duo.sidekick.eval()(x)
        z = duo.fit.temperatures.base * logits(x) + duo.fit.temperatures.sidekick * sidekick
        torch.testing.assert_close(duo.module(x).probs, z.float().softmax(1), atol=1e-5, rtol=1e-4)


# ---- with and without ----


class Trace(L.Callback):
    """What somebody who knows nothing of the duo can see of a run."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        own = {k: v for k, v in trainer.callback_metrics.items() if not is_of_the_duo(k)}
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        schedulers = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        gradients = [p.grad for p in pl_module.parameters()]
        streams = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
        modes = [part.training for part in pl_module.modules()]
        trainable = [p.requires_grad for p in pl_module.parameters()]
        state = [pl_module.state_dict(), optimizers, gradients, streams, own, modes, trainable]
        self.seen.append(digest([*state, trainer.global_step, str(schedulers)]))

    on_train_batch_end = on_validation_batch_end = on_validation_end = look
    on_train_epoch_end = on_fit_end = look


def is_of_the_duo(name: str) -> bool:
    return name.split("/")[0] in ("base", "base_scaled", "sidekick", "duo")


def compare(
    make: Callable[[], L.LightningModule],
    *,
    train: Callable[[], Any] = lambda: loader(TRAIN, shuffle=True),
    val: Callable[[], Any] = lambda: loader(VAL),
    duo: Mapping[str, Any] = {},
    callbacks: Callable[[], list[L.Callback]] = list,
    **options: Any,
) -> Fitted:
    """Run with and without the callback, compare, and return the run with it."""

    def run(mine: list[L.Callback]) -> tuple[list[str], L.LightningModule, L.Trainer]:
        L.seed_everything(3, verbose=False)
        module, trace = make(), Trace()
        trainer = make_trainer(*mine, *callbacks(), trace, **options)
        trainer.fit(module, train(), val())
        return trace.seen, module, trainer

    alone, _, _ = run([])
    found = make_duo(**{"sidekick": Restless, **duo})
    seen, module, trainer = run([found])
    assert len(alone) > 4
    assert seen == alone
    return Fitted(found, module, trainer)

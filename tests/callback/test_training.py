"""The sidekick's training against a plain loop that does what the recipe says."""

import copy
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers import TRAIN, VAL, Classifier, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from runs import check_duo, compare, fitted, make_duo
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_duo import DuoCallback


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def no_dropout_net() -> nn.Module:
    net = small_net()
    net[4].p = 0.0
    return net


class Watch(L.Callback):
    """The sidekick's weights after each training batch."""

    def __init__(self, duo: DuoCallback) -> None:
        self.duo, self.history = duo, []

    def on_train_batch_end(self, *_: object) -> None:
        self.history.append({k: v.clone() for k, v in self.duo.sidekick.state_dict().items()})


@pytest.mark.parametrize(
    ("options", "window", "clip"),
    [
        ({}, 1, None),
        ({"accumulate_grad_batches": 4}, 4, None),  # 7 batches: windows of 4 and 3
        ({"gradient_clip_val": 0.1}, 1, 0.1),
    ],
)
def test_training_is_that_of_a_plain_loop(options: dict, window: int, clip: float | None) -> None:
    sidekick = no_dropout_net()
    reference = copy.deepcopy(sidekick)
    duo, _, _ = fitted(make_duo(sidekick, probe=0, optimizer=sgd, lr_scheduler=constant), **options)

    optimizer = sgd(reference.parameters())
    for _ in range(2):
        batches = list(loader(TRAIN))
        for i, (x, y) in enumerate(batches):
            (nn.functional.cross_entropy(reference.train()(x), y) / window).backward()
            if (i + 1) % window == 0 or i + 1 == len(batches):
                if clip:
                    nn.utils.clip_grad_norm_(reference.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(duo.sidekick.state_dict()[name], value, msg=name)


def test_the_head_is_probed_first_on_frozen_features() -> None:
    duo = make_duo(probe=0.5, optimizer=None)
    watch = Watch(duo)
    fitted(duo, None, watch)
    first, middle, last = (watch.history[i] for i in (0, 6, 13))
    body = [name for name in first if not name.startswith("5.")]
    assert all(torch.equal(first[name], middle[name]) for name in body)
    assert not torch.equal(first["5.weight"], middle["5.weight"])
    assert not torch.equal(middle["1.weight"], last["1.weight"])
    assert not torch.equal(middle["2.running_mean"], last["2.running_mean"])


class Rates(L.Callback):
    def __init__(self, duo: DuoCallback) -> None:
        self.duo, self.rates = duo, []

    def on_train_batch_end(self, *_: object) -> None:
        (group,) = self.duo.state_dict()["training"]["optimizer"]["param_groups"]
        self.rates.append(group["lr"])


def test_learning_rate_rises_and_falls_in_each_phase() -> None:
    duo = make_duo(probe=0.3, optimizer=None)
    seen = Rates(duo)
    fitted(duo, None, seen, max_epochs=20)
    probe, rest = seen.rates[:41], seen.rates[41:-1]  # after each of 140 updates, 42 of the head
    assert max(probe) == pytest.approx(1e-3)
    assert probe[-1] < 1e-5
    assert rest[0] < 1e-4 < max(rest) == pytest.approx(3e-4)
    assert rest[-1] < 1e-6


def test_the_learning_rate_never_rises_again(tmp_path: Path) -> None:
    """Resumed for longer than was planned, it follows the new plan to its end."""
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fitted(make_duo(probe=0, optimizer=None), None, keep, enable_checkpointing=True)
    longer = make_duo(probe=0, optimizer=None)
    rates = Rates(longer)
    fitted(longer, None, rates, max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert len(rates.rates) == 14
    assert rates.rates == sorted(rates.rates, reverse=True)
    assert rates.rates[0] > 1e-4
    assert rates.rates[-1] < 1e-5


def test_a_sidekick_that_begins_late_plans_for_what_is_left() -> None:
    module, alone = Classifier(), make_trainer(max_epochs=2)
    alone.fit(module, loader(TRAIN), loader(VAL))
    duo = make_duo(probe=0.5)
    alone.callbacks.insert(0, duo)
    alone.fit_loop.max_epochs = 4
    alone.fit(module, loader(TRAIN), loader(VAL))
    assert duo.progress.updates == 14
    assert duo.progress.probe_updates == 7


def test_training_that_ends_in_the_probe_is_said() -> None:
    stop = EarlyStopping("val_loss", min_delta=9.0, patience=1)
    with pytest.warns(UserWarning, match=r"14 of the 210 steps.*max_epochs"):
        fitted(None, None, stop, max_epochs=100)


def test_the_default_optimizer_is_refused_in_float16() -> None:
    with pytest.raises(MisconfigurationException, match=r"AdamW.*float16.*optimizer="):
        fitted(make_duo(optimizer=None), precision="16-true")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_the_default_recipe_in_every_precision(precision: str) -> None:
    duo, _, _ = fitted(make_duo(optimizer=None), precision=precision)
    assert duo.fit.status == "converged"
    assert all(value.isfinite().all() for value in duo.sidekick.state_dict().values())


class Endless(IterableDataset):
    def __iter__(self) -> object:
        return iter([TRAIN[i] for i in range(64)])


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -1, "max_time": {"seconds": 2}},
        {"train": DataLoader(Endless(), 16), "max_epochs": 6},
    ],
)
def test_without_known_end_there_is_no_probe_and_a_constant_rate(options: dict) -> None:
    duo = make_duo(optimizer=None)
    seen = Rates(duo)
    with pytest.warns(UserWarning, match=r"max_epochs or max_steps"):
        fitted(duo, None, seen, **options)
    assert duo.fit is not None
    assert duo.progress.probe_updates == 0
    assert seen.rates == sorted(seen.rates)  # rises over 100 updates and stays


def test_a_last_batch_of_one_and_batch_norm_in_the_sidekick_only() -> None:
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    duo, module, _ = compare(Plain, train=lambda: loader(small_images(33, 1)), duo={"probe": 0})
    check_duo(duo, module)
    assert duo.progress.updates == 6


def test_a_frozen_sidekick_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"no trainable.*requires_grad_"):
        fitted(make_duo(small_net().requires_grad_(False)))


def test_parameters_frozen_by_the_user_stay_frozen() -> None:
    net = small_net()
    net[1].weight.requires_grad_(False)
    before = net[1].weight.clone()
    duo, _, _ = fitted(make_duo(net))
    assert torch.equal(duo.sidekick[1].weight, before)
    assert not duo.sidekick[1].weight.requires_grad


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_what_makes_optimizers_must_be_callable(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be callable.*'sgd'"):
        DuoCallback(small_net(), **{name: "sgd"})


@pytest.mark.parametrize("probe", [-0.1, 1.5])
def test_probe_must_be_a_fraction(probe: float) -> None:
    with pytest.raises(ValueError, match=rf"probe .*\[0, 1\].*{probe}"):
        make_duo(probe=probe)


def planned(**options: object) -> int | None:
    """What the callback takes as the length of training."""
    duo = make_duo(probe=0.5)
    steps = set()

    class Look(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            steps.add(duo.progress.total)

    fitted(duo, options.pop("module", None), Look(), *options.pop("beside", []), **options)
    assert steps == {duo.progress.updates}
    return duo.progress.updates


class TwoOptimizers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> list:
        return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(2)]


def test_steps_of_several_optimizers_are_not_batches() -> None:
    """max_steps counts every optimizer's steps: 20 of them are 10 batches here."""
    assert planned(module=TwoOptimizers(), max_steps=20, max_epochs=9) == 10
    assert planned(module=TwoOptimizers(), max_epochs=2) == 14


def test_the_length_of_training_is_foreseen() -> None:
    """7 batches an epoch."""
    assert planned(max_epochs=3) == 21
    assert planned(max_epochs=3, max_steps=8, val_check_interval=1) == 8
    assert planned(max_epochs=3, accumulate_grad_batches=4) == 6
    growing = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    assert planned(max_epochs=4, beside=[growing]) == 7 + 4 + 2 + 2


def test_every_step_draws_other_numbers_from_every_stream() -> None:
    """Also where nobody else advances them."""
    drawn: list[tuple] = []

    def draw(x: torch.Tensor) -> torch.Tensor:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return x

    fitted(make_duo(sidekick_transform=draw), num_sanity_val_steps=0, limit_val_batches=1)
    trained = drawn[:7] + drawn[8:15]  # a validation after 7 steps
    for stream in zip(*trained, strict=True):
        assert len(set(stream)) == 14


class MadeUp(SingleDeviceStrategy):
    """Says that it is on a GPU when asked to, and takes the Trainer's layer sync as DDP does."""

    pretends, _layer_sync = False, None

    @property
    def root_device(self) -> torch.device:
        return torch.device("cuda" if self.pretends else "cpu")


class Pretend(L.Callback):
    """Before and behind the duo, where it takes its first step."""

    def __init__(self, pretends: bool, seen: list) -> None:
        self.pretends, self.seen = pretends, seen

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.strategy.pretends = self.pretends
        duo = next(c for c in trainer.callbacks if isinstance(c, DuoCallback))
        self.seen.append(type(duo.sidekick[2]))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_norm_is_synchronised_as_the_bases_is(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are synchronised layers for GPUs only, so the device is made up."""
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    seen: list[type] = []
    before, behind = Pretend(device == "cuda", seen), Pretend(False, seen)
    duo = make_duo(small_net(), probe=0)
    options = {"strategy": MadeUp("cpu"), "sync_batchnorm": True, "max_epochs": 1}
    trainer = make_trainer(before, duo, behind, **options)
    trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    expected = nn.SyncBatchNorm if device == "cuda" else nn.BatchNorm1d
    assert seen == [nn.BatchNorm1d] + [expected] * 13
    assert not isinstance(duo.sidekick[2], nn.SyncBatchNorm)

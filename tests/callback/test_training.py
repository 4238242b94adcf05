"""The sidekick's training against a plain loop that does what the recipe says."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Classifier, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from lightning_duo import DuoCallback
from lightning_duo.callback.training import Recipe, SidekickTrainer

TRAIN, VAL = small_images(96, seed=1), small_images(64, seed=2)


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def no_dropout_net() -> nn.Module:
    net = small_net()
    net[4].p = 0.0
    return net


class Watch(Callback):
    """The sidekick's weights after each training batch."""

    def __init__(self, duo: DuoCallback) -> None:
        self.duo, self.history = duo, []

    def on_train_batch_end(self, *_: object) -> None:
        model = self.duo._sidekick.model
        self.history.append({k: v.clone() for k, v in model.state_dict().items()})


@pytest.mark.parametrize(
    ("options", "window", "clip"),
    [
        ({}, 1, None),
        ({"accumulate_grad_batches": 4}, 4, None),  # 6 batches: windows of 4 and 2
        ({"gradient_clip_val": 0.1}, 1, 0.1),
    ],
)
def test_training_is_that_of_a_plain_loop(options: dict, window: int, clip: float | None) -> None:
    sidekick = no_dropout_net()
    reference = copy.deepcopy(sidekick)
    duo = DuoCallback(sidekick, probe=0, optimizer=sgd, lr_scheduler=constant, summary=False)
    trainer = make_trainer(duo, max_epochs=2, **options)
    trainer.fit(Classifier(), loader(TRAIN), loader(VAL))

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
        torch.testing.assert_close(sidekick.state_dict()[name], value, msg=name)


def test_the_head_is_probed_first_on_frozen_features() -> None:
    duo = DuoCallback(small_net, probe=0.5, summary=False)
    watch = Watch(duo)
    trainer = make_trainer(duo, watch, max_epochs=2)
    trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    first, middle, last = watch.history[0], watch.history[5], watch.history[11]
    body = [name for name in first if not name.startswith("5.")]
    assert all(torch.equal(first[name], middle[name]) for name in body)
    assert not torch.equal(first["5.weight"], middle["5.weight"])
    assert not torch.equal(middle["1.weight"], last["1.weight"])
    assert not torch.equal(middle["2.running_mean"], last["2.running_mean"])


def test_learning_rate_rises_and_falls_in_each_phase() -> None:
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            if duo._training is not None:
                rates.append(duo._training.optimizer.param_groups[0]["lr"])

    duo = DuoCallback(small_net, probe=0.3, summary=False)
    make_trainer(duo, Rates(), max_epochs=20).fit(Classifier(), loader(TRAIN), loader(VAL))
    probe, rest = rates[:35], rates[35:]  # 36 of 120 updates, the first not recorded
    assert max(probe) == pytest.approx(1e-3)
    assert probe[-1] < 1e-5
    assert rest[0] < 1e-4 < max(rest) == pytest.approx(3e-4)
    assert rest[-1] < 1e-6


def test_without_known_end_there_is_no_probe_and_a_constant_rate() -> None:
    duo = DuoCallback(small_net, summary=False)
    trainer = make_trainer(duo, max_epochs=-1, max_time={"seconds": 2})
    with pytest.warns(UserWarning, match="nobody knows when training ends"):
        trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    assert duo.fit is not None


def test_a_frozen_sidekick_is_refused() -> None:
    duo = DuoCallback(small_net().requires_grad_(False), summary=False)
    with pytest.raises(MisconfigurationException, match="no trainable parameters"):
        make_trainer(duo).fit(Classifier(), loader(TRAIN), loader(VAL))


def test_parameters_frozen_by_the_user_stay_frozen() -> None:
    net = small_net()
    net[1].weight.requires_grad_(False)
    before = net[1].weight.clone()
    make_trainer(DuoCallback(net, summary=False)).fit(Classifier(), loader(TRAIN), loader(VAL))
    assert torch.equal(net[1].weight, before)


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_what_makes_optimizers_must_be_callable(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be callable.*got 'sgd'"):
        DuoCallback(small_net(), **{name: "sgd"})


@pytest.mark.parametrize("probe", [-0.1, 1.5])
def test_probe_must_be_a_fraction(probe: float) -> None:
    with pytest.raises(ValueError, match="fraction of the training"):
        Recipe(probe=probe)


def planned(**options: object) -> int | None:
    """What the callback takes as the length of training."""
    duo = DuoCallback(small_net, probe=0.5, summary=False)
    steps = []

    class Look(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            steps.append(duo._training.total)

    module = options.pop("module", Classifier)()
    beside = options.pop("beside", [])
    make_trainer(duo, Look(), *beside, **options).fit(module, loader(TRAIN), loader(VAL))
    assert len(set(steps)) == 1
    assert duo._training_state["updates"] == steps[0]
    return steps[0]


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
    assert planned(module=TwoOptimizers, max_steps=20, max_epochs=9) == 10
    assert planned(module=TwoOptimizers, max_epochs=2) == 12


def test_the_length_of_training_is_foreseen() -> None:
    """6 batches an epoch."""
    assert planned(max_epochs=3) == 18
    assert planned(max_epochs=3, max_steps=8, val_check_interval=1) == 8
    assert planned(max_epochs=3, accumulate_grad_batches=4) == 6
    growing = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    assert planned(max_epochs=4, beside=[growing]) == 6 + 3 + 2 + 2


def test_every_step_draws_other_numbers_from_every_stream() -> None:
    """Also where nobody else advances them."""
    drawn: list[tuple] = []

    def draw(x: torch.Tensor) -> torch.Tensor:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return x

    duo = DuoCallback(small_net, sidekick_transform=draw, summary=False)
    make_trainer(duo, num_sanity_val_steps=0, limit_val_batches=1).fit(
        Classifier(), loader(TRAIN), loader(VAL)
    )
    trained = drawn[:6] + drawn[7:13]  # a validation after 6 steps
    for stream in zip(*trained, strict=True):
        assert len(set(stream)) == 12


def test_batch_norm_is_synchronised_as_the_bases_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are synchronised layers for GPUs only, so the device is made up and no step taken."""
    sync = TorchSyncBatchNorm()
    model = small_net()
    trainer = make_trainer()
    for device, expected in (("cpu", nn.BatchNorm1d), ("cuda", nn.SyncBatchNorm)):
        strategy = SimpleNamespace(
            root_device=torch.device(device), _layer_sync=sync, broadcast=lambda value: value
        )
        monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: None)
        strategy.precision_plugin = None
        strategy.world_size = 1
        training = SidekickTrainer(model, 4, Recipe(probe=0), trainer, None)
        assert isinstance(model[2], expected)
        training.stop()
        assert not isinstance(model[2], nn.SyncBatchNorm)

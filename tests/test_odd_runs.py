"""Ordinary things of users' code that a callback with a model of its own may trip over."""

import copy
import functools
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, digest, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from test_any_run import VAL, check_duo, compare
from test_any_run import Classifier as Base
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_duo import DuoCallback, DuoModule
from lightning_duo.base import LogitsOf
from lightning_duo.samples import own_samples

TRAIN = small_images(96, 1)


def fast_adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_duo(sidekick: object = small_net, **options: object) -> DuoCallback:
    return DuoCallback(sidekick, **{"optimizer": fast_adam, "summary": False, **options})


def fitted(duo: DuoCallback, module: L.LightningModule, **options: object) -> L.Trainer:
    trainer = make_trainer(duo, **options)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    return trainer


# ---- batches ----


def test_a_last_batch_of_one_and_batch_norm_in_the_sidekick_only() -> None:
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    duo, module, _ = compare(Plain, train=lambda: loader(small_images(33, 1)), duo={"probe": 0})
    check_duo(duo, module)
    assert duo._training_state["updates"] == 6


def test_what_batch_fn_returns_is_checked() -> None:
    for wrong, said in (
        (lambda b: (b[0], b[1], 3), "got 3 values"),
        (lambda b: None, "got NoneType"),
        (lambda b: b[0], "got torch.float32 tensor"),
        (lambda b: (b[0], None), "targets as a tensor of class indices, got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"batch_fn must return .inputs, targets.*{said}"):
            fitted(make_duo(batch_fn=wrong), Classifier())


def test_changes_behind_autograds_back_are_found() -> None:
    class Hidden(Classifier):
        def training_step(self, batch: list, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            batch[0].data.mul_(0)
            return loss

    with pytest.raises(ValueError, match="Hidden changed the batch in place"):
        fitted(make_duo(), Hidden())


# ---- logits ----


class CallsTwice(Classifier):
    """For the loss and for the accuracy."""

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.log("val_accuracy", (self(x=batch[0]).argmax(1) == batch[1]).float().mean())


class Peeks(L.Callback):
    """Calls the module before the duo has its turn."""

    def on_validation_batch_end(self, trainer: object, module: Base, *args: list) -> None:
        module(args[1][0] + 1)


def test_equal_logits_of_two_calls_are_one_answer() -> None:
    duo, module = make_duo(), CallsTwice()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        fitted(duo, module)
    check_duo(duo, module)


def test_calls_of_other_callbacks_are_not_the_steps() -> None:
    duo, module = make_duo(), Classifier()
    make_trainer(Peeks(), duo).fit(module, loader(TRAIN), loader(VAL))
    check_duo(duo, module)


class Counts(Classifier):
    """A buffer that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.net(x)


class CountsElsewhere(Counts):
    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


@pytest.mark.parametrize("make", [Counts, CountsElsewhere])
def test_forwards_of_the_callbacks_own_leave_buffers_alone(make: type) -> None:
    compare(make)


# ---- loaders ----


class SeveralLoaders(Classifier):
    def validation_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (Subset(VAL, []), None),
        (TensorDataset(VAL.tensors[0], -torch.ones(80).long()), r"1 is not measured: .*0\.\.3"),
    ],
)
def test_further_loaders_may_be_empty_or_without_classes(second: object, said: str | None) -> None:
    duo, module = make_duo(), SeveralLoaders()
    trainer = make_trainer(duo)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer.fit(module, loader(TRAIN), [loader(VAL), DataLoader(second, 16)])
    check_duo(duo, module)
    assert set(duo.results) == {"val"}
    messages = [str(w.message) for w in record]
    assert not said or any(m.startswith("DuoCallback: validation dataloader") for m in messages)


def test_the_loader_that_fits_must_have_samples() -> None:
    empty = DataLoader(Subset(VAL, []), 16)
    with pytest.raises(ValueError, match="at least one sample"):
        make_trainer(make_duo(small_net(), calibration_loader=1)).validate(
            SeveralLoaders(), [loader(VAL), empty], verbose=False
        )


# ---- schedules ----


class Rates(L.Callback):
    def __init__(self, duo: DuoCallback) -> None:
        self.duo, self.rates = duo, []

    def on_train_batch_end(self, *_: object) -> None:
        (group,) = self.duo._training.optimizer.param_groups
        self.rates.append(group["lr"])


def test_the_learning_rate_never_rises_again(tmp_path: Path) -> None:
    """Resumed for longer than was planned, it follows the new plan to its end."""
    keep = ModelCheckpoint(tmp_path, save_last=True)
    duo, module = make_duo(probe=0, optimizer=None), Classifier()
    trainer = make_trainer(duo, keep, enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    longer = make_duo(probe=0, optimizer=None)
    rates = Rates(longer)
    make_trainer(longer, rates, max_epochs=4).fit(
        Classifier(), loader(TRAIN), loader(VAL), ckpt_path=tmp_path / "last.ckpt"
    )
    assert len(rates.rates) == 12
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
    assert duo._training_state["updates"] == 12
    assert duo._training_state["probe_updates"] == 6


def test_training_that_ends_in_the_probe_is_said() -> None:
    duo = make_duo()
    stop = EarlyStopping("val_loss", min_delta=9.0, patience=1)
    with pytest.warns(UserWarning, match="ended after 12 of the 180 steps that train the"):
        make_trainer(duo, stop, max_epochs=100).fit(Classifier(), loader(TRAIN), loader(VAL))


def test_the_default_optimizer_is_refused_in_float16() -> None:
    with pytest.raises(MisconfigurationException, match=r"AdamW.*cannot train weights in float16"):
        fitted(make_duo(optimizer=None), Classifier(), precision="16-true")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_the_default_recipe_in_every_precision(precision: str) -> None:
    duo = DuoCallback(small_net, summary=False)
    fitted(duo, Classifier(), precision=precision)
    assert duo.fit.status == "converged"
    assert all(value.isfinite().all() for value in duo._sidekick.model.state_dict().values())


# ---- which models ----


def test_a_sidekick_that_was_given_starts_anew_beside_another_base() -> None:
    """Cross-validation: what it learnt of one fold must not reach the next."""
    sidekick = small_net()
    first = copy.deepcopy(sidekick.state_dict())
    duo = make_duo(sidekick)
    seen = []

    class Look(L.Callback):
        def on_train_start(self, *_: object) -> None:
            seen.append(digest(sidekick.state_dict()))

    for _ in range(2):
        make_trainer(duo, Look(), num_sanity_val_steps=0).fit(
            Classifier(), loader(TRAIN), loader(VAL)
        )
        assert digest(sidekick.state_dict()) != digest(first)
    assert seen == [digest(first)] * 2


def test_validate_of_what_is_in_memory_changes_no_model(tmp_path: Path) -> None:
    duo, module = make_duo(), Classifier()
    keep = ModelCheckpoint(tmp_path, filename="kept", monitor="val_loss")
    trainer = make_trainer(duo, keep, enable_checkpointing=True)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    with torch.no_grad():
        duo._sidekick.model[5].bias += 1  # no longer the best
    before = digest(duo._sidekick.model.state_dict())
    trainer.validate(module, loader(VAL), verbose=False)
    assert digest(duo._sidekick.model.state_dict()) == before

    path = str(tmp_path / "kept.ckpt")
    trainer.validate(module, loader(VAL), ckpt_path=path, verbose=False)
    assert digest(duo._sidekick.model.state_dict()) != before
    temperatures = duo.fit.temperatures
    trainer.test(module, loader(VAL), verbose=False)
    assert duo.fit.temperatures == temperatures
    with pytest.warns(UserWarning, match="refitted gives way to that of the checkpoint"):
        trainer.test(module, loader(VAL), ckpt_path=path, verbose=False)


def test_memory_in_common_is_found_whatever_holds_it() -> None:
    module, sidekick = Classifier(), small_net(width=32)
    sidekick[5].weight = nn.Parameter(module.net[5].weight.data)
    with pytest.raises(MisconfigurationException, match="share parameters"):
        fitted(make_duo(sidekick), module)
    one, two = small_net(), small_net()
    two[1] = one[1]
    with pytest.raises(MisconfigurationException, match="or a part of it"):
        make_trainer(make_duo(one), make_duo(two, name="b")).fit(
            Classifier(), loader(TRAIN), loader(VAL)
        )


def test_statistics_renewed_after_the_fit_are_said() -> None:
    duo, module = make_duo(), Classifier()
    fitted(duo, module)
    module.net[2].running_mean += 0.1
    with pytest.warns(UserWarning, match="are others now"):
        _ = duo.module


def test_saving_between_the_two_steps_is_said(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "odd.ckpt")

    duo = make_duo()
    with pytest.warns(UserWarning, match="after the base's step and before the sidekick's.*before"):
        make_trainer(Save(), duo).fit(Classifier(), loader(TRAIN), loader(VAL))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        make_trainer(make_duo(), Save()).fit(Classifier(), loader(TRAIN), loader(VAL))


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_another_transform_than_the_checkpoints_is_said(tmp_path: Path) -> None:
    duo = make_duo(sidekick_transform=double)
    trainer = fitted(duo, Classifier(), enable_checkpointing=True, default_root_dir=tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="saw its inputs through double, .* sees .* through None"):
        make_trainer(make_duo()).test(Classifier(), loader(VAL), ckpt_path=path, verbose=False)


def test_sidekicks_of_another_name_and_the_same_weights_are_taken(tmp_path: Path) -> None:
    """As one that LightningCLI made of a class, which has no name there."""
    duo = make_duo(lambda k: small_net(k))
    trainer = fitted(duo, Classifier(), enable_checkpointing=True, default_root_dir=tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    other = make_duo(small_net)
    make_trainer(other).test(Classifier(), loader(VAL), ckpt_path=path, verbose=False)
    assert other.fit.temperatures == duo.fit.temperatures


# ---- making and keeping ----


def test_makers_are_given_the_number_of_classes_as_they_take_it() -> None:
    import timm
    import torchvision

    for make in (
        functools.partial(timm.create_model, "resnet10t"),
        torchvision.models.shufflenet_v2_x0_5,
        lambda count: small_net(count),
    ):
        model = make_duo(make)._sidekick.build(4, Classifier(), pretrained=False)
        size = 8 if isinstance(model, nn.Sequential) else 32
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 4)


def twice(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * module(x)


def test_a_duo_with_a_logits_fn_is_saved_and_loaded(tmp_path: Path) -> None:
    duo, module = make_duo(logits_fn=twice), Classifier()
    fitted(duo, module)
    deployed = duo.module
    deployed.save(tmp_path / "duo.safetensors")
    base = LogitsOf(twice, Classifier())
    loaded = DuoModule.load(tmp_path / "duo.safetensors", base, small_net())
    assert torch.equal(loaded(VAL.tensors[0]).probs, deployed(VAL.tensors[0]).probs)


def test_messages_say_which_duo_and_thresholds_are_warned_of_once(
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(ValueError, match="name must not be empty"):
        make_duo(name="")
    duo = make_duo(name="small", summary=True, target_accuracy=0.99, delta=0.01)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fitted(duo, Classifier(), max_epochs=3)
    said = [str(w.message) for w in record if "no threshold" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("DuoCallback 'small': ")
    assert "the validation set (which fitted the temperatures), small" in " ".join(
        capsys.readouterr().out.split()
    )


def test_integers_that_could_be_the_targets_are_said(caplog: pytest.LogCaptureFixture) -> None:
    x, y = TRAIN.tensors
    for third, said in ((torch.arange(96), 1), (torch.rand(96), 0)):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            duo = make_duo()
            data = loader(TensorDataset(x, y, third))
            make_trainer(duo).fit(Classifier(), data, data)
        assert caplog.text.count("of the 3 parts of a batch the first is taken as") == said


def test_the_rest_of_an_epoch_may_be_skipped(tmp_path: Path) -> None:
    class Skips(Classifier):
        def on_train_batch_start(self, batch: list, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    duo, module = make_duo(), Skips()
    keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback.*checkpoint is being saved")
        trainer = make_trainer(duo, keep, enable_checkpointing=True, check_val_every_n_epoch=2)
        trainer.fit(module, loader(TRAIN), loader(VAL))
    assert duo._training_state["updates"] == trainer.global_step == 6


def test_only_samplers_that_repeat_are_corrected() -> None:
    class InBlocks(DistributedSampler):
        def __iter__(self) -> object:
            return iter(range(self.rank * self.num_samples, (self.rank + 1) * self.num_samples))

    def own(sampler: object) -> int | None:
        return own_samples(DataLoader(VAL, 16, sampler=sampler))

    parts = [DistributedSampler(VAL, 3, rank) for rank in range(3)]  # 80 samples: 27 each
    assert [own(part) for part in parts] == [27, 27, 26]
    assert own(DistributedSampler(VAL, 3, 2, drop_last=True)) is None
    assert own(InBlocks(VAL, 3, 2)) is None
    assert own(None) is None
    tiny = Subset(VAL, [0, 1])
    few = [DistributedSampler(tiny, 4, rank) for rank in range(4)]
    assert [own_samples(DataLoader(tiny, sampler=part)) for part in few] == [1, 1, 0, 0]

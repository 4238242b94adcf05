"""Ordinary things of users' code that a callback with a model of its own may trip over."""

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, digest, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from test_any_run import VAL, check_duo, compare
from test_any_run import Classifier as Base
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_duo import DuoCallback, DuoModule
from lightning_duo.base import LogitsOf
from lightning_duo.callback.samples import own_samples

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
    """Buffers that every forward changes, and something that it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        logits = self.net(x)
        if self._trainer is not None:
            self.log("norm", logits.norm())
        return logits


class CountsElsewhere(Counts):
    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


@pytest.mark.parametrize("make", [Counts, CountsElsewhere])
def test_forwards_of_the_callbacks_own_leave_buffers_and_logs_alone(make: type) -> None:
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


# ---- what differs between loaders, runs and steps ----


class OneSize(nn.Module):
    """A sidekick for images of 8 pixels only, as vision transformers are for 224."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 8, f"Input height ({x.shape[-1]}) doesn't match model (8)"
        return self.net(x)


class AnySize(Classifier):
    def __init__(self) -> None:
        super().__init__()
        pool = nn.AdaptiveAvgPool2d(8)
        self.net = nn.Sequential(pool, small_net())


def of_size(data: TensorDataset, size: int) -> DataLoader:
    images, targets = data.tensors
    return loader(TensorDataset(nn.functional.interpolate(images, size), targets))


def test_sizes_of_images_may_differ_between_loaders() -> None:
    duo = make_duo(OneSize())
    trainer, module = make_trainer(duo), AnySize()
    trainer.fit(module, of_size(TRAIN, 12), of_size(VAL, 8))  # 8 pixels come first
    trainer.test(module, of_size(VAL, 16), verbose=False)
    x = of_size(VAL, 16).dataset.tensors[0]
    wanted = duo.results["test"]["duo"]["accuracy"]
    found = (duo.module(x).prediction == VAL.tensors[1]).float().mean().item()
    assert found == pytest.approx(wanted)
    plain = make_duo(OneSize())  # no resizing where none is needed
    fitted(plain, AnySize())
    assert isinstance(plain.module.sidekick, OneSize)


def test_the_transform_of_another_base_is_forgotten() -> None:
    duo = make_duo(lambda num_classes: OneSize())
    module = AnySize()
    make_trainer(duo).fit(module, of_size(TRAIN, 16), of_size(VAL, 16))
    assert isinstance(duo.module.sidekick, nn.Sequential)
    fitted(duo, AnySize())
    assert isinstance(duo.module.sidekick, OneSize)


class SecondLoader(Classifier):
    """Watches data that have no labels beside the ones that have."""

    def validation_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx:
            self.log("ood", self(batch[0]).softmax(1).amax(1).mean(), add_dataloader_idx=False)
        else:
            super().validation_step(batch, batch_idx)

    def test_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize("labels", [None, -1])
@pytest.mark.parametrize("sanity", [0, 2])
def test_further_loaders_without_labels_are_left_out(labels: int | None, sanity: int) -> None:
    images = small_images(32, 5).tensors[0]
    tensors = (images,) if labels is None else (images, torch.full((32,), labels))
    unlabelled = loader(TensorDataset(*tensors))
    duo, module = make_duo(), SecondLoader()
    trainer = make_trainer(duo, num_sanity_val_steps=sanity)
    with pytest.warns(UserWarning, match="validation dataloader 1 is not measured: "):
        trainer.fit(module, loader(TRAIN), [loader(VAL), unlabelled])
    assert "ood" in trainer.callback_metrics
    assert set(duo.results) == {"val"}
    with pytest.warns(UserWarning, match="test dataloader 1 is not measured: "):
        trainer.test(module, [loader(VAL), unlabelled], verbose=False)
    assert set(duo.results) == {"val", "test"}
    with pytest.raises(ValueError, match=r"batch_fn|targets"):  # the first must be measured
        trainer.test(module, [unlabelled, loader(VAL)], verbose=False)


def test_results_are_those_of_the_last_test() -> None:
    duo, module = make_duo(), SecondLoader()
    trainer = fitted(duo, module)
    trainer.test(module, [loader(VAL), loader(TRAIN)], verbose=False)
    assert set(duo.results) == set(duo.predictions) == {"val", "test", "test/dataloader_idx_1"}
    trainer.test(module, loader(VAL), verbose=False)
    assert set(duo.results) == set(duo.predictions) == {"val", "test"}


class ReturnsFeatures(Classifier):
    def validation_step(self, batch: list, batch_idx: int) -> Tensor:
        super().validation_step(batch, batch_idx)
        return self.net[:2](batch[0])  # for a plot of embeddings


class ForwardGivesFeatures(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[:2](x)

    def logits(self, x: Tensor) -> Tensor:
        return self.net[2:](self(x))

    def training_step(self, batch: list, batch_idx: int) -> dict:
        logits = self.logits(batch[0])
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits}

    def validation_step(self, batch: list, batch_idx: int) -> Tensor:
        return self.logits(batch[0])


class NarrowFeatures(Classifier):
    """Three features, of which the step makes logits, as it says by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = small_net(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)

    def training_step(self, batch: list, batch_idx: int) -> dict:
        logits = self.head(self(batch[0]))
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits}

    validation_step = training_step


class Averages(Classifier):
    def validation_step(self, batch: list, batch_idx: int) -> dict:
        return {"logits": (self(batch[0]) + 3 * self(batch[0].flip(-1))) / 4}


@pytest.mark.parametrize(
    ("module", "logits", "said"),
    [
        (ReturnsFeatures, lambda module, x: module(x), "forward's are taken"),
        (ForwardGivesFeatures, lambda module, x: module.logits(x), "what it returns is taken"),
        (
            NarrowFeatures,
            lambda module, x: module.head(module.features(x)),
            "what it returns is taken",
        ),
        (
            Averages,
            lambda module, x: (module(x) + 3 * module(x.flip(-1))) / 4,
            "what it returns is taken",
        ),
    ],
)
def test_a_step_that_returns_other_logits_than_its_forward(
    module: type, logits: Callable, said: str
) -> None:
    duo, base = make_duo(), module()
    images, targets = VAL.tensors
    order = targets.argsort()  # the first batch holds few of the classes
    ordered = loader(TensorDataset(images[order], targets[order]))
    with pytest.warns(UserWarning, match=f"gives other logits .* {said}") as warned:
        make_trainer(duo).fit(base, loader(TRAIN), ordered)
    assert sum("gives other logits" in str(w.message) for w in warned) == 1
    with torch.no_grad():
        expected = nn.functional.cross_entropy(logits(base.eval(), images), targets)
    assert duo.results["val"]["base"]["nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_folds_that_reset_the_weights_of_one_module_start_the_sidekick_anew() -> None:
    module, duo = Classifier(), make_duo(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    first, weights = copy.deepcopy(module.state_dict()), copy.deepcopy(duo._sidekick.source)
    trained = []
    for _ in range(2):
        module.load_state_dict(first)
        L.seed_everything(3, verbose=False)
        fitted(duo, module)
        trained.append(digest(duo.module.sidekick.state_dict()))
    assert trained[0] == trained[1] != digest(weights.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fitted(duo, module)  # goes on from where both are
    assert digest(duo.module.sidekick.state_dict()) != trained[0]
    with torch.no_grad():
        module.net[1].weight.normal_()
    with pytest.warns(UserWarning, match="other weights than at the end of the last fit"):
        fitted(duo, module)


def test_a_lazy_sidekick_starts_anew_too_and_so_does_one_of_a_fit_that_was_interrupted() -> None:
    module = Classifier()
    first = copy.deepcopy(module.state_dict())
    duo = make_duo(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    fitted(duo, module)
    weights = copy.deepcopy(duo._sidekick._first_weights)

    class Interrupts(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            started.append(digest(duo._sidekick.model.state_dict()))
            raise RuntimeError("interrupted")

    started: list[str] = []
    for _ in range(2):
        module.load_state_dict(first)
        L.seed_everything(3, verbose=False)
        with pytest.raises(RuntimeError, match="interrupted"):
            make_trainer(duo, Interrupts()).fit(module, loader(TRAIN), loader(VAL))
    assert started[0] == started[1] != digest(weights)
    assert not torch.equal(duo._sidekick.model[1].weight, weights["1.weight"])


def test_a_checkpoint_of_before_the_first_batch_holds_no_pair(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    module, duo = Classifier(), make_duo(num_classes=4)
    trainer = make_trainer(duo, Saves(), num_sanity_val_steps=0)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    trained, temperatures = digest(duo.module.sidekick.state_dict()), duo.fit.temperatures
    with pytest.raises(MisconfigurationException, match=r"early\.ckpt holds no state"):
        trainer.test(module, loader(VAL), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert digest(duo._sidekick.model.state_dict()) == trained
    assert duo.fit.temperatures == temperatures
    again = make_duo(num_classes=4)
    L.seed_everything(3, verbose=False)
    early = tmp_path / "early.ckpt"
    make_trainer(again).fit(Classifier(), loader(TRAIN), loader(VAL), ckpt_path=early)
    assert again.fit is not None


def test_a_trial_of_learning_rates_leaves_the_sidekick_as_it_was(tmp_path: Path) -> None:
    found = []
    for tried in (False, True):
        L.seed_everything(3, verbose=False)
        duo = make_duo(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(True))
        with torch.no_grad():
            duo._sidekick.source[1].weight.fill_(0.01)
        finder = [LearningRateFinder(num_training_steps=8, update_attr=False)] if tried else []
        module = WithRate()
        trainer = make_trainer(duo, *finder, default_root_dir=tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*holds no state")
            trainer.fit(module, loader(TRAIN), loader(VAL))
        found.append(digest(duo.module.sidekick.state_dict()))
    assert found[0] == found[1]


class WithRate(Classifier):
    lr = 1e-3


def test_a_transform_with_modes_is_in_eval_mode_where_the_sidekick_is() -> None:
    dropout = nn.Dropout(0.5)
    duo = make_duo(sidekick_transform=dropout)
    fitted(duo, Classifier())
    assert dropout.training
    images, targets = VAL.tensors
    logits = nn.functional.cross_entropy(duo.module.member_logits(images)[1], targets).item()
    assert duo.results["val"]["sidekick"]["nll"] == pytest.approx(logits, rel=1e-5)


def test_a_copied_callback_writes_its_report(tmp_path: Path) -> None:
    duo = make_duo()
    fitted(duo, Classifier())
    again = pickle.loads(pickle.dumps(duo))
    path = again.write_report(tmp_path / "report.html", resamples=10)
    assert "<html" in path.read_text()


def test_watchers_of_a_duo_that_diverges_go_on(tmp_path: Path) -> None:
    class Diverges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = small_net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) * (torch.nan if self.calls > 20 else 1)

    several = make_duo(Diverges(), target_accuracy=0.9)
    trainer = make_trainer(several, max_epochs=4)
    with pytest.warns(UserWarning, match="no temperatures can be fitted"):
        trainer.fit(SecondLoader(), loader(TRAIN), [loader(VAL), loader(VAL)])
    values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(("base/", "duo/"))}
    assert {"duo/threshold", "duo/val_coverage/dataloader_idx_1"} < set(values)
    assert all(torch.isnan(value) for value in values.values())
    duo = make_duo(Diverges())
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="duo/val_aurc")
    stop = EarlyStopping("duo/val_aurc", patience=9, check_finite=False)
    trainer = make_trainer(duo, best, stop, max_epochs=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="no temperatures can be fitted"):
        trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    assert trainer.current_epoch == 4
    assert best.best_model_path.endswith("epoch=0.ckpt")
    assert math.isfinite(best.best_model_score)


def test_a_trainer_of_the_other_package_is_named() -> None:
    other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer"})()
    with pytest.raises(MisconfigurationException, match=r"of pytorch_lightning; import it, and"):
        make_duo().setup(other, Classifier(), "fit")


class OneOutput(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return self(batch[0]).mean()

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self(batch[0])


class Crops(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(96, 4))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        halves = batch[0].unflatten(2, (2, 4)).unbind(2)
        return nn.functional.cross_entropy(sum(map(self.net, halves)), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("module", "sidekick", "message"),
    [
        (OneOutput, small_net, "a duo needs logits of K >= 2 classes"),
        (Crops, small_net, "the forward of Crops cannot run .*pass DuoCallback.*logits_fn"),
        (
            Classifier,
            nn.Sequential(nn.Conv2d(5, 4, 8), nn.Flatten()),
            r"the sidekick cannot run the base's inputs \(torch.float32 tensor \(16, 3, 8, 8\)\): "
            "RuntimeError: .*to have 5 channels.*sidekick_transform",
        ),
    ],
)
def test_what_a_model_cannot_run_is_named(
    module: type, sidekick: object, message: str, sanity: int
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(make_duo(copy.deepcopy(sidekick)), module(), num_sanity_val_steps=sanity)


@pytest.mark.parametrize("sanity", [0, 2])
def test_lazy_sidekicks(sanity: int) -> None:
    duo = make_duo(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    fitted(duo, Classifier(), num_sanity_val_steps=sanity)
    assert duo.module.sidekick[1].weight.shape == (4, 192)

"""Ordinary things of users' code that a callback with a model of its own may trip over."""

import math
import pickle
import re
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import (
    TRAIN,
    VAL,
    Classifier,
    digest,
    loader,
    make_trainer,
    small_images,
    small_net,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import check_duo, fitted, make_duo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_duo import DuoModule, LogitsOf

# ---- loaders ----


class SecondLoader(Classifier):
    """Watches data that have no labels beside the ones that have."""

    def validation_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx:
            self.log("ood", self(batch[0]).softmax(1).amax(1).mean(), add_dataloader_idx=False)
        else:
            super().validation_step(batch, batch_idx)

    def test_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (Subset(VAL, []), None),
        (
            TensorDataset(VAL.tensors[0], -torch.ones(80).long()),
            r"dataloader 1 .*0\.\.3",
        ),
    ],
)
def test_further_loaders_may_be_empty_or_without_classes(second: object, said: str | None) -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        loaders = [loader(VAL), DataLoader(second, 16)]
        duo, module, _ = fitted(module=SecondLoader(), val=loaders)
    check_duo(duo, module)
    assert set(duo.results) == {"val"}
    messages = [str(w.message) for w in record if "dataloader 1" in str(w.message)]
    assert all(re.search(said or "nothing", message) for message in messages)
    assert bool(messages) == bool(said)


def test_the_loader_that_fits_must_have_samples() -> None:
    empty = DataLoader(Subset(VAL, []), 16)
    with pytest.raises(ValueError, match="at least one sample"):
        make_trainer(make_duo(small_net(), calibration_loader=1)).validate(
            SecondLoader(), [loader(VAL), empty], verbose=False
        )


# ---- which models ----


def test_validate_of_what_is_in_memory_changes_no_model(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="kept", monitor="val_loss")
    duo, module, trainer = fitted(None, None, keep, enable_checkpointing=True)
    with torch.no_grad():
        duo.sidekick[5].bias += 1  # no longer the best
    before = digest(duo.sidekick.state_dict())
    trainer.validate(module, loader(VAL), verbose=False)
    assert digest(duo.sidekick.state_dict()) == before

    path = str(tmp_path / "kept.ckpt")
    trainer.validate(module, loader(VAL), ckpt_path=path, verbose=False)
    assert digest(duo.sidekick.state_dict()) != before
    temperatures = duo.fit.temperatures
    trainer.test(module, loader(VAL), verbose=False)
    assert duo.fit.temperatures == temperatures
    with pytest.warns(
        UserWarning, match=r"trainer\.validate refitted.*trainer\.test\(.*without ckpt_path"
    ):
        trainer.test(module, loader(VAL), ckpt_path=path, verbose=False)


def test_statistics_renewed_after_the_fit_are_said() -> None:
    duo, module, _ = fitted()
    module.net[2].running_mean += 0.1
    with pytest.warns(UserWarning, match=r"fitted at step 14\b.*refit.*trainer\.validate"):
        _ = duo.module


def test_saving_between_the_two_steps_is_said(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "odd.ckpt")

    with pytest.warns(UserWarning, match=r"checkpoint .*put DuoCallback before"):
        make_trainer(Save(), make_duo()).fit(Classifier(), loader(TRAIN), loader(VAL))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        fitted(None, None, Save())


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_another_transform_than_the_checkpoints_is_said(tmp_path: Path) -> None:
    duo = make_duo(sidekick_transform=double)
    kept = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    path = fitted(duo, **kept).trainer.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match=r"checkpoint.*double.*None"):
        make_trainer(make_duo()).test(Classifier(), loader(VAL), ckpt_path=path, verbose=False)


def test_sidekicks_of_another_name_and_the_same_weights_are_taken(tmp_path: Path) -> None:
    """As one that LightningCLI made of a class, which has no name there."""
    duo = make_duo(lambda k: small_net(k))
    kept = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    path = fitted(duo, **kept).trainer.checkpoint_callback.best_model_path
    other = make_duo(small_net)
    make_trainer(other).test(Classifier(), loader(VAL), ckpt_path=path, verbose=False)
    assert other.fit.temperatures == duo.fit.temperatures


# ---- making and keeping ----


def twice(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * module(x)


def test_a_duo_with_a_logits_fn_is_saved_and_loaded(tmp_path: Path) -> None:
    deployed = fitted(make_duo(logits_fn=twice)).duo.module
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
        fitted(duo, max_epochs=3)
    said = [str(w.message) for w in record if "no threshold" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("DuoCallback 'small': ")
    assert re.search(r"validation set.*; duo 'small'\)", " ".join(capsys.readouterr().out.split()))


def test_the_rest_of_an_epoch_may_be_skipped(tmp_path: Path) -> None:
    class Skips(Classifier):
        def on_train_batch_start(self, batch: list, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback.*checkpoint .*put DuoCallback")
        beside = {"enable_checkpointing": True, "check_val_every_n_epoch": 2}
        duo, _, trainer = fitted(None, Skips(), keep, **beside)
    assert duo.progress.updates == trainer.global_step == 6


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
    sizes = {"train": of_size(TRAIN, 12), "val": of_size(VAL, 8)}  # 8 pixels come first
    duo, module, trainer = fitted(make_duo(OneSize()), AnySize(), **sizes)
    trainer.test(module, of_size(VAL, 16), verbose=False)
    x = of_size(VAL, 16).dataset.tensors[0]
    wanted = duo.results["test"]["duo"]["accuracy"]
    found = (duo.module(x).prediction == VAL.tensors[1]).float().mean().item()
    assert found == pytest.approx(wanted)
    plain = fitted(make_duo(OneSize()), AnySize()).duo  # no resizing where none is needed
    assert isinstance(plain.module.sidekick, OneSize)


def test_the_transform_of_another_base_is_forgotten() -> None:
    duo = make_duo(lambda num_classes: OneSize())
    fitted(duo, AnySize(), train=of_size(TRAIN, 16), val=of_size(VAL, 16))
    assert isinstance(duo.module.sidekick, nn.Sequential)
    fitted(duo, AnySize())
    assert isinstance(duo.module.sidekick, OneSize)


@pytest.mark.parametrize("labels", [None, -1])
@pytest.mark.parametrize("sanity", [0, 2])
def test_further_loaders_without_labels_are_left_out(labels: int | None, sanity: int) -> None:
    images = small_images(32, 5).tensors[0]
    tensors = (images,) if labels is None else (images, torch.full((32,), labels))
    unlabelled = loader(TensorDataset(*tensors))
    loaders = {"val": [loader(VAL), unlabelled], "num_sanity_val_steps": sanity}
    with pytest.warns(UserWarning, match="validation dataloader 1 "):
        duo, module, trainer = fitted(module=SecondLoader(), **loaders)
    assert "ood" in trainer.callback_metrics
    assert set(duo.results) == {"val"}
    with pytest.warns(UserWarning, match="test dataloader 1 "):
        trainer.test(module, [loader(VAL), unlabelled], verbose=False)
    assert set(duo.results) == {"val", "test"}
    with pytest.raises(ValueError, match=r"batch_fn|targets"):  # the first must be measured
        trainer.test(module, [unlabelled, loader(VAL)], verbose=False)


def test_results_are_those_of_the_last_test() -> None:
    duo, module, trainer = fitted(module=SecondLoader())
    trainer.test(module, [loader(VAL), loader(TRAIN)], verbose=False)
    assert set(duo.results) == set(duo.predictions) == {"val", "test", "test/dataloader_idx_1"}
    trainer.test(module, loader(VAL), verbose=False)
    assert set(duo.results) == set(duo.predictions) == {"val", "test"}


def test_a_transform_with_modes_is_in_eval_mode_where_the_sidekick_is() -> None:
    dropout = nn.Dropout(0.5)
    duo, _, _ = fitted(make_duo(sidekick_transform=dropout))
    assert dropout.training
    images, targets = VAL.tensors
    logits = nn.functional.cross_entropy(duo.module.member_logits(images)[1], targets).item()
    assert duo.results["val"]["sidekick"]["nll"] == pytest.approx(logits, rel=1e-5)


def test_a_copied_callback_writes_its_report(tmp_path: Path) -> None:
    duo, _, _ = fitted()
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
            return self.net(x) * (torch.nan if self.calls > 25 else 1)

    several = make_duo(Diverges(), target_accuracy=0.9)
    both, nothing = [loader(VAL), loader(VAL)], r"temperatures .* NaN .*sidekick"
    with pytest.warns(UserWarning, match=nothing):
        trainer = fitted(several, SecondLoader(), val=both, max_epochs=4).trainer
    values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(("base/", "duo/"))}
    assert {"duo/threshold", "duo/val_coverage/dataloader_idx_1"} < set(values)
    assert all(torch.isnan(value) for value in values.values())
    duo = make_duo(Diverges())
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="duo/val_aurc")
    stop = EarlyStopping("duo/val_aurc", patience=9, check_finite=False)
    beside = {"max_epochs": 4, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match=nothing):
        trainer = fitted(duo, None, best, stop, **beside).trainer
    assert trainer.current_epoch == 4
    assert best.best_model_path.endswith("epoch=0.ckpt")
    assert math.isfinite(best.best_model_score)


def test_a_further_loader_on_which_the_sidekick_fails_is_left_out() -> None:
    class FailsOnBright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.mean((1, 2, 3))[:, None] > 5, torch.nan, self.net(x))

    images, targets = VAL.tensors
    bright = loader(TensorDataset(images + 10, targets))
    duo = make_duo(FailsOnBright())
    with pytest.warns(UserWarning, match="dataloader 1 is not measured: 80 of 80 .*NaN .*sidekick"):
        trainer = fitted(duo, SecondLoader(), val=[loader(VAL), bright]).trainer
    assert set(duo.results) == {"val"}
    assert torch.isnan(trainer.callback_metrics["duo/val_nll/dataloader_idx_1"])
    assert torch.isfinite(trainer.callback_metrics["duo/val_nll"])


def test_a_trainer_of_the_other_package_is_named() -> None:
    other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer"})()
    with pytest.raises(
        MisconfigurationException, match=r"pytorch_lightning; import .*lightning\.pytorch"
    ):
        make_duo().setup(other, Classifier(), "fit")

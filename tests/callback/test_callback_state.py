"""What the callback keeps: the best sidekick, whose temperatures they are, and in checkpoints."""

import copy
import logging
import re
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import TRAIN, VAL, Classifier, digest, loader, make_trainer, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import INFO, fitted, make_duo, reference_fit
from torch import nn

from lightning_duo import DuoCallback, DuoModule
from lightning_duo.callback.fingerprint import fingerprint


class Diverges(L.Callback):
    """From the given epoch on the sidekick gets worse."""

    def __init__(self, duo: DuoCallback, epoch: int) -> None:
        self.duo, self.epoch = duo, epoch
        self.losses: list[float] = []
        self.states: list[str] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.current_epoch >= self.epoch and not trainer.sanity_checking:
            with torch.no_grad():
                self.duo.sidekick[5].weight.zero_()

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        if not trainer.sanity_checking:
            self.losses.append(self.duo.fit.nll_sidekick)
            self.states.append(digest(self.duo.sidekick.state_dict()))


def trained(folder: Path, epoch: int = 2) -> tuple[DuoCallback, L.LightningModule, Diverges]:
    duo = make_duo()
    diverges = Diverges(duo, epoch)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="val_loss")
    beside = {"max_epochs": 4, "enable_checkpointing": True}
    _, module, _ = fitted(duo, None, diverges, keep, **beside)
    return duo, module, diverges


def expected(duo: DuoCallback, module: nn.Module) -> object:
    return pytest.approx(reference_fit(duo, module).temperatures, rel=1e-5)


def test_validate_pairs_any_checkpoint_with_the_best_sidekick(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    duo, module, seen = trained(tmp_path)
    best = seen.losses.index(min(seen.losses))
    assert best < 2
    # After fit the duo is the last base beside the last sidekick, whose temperatures these are.
    assert digest(duo.sidekick.state_dict()) == seen.states[3]
    assert duo.fit.temperatures == expected(duo, module)

    for chosen, step in ((0, 7), (3, 28)):  # an earlier base, and the last
        path = str(tmp_path / f"epoch={chosen}.ckpt")
        with caplog.at_level(logging.INFO, INFO):
            caplog.clear()
            make_trainer(duo).validate(module, loader(VAL), ckpt_path=path, verbose=False)
        said = rf"base of step {step}\b.*sidekick of step {7 * best + 7}\b.*{seen.losses[best]:.4f}"
        assert re.search(said, caplog.text)
        assert digest(duo.sidekick.state_dict()) == seen.states[best]
        assert duo.fit.nll_sidekick == pytest.approx(seen.losses[best])
        assert duo.fit.temperatures == expected(duo, module)
        assert duo.fitted_at_step == step


def test_another_process_knows_the_best_up_to_the_checkpoint(tmp_path: Path) -> None:
    _, _, seen = trained(tmp_path)
    whole = seen.losses.index(min(seen.losses))
    for chosen, best in ((0, 0), (1, whole), (3, whole)):
        duo, module = make_duo(), Classifier()
        path = str(tmp_path / f"epoch={chosen}.ckpt")
        trainer = make_trainer(duo)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="DuoCallback")
            trainer.test(module, loader(VAL), ckpt_path=path, verbose=False)
        # A test takes the pair as it was, with its temperatures.
        assert digest(duo.sidekick.state_dict()) == seen.states[chosen]
        trainer.validate(module, loader(VAL), ckpt_path=path, verbose=False)
        assert digest(duo.sidekick.state_dict()) == seen.states[best]


def test_the_best_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Losses of other runs may be of other data."""
    trained(tmp_path / "one")
    duo, module, _ = trained(tmp_path / "two")
    path = str(tmp_path / "one" / "epoch=0.ckpt")
    make_trainer(duo).validate(module, loader(VAL), ckpt_path=path, verbose=False)
    kept = torch.load(path, weights_only=True)["callbacks"]["DuoCallback"]["best"]["weights"]
    assert digest(duo.sidekick.state_dict()) == digest(kept)


def test_a_second_fit_looks_for_its_own_best(tmp_path: Path) -> None:
    duo, module, seen = trained(tmp_path)
    fitted(duo, module, max_epochs=1)
    assert duo.best.step == 7
    assert duo.best.nll == duo.fit.nll_sidekick != min(seen.losses)


# ---- staleness ----


STALE = r"fitted at step {}\b.*refit.*trainer\.validate"


def test_temperatures_of_other_weights_are_said() -> None:
    """Wherever weights came from after the fit, and only then."""
    duo, module = make_duo(), Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trainer.validate")
        trainer = fitted(duo, module, max_steps=10, val_check_interval=3).trainer
        _ = duo.module
        trainer.test(module, loader(VAL), verbose=False)
    with torch.no_grad():
        module.net[1].weight[0, 0] += 1e-3
    for act in (
        lambda: duo.module,
        lambda: make_trainer(duo).test(module, loader(VAL), verbose=False),
    ):
        with pytest.warns(UserWarning, match=STALE.format(10)):
            act()
    make_trainer(duo).validate(module, loader(VAL), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _ = duo.module


def test_training_on_after_the_last_validation_is_said() -> None:
    with pytest.warns(UserWarning, match=r"fitted at step 11\b.*base .*at step 14\b"):
        fitted(val_check_interval=4)


def test_fingerprints_tell_models_apart_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = nn.Linear(5, 3).to(dtype)
        before = fingerprint(layer)
        assert fingerprint(copy.deepcopy(layer)) == before
        with torch.no_grad():
            layer.weight[2, 1] = -layer.weight[2, 1]
        assert fingerprint(layer) != before
    assert fingerprint(nn.Flatten()) == 0
    layer = nn.Linear(2, 2)
    before = fingerprint(layer)
    layer.weight.data, layer.bias.data = layer.bias.data, layer.weight.data
    assert fingerprint(layer) != before


# ---- checkpoints ----


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path: Path) -> None:
    trained(tmp_path)
    state = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["callbacks"]["DuoCallback"]
    assert {"version", "library", "sidekick", "training", "best", "calibration"} <= set(state)


def test_states_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _, module, _ = trained(tmp_path)
    path = tmp_path / "epoch=3.ckpt"
    whole = torch.load(path, weights_only=True)

    def refused(duo: DuoCallback, message: str, **changes: object) -> None:
        changed = copy.deepcopy(whole)
        changed["callbacks"]["DuoCallback"] |= changes
        torch.save(changed, tmp_path / "changed.ckpt")
        for run in ("validate", "test"):
            with pytest.raises(ValueError, match=message):
                getattr(make_trainer(duo), run)(
                    module, loader(VAL), ckpt_path=tmp_path / "changed.ckpt", verbose=False
                )
        with pytest.raises(ValueError, match=message):
            fitted(duo, module, max_epochs=9, ckpt_path=tmp_path / "changed.ckpt")

    later = r"version 9\b.* lightning_duo 7\.1\b.*version 3\b"
    refused(make_duo(), later, version=9, library="7.1")
    refused(make_duo(), r"version 2\b.*version 3\b", version=2)
    refused(make_duo(num_classes=5), "'small_net' has 4 outputs.* 5")
    refused(make_duo("resnet10t", pretrained=False), "'small_net'.*weights.*'resnet10t'")

    def wide(num_classes: int) -> nn.Module:
        return small_net(num_classes, width=24)

    refused(make_duo(wide), "'small_net'.*weights.*'wide'.*size mism")


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path: Path) -> None:
    """Training may go on from it, with a word; a test of it has no temperatures."""
    module = Classifier()
    alone = make_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    alone.fit(module, loader(TRAIN), loader(VAL))
    path = alone.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="no state of DuoCallback"):
        duo, _, _ = fitted(None, module, max_epochs=4, ckpt_path=path)
    assert duo.progress.updates == 14
    with pytest.raises(MisconfigurationException, match=r"no state of DuoCallback.*trainer\.valid"):
        make_trainer(make_duo()).test(module, loader(VAL), ckpt_path=path, verbose=False)


# ---- several duos ----


def test_several_duos_of_one_trainer(tmp_path: Path) -> None:
    def narrow(num_classes: int) -> nn.Module:
        return small_net(num_classes, width=4)

    one, two = make_duo(), make_duo(narrow, name="narrow")
    keep = ModelCheckpoint(tmp_path, filename="kept", monitor="narrow/duo/val_nll")
    _, module, trainer = fitted(one, None, two, keep, enable_checkpointing=True)
    logged = trainer.callback_metrics
    for prefix, duo in (("", one), ("narrow/", two)):
        assert duo.fit.temperatures == expected(duo, module)
        assert float(logged[f"{prefix}duo/val_nll"]) == pytest.approx(duo.fit.nll, rel=1e-5)
        assert f"{prefix}sidekick/train_nll" in logged
    again = make_duo(), make_duo(narrow, name="narrow")
    make_trainer(*again).test(
        module, loader(VAL), ckpt_path=str(tmp_path / "kept.ckpt"), verbose=False
    )
    for old, new in zip((one, two), again, strict=True):
        assert digest(old.sidekick.state_dict()) == digest(new.sidekick.state_dict())


def test_two_duos_of_one_name_are_refused() -> None:
    with pytest.raises(RuntimeError, match="state_key` must be unique"):  # Lightning's own
        make_trainer(make_duo(), make_duo())
    trainer = make_trainer(make_duo())
    trainer.callbacks.append(make_duo())
    with pytest.raises(MisconfigurationException, match=r"two DuoCallbacks.*name="):
        trainer.fit(Classifier(), loader(TRAIN), loader(VAL))


# ---- sidekicks that cannot be ----


class Unmoved(Classifier):
    """Counts the batches that were trained on."""

    batches = 0

    def on_train_batch_start(self, *_: object) -> None:
        type(self).batches += 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda module: small_net().requires_grad_(False), "no trainable.*requires_grad_.*validat"),
        (lambda module: nn.Sequential(nn.Flatten()), "no trainable"),
        (lambda module: small_net().to("meta"), "meta device.*on the CPU"),
        (
            lambda module: nn.Sequential(small_net(), nn.Linear(4, 4, device="meta")),
            r"several devices.*cpu and meta.*sidekick.cpu\(\)",
        ),
    ],
)
def test_sidekicks_that_cannot_be_are_refused_before_training(make: object, message: str) -> None:
    module = Unmoved()
    Unmoved.batches = 0
    with pytest.raises(MisconfigurationException, match=message):
        fitted(make_duo(make(module)), module)
    assert Unmoved.batches == 0


def test_a_frozen_sidekick_may_still_be_fitted() -> None:
    duo, module = make_duo(small_net().requires_grad_(False)), Classifier()
    make_trainer(duo).validate(module, loader(VAL), verbose=False)
    assert duo.fit.temperatures == expected(duo, module)
    assert isinstance(duo.module, DuoModule)


def test_loaders_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"calibration_loader .*0, 1.*got -1"):
        make_duo(calibration_loader=-1)
    for sanity in (0, 2):
        module = Unmoved()
        Unmoved.batches = 0
        with pytest.raises(MisconfigurationException, match=r"calibration_loader is 2.* 1,"):
            fitted(make_duo(calibration_loader=2), module, num_sanity_val_steps=sanity)
        assert Unmoved.batches == 0

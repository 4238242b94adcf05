"""When a sidekick goes on from what it learnt, and when it starts anew."""

import copy
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import VAL, Classifier, digest, loader, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateFinder
from runs import fitted, make_duo
from torch import nn


def test_a_second_fit_trains_afresh() -> None:
    duo, module, _ = fitted()
    before = duo.sidekick[5].weight.clone()
    trainer = fitted(duo, module).trainer
    assert not torch.equal(duo.sidekick[5].weight, before)
    assert duo.progress.updates == trainer.global_step == 14


def test_another_base_gets_another_sidekick() -> None:
    duo, _, _ = fitted()
    first = duo.sidekick
    fitted(duo)
    assert duo.sidekick is not first
    assert duo.progress.updates == 14


def test_a_sidekick_that_was_given_starts_anew_beside_another_base() -> None:
    """Cross-validation: what it learnt of one fold must not reach the next."""
    sidekick = small_net()
    first = digest(sidekick.state_dict())
    duo = make_duo(sidekick)
    seen = []

    class Look(L.Callback):
        def on_sanity_check_end(self, *_: object) -> None:
            seen.append(digest(duo.sidekick.state_dict()))

    for _ in range(2):
        fitted(duo, None, Look())
        assert digest(duo.sidekick.state_dict()) != first
    assert seen == [first] * 2


def test_folds_that_reset_the_weights_of_one_module_start_the_sidekick_anew() -> None:
    given = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    module, weights, duo = Classifier(), digest(given.state_dict()), make_duo(given)
    first = copy.deepcopy(module.state_dict())
    trained = []
    for _ in range(2):
        module.load_state_dict(first)
        L.seed_everything(3, verbose=False)
        fitted(duo, module)
        trained.append(digest(duo.module.sidekick.state_dict()))
    assert trained[0] == trained[1] != weights
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fitted(duo, module)  # goes on from where both are
    assert digest(duo.module.sidekick.state_dict()) != trained[0]
    with torch.no_grad():
        module.net[1].weight.normal_()
    with pytest.warns(UserWarning, match=r"DuoCallback: .*base .*last fit"):
        fitted(duo, module)


def test_a_lazy_sidekick_starts_anew_too_and_so_does_one_of_a_fit_that_was_interrupted() -> None:
    module = Classifier()
    first = copy.deepcopy(module.state_dict())
    duo = make_duo(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    fitted(duo, module)
    trained = digest(duo.sidekick.state_dict())

    class Interrupts(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            started.append(digest(duo.sidekick.state_dict()))
            raise RuntimeError("interrupted")

    started: list[str] = []
    for _ in range(2):
        module.load_state_dict(first)
        L.seed_everything(3, verbose=False)
        with pytest.raises(RuntimeError, match="interrupted"):
            fitted(duo, module, Interrupts())
    assert started[0] == started[1] != trained


def test_a_checkpoint_of_before_the_first_batch_holds_no_pair(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    duo, module, trainer = fitted(make_duo(num_classes=4), None, Saves(), num_sanity_val_steps=0)
    trained, temperatures = digest(duo.module.sidekick.state_dict()), duo.fit.temperatures
    with pytest.raises(MisconfigurationException, match=r"early\.ckpt .*no state"):
        trainer.test(module, loader(VAL), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert digest(duo.sidekick.state_dict()) == trained
    assert duo.fit.temperatures == temperatures
    again = fitted(make_duo(num_classes=4), ckpt_path=tmp_path / "early.ckpt").duo
    assert again.fit is not None


class WithRate(Classifier):
    lr = 1e-3


def test_a_trial_of_learning_rates_leaves_the_sidekick_as_it_was(tmp_path: Path) -> None:
    found = []
    for tried in (False, True):
        L.seed_everything(3, verbose=False)
        sidekick = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        nn.init.constant_(sidekick[1].weight, 0.01)
        finder = [LearningRateFinder(num_training_steps=8, update_attr=False)] if tried else []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*no state of DuoCallback")
            duo, _, _ = fitted(make_duo(sidekick), WithRate(), *finder, default_root_dir=tmp_path)
        found.append(digest(duo.module.sidekick.state_dict()))
    assert found[0] == found[1]


@pytest.mark.parametrize("sanity", [0, 2])
def test_lazy_sidekicks(sanity: int) -> None:
    duo = make_duo(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    fitted(duo, num_sanity_val_steps=sanity)
    assert duo.module.sidekick[1].weight.shape == (4, 192)

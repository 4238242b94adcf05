"""DuoCallback in real Trainers: the base unchanged, the numbers right, mistakes named."""

import copy
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers import NUM_CLASSES, TEST, TRAIN, VAL, Classifier, loader, make_trainer, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import (
    StopAfter,
    compare,
    fitted,
    is_of_the_duo,
    logits_of,
    make_duo,
    reference_fit,
)
from subprocesses import PATHS
from torch import Tensor, nn

from lightning_duo import DuoCallback, DuoModule


def base_nll(module: nn.Module, data: object) -> float:
    return float(nn.functional.cross_entropy(logits_of(module, data).double(), data.tensors[1]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
        {"val_check_interval": 0.4, "num_sanity_val_steps": 0},
    ],
)
@pytest.mark.parametrize("sidekick", ["resnet10t", small_net])
def test_the_base_does_not_notice(sidekick: object, options: dict) -> None:
    recipe = {"sidekick": sidekick, "pretrained": False, "optimizer": None}
    assert compare(Classifier, duo=recipe, **options).duo.fit is not None


def test_logged_values_are_those_of_the_two_models() -> None:
    duo, module, trainer = fitted()
    fit = reference_fit(duo, module)
    assert duo.fit.temperatures == pytest.approx(fit.temperatures, rel=1e-5)
    logged = trainer.callback_metrics
    assert float(logged["duo/val_nll"]) == pytest.approx(fit.nll, rel=1e-5)
    assert float(logged["base_scaled/val_nll"]) == pytest.approx(fit.nll_base, rel=1e-5)
    accuracy = (logits_of(module).argmax(1) == VAL.tensors[1]).float().mean()
    assert float(logged["base/val_accuracy"]) == pytest.approx(float(accuracy))
    assert float(logged["duo/temperature_base"]) == pytest.approx(fit.temperatures.base, rel=1e-5)
    assert "sidekick/train_nll" in logged
    for model in ("base", "base_scaled", "sidekick", "duo"):
        assert {"f1", "auroc", "fpr95", "e_aurc", "augrc"} < set(duo.results["val"][model])
        for metric in ("accuracy", "nll", "brier", "ece", "aurc", "sac98"):
            value = pytest.approx(duo.results["val"][model][metric], rel=1e-6)
            assert float(logged[f"{model}/val_{metric}"]) == value
    assert logged["duo/val_nll"] <= logged["base_scaled/val_nll"]


def test_a_sidekick_that_was_never_trained_is_said() -> None:
    with pytest.warns(UserWarning, match="not fine-tuned"):
        make_trainer(make_duo()).validate(Classifier(), loader(VAL), verbose=False)


def test_test_evaluates_without_refitting() -> None:
    duo, module, trainer = fitted()
    before = duo.fit
    (logged,) = trainer.test(module, loader(TEST), verbose=False)
    assert duo.fit is before
    t_base, t_sidekick = before.temperatures
    z = t_base * logits_of(module, TEST) + t_sidekick * logits_of(duo.sidekick, TEST)
    nll = nn.functional.cross_entropy(z.double(), TEST.tensors[1])
    assert logged["duo/test_nll"] == pytest.approx(float(nll), rel=1e-5)
    assert set(duo.results["test"]) > {"unweighted", "uq_only", "sidekick_scaled", "duo"}


def test_a_learnable_problem_gains() -> None:
    duo, _, _ = fitted(max_epochs=12)
    results = duo.results["val"]
    assert results["sidekick"]["accuracy"] > 0.4
    assert results["duo"]["nll"] < results["base_scaled"]["nll"] - 1e-3
    assert duo.balance == pytest.approx((192 * 16 + 16 * 4) / (192 * 32 + 32 * 4))


def test_module_is_a_deployable_copy(tmp_path: Path) -> None:
    duo, module, _ = fitted()
    deployed = duo.module
    assert isinstance(deployed, DuoModule)
    assert not deployed.training
    x = TEST.tensors[0]
    output = deployed(x)
    t_base, t_sidekick = duo.fit.temperatures
    z = t_base * logits_of(module, TEST) + t_sidekick * logits_of(duo.sidekick, TEST)
    torch.testing.assert_close(output.probs, z.softmax(1))
    with torch.no_grad():
        module.net[1].weight.zero_()
    assert torch.equal(deployed(x).probs, output.probs)
    deployed.save(tmp_path / "duo.safetensors")
    loaded = DuoModule.load(tmp_path / "duo.safetensors", Classifier(), small_net())
    assert torch.equal(loaded(x).probs, output.probs)


def test_what_steps_keep_on_the_module_does_not_keep_it_from_being_copied() -> None:
    class Keeps(Classifier):
        def training_step(self, batch: list, batch_idx: int) -> Tensor:
            self.last = {"losses": [super().training_step(batch, batch_idx)]}
            return self.last["losses"][0]

    duo, module, _ = fitted(module=Keeps())
    assert not module.last["losses"][0].is_leaf
    torch.testing.assert_close(duo.module.base(VAL.tensors[0]), logits_of(module))
    module.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match=r"Keeps .*cannot be copied.*lock"):
        _ = duo.module


def test_the_sidekick_may_see_other_inputs() -> None:
    def halve(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2)

    def tiny(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))

    duo, _, _ = fitted(make_duo(tiny, sidekick_transform=halve))
    assert duo.module(TEST.tensors[0]).probs.shape == (len(TEST), NUM_CLASSES)
    assert duo.balance == pytest.approx(48 * 4 / (192 * 32 + 32 * 4))


def test_checkpoint_tests_the_same_in_a_new_process(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="duo/val_aurc", filename="best")
    duo, module, trainer = fitted(None, None, best, enable_checkpointing=True, max_epochs=3)
    path = str(tmp_path / "best.ckpt")
    torch.load(path, weights_only=True)
    trainer.test(module, loader(TEST), ckpt_path=path, verbose=False)
    here = duo.results["test"]
    script = f"""{PATHS}
import json
from helpers import TEST, Classifier, loader, make_trainer
from runs import make_duo
duo = make_duo()
make_trainer(duo).test(Classifier(), loader(TEST), ckpt_path={path!r}, verbose=False)
print(json.dumps([duo.results["test"], duo.fit.temperatures, duo.fitted_at_step]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    there, temperatures, step = json.loads(run.stdout.splitlines()[-1])
    assert there == here
    assert tuple(temperatures) == duo.fit.temperatures
    assert step == duo.fitted_at_step


def test_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    """No shuffling and no dropout in the base, whose random streams Lightning does not restore."""

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[DuoCallback, Classifier]:
        L.seed_everything(5, verbose=False)
        module = Classifier()
        module.net[4].p = 0.0
        last = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        # One horizon, so that the schedules agree; interrupted after some epochs.
        beside = {"max_epochs": 4, "enable_checkpointing": True, "ckpt_path": ckpt_path}
        duo = make_duo(optimizer=None)
        return fitted(duo, module, last, StopAfter(epochs), **beside)[:2]

    whole, base = run(4)
    run(2)
    resumed, resumed_base = run(4, tmp_path / "2" / "last.ckpt")
    for name, value in base.state_dict().items():
        assert torch.equal(resumed_base.state_dict()[name], value), name
    for name, value in whole.sidekick.state_dict().items():
        assert torch.equal(resumed.sidekick.state_dict()[name], value), name
    assert resumed.fit.temperatures == whole.fit.temperatures


def test_validate_refits_for_the_checkpoint(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path, filename="first", save_top_k=1, every_n_epochs=1)
    duo, module, trainer = fitted(None, None, first, enable_checkpointing=True, max_epochs=1)
    fit = duo.fit
    trainer.validate(module, loader(TEST), ckpt_path=first.best_model_path, verbose=False)
    expected = reference_fit(duo, module, TEST).temperatures
    assert duo.fit.temperatures == pytest.approx(expected, rel=1e-5)
    assert duo.fit.temperatures != fit.temperatures


def test_several_loaders_are_measured_apart_and_the_first_fits() -> None:
    class TwoSets(Classifier):
        def validation_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])

    duo, module, trainer = fitted(module=TwoSets(), val=[loader(VAL), loader(TEST)])
    expected = reference_fit(duo, module)
    assert duo.fit.temperatures == pytest.approx(expected.temperatures, rel=1e-5)
    second = float(trainer.callback_metrics["base/val_nll/dataloader_idx_1"])
    assert second == pytest.approx(base_nll(module, TEST), rel=1e-5)


def test_the_summary_says_what_was_gained(capsys: pytest.CaptureFixture) -> None:
    duo, _, _ = fitted(make_duo(summary=True))
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("scaled base", "sidekick", "duo", "AURC", "validation set", "FLOPs", "50.0 %"):
        assert word in shown
    assert f"{duo.results['val']['duo']['nll']:.3f}" in shown


def test_the_sidekicks_loss_is_logged_and_leaves_the_users_bar_alone() -> None:
    trainer = fitted().trainer
    assert "sidekick/train_nll" in trainer.callback_metrics
    assert not any(map(is_of_the_duo, trainer.progress_bar_metrics))


# ---- mistakes ----


def test_wrong_number_of_classes_is_found_before_training() -> None:
    epochs = []

    class Count(Classifier):
        def on_train_epoch_start(self) -> None:
            epochs.append(1)

    with pytest.raises(ValueError, match=r"\(16, 5\).*\(16, 4\)"):
        fitted(make_duo(small_net(5)), Count())
    with pytest.raises(ValueError, match=r"leave num_classes out of DuoCallback"):
        fitted(make_duo(num_classes=5), Count())
    assert not epochs


def test_missing_validation_is_found_at_set_up() -> None:
    with pytest.raises(MisconfigurationException, match="val_dataloader"):
        make_trainer(make_duo()).fit(Classifier(), loader(TRAIN))


def test_validation_switched_off_is_said() -> None:
    duo = make_duo()
    with pytest.warns(UserWarning, match=r"limit_val_batches=0.*trainer\.validate"):
        fitted(duo, limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match=r"temperatures.*trainer\.validate"):
        _ = duo.module


def test_testing_without_temperatures_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"temperatures.*trainer\.test\(ckpt_path"):
        make_trainer(make_duo()).test(Classifier(), loader(TEST), verbose=False)


def test_nan_logits_are_an_error_and_not_a_number() -> None:
    class Diverged(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    message = "80 of 80 samples .*NaN"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_duo(small_net())).validate(Diverged(), loader(VAL), verbose=False)
    with pytest.warns(UserWarning, match=f"temperatures .*step 7.*{message}"):
        duo, _, trainer = fitted(module=Diverged())  # it is not the duo that ends it
    assert trainer.global_step == 14
    assert duo.fit is None
    assert duo.results == {}
    values = trainer.callback_metrics  # so that what watches them learns of it
    assert all(torch.isnan(values[f"{model}/val_nll"]) for model in ("base", "sidekick", "duo"))
    assert torch.isnan(values["duo/temperature_base"])


def test_checkpoints_of_another_sidekick_are_refused(tmp_path: Path) -> None:
    trainer = fitted(enable_checkpointing=True, default_root_dir=tmp_path).trainer
    path = trainer.checkpoint_callback.best_model_path
    other = make_duo("resnet10t", pretrained=False)
    with pytest.raises(ValueError, match=r"'small_net'.*weights.*'resnet10t'"):
        make_trainer(other).test(Classifier(), loader(TEST), ckpt_path=path, verbose=False)
    state = copy.deepcopy(torch.load(path, weights_only=True)["callbacks"]["DuoCallback"])
    state["version"] = 99
    with pytest.raises(ValueError, match="version 99"):
        make_duo().load_state_dict(state)


# ---- odd runs ----


def test_a_random_transform_leaves_the_base_alone() -> None:
    def jitter(x: Tensor) -> Tensor:
        random.random(), np.random.rand()
        return x + 0.1 * torch.randn_like(x)

    compare(Classifier, duo={"sidekick_transform": jitter})


def test_checkpoints_without_duo_state_are_not_paired_with_what_is_in_memory(
    tmp_path: Path,
) -> None:
    light = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only=True"):
        _, module, trainer = fitted(None, None, light, enable_checkpointing=True)
    path = str(tmp_path / "light.ckpt")
    with pytest.raises(MisconfigurationException, match=r"light\.ckpt.*no state of DuoCallback"):
        trainer.test(module, loader(TEST), ckpt_path=path, verbose=False)
    with pytest.warns(UserWarning, match=r"light\.ckpt.*no state of DuoCallback"):
        trainer.validate(module, loader(VAL), ckpt_path=path, verbose=False)
    trainer.test(module, loader(TEST), verbose=False)


def test_stale_temperatures_are_said(tmp_path: Path) -> None:
    often = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    _, module, trainer = fitted(None, None, often, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"step 7\b.*step 10\b.*trainer\.validate"):
        trainer.test(module, loader(TEST), ckpt_path=str(tmp_path / "step=10.ckpt"), verbose=False)


def test_an_interrupted_probe_goes_on_to_train_the_body(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True)
    whole = {"max_epochs": 4, "enable_checkpointing": True}
    duo, module, _ = fitted(make_duo(probe=0.5), None, last, StopAfter(1), **whole)
    assert duo.progress.updates < duo.progress.probe_updates
    before = duo.sidekick[1].weight.clone()
    fitted(duo, module, max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert duo.progress.updates == 28
    assert not torch.equal(duo.sidekick[1].weight, before)


def test_after_an_exception_the_checkpoint_decides(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 10:
                raise RuntimeError("power cut")

    last = ModelCheckpoint(tmp_path, save_last=True)
    duo, module = make_duo(), Classifier()
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(duo, module, last, Fails(), max_epochs=4, enable_checkpointing=True)
    again = fitted(duo, module, max_epochs=4, ckpt_path=tmp_path / "last.ckpt").trainer
    assert duo.progress.updates == again.global_step == 28


def test_the_duo_of_a_compiled_base_is_a_copy_too() -> None:
    module = Classifier()
    compiled = torch.compile(module, backend="eager")
    deployed = fitted(None, compiled, max_epochs=1).duo.module
    before = deployed(TEST.tensors[0]).probs
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(deployed(TEST.tensors[0]).probs, before)


def test_nan_at_test_is_named() -> None:
    duo, module, trainer = fitted()
    with torch.no_grad():
        duo.sidekick[5].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"16 of 16 samples .*NaN.*sidekick"):
        trainer.test(module, loader(TEST), verbose=False)


def test_double_precision() -> None:
    duo, _, _ = fitted(precision="64-true")
    assert duo.module(TEST.tensors[0].double()).probs.dtype == torch.float32


def test_schedulers_that_need_a_metric_are_refused() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(MisconfigurationException, match="ReduceLROnPlateau"):
        fitted(make_duo(lr_scheduler=plateau))

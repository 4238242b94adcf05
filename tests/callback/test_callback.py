"""DuoCallback in real Trainers: the base unchanged, the numbers right, mistakes named."""

import copy
import hashlib
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
from helpers import NUM_CLASSES, Classifier, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback, DuoModule, fit_temperatures

TRAIN, VAL, TEST = small_images(240, 1), small_images(128, 2), small_images(128, 3)


def fast_adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_duo(sidekick: object = small_net, **options: object) -> DuoCallback:
    return DuoCallback(sidekick, **{"optimizer": fast_adam, "summary": False, **options})


def fitted(*callbacks: L.Callback, **options: object) -> tuple[DuoCallback, Classifier, L.Trainer]:
    duo, module = make_duo(), Classifier()
    trainer = make_trainer(duo, *callbacks, **options)
    trainer.fit(module, loader(TRAIN, shuffle=True), loader(VAL))
    return duo, module, trainer


@torch.no_grad()
def logits_of(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    model.eval()
    x, y = data.tensors
    return model(x), y


def digest(*parts: object) -> str:
    seen = hashlib.sha256()
    for part in parts:
        values = part.values() if isinstance(part, dict) else part
        for value in values:
            if isinstance(value, dict):
                seen.update(digest(value).encode())
            else:
                array = value.detach().numpy() if isinstance(value, Tensor) else value
                seen.update(array.tobytes() if isinstance(value, Tensor) else repr(array).encode())
    return seen.hexdigest()


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
    def run(*callbacks: L.Callback) -> tuple[str, dict]:
        L.seed_everything(3, verbose=False)
        module = Classifier()
        trainer = make_trainer(*callbacks, **options)
        trainer.fit(module, loader(TRAIN, shuffle=True), loader(VAL))
        optimizer = trainer.optimizers[0].state_dict()["state"]
        state = digest(module.state_dict(), optimizer, [torch.rand(8)])
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" not in k}
        return state, logged

    alone = run()
    duo = DuoCallback(sidekick, pretrained=False, summary=False)
    assert run(duo) == alone
    assert duo.fit is not None


def test_logged_values_are_those_of_the_two_models() -> None:
    duo, module, trainer = fitted()
    base, targets = logits_of(module, VAL)
    sidekick, _ = logits_of(duo._sidekick.model, VAL)
    fit = fit_temperatures(base, sidekick, targets)
    assert duo.fit.temperatures == pytest.approx(fit.temperatures, rel=1e-5)
    logged = trainer.callback_metrics
    assert float(logged["duo/val_nll"]) == pytest.approx(fit.nll, rel=1e-5)
    assert float(logged["base_scaled/val_nll"]) == pytest.approx(fit.nll_base, rel=1e-5)
    accuracy = (base.argmax(1) == targets).float().mean()
    assert float(logged["base/val_accuracy"]) == pytest.approx(float(accuracy))
    assert float(logged["duo/temperature_base"]) == pytest.approx(fit.temperatures.base, rel=1e-5)
    assert "sidekick/train_nll" in logged
    for model in ("base", "base_scaled", "sidekick", "duo"):
        for metric in ("accuracy", "f1", "nll", "brier", "ece", "auroc", "aurc", "sac98"):
            assert f"{model}/val_{metric}" in logged
    assert logged["duo/val_nll"] <= logged["base_scaled/val_nll"]


def test_a_sidekick_that_was_never_trained_is_said() -> None:
    with pytest.warns(UserWarning, match="was not fine-tuned"):
        make_trainer(make_duo()).validate(Classifier(), loader(VAL), verbose=False)


def test_test_evaluates_without_refitting() -> None:
    duo, module, trainer = fitted()
    before = duo.fit
    (logged,) = trainer.test(module, loader(TEST), verbose=False)
    assert duo.fit is before
    base, targets = logits_of(module, TEST)
    sidekick, _ = logits_of(duo._sidekick.model, TEST)
    z = before.temperatures.base * base + before.temperatures.sidekick * sidekick
    nll = nn.functional.cross_entropy(z.double(), targets)
    assert logged["duo/test_nll"] == pytest.approx(float(nll), rel=1e-5)
    assert set(duo.results["test"]) > {"unweighted", "uq_only", "sidekick_scaled", "duo"}


def test_a_learnable_problem_gains() -> None:
    duo, _, _ = fitted(max_epochs=6)
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
    base, _ = logits_of(module, TEST)
    sidekick, _ = logits_of(duo._sidekick.model, TEST)
    z = duo.fit.temperatures.base * base + duo.fit.temperatures.sidekick * sidekick
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

    duo, module = make_duo(), Keeps()
    make_trainer(duo).fit(module, loader(TRAIN), loader(VAL))
    assert not module.last["losses"][0].is_leaf
    torch.testing.assert_close(duo.module.base(VAL.tensors[0]), logits_of(module, VAL)[0])
    module.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match="Keeps or the sidekick cannot be copied"):
        _ = duo.module


def test_the_sidekick_may_see_other_inputs(tmp_path: Path) -> None:
    def halve(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2)

    def tiny(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))

    duo = make_duo(tiny, sidekick_transform=halve)
    make_trainer(duo).fit(Classifier(), loader(TRAIN), loader(VAL))
    assert duo.module(TEST.tensors[0]).probs.shape == (128, NUM_CLASSES)
    assert duo.balance == pytest.approx(48 * 4 / (192 * 32 + 32 * 4))


def test_checkpoint_tests_the_same_in_a_new_process(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="duo/val_aurc", filename="best")
    duo, module, trainer = fitted(best, enable_checkpointing=True, max_epochs=3)
    torch.load(tmp_path / "best.ckpt", weights_only=True)
    trainer.test(module, loader(TEST), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)
    here = duo.results["test"]
    script = f"""
import sys, json
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_callback as t
duo = t.make_duo()
trainer = t.make_trainer(duo)
path = {str(tmp_path / "best.ckpt")!r}
trainer.test(t.Classifier(), t.loader(t.TEST), ckpt_path=path, verbose=False)
print(json.dumps([duo.results["test"], duo.fit.temperatures, duo.fitted_at_step]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    there, temperatures, step = json.loads(run.stdout.splitlines()[-1])
    assert there == here
    assert tuple(temperatures) == duo.fit.temperatures
    assert step == duo.fitted_at_step


def test_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    """No shuffling and no dropout in the base, whose random streams Lightning does not restore."""

    def run(max_epochs: int, ckpt_path: str | None = None) -> tuple[DuoCallback, Classifier]:
        L.seed_everything(5, verbose=False)
        module = Classifier()
        module.net[4].p = 0.0
        duo = make_duo(optimizer=None)
        last = ModelCheckpoint(tmp_path / str(ckpt_path is None), save_last=True)
        # One horizon, so that the schedules agree; interrupted after some epochs.
        stop = StopAfter(max_epochs)
        trainer = make_trainer(duo, last, stop, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, loader(TRAIN), loader(VAL), ckpt_path=ckpt_path)
        return duo, module

    whole, base = run(4)
    run(2)
    found = sorted((tmp_path / "True").glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)[-1]
    resumed, resumed_base = run(4, str(found))
    for name, value in base.state_dict().items():
        assert torch.equal(resumed_base.state_dict()[name], value), name
    for name, value in whole._sidekick.model.state_dict().items():
        assert torch.equal(resumed._sidekick.model.state_dict()[name], value), name
    assert resumed.fit.temperatures == whole.fit.temperatures


class StopAfter(L.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True


def test_a_second_fit_trains_afresh() -> None:
    duo, module, _ = fitted()
    before = duo._sidekick.model[5].weight.clone()
    trainer = make_trainer(duo)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    assert not torch.equal(duo._sidekick.model[5].weight, before)
    assert duo._training_state["updates"] == trainer.global_step == 30


def test_validate_refits_for_the_checkpoint(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path, filename="first", save_top_k=1, every_n_epochs=1)
    duo, module, trainer = fitted(first, enable_checkpointing=True, max_epochs=1)
    fit = duo.fit
    trainer.validate(module, loader(TEST), ckpt_path=first.best_model_path, verbose=False)
    base, targets = logits_of(module, TEST)
    sidekick, _ = logits_of(duo._sidekick.model, TEST)
    expected = fit_temperatures(base, sidekick, targets).temperatures
    assert duo.fit.temperatures == pytest.approx(expected, rel=1e-5)
    assert duo.fit.temperatures != fit.temperatures


def test_two_trained_models_need_only_validate() -> None:
    base, sidekick = Classifier(), small_net()
    duo = make_duo(sidekick)
    make_trainer(duo).validate(base, loader(VAL), verbose=False)
    a, targets = logits_of(base, VAL)
    expected = fit_temperatures(a, logits_of(sidekick, VAL)[0], targets).temperatures
    assert duo.fit.temperatures == pytest.approx(expected, rel=1e-5)


class DictClassifier(Classifier):
    """Dict batches, steps that return their logits and never call forward."""

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        logits = self.net(batch["pixel_values"])
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]), "logits": logits}

    def validation_step(self, batch: dict, batch_idx: int) -> dict:
        return self.training_step(batch, batch_idx)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        return None


def collate_dict(samples: list) -> dict:
    x, y = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(x), "labels": torch.stack(y)}


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_dict_batches_and_returned_logits(sanity_steps: int) -> None:
    loaders = [DataLoader(d, 16, collate_fn=collate_dict) for d in (TRAIN, VAL, TEST)]
    duo, module = make_duo(), DictClassifier()
    trainer = make_trainer(duo, num_sanity_val_steps=sanity_steps)
    trainer.fit(module, *loaders[:2])
    base, targets = logits_of(module, VAL)
    expected = fit_temperatures(base, logits_of(duo._sidekick.model, VAL)[0], targets)
    assert duo.fit.temperatures == pytest.approx(expected.temperatures, rel=1e-5)
    trainer.test(module, loaders[2], verbose=False)  # this step gives nothing: one extra forward
    base, targets = logits_of(module, TEST)
    nll = nn.functional.cross_entropy(base.double(), targets)
    assert duo.results["test"]["base"]["nll"] == pytest.approx(float(nll), rel=1e-5)


def test_adapters_for_batches_and_logits() -> None:
    class NoForward(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def training_step(self, batch: list, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0][1]), batch[0][0])

        def validation_step(self, batch: list, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def collate(samples: list) -> list:
        batch = collate_dict(samples)
        return [(batch["labels"], batch["pixel_values"])]

    loaders = [DataLoader(d, 16, collate_fn=collate) for d in (TRAIN, VAL)]
    duo = make_duo(batch_fn=lambda b: (b[0][1], b[0][0]), logits_fn=lambda m, x: m.net(x))
    module = NoForward()
    make_trainer(duo).fit(module, *loaders)
    base, targets = logits_of(module.net, VAL)
    expected = fit_temperatures(base, logits_of(duo._sidekick.model, VAL)[0], targets)
    assert duo.fit.temperatures == pytest.approx(expected.temperatures, rel=1e-5)
    assert duo.module(VAL.tensors[0]).probs.shape == (128, NUM_CLASSES)

    without = make_duo(batch_fn=lambda b: (b[0][1], b[0][0]))
    with pytest.raises(ValueError, match="NoForward has no forward"):
        make_trainer(without).fit(module, *loaders)


def test_several_loaders_are_measured_apart_and_the_first_fits() -> None:
    class TwoSets(Classifier):
        def validation_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])

    duo, module = make_duo(), TwoSets()
    trainer = make_trainer(duo)
    trainer.fit(module, loader(TRAIN), [loader(VAL), loader(TEST)])
    base, targets = logits_of(module, VAL)
    expected = fit_temperatures(base, logits_of(duo._sidekick.model, VAL)[0], targets)
    assert duo.fit.temperatures == pytest.approx(expected.temperatures, rel=1e-5)
    second = float(trainer.callback_metrics["base/val_nll/dataloader_idx_1"])
    base, targets = logits_of(module, TEST)
    assert second == pytest.approx(float(nn.functional.cross_entropy(base, targets)), rel=1e-5)


def test_the_summary_says_what_was_gained(capsys: pytest.CaptureFixture) -> None:
    duo = make_duo(summary=True)
    make_trainer(duo).fit(Classifier(), loader(TRAIN), loader(VAL))
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("scaled base", "sidekick", "duo", "AURC", "validation set", "FLOPs: 50.0 %"):
        assert word in shown
    assert f"{duo.results['val']['duo']['nll']:.3f}" in shown


def test_progress_shows_in_the_users_bar() -> None:
    duo = make_duo()
    trainer = make_trainer(duo)
    trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    assert "sidekick/train_nll" in trainer.progress_bar_metrics


# ---- mistakes ----


def refused(
    duo: DuoCallback,
    error: type[Exception],
    message: str,
    module: L.LightningModule | None = None,
    train: DataLoader | None = None,
    val: DataLoader | None = None,
    **options: object,
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(duo, **options).fit(
            module or Classifier(), train or loader(TRAIN), val or loader(VAL)
        )


def test_wrong_number_of_classes_is_found_before_training() -> None:
    epochs = []

    class Count(Classifier):
        def on_train_epoch_start(self) -> None:
            epochs.append(1)

    refused(make_duo(small_net(5)), ValueError, r"\(16, 5\) but the base \(16, 4\)", Count())
    refused(make_duo(num_classes=5), ValueError, "pass DuoCallback.*num_classes=4", Count())
    assert not epochs


def test_missing_validation_is_found_at_set_up() -> None:
    with pytest.raises(MisconfigurationException, match="give the Trainer a val_dataloader"):
        make_trainer(make_duo()).fit(Classifier(), loader(TRAIN))


def test_validation_switched_off_is_said() -> None:
    duo = make_duo()
    with pytest.warns(UserWarning, match="no temperatures will be fitted"):
        make_trainer(duo, limit_val_batches=0).fit(Classifier(), loader(TRAIN), loader(VAL))
    with pytest.raises(MisconfigurationException, match="no temperatures were fitted"):
        _ = duo.module


def test_testing_without_temperatures_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="cannot test without temperatures"):
        make_trainer(make_duo()).test(Classifier(), loader(TEST), verbose=False)


def test_targets_and_batches_that_cannot_be_used() -> None:
    x, y = VAL.tensors

    class Lenient(Classifier):
        """Accepts any targets, so that the callback is the one to complain."""

        def training_step(self, batch: object, batch_idx: int) -> Tensor:
            return self(batch[0] if isinstance(batch, list) else batch["picture"]).sum()

        def validation_step(self, batch: object, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    def with_targets(targets: Tensor) -> DataLoader:
        return DataLoader(TensorDataset(x, targets), 16)

    one_hot = nn.functional.one_hot(y, 4)
    for targets, message in [
        (one_hot, "multi-label targets are not supported"),
        (one_hot.float() * 2, "soft"),
        (y + 1, r"targets must be in 0\.\.3"),
    ]:
        bad = with_targets(targets)
        refused(make_duo(), ValueError, message, Lenient(), val=bad)
        refused(make_duo(), ValueError, message, Lenient(), train=bad)
    soft = with_targets(one_hot.float())
    refused(make_duo(), ValueError, "soft", Lenient(), val=soft)

    def collate(samples: list) -> dict:
        batch = collate_dict(samples)
        return {"picture": batch["pixel_values"], "grade": batch["labels"]}

    listed = make_duo(batch_fn=lambda b: (b[0], b[1].tolist()))
    refused(listed, ValueError, "targets as a tensor of class indices, got list")
    odd = DataLoader(VAL, 16, collate_fn=collate)
    refused(make_duo(), ValueError, r"keys \['grade', 'picture'\].*batch_fn", Lenient(), val=odd)


def test_nan_logits_are_an_error_and_not_a_number() -> None:
    class Diverged(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    message = "128 of 128 samples have NaN"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_duo(small_net())).validate(Diverged(), loader(VAL), verbose=False)
    duo = make_duo()
    trainer = make_trainer(duo)
    with pytest.warns(UserWarning, match=f"no temperatures can be fitted at step 15: {message}"):
        trainer.fit(Diverged(), loader(TRAIN), loader(VAL))  # it is not the duo that ends it
    assert trainer.global_step == 30
    assert duo.fit is None
    assert duo.results == {}
    values = trainer.callback_metrics  # so that what watches them learns of it
    assert all(torch.isnan(values[f"{model}/val_nll"]) for model in ("base", "sidekick", "duo"))
    assert torch.isnan(values["duo/temperature_base"])


def test_a_sidekick_that_is_the_base_is_refused() -> None:
    module = Classifier()
    refused(make_duo(module.net), MisconfigurationException, "share parameters", module)


def test_checkpoints_of_another_sidekick_are_refused(tmp_path: Path) -> None:
    _, _, trainer = fitted(enable_checkpointing=True, default_root_dir=tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    other = make_duo("resnet10t", pretrained=False)
    with pytest.raises(ValueError, match=r"'small_net' has other weights than .*'resnet10t'"):
        make_trainer(other).test(Classifier(), loader(TEST), ckpt_path=path, verbose=False)
    state = copy.deepcopy(torch.load(path, weights_only=True)["callbacks"]["DuoCallback"])
    state["version"] = 99
    with pytest.raises(ValueError, match="state of version 99"):
        make_duo().load_state_dict(state)


# ---- odd runs ----


def test_a_random_transform_leaves_the_base_alone_and_resumes() -> None:
    def run(*callbacks: L.Callback) -> str:
        L.seed_everything(3, verbose=False)
        module = Classifier()
        make_trainer(*callbacks).fit(module, loader(TRAIN, shuffle=True), loader(VAL))
        draws = [torch.rand(4), torch.tensor(random.random()), torch.from_numpy(np.random.rand(3))]
        return digest(module.state_dict(), draws)

    def jitter(x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        return x + 0.1 * torch.randn_like(x)

    assert run(make_duo(sidekick_transform=jitter)) == run()


def test_checkpoints_without_duo_state_are_not_paired_with_what_is_in_memory(
    tmp_path: Path,
) -> None:
    light = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True)
    duo, module = make_duo(), Classifier()
    trainer = make_trainer(duo, light, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="save_weights_only=True"):
        trainer.fit(module, loader(TRAIN), loader(VAL))
    path = str(tmp_path / "light.ckpt")
    with pytest.raises(MisconfigurationException, match="holds no state of DuoCallback"):
        trainer.test(module, loader(TEST), ckpt_path=path, verbose=False)
    with pytest.warns(UserWarning, match="holds no state of DuoCallback"):
        trainer.validate(module, loader(VAL), ckpt_path=path, verbose=False)
    trainer.test(module, loader(TEST), verbose=False)


def test_stale_temperatures_are_said(tmp_path: Path) -> None:
    often = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    _, module, trainer = fitted(often, enable_checkpointing=True, max_epochs=2)
    said = r"fitted at step 15 and the weights .* are others now \(the base is at step 20\)"
    with pytest.warns(UserWarning, match=said):
        trainer.test(module, loader(TEST), ckpt_path=str(tmp_path / "step=20.ckpt"), verbose=False)


def test_an_interrupted_probe_goes_on_to_train_the_body(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True)
    duo, module = make_duo(probe=0.5), Classifier()
    first = make_trainer(duo, last, StopAfter(1), max_epochs=4, enable_checkpointing=True)
    first.fit(module, loader(TRAIN), loader(VAL))
    assert duo._training_state["updates"] < duo._training_state["probe_updates"]
    before = duo._sidekick.model[1].weight.clone()
    again = make_trainer(duo, max_epochs=4)
    again.fit(module, loader(TRAIN), loader(VAL), ckpt_path=str(tmp_path / "last.ckpt"))
    assert duo._training_state["updates"] == 60
    assert not torch.equal(duo._sidekick.model[1].weight, before)


def test_after_an_exception_the_checkpoint_decides(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 22:
                raise RuntimeError("power cut")

    last = ModelCheckpoint(tmp_path, save_last=True)
    duo, module = make_duo(), Classifier()
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(duo, last, Fails(), max_epochs=4, enable_checkpointing=True).fit(
            module, loader(TRAIN), loader(VAL)
        )
    again = make_trainer(duo, max_epochs=4)
    again.fit(module, loader(TRAIN), loader(VAL), ckpt_path=str(tmp_path / "last.ckpt"))
    assert duo._training_state["updates"] == again.global_step == 60


def test_another_base_gets_another_sidekick() -> None:
    duo, _, _ = fitted()
    first = duo._sidekick.model
    make_trainer(duo).fit(Classifier(), loader(TRAIN), loader(VAL))
    assert duo._sidekick.model is not first
    assert duo._training_state["updates"] == 30


def test_manual_optimization_follows_the_batches() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list, batch_idx: int) -> None:
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]) / 5)
            if batch_idx % 5 == 4:
                self.optimizers().step()
                self.optimizers().zero_grad()

    duo = make_duo()
    make_trainer(duo).fit(Manual(), loader(TRAIN), loader(VAL))
    assert duo._training_state["updates"] == 30
    assert duo._training_state["probe_updates"] == 9


def test_a_train_loader_without_length_has_no_known_end() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> object:
            return iter([TRAIN[i] for i in range(64)])

    duo = make_duo()
    with pytest.warns(UserWarning, match="nobody knows when training ends"):
        make_trainer(duo).fit(Classifier(), DataLoader(Endless(), 16), loader(VAL))
    assert duo._training_state["updates"] == 8


def test_steps_that_change_the_inputs_are_said() -> None:
    class Scales(Classifier):
        def validation_step(self, batch: list, batch_idx: int) -> None:
            self(batch[0] / 3)

    with pytest.warns(UserWarning, match="with something else than the batch's inputs"):
        make_trainer(make_duo()).fit(Scales(), loader(TRAIN), loader(VAL))


def test_the_duo_of_a_compiled_base_is_a_copy_too() -> None:
    duo, module = make_duo(), Classifier()
    compiled = torch.compile(module, backend="eager")
    make_trainer(duo, max_epochs=1).fit(compiled, loader(TRAIN), loader(VAL))
    deployed = duo.module
    before = deployed(TEST.tensors[0]).probs
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(deployed(TEST.tensors[0]).probs, before)


def test_nan_at_test_is_named() -> None:
    duo, module, trainer = fitted()
    with torch.no_grad():
        duo._sidekick.model[5].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"16 of 16 samples have NaN or \+inf sidekick logits"):
        trainer.test(module, loader(TEST), verbose=False)


def test_double_precision() -> None:
    duo, module = make_duo(), Classifier()
    make_trainer(duo, precision="64-true").fit(module, loader(TRAIN), loader(VAL))
    assert duo.module(TEST.tensors[0].double()).probs.dtype == torch.float32


def test_bf16_mixed() -> None:
    duo = make_duo()
    make_trainer(duo, precision="bf16-mixed").fit(Classifier(), loader(TRAIN), loader(VAL))
    assert duo.fit.status == "converged"


def test_schedulers_that_need_a_metric_are_refused() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    refused(make_duo(lr_scheduler=plateau), MisconfigurationException, "ReduceLROnPlateau")

"""The ways people train: the base is bit for bit what it is alone, and the duo is right.

Every style of module and every setting of the Trainer is run twice from the same seed, with and
without the callback, beside a sidekick that draws from every random stream. After every batch
and every validation the weights, the optimizers, the logged values and the random streams of
both runs are compared by their hash. Then the temperatures are compared with a fit to logits
computed apart.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import (
    NUM_CLASSES,
    TRAIN,
    VAL,
    Classifier,
    Restless,
    as_mapping,
    loader,
    make_trainer,
    small_images,
    small_net,
)
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from runs import Trace, check_duo, compare, fitted, logits_of, make_duo, reference_fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_duo import fit_temperatures

cross_entropy = nn.functional.cross_entropy


# ---- styles of module ----


class NeverForward(Classifier):
    """Steps that use a part of the module and never its forward."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))


class ReturnsMapping(Classifier):
    def training_step(self, batch: list, batch_idx: int) -> dict:
        logits = self.net(batch[0])
        return {"loss": cross_entropy(logits, batch[1]), "logits": logits, "note": "kept"}

    def validation_step(self, batch: list, batch_idx: int) -> dict:
        return self.training_step(batch, batch_idx)


class ReturnsLogits(Classifier):
    def validation_step(self, batch: list, batch_idx: int) -> Tensor:
        return self.net(batch[0])


class PopsLabels(Classifier):
    """Hugging Face style, and the step takes the batch apart."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return cross_entropy(self(**batch), labels)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)


class Nested(Classifier):
    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["views"][0]["image"]), batch["meta"]["grade"])

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def as_nested(samples: list) -> dict:
    batch = as_mapping(samples)
    return {"views": [{"image": batch["pixel_values"]}], "meta": {"grade": batch["labels"]}}


def with_extras(samples: list) -> list:
    batch = as_mapping(samples)
    return [*batch.values(), torch.arange(len(samples)), [f"{i}.png" for i in range(len(samples))]]


class TwoViews(Classifier):
    """A base of two inputs; the sidekick takes the first."""

    def forward(self, views: list) -> Tensor:
        return self.net(views[0]) + 0.1 * self.net(views[1])


def as_views(samples: list) -> list:
    batch = as_mapping(samples)
    return [[batch["pixel_values"], batch["pixel_values"].flip(3)], batch["labels"]]


class Manual(Classifier):
    """Steps its optimizer itself, every third batch, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list, batch_idx: int) -> None:
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]) / 3)
        if batch_idx % 3 == 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(Classifier):
    """A generator makes hard examples for the classifier: two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Conv2d(3, 3, 3, padding=1)

    def training_step(self, batch: list, batch_idx: int) -> None:
        x, y = batch
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = cross_entropy(self(x + 0.1 * self.generator(x).tanh()), y)
            self.manual_backward(-loss if index == 0 else loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list:
        parts = self.generator.parameters(), self.net.parameters()
        return [torch.optim.Adam(part, 1e-2) for part in parts]


class SeveralLoaders(Classifier):
    def validation_step(self, batch: list, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


class CompiledInside(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class MixesInside(Classifier):
    """MixUp in the step: the sidekick learns from the images before."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, y = batch
        share, order = torch.rand(()), torch.randperm(len(x))
        logits = self(share * x + (1 - share) * x[order])
        return share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])


class LearntAugmentation(Classifier):
    """A transfer hook with parameters: the sidekick's gradient must not reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def on_after_batch_transfer(self, batch: list, dataloader_idx: int) -> list:
        return [batch[0] * self.gain, batch[1]] if self.trainer.training else batch


class SkipsBatches(Classifier):
    def training_step(self, batch: list, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class SingleOutput(Classifier):
    """Two classes by one number and binary cross-entropy."""

    def __init__(self) -> None:
        super().__init__(num_classes=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def padded(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.pad(module(x).reshape(-1, 1), (1, 0))


def collated(collate: Callable, data: TensorDataset) -> Callable[[], DataLoader]:
    shuffle = data is TRAIN
    return lambda: DataLoader(data, 16, shuffle=shuffle, collate_fn=collate)


def both(collate: Callable) -> dict:
    return {"train": collated(collate, TRAIN), "val": collated(collate, VAL)}


def two_classes(data: TensorDataset) -> TensorDataset:
    x, y = data.tensors
    return TensorDataset(x, (y % 2).float())


class Endless(IterableDataset):
    def __iter__(self) -> Iterator:
        return iter([TRAIN[i] for i in range(64)])


STYLES: dict[str, tuple[Callable, dict]] = {
    "calls itself": (Classifier, {}),
    "never calls forward": (NeverForward, {}),
    "returns a mapping": (ReturnsMapping, {}),
    "returns logits": (ReturnsLogits, {}),
    "dict batches, taken apart": (PopsLabels, both(as_mapping)),
    "extra fields": (Classifier, both(with_extras)),
    "manual optimization, no return": (Manual, {}),
    "two optimizers": (Adversarial, {}),
    "compiled part": (CompiledInside, {}),
    "compiled module": (lambda: torch.compile(Classifier(), backend="eager"), {}),
    "mixup in the step": (MixesInside, {}),
    "learnt augmentation": (LearntAugmentation, {}),
    "skips batches": (SkipsBatches, {}),
    "no length": (Classifier, {"train": lambda: DataLoader(Endless(), 16)}),
}


@pytest.mark.parametrize("style", STYLES)
def test_styles_of_module(style: str) -> None:
    make, options = STYLES[style]
    duo, module, trainer = compare(make, **options)
    logits = (lambda x: module(pixel_values=x)) if make is PopsLabels else None
    check_duo(duo, module, logits)
    assert duo.fit.temperatures.sidekick > 0
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    probed = 0 if style == "no length" else round(0.3 * batches)
    assert duo.progress[:3] == (batches, batches, probed)


def test_nested_batches() -> None:
    def batch_fn(batch: dict) -> tuple[Tensor, Tensor]:
        return batch["views"][0]["image"], batch["meta"]["grade"]

    duo, module, _ = compare(Nested, duo={"batch_fn": batch_fn}, **both(as_nested))
    check_duo(duo, module)


def test_several_inputs() -> None:
    duo, module, _ = compare(TwoViews, duo={"sidekick_transform": first}, **both(as_views))
    module.eval()
    fit = reference_fit(duo, lambda x: module([x, x.flip(3)]))
    assert duo.fit.temperatures == pytest.approx(tuple(fit.temperatures), rel=1e-4)
    x = VAL.tensors[0][:4]
    assert duo.module([x, x.flip(3)]).probs.shape == (4, NUM_CLASSES)


def first(views: list) -> Tensor:
    return views[0]


@pytest.mark.parametrize("chosen", [0, 1])
def test_several_validation_loaders(chosen: int) -> None:
    """One fits, all are measured."""
    other = small_images(48, 5)
    duo, module, trainer = compare(
        SeveralLoaders,
        val=lambda: [loader(VAL), loader(other)],
        duo={"calibration_loader": chosen},
    )
    check_duo(duo, module, data=(VAL, other)[chosen])
    for index, stage in enumerate(("val", "val/dataloader_idx_1")):
        page = duo.write_report(f"{index}.html", stage=stage, resamples=10).read_text()
        assert ("These samples also fitted the temperatures" in page) == (index == chosen)
    for suffix, data in (("", VAL), ("/dataloader_idx_1", other)):
        expected = cross_entropy(logits_of(module, data), data.tensors[1])
        logged = float(trainer.callback_metrics[f"base/val_nll{suffix}"])
        assert logged == pytest.approx(float(expected), rel=1e-4)


def test_mixup_of_the_dataloader_gives_soft_targets() -> None:
    from torchvision.transforms import v2

    def mixed(samples: list) -> tuple[Tensor, Tensor]:
        return v2.MixUp(num_classes=NUM_CLASSES)(*as_mapping(samples).values())

    duo, module, _ = compare(Classifier, train=collated(mixed, TRAIN))
    check_duo(duo, module)


def test_a_single_output() -> None:
    duo, module, _ = compare(
        SingleOutput,
        train=lambda: loader(two_classes(TRAIN), shuffle=True),
        val=lambda: loader(two_classes(VAL)),
        duo={"batch_fn": lambda batch: (batch[0], batch[1].long()), "logits_fn": padded},
    )
    x, y = two_classes(VAL).tensors
    check_duo(duo, module, lambda x: padded(module, x), data=TensorDataset(x, y.long()))


def test_a_routine_of_somebody_else() -> None:
    """torch-uncertainty's routine owns its steps, calls `self.forward`, and mixes in the step."""
    from torch_uncertainty.routines import ClassificationRoutine

    def make() -> L.LightningModule:
        model = small_net(width=32)
        return ClassificationRoutine(
            model=model,
            num_classes=NUM_CLASSES,
            loss=nn.CrossEntropyLoss(),
            optim_recipe=torch.optim.AdamW(model.parameters(), 1e-2),
            mixup_params={"mixtype": "mixup", "mixup_alpha": 1.0},
        )

    duo, module, _ = compare(make)
    check_duo(duo, module)


# ---- settings of the Trainer ----

SETTINGS: dict[str, dict] = {
    "accumulation": {"accumulate_grad_batches": 3},
    "accumulation by epoch": {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]},
    "clipping by norm": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "max_steps": {"max_steps": 6, "val_check_interval": 3},
    "max_steps without epochs": {
        "max_epochs": -1,
        "max_steps": 12,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    },
    "val_check_interval": {"val_check_interval": 0.5, "accumulate_grad_batches": 2},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2},
    "limit_batches": {"limit_train_batches": 4, "limit_val_batches": 5},
    "no sanity check": {"num_sanity_val_steps": 0},
    "whole sanity check": {"num_sanity_val_steps": -1},
    "reloading": {"reload_dataloaders_every_n_epochs": 1},
    "deterministic": {"deterministic": True, "detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "barebones": {"barebones": True, "logger": None, "enable_checkpointing": None},
    "early stopping": {
        "callbacks": lambda: [EarlyStopping("val_loss", min_delta=9.0, patience=1)],
        "max_epochs": 6,
    },
    "frozen backbone": {"callbacks": lambda: [BackboneFinetuning(1)]},
}


class WithBackbone(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[:4]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_trainer(setting: str) -> None:
    make = WithBackbone if setting == "frozen backbone" else Classifier
    duo, module, trainer = compare(make, **SETTINGS[setting])
    assert duo.progress.updates == trainer.global_step
    if setting not in ("val_check_interval",):  # where the last validation is not the end
        check_duo(duo, module)


PRECISIONS: dict[str, dict] = {
    "32-true": {"rel": 1e-4},
    "64-true": {"rel": 1e-4},
    "bf16-mixed": {"rel": 0.1},
    "bf16-true": {"rel": 0.1},
    "16-true": {"rel": 0.1},
}


class WithoutMoments(Classifier):
    """AdamW divides by zero in float16."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def plain_sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str, clip: float | None) -> None:
    duo, module, _ = compare(
        WithoutMoments, duo={"optimizer": plain_sgd}, precision=precision, gradient_clip_val=clip
    )
    dtype = next(module.parameters()).dtype
    assert next(duo.sidekick.parameters()).dtype == dtype
    module.eval()
    cast = duo.sidekick.to(dtype)
    parts = [(module(x.to(dtype)), cast.eval()(x.to(dtype)), y) for x, y in loader(VAL)]
    base, sidekick, targets = (torch.cat(part).detach() for part in zip(*parts, strict=True))
    fit = fit_temperatures(base.float(), sidekick.float(), targets)
    # Autocast rounds the logits, so that the optimum of these is only near.
    assert duo.fit.nll == pytest.approx(fit.nll, rel=PRECISIONS[precision]["rel"])


class Loud(Restless):
    """Its gradients overflow float16 at the scale that scalers start from."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 300


@pytest.mark.parametrize("clip", [None, 0.1])
def test_half_precision_with_a_scaler_of_its_own(clip: float | None) -> None:
    """16-mixed: an overflow of the sidekick skips its step and not the base's."""

    def run(*callbacks: L.Callback) -> tuple[list[str], dict]:
        L.seed_everything(3, verbose=False)
        scaler, trace = torch.amp.GradScaler("cpu", init_scale=2.0**10), Trace()
        half = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer = make_trainer(*callbacks, trace, plugins=[half], gradient_clip_val=clip)
        trainer.fit(Classifier(), loader(TRAIN, shuffle=True), loader(VAL))
        return trace.seen, scaler.state_dict()

    alone = run()
    duo = make_duo(Loud, optimizer=plain_sgd)
    assert run(duo) == alone
    assert alone[1]["scale"] == 2.0**10
    assert duo.state_dict()["training"]["scaler"]["scale"] < 2.0**16
    assert duo.progress.updates == 14
    assert all(value.isfinite().all() for value in duo.sidekick.state_dict().values())
    assert duo.fit.status == "converged"


# ---- callbacks and tools beside it ----


def test_metrics_of_the_duo_stop_training_and_choose_checkpoints(tmp_path: Path) -> None:
    history = []

    class Record(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
            if not trainer.sanity_checking:
                history.append(float(trainer.callback_metrics["duo/val_aurc"]))

    stop = EarlyStopping("duo/val_nll", min_delta=9.0, patience=1)
    best = ModelCheckpoint(tmp_path, monitor="duo/val_aurc", save_top_k=1, filename="best")
    beside = {"enable_checkpointing": True, "max_epochs": 8}
    trainer = fitted(make_duo(Restless), None, stop, best, Record(), **beside).trainer
    assert len(history) == trainer.current_epoch == 2
    assert float(best.best_model_score) == min(history)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_what_is_measured(first: bool) -> None:
    """EMA swaps the weights in for validation and keeps them at the end: so they fit."""
    duo = make_duo(Restless)
    beside = [duo, EMAWeightAveraging(decay=0.9)]
    module = Classifier()
    trainer = make_trainer(*(beside if first else beside[::-1]))
    trainer.fit(module, loader(TRAIN, shuffle=True), loader(VAL))
    check_duo(duo, module)


def test_the_base_does_not_notice_under_ema() -> None:
    compare(Classifier, callbacks=lambda: [EMAWeightAveraging(decay=0.9)])


class WithoutStatistics(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Identity()


def test_weights_averaged_after_the_last_validation_are_said() -> None:
    """SWA replaces the weights at the end of training, and nobody has validated those.

    Unless there are normalisation statistics: then it adds an epoch, which validates.
    """
    swa = {"callbacks": lambda: [StochasticWeightAveraging(1e-2, 1)], "max_epochs": 3}
    check_duo(*compare(Classifier, **swa)[:2])
    with pytest.warns(UserWarning, match="base or .*sidekick.*refit.*trainer.validate"):
        duo, module, trainer = compare(WithoutStatistics, **swa)
    trainer.validate(module, loader(VAL), verbose=False)
    check_duo(duo, module)


class HasRate(Classifier):
    def __init__(self, learning_rate: float = 1e-3, batch_size: int = 2) -> None:
        super().__init__()
        self.learning_rate, self.batch_size = learning_rate, batch_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TRAIN, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return loader(VAL)


def test_the_learning_rate_finder_finds_the_bases_rate(tmp_path: Path) -> None:
    """As a callback and as a tool; the sidekick does not learn from its trial batches."""
    options = {"max_epochs": 2, "default_root_dir": tmp_path}
    finder = {"num_training_steps": 12, "early_stop_threshold": None}

    def run(*callbacks: L.Callback) -> tuple[list[str], HasRate]:
        L.seed_everything(3, verbose=False)
        module, trace = HasRate(batch_size=16), Trace()
        tune = LearningRateFinder(**finder)
        make_trainer(*callbacks, tune, trace, **options).fit(module)
        return trace.seen, module

    alone, _ = run()
    duo = make_duo(Restless)
    seen, module = run(duo)
    assert seen == alone
    assert duo.progress.updates == 14
    check_duo(duo, module)

    duo, module = make_duo(Restless), HasRate(batch_size=16)
    trainer = make_trainer(duo, **options)
    Tuner(trainer).lr_find(module, num_training=12, early_stop_threshold=None)
    assert duo.sidekick is None
    trainer.fit(module)
    assert duo.progress.updates == trainer.global_step == 14


def test_the_batch_size_tuner_knows_nothing_of_the_sidekick(tmp_path: Path) -> None:
    duo, module = make_duo(Restless), HasRate()
    trainer = make_trainer(duo, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(module, max_trials=3, steps_per_trial=1)
    assert module.batch_size > 2
    assert duo.sidekick is None
    trainer.fit(module)
    assert duo.fit is not None


def test_fast_dev_run() -> None:
    duo, _, _ = fitted(make_duo(Restless), fast_dev_run=2)
    assert duo.progress.updates == 2
    assert len(duo.predictions["val"]["duo"].confidence) == 32


def test_overfit_batches() -> None:
    """Lightning validates on the same few training batches then; the temperatures fit those."""
    duo, module, trainer = compare(Classifier, overfit_batches=3, max_epochs=3)
    assert duo.progress.updates == trainer.global_step == 9
    assert len(duo.predictions["val"]["duo"].confidence) == 48
    assert module is not None


def test_validate_and_test_without_fit() -> None:
    """Two trained models: validate fits, test measures, in inference mode."""
    module, sidekick = Classifier(), small_net()
    duo = make_duo(sidekick)
    trainer = make_trainer(duo)
    trainer.validate(module, loader(VAL), verbose=False)
    fit = duo.fit
    trainer.test(module, loader(TRAIN), verbose=False)
    assert duo.fit is fit
    check_duo(duo, module)
    assert len(duo.predictions["test"]["duo"].confidence) == len(TRAIN)

"""A base that is trained already: it stays as it is, and its sidekick is all that learns."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import digest, make_trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from scipy.optimize import minimize
from subprocesses import two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_duo import DuoCallback, add_sidekick

CLASSES = 3


def data(count: int = 96, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    rule = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(7))
    noise = 1.2 * torch.randn(count, CLASSES, generator=generator)
    return TensorDataset(x, (x @ rule + noise).argmax(1))


def loaders(batch: int = 16) -> tuple[DataLoader, DataLoader]:
    return DataLoader(data(), batch), DataLoader(data(64, 2), batch)


class Base(L.LightningModule):
    """Everything that training would change: normalisation, dropout, metrics, a moving average."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, CLASSES)
        )
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES)
        self.register_buffer("average", torch.zeros(8))
        self.runs = 0
        self.ran_training_hooks = False

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.net(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.average.lerp_(x.mean(0), 0.1)
        self.accuracy(logits, y)
        self.log("train_accuracy", self.accuracy, on_epoch=True)
        return F.cross_entropy(logits, y)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ran_training_hooks = True

    def on_train_epoch_end(self) -> None:
        self.ran_training_hooks = True

    def validation_step(self, batch: list, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class TwoOptimizers(Base):
    """Steps its optimizers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list, batch_idx: int) -> None:
        one, other = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        one.step()
        other.step()

    def configure_optimizers(self) -> list:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[3])]


class OneOptimizer(TwoOptimizers):
    def training_step(self, batch: list, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Mixing(Base):
    """Only the step knows what it mixes."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, y = batch
        soft = 0.7 * F.one_hot(y, CLASSES) + 0.3 * F.one_hot(y.flip(0), CLASSES)
        return F.cross_entropy(self(0.7 * x + 0.3 * x.flip(0)), soft)


def small(outputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Linear(8, outputs)


def quick(**options: Any) -> dict[str, Any]:
    recipe = {
        "sidekick": small,
        "probe": 0,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, 1e-2),
        "summary": False,
    }
    return {**recipe, **options}


def pretrained(kind: type[Base] = Base) -> Base:
    torch.manual_seed(3)
    module = kind()
    make_trainer(max_epochs=1).fit(module, *loaders())
    module.runs, module.ran_training_hooks = 0, False
    return module


def state_of(module: nn.Module) -> str:
    return digest(module.state_dict())


@pytest.mark.parametrize("kind", [Base, OneOptimizer, TwoOptimizers])
def test_the_base_stays_as_it_is_and_does_not_run(kind: type[Base]) -> None:
    module = pretrained(kind)
    module.net[0].weight.requires_grad_(False)
    before = state_of(module), set(vars(module)), [p.requires_grad for p in module.parameters()]
    modes = [part.training for part in module.modules()]
    counted = digest(module.accuracy.metric_state)
    automatic = module.automatic_optimization
    callback = add_sidekick(module, *loaders(), trainer=make_trainer(max_epochs=3), **quick())
    after = state_of(module), set(vars(module)), [p.requires_grad for p in module.parameters()]
    assert after == before
    assert [part.training for part in module.modules()] == modes
    assert digest(module.accuracy.metric_state) == counted
    assert module.automatic_optimization is automatic
    assert not module.ran_training_hooks
    of_validations, seen, counted_once = 2 + 3 * 4, 2, 1  # and once to count its operations
    assert of_validations <= module.runs <= of_validations + seen + counted_once
    assert callback.fit is not None
    assert callback.progress is not None
    assert callback.progress.batches == 3 * 6


def test_the_sidekick_learns_what_it_would_beside_a_base_that_learns_nothing() -> None:
    module = pretrained()
    callback = add_sidekick(module, *loaders(), trainer=make_trainer(max_epochs=3), **quick())

    class Still(Base):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    beside = Still()
    beside.load_state_dict(module.state_dict())
    other = DuoCallback(**quick())
    make_trainer(other, max_epochs=3).fit(beside, *loaders())
    assert callback.sidekick is not None
    assert other.sidekick is not None
    assert state_of(callback.sidekick) == state_of(other.sidekick)


def test_the_temperatures_are_those_of_scipy() -> None:
    module = pretrained()
    callback = add_sidekick(module, *loaders(), trainer=make_trainer(max_epochs=3), **quick())
    x, y = data(64, 2).tensors
    module.eval()
    assert callback.sidekick is not None
    with torch.no_grad():
        base, side = (model(x).double().numpy() for model in (module, callback.sidekick.eval()))

    def nll(t: np.ndarray) -> float:
        z = torch.from_numpy(t[0] * base + t[1] * side)
        return float(F.cross_entropy(z, y))

    best = minimize(nll, [1.0, 1.0], bounds=[(0, None)] * 2, options={"ftol": 1e-15})
    assert callback.fit is not None
    np.testing.assert_allclose(callback.fit.temperatures, best.x, rtol=1e-3, atol=1e-4)
    answer = callback.module(x)
    want = torch.softmax(torch.from_numpy(best.x[0] * base + best.x[1] * side), 1)
    torch.testing.assert_close(answer.probs.double(), want, atol=1e-4, rtol=1e-3)


def test_fit_of_a_module_without_gradients_is_the_same() -> None:
    module = pretrained()
    callback = add_sidekick(module, *loaders(), trainer=make_trainer(max_epochs=2), **quick())
    module.requires_grad_(False)
    other = DuoCallback(**quick())
    trainer = make_trainer(other, max_epochs=2)
    trainer.fit(module, *loaders())
    assert other.fit == callback.fit
    trainer.test(module, loaders()[1], verbose=False)
    assert set(other.results["test"]) >= {"base", "duo"}


def test_where_only_the_step_tells_the_targets_it_runs() -> None:
    module = pretrained(Mixing)
    before = state_of(module)
    callback = add_sidekick(module, *loaders(), trainer=make_trainer(max_epochs=2), **quick())
    assert state_of(module) == before
    assert callback.fit is not None


def test_checkpoints_hold_the_base_and_are_resumed_to_the_bit(tmp_path: Path) -> None:
    module = pretrained()
    start = module.state_dict()

    def run(epochs: int, ckpt_path: str | None, folder: Path) -> tuple[Any, L.Trainer]:
        torch.manual_seed(9)
        base = Base()
        if ckpt_path is None:
            base.load_state_dict(start)
        saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(saver, enable_checkpointing=True, max_epochs=epochs)
        callback = add_sidekick(base, *loaders(), ckpt_path=ckpt_path, trainer=trainer, **quick())
        assert state_of(base) == digest(start)
        return callback, trainer

    whole, trainer = run(4, None, tmp_path / "whole")
    assert trainer.global_step == 4 * 6
    path = str(tmp_path / "whole" / "epoch=1.ckpt")
    resumed, trainer = run(4, path, tmp_path / "resumed")
    assert trainer.global_step == 4 * 6
    assert state_of(resumed.sidekick) == state_of(whole.sidekick)
    assert resumed.fit == whole.fit
    loaded = Base.load_from_checkpoint(path)
    assert state_of(loaded) == digest(start)


def test_a_checkpoint_of_the_base_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = Base(width=12)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    fresh = Base(width=12)
    trainer = make_trainer(max_epochs=1)
    path = str(tmp_path / "base.ckpt")
    callback = add_sidekick(fresh, *loaders(), ckpt_path=path, trainer=trainer, **quick())
    assert state_of(fresh) == state_of(module)
    assert callback.fit is not None


@pytest.mark.parametrize(
    ("options", "batches", "steps"),
    [
        ({"max_steps": 5, "max_epochs": -1}, 5, 5),
        ({"accumulate_grad_batches": 4}, 12, 4),
        ({"precision": "bf16-mixed"}, 12, 12),
        ({"gradient_clip_val": 0.1}, 12, 12),
        ({"deterministic": True, "limit_train_batches": 3}, 6, 6),
        ({"precision": "16-mixed", "val_check_interval": 2}, 12, 12),
        ({"overfit_batches": 2, "check_val_every_n_epoch": 2}, 4, 4),
        ({"inference_mode": False, "num_sanity_val_steps": -1}, 12, 12),
    ],
)
def test_settings_of_the_trainer(options: dict, batches: int, steps: int) -> None:
    module = pretrained()
    before = state_of(module)
    trainer = make_trainer(**{"max_epochs": 2, **options})
    callback = add_sidekick(module, *loaders(), trainer=trainer, **quick())
    assert callback.progress is not None
    assert callback.progress.batches == batches
    assert trainer.global_step == callback.progress.updates == steps
    assert state_of(module) == before


class Quantised(nn.Module):
    """Weights of eight bits, in buffers, that are made numbers in the forward."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randint(-127, 128, (16, 8), dtype=torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.full((16, 1), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class Eight(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Quantised(), nn.ReLU(), nn.Linear(16, CLASSES))


class Counting(Base):
    """Each forward in training changes a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.sum(0)
        return super().forward(x)


class Looking(L.Callback):
    """Runs the module after every training step, to show what it says."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        module(batch[0])


@pytest.mark.parametrize("kind", [Eight, Counting, Mixing])
def test_buffers_stay_as_they_are(kind: type[Base]) -> None:
    module = pretrained(kind)
    before = digest(dict(module.named_buffers())), state_of(module)
    trainer = make_trainer(Looking(), max_epochs=2)
    callback = add_sidekick(module, *loaders(), trainer=trainer, **quick())
    assert (digest(dict(module.named_buffers())), state_of(module)) == before
    x = data(8, 4).tensors[0]
    module.eval()
    assert torch.equal(callback.module.base_logits(x), module(x))


def test_others_wait_for_the_metrics_and_find_the_best_pair(tmp_path: Path) -> None:
    module = pretrained()
    best = ModelCheckpoint(tmp_path, monitor="duo/val_aurc")
    stop = EarlyStopping("duo/val_aurc", patience=1)
    rates, logger = LearningRateMonitor("step"), CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True}
    trainer = make_trainer(best, stop, rates, **options, max_epochs=20)
    callback = add_sidekick(module, *loaders(), trainer=trainer, **quick())
    assert 1 < trainer.current_epoch < 20
    other, fresh = DuoCallback(**quick()), Base()
    tester = make_trainer(other)
    tester.test(fresh, loaders()[1], ckpt_path=best.best_model_path, verbose=False)
    assert state_of(fresh) == state_of(module)
    found = other.results["test"]["duo"]["aurc"]
    assert found == pytest.approx(float(best.best_model_score), rel=1e-5)
    assert callback.results["val"]["duo"]["aurc"] >= found - 1e-6


@pytest.mark.parametrize(
    "callback",
    [
        BackboneFinetuning(1),
        EMAWeightAveraging(decay=0.9),
        ModelPruning("l1_unstructured", amount=0.5),
        StochasticWeightAveraging(1e-2, 1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_would_change_the_base_are_refused(callback: L.Callback) -> None:
    module = pretrained()
    before = state_of(module), set(vars(module))
    with pytest.raises(Exception, match=f"{type(callback).__name__} would change it; leave that"):
        add_sidekick(module, *loaders(), trainer=make_trainer(callback), **quick())
    assert (state_of(module), set(vars(module))) == before


def test_what_else_changes_the_base_is_said() -> None:
    class Restless(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            module.average += 1

    module, trainer = pretrained(), make_trainer(Restless(), max_epochs=1)
    with pytest.warns(UserWarning, match="the base is no longer as it was: a callback, or"):
        add_sidekick(module, *loaders(), trainer=trainer, **quick())


def test_a_precision_that_rounds_the_base_is_said() -> None:
    for precision in ("bf16-true", "bf16-mixed"):
        module = pretrained()
        before = state_of(module)
        trainer = make_trainer(precision=precision, max_epochs=1)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            add_sidekick(module, *loaders(), trainer=trainer, **quick())
        said = any("has rounded the base's weights" in str(w.message) for w in record)
        assert said == (precision == "bf16-true") == (state_of(module) != before)


def test_a_trainer_with_nothing_left_to_do_is_said() -> None:
    module, trainer = Base(), make_trainer(max_epochs=1)
    trainer.fit(module, *loaders())
    with pytest.warns(UserWarning, match=r"has learnt nothing: .*; pass a new Trainer"):
        assert add_sidekick(module, *loaders(), trainer=trainer, **quick()).fit is None
    again = make_trainer(max_epochs=1)
    assert add_sidekick(module, *loaders(), trainer=again, **quick()).fit is not None


class Partial(Base):
    """Saves what is trained only, as those do who train adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted = {name for name, p in self.named_parameters() if p.requires_grad}
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: value for name, value in weights if name in wanted}


def test_to_resume_beside_another_base_is_said(tmp_path: Path) -> None:
    start = pretrained(Partial).state_dict()

    def run(base: Base, epochs: int, ckpt_path: Path | None) -> list[str]:
        base.requires_grad_(False)  # so no weight at all is saved
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        duo = DuoCallback(**quick())
        trainer = make_trainer(duo, saver, enable_checkpointing=True, max_epochs=epochs)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            trainer.fit(base, *loaders(), ckpt_path=ckpt_path)
        return [str(w.message) for w in record if "beside another base" in str(w.message)]

    def base() -> Base:
        found = Partial()
        found.load_state_dict(start)
        return found

    assert not run(base(), 1, None)
    path = tmp_path / "epoch=0.ckpt"
    assert run(Partial(), 2, path)
    assert not run(base(), 2, path)


def test_weights_that_alone_want_gradients_are_saved_and_resumed(tmp_path: Path) -> None:
    """As of an adapter, beside others that the module makes anew."""

    def base() -> Base:
        torch.manual_seed(4)
        found = Partial()
        found.net[0].requires_grad_(False)
        return found

    module = base()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, *loaders())
    for own, other in zip(module.buffers(), base().buffers(), strict=True):  # none is saved
        own.copy_(other)
    trainer.save_checkpoint(tmp_path / "base.ckpt")

    def run(path: Path, epochs: int) -> tuple[Any, ...]:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        trainer = make_trainer(saver, enable_checkpointing=True, max_epochs=epochs)
        fresh = base()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="DuoCallback")
            found = add_sidekick(fresh, *loaders(), ckpt_path=path, trainer=trainer, **quick())
        assert state_of(fresh) == state_of(module)
        return state_of(found.sidekick), found.fit

    whole = run(tmp_path / "base.ckpt", 3)
    assert run(tmp_path / "step=6.ckpt", 3) == whole


class Configured(Base):
    """Makes its layers where the Trainer asks for them."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))


class SetUp(Configured):
    def setup(self, stage: str) -> None:
        Configured.configure_model(self)

    def configure_model(self) -> None:
        pass


@pytest.mark.parametrize("kind", [Configured, SetUp])
def test_layers_that_are_made_in_set_up_are_loaded_and_stay(
    kind: type[Base], tmp_path: Path
) -> None:
    module, trainer = kind(), make_trainer(max_epochs=1)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    fresh, path = kind(), tmp_path / "base.ckpt"
    trainer = make_trainer(max_epochs=1)
    callback = add_sidekick(fresh, *loaders(), ckpt_path=path, trainer=trainer, **quick())
    assert state_of(fresh) == state_of(module)
    assert all(part.training for part in fresh.modules())
    assert callback.fit is not None


def test_a_base_without_parameters_has_a_sidekick_too() -> None:
    module = Eight()
    module.net[2] = Quantised()
    module.net[2].weight = torch.randint(-127, 128, (CLASSES, 16), dtype=torch.int8)
    module.net[2].scale = torch.full((CLASSES, 1), 0.01)
    assert not list(module.parameters())
    before = state_of(module)
    trainer = make_trainer(max_epochs=1)
    assert add_sidekick(module, *loaders(), trainer=trainer, **quick()).fit is not None
    assert state_of(module) == before


# ---- what goes wrong ----


class Failing(Base):
    """Stops in one of its own hooks, once it was trained."""

    at, error = "", RuntimeError

    def fail(self, where: str) -> None:
        if self.at == where and not self.trainer.sanity_checking:
            raise self.error("stopped")

    def setup(self, stage: str) -> None:
        self.fail("setup")

    def on_fit_start(self) -> None:
        self.fail("on_fit_start")

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        self.fail("training_step")
        return Mixing.training_step(self, batch, batch_idx)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.fail("validation_step")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.fail("on_validation_epoch_end")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "at",
    [
        "setup",
        "on_fit_start",
        "training_step",
        "validation_step",
        "on_validation_epoch_end",
        "data",
    ],
)
def test_a_fit_that_fails_gives_the_base_back(at: str, error: type[BaseException]) -> None:
    def broken(samples: list) -> Any:
        raise error("stopped")

    module = pretrained(Failing)
    module.net[0].weight.requires_grad_(False)
    module.at, module.error = at, error
    train, val = loaders()
    train = DataLoader(train.dataset, 16, collate_fn=broken) if at == "data" else train
    trainer = make_trainer(num_sanity_val_steps=0)
    before, names = everything(module), set(vars(trainer.strategy))
    with pytest.raises((SystemExit, ValueError, RuntimeError)):
        add_sidekick(module, train, val, trainer=trainer, **quick())
    assert everything(module) == before
    assert not {"training_step", "validation_step"} & set(vars(trainer.strategy)) - names
    module.at = ""
    callback = add_sidekick(module, *loaders(), trainer=make_trainer(max_epochs=1), **quick())
    assert callback.fit is not None
    start = state_of(module)
    make_trainer(max_epochs=1).fit(module, *loaders())
    assert state_of(module) != start


def everything(module: Base) -> list[Any]:
    """All that a run may leave on a module."""
    return [
        state_of(module),
        digest(dict(module.named_buffers())),
        digest(module.accuracy.metric_state),
        [parameter.requires_grad for parameter in module.parameters()],
        [part.training for part in module.modules()],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
        set(vars(module)),
        module.automatic_optimization,
    ]


def test_no_validation_data_is_refused_with_the_remedy() -> None:
    with pytest.raises(Exception, match=r"val_loader, \.\.\.\) or a datamodule"):
        add_sidekick(pretrained(), loaders()[0], sidekick=nn.Linear(8, CLASSES))

    class Module(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loaders()[0]

        def val_dataloader(self) -> DataLoader:
            return loaders()[1]

    trainer = make_trainer(max_epochs=1)
    assert add_sidekick(pretrained(), Module(), trainer=trainer, **quick()).fit is not None


# ---- two processes ----


def run(world: int) -> dict:
    """Add a sidekick, in float64."""
    torch.manual_seed(0)
    module = Base()
    ddp = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    options = {"devices": world, "strategy": ddp, "use_distributed_sampler": False}
    trainer = make_trainer(**options, precision="64-true", max_epochs=2)
    rank = trainer.global_rank
    train, val = (
        DataLoader(dataset, 8 // world, sampler=range(rank, len(dataset), world))
        for dataset in (data(64), data(23, 2))
    )
    before = everything(module.double())
    callback = add_sidekick(module, train, val, trainer=trainer, **quick())
    assert everything(module) == before
    assert callback.fit is not None
    assert callback.sidekick is not None
    weights = [p.detach().flatten() for p in callback.sidekick.parameters()]
    temperatures = [*callback.fit.temperatures]
    return {"temperatures": temperatures, "sidekick": torch.cat(weights).tolist()}


class Sharded(Base):
    """Splits itself where it is told a mesh of processes, as FSDP2 wants it."""

    def configure_model(self) -> None:
        if self._device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self._device_mesh["data_parallel"])


def run_sharded(folder: Path) -> list:
    """Fit beside a base in shards, whole and resumed."""

    def fit(name: str, ckpt_path: Path | None = None) -> list:
        torch.manual_seed(0)
        base = Sharded().requires_grad_(False)
        if ckpt_path is not None:  # which holds its weights
            base.net[0].weight.zero_()
        saver = ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)
        strategy = ModelParallelStrategy(2, 1, False, process_group_backend="gloo")
        duo = DuoCallback(**quick())
        trainer = make_trainer(duo, saver, strategy=strategy, devices=2, enable_checkpointing=True)
        trainer.fit(base, *loaders(), ckpt_path=ckpt_path)
        assert duo.fit is not None
        assert duo.sidekick is not None
        weights = [getattr(p, "full_tensor", lambda p=p: p)() for p in base.parameters()]
        return [digest(weights), state_of(duo.sidekick), *duo.fit.temperatures]

    return [fit("whole"), fit("resumed", folder / "whole" / "epoch=0.ckpt")]


def both(folder: Path) -> dict:
    return {**run(2), "sharded": run_sharded(folder)}


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    first, second = two_processes("test_trained.both(folder)", tmp_path, port=11)
    alone = run(1)
    assert first == second
    whole, resumed = first["sharded"]
    assert whole == resumed
    torch.manual_seed(0)
    assert whole[0] == digest(list(Base().parameters()))
    assert first["sidekick"] == pytest.approx(alone["sidekick"], abs=1e-6)
    assert first["temperatures"] == pytest.approx(alone["temperatures"], rel=1e-5, abs=1e-6)

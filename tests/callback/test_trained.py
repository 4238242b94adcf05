"""A base that is trained already: it stays as it is, and its sidekick is all that learns."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import digest, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from scipy.optimize import minimize
from subprocesses import two_processes
from torch import Tensor, nn
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
    ],
)
def test_settings_of_the_trainer(options: dict, batches: int, steps: int) -> None:
    module = pretrained()
    trainer = make_trainer(**{"max_epochs": 2, **options})
    callback = add_sidekick(module, *loaders(), trainer=trainer, **quick())
    assert callback.progress is not None
    assert callback.progress.batches == batches
    assert trainer.global_step == callback.progress.updates == steps


def test_a_fit_that_fails_gives_the_base_back() -> None:
    class Broken(Base):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                raise RuntimeError("broken")

    torch.manual_seed(3)
    module = Broken()
    before, names = state_of(module), set(vars(module))
    with pytest.raises(RuntimeError, match="broken"):
        add_sidekick(module, *loaders(), trainer=make_trainer(), **quick())
    assert state_of(module) == before
    assert set(vars(module)) - names <= {"_trainer"}
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.training


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
    callback = add_sidekick(module, train, val, trainer=trainer, **quick())
    assert callback.fit is not None
    assert callback.sidekick is not None
    weights = [p.detach().flatten() for p in callback.sidekick.parameters()]
    temperatures = [*callback.fit.temperatures]
    return {"temperatures": temperatures, "sidekick": torch.cat(weights).tolist()}


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    first, second = two_processes("test_trained.run(2)", tmp_path, port=11)
    alone = run(1)
    assert first == second
    assert first["sidekick"] == pytest.approx(alone["sidekick"], abs=1e-6)
    assert first["temperatures"] == pytest.approx(alone["temperatures"], rel=1e-5, abs=1e-6)

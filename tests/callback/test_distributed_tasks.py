"""Two real processes against one, where an item has several decisions: pixels, labels, views."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import make_trainer
from lightning.pytorch.strategies import DDPStrategy
from subprocesses import two_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback

ITEMS = 23  # an odd number, so that Lightning's sampler repeats an item
CLASSES = 3


class Pixels(L.LightningModule):
    """Segmentation; some pixels do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, CLASSES, 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets, ignore_index=9)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class ManyLabels(Pixels):
    """Multi-label; some labels are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, CLASSES)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        known = ~targets.isnan()
        return nn.functional.binary_cross_entropy_with_logits(logits[known], targets[known])


class Views(Pixels):
    """Two views of every item in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, CLASSES)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, targets = batch
        logits = self.net(torch.cat([x, x.flip(1)]))
        return self.loss(logits, targets.repeat(2))


def pixels() -> TensorDataset:
    targets = torch.randint(CLASSES, (ITEMS, 4, 5))
    x = torch.stack([targets == 0, targets == 1], 1) + torch.randn(ITEMS, 2, 4, 5)
    return TensorDataset(x, targets.masked_fill(torch.rand(targets.shape) < 0.2, 9))


def labels() -> TensorDataset:
    targets = (torch.rand(ITEMS, CLASSES) < 0.4).float()
    x = targets[:, :2] + torch.randn(ITEMS, 2)
    return TensorDataset(x, targets.masked_fill(torch.rand(targets.shape) < 0.2, torch.nan))


def views() -> TensorDataset:
    targets = torch.randint(CLASSES, (ITEMS,))
    x = torch.stack([targets == 0, targets == 1], 1) + torch.randn(ITEMS, 2)
    return TensorDataset(x, targets)


KINDS: dict[str, tuple[type[L.LightningModule], Callable[[], TensorDataset], int]] = {
    "pixels": (Pixels, pixels, 20),
    "labels": (ManyLabels, labels, CLASSES),
    "views": (Views, views, 2),
}


def run(world: int) -> dict:
    """Fit a little, validate and test each kind; in float64, with Lightning's own sampler."""
    return {kind: _run(kind, world) for kind in KINDS}


def _run(kind: str, world: int) -> dict:
    torch.manual_seed(0)
    make, data, _ = KINDS[kind]
    module, samples = make(), data()
    sidekick = type(module)().net  # of its own weights
    duo = DuoCallback(sidekick, summary=False, probe=0)
    ddp = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    trainer = make_trainer(duo, devices=world, strategy=ddp, precision="64-true")
    trainer.validate(module, DataLoader(samples, 4), verbose=False)
    trainer.test(module, DataLoader(samples, 6), verbose=False)
    said = {}
    for stage in ("val", "test"):
        found = duo.predictions[stage]["duo"]
        order = torch.argsort(found.confidence.double())
        columns = found.confidence, found.nll, found.targets, found.items
        said[stage] = [column[order].tolist() for column in columns]
    return {"temperatures": [*duo.fit.temperatures], "results": duo.results, "said": said}


def test_two_processes_say_of_every_decision_what_one_says(tmp_path: Path) -> None:
    first, second = two_processes("test_distributed_tasks.run(2)", tmp_path, port=7)
    alone = run(1)
    assert first == second
    for kind, (_, _, most) in KINDS.items():
        mine, theirs = alone[kind], first[kind]
        assert theirs["temperatures"] == pytest.approx(mine["temperatures"], rel=1e-6), kind
        for stage in ("val", "test"):
            for form, values in mine["results"][stage].items():
                given = theirs["results"][stage][form]
                assert given == pytest.approx(values, rel=1e-6, abs=1e-6), (kind, stage, form)
            confidence, nll, targets, items = theirs["said"][stage]
            assert ITEMS < len(confidence) <= most * ITEMS
            assert confidence == pytest.approx(mine["said"][stage][0], rel=1e-6)
            assert sorted(nll) == pytest.approx(sorted(mine["said"][stage][1]), rel=1e-6, abs=1e-6)
            assert sorted(targets) == sorted(mine["said"][stage][2])
            assert len(set(items)) == len(set(mine["said"][stage][3])) > ITEMS - 3

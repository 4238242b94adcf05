"""Inputs and targets of one tensor, and steps that do other things from batch to batch."""

from typing import Any

import lightning as L
import torch
from strangers.batches import Classifier
from strangers.data import Records, generator, points
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import Optimized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


def of_rows(rows: Tensor) -> Dataset:
    """A data set whose batches are one tensor."""
    return Records(rows, make=lambda row: row)


class NextSymbolModule(Classifier):
    """A window of symbols, the last of which is to be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(3, 6), nn.Flatten(), nn.Linear(48, 3))

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch[:, :-1], batch[:, -1]


class NextSymbol(Rule):
    """What is seen and what is guessed are other places of one tensor."""

    def module(self) -> L.LightningModule:
        return NextSymbolModule()

    def data(self, count: int, seed: int) -> Dataset:
        window = torch.randint(3, (count, 8), generator=generator(seed))
        slips = torch.rand(count, generator=generator(seed + 1000)) > 0.8
        following = (window[:, -1] + slips) % 3
        return of_rows(torch.cat([window, following[:, None]], 1))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(3, 6), nn.Flatten(), nn.Linear(48, outputs))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[:, :-1],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[:, -1]


class NextFrameModule(Classifier):
    """Three binary frames, and the one that follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 1, 3, padding=1)

    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[:, :3]), batch[:, 3:])


class NextFrame(NextSymbol):
    layout = "labels"

    def module(self) -> L.LightningModule:
        return NextFrameModule()

    def data(self, count: int, seed: int) -> Dataset:
        frames = (torch.rand(count, 3, 6, 6, generator=generator(seed)) > 0.5).float()
        noise = torch.randn(count, 1, 6, 6, generator=generator(seed + 1000))
        following = frames.sum(1, keepdim=True) + 0.5 * noise > 1.5
        return of_rows(torch.cat([frames, following.float()], 1))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Conv2d(3, outputs, 1)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[:, :3],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[:, 3:]


class AuxiliaryModule(Optimized):
    """Nested outputs of two heads; the auxiliary one stands first, validation has the main one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.heads = nn.ModuleDict({"coarse": nn.Linear(8, 2), "fine": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> dict[str, dict[str, Tensor]]:
        h = self.body(x)
        return {"aux": {"coarse": self.heads["coarse"](h)}, "main": {"fine": self.heads["fine"](h)}}

    def losses(self, batch: Any) -> list[Tensor]:
        out, y = self(batch["x"]), batch["targets"]
        pairs = (("aux", "coarse"), ("main", "fine"))
        return [F.cross_entropy(out[part][name], y[part][name]) for part, name in pairs]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        coarse, fine = self.losses(batch)
        return 0.3 * coarse + fine

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        fine = self(batch["x"])["main"]["fine"]
        self.log("val_loss", F.cross_entropy(fine, batch["targets"]["main"]["fine"]))


class AuxiliaryFirst(Stranger):
    """The head that alone is validated is the duo's."""

    def module(self) -> L.LightningModule:
        return AuxiliaryModule()

    def data(self, count: int, seed: int) -> Dataset:
        def record(x: Tensor, y: Tensor) -> dict[str, Any]:
            targets = {"aux": {"coarse": (y > 0).long()}, "main": {"fine": y}}
            return {"x": x, "targets": targets}

        return Records(*points(count, seed), make=record)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch["x"])["main"]["fine"]

    def targets(self, batch: Any) -> Tensor:
        return batch["targets"]["main"]["fine"]


class ShuffledModule(AuxiliaryModule):
    def losses(self, batch: Any) -> list[Tensor]:
        losses, (out, y) = [], (self(batch["x"]), batch["targets"])
        for i in torch.randperm(2).tolist():
            part, name = (("aux", "coarse"), ("main", "fine"))[i]
            losses.append(F.cross_entropy(out[part][name], y[part][name]))
        return losses


class ShuffledHeads(AuxiliaryFirst):
    """The losses come in another order at every step."""

    def module(self) -> L.LightningModule:
        return ShuffledModule()


class ChunksModule(Classifier):
    """Gradients are accumulated by hand, from one small part of the batch after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for start in range(0, len(batch[0]), 5):
            x, y = (part[start : start + 5] for part in batch)
            self.manual_backward(F.cross_entropy(self(x), y, reduction="sum") / len(batch[0]))
        optimizer.step()


class MicroBatches(Rule):
    def module(self) -> L.LightningModule:
        return ChunksModule()


class WarmUpModule(Classifier):
    """Noisy labels: cross-entropy at first, then a robust loss by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        if self.current_epoch == 0:
            return F.cross_entropy(logits, batch[1])
        return ((1 - logits.softmax(1).gather(1, batch[1][:, None]) ** 0.7) / 0.7).mean()


class RobustAfterWarmUp(Rule):
    def module(self) -> L.LightningModule:
        return WarmUpModule()

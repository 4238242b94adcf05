"""Losses by hand that are written in other ways, and what only looks like one."""

from typing import Any

import lightning as L
import torch
from strangers.batches import Classifier
from strangers.data import Records, generator, points, scenes
from strangers.dense import Scenes
from strangers.losses import Rule
from strangers.models import mlp
from strangers.refused import OneLoss, Unfit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


def flags(count: int, seed: int) -> Tensor:
    return (torch.rand(count, generator=generator(seed + 50)) > 0.5).float()


# ---- classifications ----


class BoundaryModule(OneLoss):
    """LIViA's boundary loss: masks and distance maps (N, K, H, W) by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def loss(self, batch: Any) -> Tensor:
        probs, masks = self(batch["images"]).softmax(1), batch["gts"].float()
        entropy = -torch.einsum("bkwh,bkwh->", masks, (probs + 1e-10).log()) / masks.sum()
        return entropy + 0.01 * torch.einsum("bkwh,bkwh->bkwh", probs, batch["dist"]).mean()


class BoundaryLoss(Scenes):
    def module(self) -> L.LightningModule:
        return BoundaryModule()

    def data(self, count: int, seed: int) -> Dataset:
        images, y = scenes(count, seed)
        masks = F.one_hot(y, 3).permute(0, 3, 1, 2)
        far = torch.randn(masks.shape, generator=generator(seed)) - 2 * masks
        names = ("images", "gts", "dist")
        return Records(images, masks, far, make=lambda *parts: dict(zip(names, parts, strict=True)))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["images"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["gts"].argmax(1)

    def value(self, module: Any, batch: Any) -> Tensor:
        probs = self.logits(module, batch).double().softmax(1)
        entropy = super().value(module, batch)
        return entropy + 0.01 * (probs * batch["dist"].double()).mean()


class DistancesModule(BoundaryModule):
    """The same by products."""

    def loss(self, batch: Any) -> Tensor:
        probs, masks = self(batch["images"]).softmax(1), batch["gts"].float()
        entropy = -(masks * (probs + 1e-10).log()).sum(1).mean()
        return entropy + 0.01 * (probs * batch["dist"]).mean()


class DistanceMaps(BoundaryLoss):
    """Distances have the shape of the targets' probabilities."""

    def module(self) -> L.LightningModule:
        return DistancesModule()


class LoggingModule(Classifier):
    """Confusion, calibration and the accuracy of each class are computed by hand, and logged."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        probs = self(x).softmax(1)
        guess = probs.argmax(1)
        sure = probs[torch.arange(len(x)), guess]
        self.log("gap", (sure - (guess == y).float()).abs().mean())
        for c in range(3):
            mine = probs[y == c]
            self.log(f"recall_{c}", (mine.argmax(1) == c).float().sum() / max(1, len(mine)))
        return -probs.log()[torch.arange(len(x)), y].mean()


class MetricsByHand(Rule):
    def module(self) -> L.LightningModule:
        return LoggingModule()


class EntireSpaceModule(Classifier):
    """ESMM: clicks, and clicks times conversions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2)

    def loss(self, batch: Any) -> Tensor:
        x, click, bought = batch
        clicks, buys = self(x).sigmoid().unbind(1)
        return F.binary_cross_entropy(clicks, click) + F.binary_cross_entropy(clicks * buys, bought)


class EntireSpace(Rule):
    """The first loss is of one label of two, with targets of its own."""

    layout = "labels"
    takes_batch = True

    def module(self) -> L.LightningModule:
        return EntireSpaceModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        click = (y > 0).float()
        return TensorDataset(x, click, click * flags(count, seed))

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[:, 0]

    def value(self, module: Any, batch: Any) -> Tensor:
        clicks, buys = module(batch[0]).double().sigmoid().unbind(1)
        pairs = ((clicks, batch[1].double()), (clicks * buys, batch[2].double()))
        return sum(-(y * p.log() + (1 - y) * (1 - p).log()).mean() for p, y in pairs)


# ---- none ----


class PairsModule(OneLoss):
    """BPR: the first of a pair is better; a mask of which pairs are real."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]

    def loss(self, batch: Any) -> Tensor:
        first, second, real = batch
        return -(real * F.logsigmoid(self(first - second))).sum() / real.sum()


class MaskedPairs(Unfit):
    """A mask of 0 and 1 is no label."""

    def module(self) -> L.LightningModule:
        return PairsModule()

    def data(self, count: int, seed: int) -> Dataset:
        first, second = (points(count, each)[0] for each in (seed, seed + 9))
        return TensorDataset(first, second, flags(count, seed))


class HazardsModule(OneLoss):
    """Discrete survival, as in computational pathology: hazards of intervals, some censored."""

    def __init__(self) -> None:
        super().__init__(4)

    def loss(self, batch: Any) -> Tensor:
        x, interval, censored = batch[0], batch[1][:, None], batch[2][:, None]
        hazards = self(x).sigmoid()
        alive = torch.cat([torch.ones_like(censored), (1 - hazards).cumprod(1)], 1)
        died = alive.gather(1, interval).log() + hazards.gather(1, interval).log()
        return -((1 - censored) * died + censored * alive.gather(1, interval + 1).log()).mean()


class DiscreteSurvival(Unfit):
    def module(self) -> L.LightningModule:
        return HazardsModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed, classes=4), flags(count, seed))


class DistributionFocalModule(OneLoss):
    """YOLO's way to regress: cross-entropy to the two whole numbers around a value."""

    def __init__(self) -> None:
        super().__init__(5)

    def loss(self, batch: Any) -> Tensor:
        logits, low = self(batch[0]), batch[1].long()
        near = batch[1] - low
        below = F.cross_entropy(logits, low, reduction="none") * (1 - near)
        return (below + F.cross_entropy(logits, low + 1, reduction="none") * near).mean()


class DistributionFocal(Unfit):
    def module(self) -> L.LightningModule:
        return DistributionFocalModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, (x[:, 0] + 2).clamp(0, 3.9))

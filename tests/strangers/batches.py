"""Batches of unusual types, labels of unusual types, and what happens on the way to a step."""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from strangers.data import Records, points
from strangers.judge import nll, rows
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

KINDS = ("setosa", "versicolor", "virginica")


class Classifier(Optimized):
    """What everybody writes; subclasses say where inputs and targets are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch

    def loss(self, batch: Any) -> Tensor:
        x, y = self.parts(batch)
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)


class NamedRecord(NamedTuple):
    """Target first."""

    y: Tensor
    meta: list[str]
    x: Tensor


class NamedRecordModule(Classifier):
    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch.x, batch.y


class NamedTuples(Rule):
    def module(self) -> L.LightningModule:
        return NamedRecordModule()

    def data(self, count: int, seed: int) -> Dataset:
        return Records(*points(count, seed), make=lambda x, y: NamedRecord(y, "a", x))  # type: ignore[arg-type]

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.x,), {}

    def targets(self, batch: Any) -> Tensor:
        return batch.y


class TensorDict:
    """As tensordict's: keys, and tensors of one batch size."""

    def __init__(self, source: dict[str, Tensor], batch_size: int) -> None:
        self._tensordict, self.batch_size = dict(source), torch.Size([batch_size])

    def __getitem__(self, key: str) -> Tensor:
        return self._tensordict[key]

    def keys(self) -> Any:
        return self._tensordict.keys()

    def to(self, device: Any, non_blocking: bool = False) -> "TensorDict":
        moved = {key: x.to(device) for key, x in self._tensordict.items()}
        return TensorDict(moved, self.batch_size[0])


class KeyedModule(Classifier):
    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch["x"], batch["y"]


class TensorDicts(Rule):
    def module(self) -> L.LightningModule:
        return KeyedModule()

    def collate(self, samples: list[Any]) -> Any:
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return TensorDict({"y": y, "x": x}, len(y))

    def loaders(self) -> tuple[Any, Any]:
        train, val, batch = self.sizes
        sets = (self.data(train, 1), self.data(val, 2))
        return tuple(DataLoader(one, batch, collate_fn=self.collate) for one in sets)  # type: ignore[return-value]

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["y"]


class Slots:
    """A batch of a class that has slots, and no `to`."""

    __slots__ = ("features", "label")

    def __init__(self, features: Tensor, label: Tensor) -> None:
        self.features, self.label = features, label


class SlotsModule(Classifier):
    """Its own transfer_batch_to_device."""

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch.features, batch.label

    def transfer_batch_to_device(self, batch: Any, device: torch.device, idx: int) -> Any:
        return Slots(batch.features.to(device), batch.label.to(device))


class SlottedBatches(TensorDicts):
    def module(self) -> L.LightningModule:
        return SlotsModule()

    def collate(self, samples: list[Any]) -> Any:
        return Slots(*(torch.stack(part) for part in zip(*samples, strict=True)))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.features,), {}

    def targets(self, batch: Any) -> Tensor:
        return batch.label


class PixelModule(Classifier):
    """Bytes until on_after_batch_transfer, where training adds noise too."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        x = (x.float() - 128) / 40
        return (x + 0.1 * torch.randn_like(x) if self.trainer.training else x), y


class NormalisedInTheHook(Rule):
    """The duo takes what the model takes."""

    def module(self) -> L.LightningModule:
        return PixelModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset((128 + 40 * x).clamp(0, 255).byte(), y)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((batch[0].float() - 128) / 40,), {}


class SpeciesModule(Classifier):
    """The batch names its classes in words."""

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        found = [KINDS.index(name) for name in batch["species"]]
        return batch["x"], torch.tensor(found, device=self.device)


class NamesOfClasses(Rule):
    def module(self) -> L.LightningModule:
        return SpeciesModule()

    def data(self, count: int, seed: int) -> Dataset:
        make = lambda x, y: {"x": x, "species": KINDS[int(y)]}  # noqa: E731
        return Records(*points(count, seed), make=make)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def targets(self, batch: Any) -> Tensor:
        return torch.tensor([KINDS.index(name) for name in batch["species"]])


class Stream(IterableDataset):
    """Samples one after the other; nobody knows how many."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x, self.y, strict=True)


class BatchNormModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


class Streamed(Rule):
    """Loaders without length, whose last batch is one sample."""

    sizes = (193, 97, 16)

    def module(self) -> L.LightningModule:
        return BatchNormModule()

    def loaders(self) -> tuple[Any, Any]:
        train, val, batch = self.sizes
        return (
            DataLoader(Stream(*points(train, 1)), batch),
            DataLoader(Stream(*points(val, 2)), batch),
        )

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, outputs))


class IteratorModule(Classifier):
    """training_step(dataloader_iter)."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class LoaderIterator(Rule):
    def module(self) -> L.LightningModule:
        return IteratorModule()


class OtherShapesModule(Classifier):
    """Any length of series; the mean over time goes into the net."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mean(1))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = ("val_loss", "long_loss")[dataloader_idx]
        self.log(name, self.loss(batch), add_dataloader_idx=False)


class MeanLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1))


class LoadersOfOtherShapes(Rule):
    """Series of 4 steps, and of 7 in the second validation loader, which has other batches."""

    def module(self) -> L.LightningModule:
        return OtherShapesModule()

    def series(self, count: int, seed: int, length: int) -> Dataset:
        x, y = points(count, seed)
        noise = points(count * length, seed + 9)[0].view(count, length, 8)
        return TensorDataset(x[:, None] + 0.3 * noise, y)

    def loaders(self) -> tuple[Any, Any]:
        train, val, batch = self.sizes
        return DataLoader(self.series(train, 1, 4), batch), [
            DataLoader(self.series(val, 2, 4), batch),
            DataLoader(self.series(30, 3, 7), 7),
        ]

    def sidekick(self, outputs: int) -> nn.Module:
        return MeanLinear(8, outputs)


class DeepBatchModule(Classifier):
    """Inputs two levels down, passed on with **."""

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.net(x * scale[:, None])

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(**batch["inputs"]), batch["labels"]["kind"].long())


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale[:, None])


class DeepBatches(Rule):
    """Labels as bytes, two levels down, beside others of the same shape."""

    def module(self) -> L.LightningModule:
        return DeepBatchModule()

    def data(self, count: int, seed: int) -> Dataset:
        def make(x: Tensor, y: Tensor) -> Any:
            labels = {"group": (y + 1) % 3, "kind": y.byte()}
            return {"inputs": {"x": x, "scale": 1 + x[0].abs()}, "labels": labels}

        return Records(*points(count, seed), make=make)

    def sidekick(self, outputs: int) -> nn.Module:
        return ScaledLinear(8, outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), batch["inputs"]

    def targets(self, batch: Any) -> Tensor:
        return batch["labels"]["kind"].long()


class DoubleModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.double()


class Float64(Rule):
    """A module of float64 and data to match; so is the sidekick that the user gives."""

    def module(self) -> L.LightningModule:
        return DoubleModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x.double(), y)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs).double()


class TruePrecision(Rule):
    """precision="64-true": Lightning turns module and batch into float64."""

    trainer: ClassVar[dict[str, Any]] = {"precision": "64-true"}

    def module(self) -> L.LightningModule:
        return Classifier()

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[0].double(),), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0].to(module.net[0].weight.dtype))

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = rows(self.layout, self.truth(module, batch))
        return nll(logits, targets).mean()


class HalfModule(Classifier):
    """Labels as text scores: "1" to "3" in a list, and the batch as a list of two lists."""

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return torch.stack(batch[0]), torch.tensor([int(text) - 1 for text in batch[1]])


class ListsOfColumns(TensorDicts):
    def module(self) -> L.LightningModule:
        return HalfModule()

    def collate(self, samples: list[Any]) -> Any:
        return [[x for x, _ in samples], [str(int(y) + 1) for _, y in samples]]

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.stack(batch[0]),), {}

    def targets(self, batch: Any) -> Tensor:
        return torch.tensor([int(text) - 1 for text in batch[1]])

"""The models and data that the files of this folder are of."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]


def data(count: int, seed: int) -> TensorDataset:
    """Points of three classes that a line tells apart, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    weights = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, 3, generator=generator)
    return TensorDataset(x, (x @ weights + 2.0 * noise).argmax(1))


def sidekick(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, num_classes))


def scaled(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * module(x)


class Base(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Tiny(nn.Module):
    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(data(256, 1), 32)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(data(160, 2), 32)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(data(160, 3), 32)

"""Small data, models and Trainers that the tests share."""

import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 4
INF, NAN = torch.inf, torch.nan
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def make_logits(
    count: int, classes: int, seed: int, margin: float = 2.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two correlated models, the second a little worse, and targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    shared, a, b = torch.randn(3, count, classes, generator=generator)
    base, sidekick = a + 0.5 * shared, b + 0.5 * shared
    rows = torch.arange(count)
    base[rows, targets] += margin
    sidekick[rows, targets] += 0.7 * margin
    return base.to(device), sidekick.to(device), targets.to(device)


def edge_rows(classes: int) -> tuple[Tensor, Tensor, dict[str, tuple[int, int, bool]]]:
    """Logits, and per row: prediction, prediction of UQ only, whether a softmax exists."""
    base, sidekick = torch.zeros(2, 9, classes)
    base[:, 1], sidekick[:, 2] = 1.5, 3.0
    want = {"usual": (2, 1, True)}
    base[1, 4], want["NaN in the base"] = NAN, (4, 4, False)
    sidekick[2, 5], want["NaN in the sidekick"] = NAN, (5, 1, False)
    base[3, 5], base[3, 3], want["NaN and inf"] = NAN, INF, (3, 3, False)
    base[4], sidekick[4], want["all masked"] = -INF, -INF, (0, 0, False)
    base[5, 1], sidekick[5, 2], want["masked by either"] = -INF, -INF, (0, 0, True)
    base[6, 1], base[6, 3], want["mask beats the largest"] = -INF, 9.0, (3, 3, True)
    base[7], sidekick[7], want["ties"] = 1.0, 1.0, (0, 0, True)
    base[8, 0], sidekick[8, 0], want["opposite infinities"] = INF, -INF, (2, 0, True)
    return base, sidekick, want


def small_images(count: int = 240, seed: int = 0) -> TensorDataset:
    """Noise around one faint image per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(NUM_CLASSES, (count,), generator=generator)
    faint = torch.randn(NUM_CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator) + 0.12 * faint[y], y)


TRAIN, VAL, TEST = small_images(112, 1), small_images(80, 2), small_images(80, 3)


def loader(dataset: TensorDataset, *, shuffle: bool = False, batch: int = 16) -> DataLoader:
    return DataLoader(dataset, batch, shuffle=shuffle)


def as_mapping(samples: list) -> dict:
    """Collates as Hugging Face's processors do."""
    x, y = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(x), "labels": torch.stack(y)}


def small_net(num_classes: int = NUM_CLASSES, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, num_classes),
    )


class Tiny(nn.Module):
    """A sidekick of the user's own, made for the number of classes."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.net = small_net(num_classes, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Restless(nn.Module):
    """A sidekick that draws from every random stream, in its making and in its forward."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        random.random(), np.random.rand(), torch.rand(3)
        self.net = small_net(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(3)
        drop = self.training and random.random() < 0.2  # stochastic depth
        return self.net(torch.zeros_like(x) if drop else x)


class Classifier(L.LightningModule):
    """An ordinary user's module."""

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.net = small_net(num_classes, width=32)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def make_trainer(*callbacks: L.Callback, **options: object) -> L.Trainer:
    defaults: dict = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def digest(value: Any) -> str:
    """Hash of nested tensors, arrays and plain values, bit by bit."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        return digest((str(array.dtype), array.reshape(-1).view(torch.uint8).numpy().tobytes()))
    if isinstance(value, np.ndarray):
        return digest(value.tobytes())
    if isinstance(value, Mapping):
        return digest([(str(k), digest(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return digest("".join(digest(part) for part in value))
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()

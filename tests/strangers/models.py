"""Small parts of models that several runs share."""

import lightning as L
import torch
from torch import nn


class Optimized(L.LightningModule):
    """A module with the usual optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def mlp(outputs: int, inputs: int = 8, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def small_cnn(classes: int, *, channels: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(9 * width, classes),
    )


def flat(outputs: int, width: int = 432) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, outputs))

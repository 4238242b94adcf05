"""The models that the files of this folder are of."""

import torch
from torch import Tensor, nn


def inputs() -> Tensor:
    return torch.linspace(-2, 2, 40).reshape(5, 8)


class Sigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()


class Tokens(nn.Module):
    """Classes of 4 tokens, the first of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> dict:
        return {"out": [self.net(x.reshape(-1, 4, 2)), x]}


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.net(x if mask is None else x * mask)


class Unmasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

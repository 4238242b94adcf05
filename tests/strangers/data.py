"""Small data of several kinds, whose classes can be learnt a little in two epochs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Records(Dataset):
    """Samples that a function makes of the parts at an index."""

    def __init__(self, *parts: Tensor, make: Any = lambda *parts: parts) -> None:
        self.parts, self.make = parts, make

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> Any:
        return self.make(*(part[index] for part in self.parts))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, seed: int, *, width: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
    """(N, width) and classes (N,): a noisy linear rule."""
    x = torch.randn(count, width, generator=generator(seed))
    rule = torch.randn(width, classes, generator=generator(77))
    noise = torch.randn(count, classes, generator=generator(seed + 1000))
    return x, (x @ rule + 1.2 * noise).argmax(1)


def labels(x: Tensor, seed: int, count: int = 4) -> Tensor:
    """Labels (N, count) of points, float."""
    noise = torch.randn(len(x), count, generator=generator(seed + 2000))
    return (x[:, :count] + 0.8 * noise > 0.2).float()


def images(
    count: int,
    seed: int,
    *,
    classes: int = 3,
    channels: int = 3,
    size: int = 12,
    strength: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """(N, channels, size, size) and classes (N,): faint colours in noise, some labels wrong."""
    y = torch.randint(classes, (count,), generator=generator(seed))
    faint = torch.randn(classes, channels, size, size, generator=generator(78))
    faint += torch.randn(classes, channels, 1, 1, generator=generator(80))
    noise = torch.randn(count, channels, size, size, generator=generator(seed + 1000))
    slips = torch.rand(count, generator=generator(seed + 2000)) > 0.8
    return noise + strength * faint[y], (y + slips) % classes


def scenes(
    count: int,
    seed: int,
    *,
    classes: int = 3,
    channels: int = 3,
    size: tuple[int, ...] = (8, 8),
    noise: float = 1.5,
) -> tuple[Tensor, Tensor]:
    """(N, channels, *size) and classes (N, *size): each pixel's colour is that of its class."""
    y = torch.randint(classes, (count, *size), generator=generator(seed))
    colours = torch.randn(classes, channels, generator=generator(79))
    x = colours[y].movedim(-1, 1)
    return x + noise * torch.randn(x.shape, generator=generator(seed + 1000)), y


def sentences(
    count: int, seed: int, *, length: int = 9, words: int = 30, classes: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Word ids (N, length) from 1 on, lengths (N,), tags (N, length); 0 behind the end."""
    ids = torch.randint(1, words, (count, length), generator=generator(seed))
    lengths = torch.randint(3, length + 1, (count,), generator=generator(seed + 1000))
    slips = torch.rand(count, length, generator=generator(seed + 2000)) > 0.7
    tags = (ids + slips) % classes
    ids[torch.arange(length) >= lengths[:, None]] = 0
    return ids, lengths, tags


def topics(ids: Tensor, seed: int, classes: int = 3) -> Tensor:
    """A class (N,) for each sentence: mostly how many of its words are rare."""
    slips = torch.rand(len(ids), generator=generator(seed + 3000)) > 0.75
    return ((ids > 15).sum(1).div(2, rounding_mode="floor").clamp(max=2) + slips) % classes

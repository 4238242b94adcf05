"""Processes of a stage that are simulated in one, and data whose rows tell where they are from."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from lightning_duo.callback.processes import Group
from lightning_duo.logits import Logits


class Exchange:
    """What simulated processes tell each other."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._barrier, self._told = threading.Barrier(processes, timeout=20), {}

    def all(self, rank: int, values: Tensor) -> Tensor:
        self._told[rank] = values
        self._barrier.wait()
        found = torch.stack([self._told[rank] for rank in range(self.processes)])
        self._barrier.wait()
        return found

    def each(self, call: Callable[[int], Any]) -> list[Any]:
        """What a call returns in each process, all of which run at once."""
        found: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda rank=rank: found.update({rank: call(rank)}))
            for rank in range(self.processes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.processes)]


class Simulated(Group):
    def __init__(self, rank: int, exchange: Exchange) -> None:
        self._rank, self._exchange = rank, exchange

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._exchange.processes)

    def largest(self, values: Tensor) -> Tensor:
        return self._exchange.all(self.rank, values).amax(0)

    def total(self, local: int) -> int:
        return int(self._exchange.all(self.rank, torch.tensor(local)).sum())


class Numbers(Dataset):
    """Item i is i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Sorted(BatchSampler):
    """Batches from the last item to the first, whatever the sampler's order."""

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(self.sampler, reverse=True)
        return (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size))


def of_items(items: Tensor, rows: Tensor | None = None) -> Logits:
    """Rows that tell by themselves which row of which item they are."""
    rows = torch.zeros_like(items) if rows is None else rows
    base = torch.stack([items, rows], dim=1).float()
    return Logits(base, base + 0.5, items)


def distributed(
    data: Dataset, rank: int, processes: int, batch: int, kind: type[BatchSampler] = BatchSampler
) -> DataLoader:
    """A dataloader as Lightning makes it in each of several processes."""
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    return DataLoader(data, batch_sampler=kind(sampler, batch, False))

"""The samples of a stage: over all of its dataloaders and processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from lightning_duo.evaluation import DuoMetrics, Predictions
from lightning_duo.logits import Logits


def own_samples(loader: Any) -> int | None:
    """How many samples of a dataloader are this process's alone; None if there is no telling.

    PyTorch's distributed sampler, which Lightning uses, gives every process equally many, and
    repeats the first for that: sample i of process r is number i * processes + r of its order.
    """
    sampler = getattr(loader, "sampler", None)
    strided = DistributedSampler.__iter__, DistributedSamplerWrapper.__iter__
    if not isinstance(sampler, DistributedSampler) or type(sampler).__iter__ not in strided:
        return None
    if sampler.drop_last:
        return None
    dataset: Any = sampler.dataset
    return len(range(sampler.rank, len(dataset), sampler.num_replicas))


class Collected:
    """Logits and targets of each dataloader of a stage, in this process, on the CPU.

    Args:
        loaders: A dataloader, or a collection of them, as the Trainer has them.
    """

    def __init__(self, loaders: Any) -> None:
        self._batches: dict[int, list[Logits]] = {}
        self._counts: dict[int, int] = {}
        self._limits = [own_samples(loader) for loader in tree_leaves(loaders)]
        self.unusable: dict[int, str] = {}
        """Loaders that cannot be measured, and why."""

    def add(self, logits: Logits, loader: int) -> None:
        """Take a batch of a loader."""
        self._batches.setdefault(loader, []).append(self.own(logits, loader))

    def own(self, logits: Logits, loader: int) -> Logits:
        """The next batch of a loader, without samples that only repeat those of other processes."""
        limit = self._limits[loader] if loader < len(self._limits) else None
        before = self.count(loader)
        if limit is not None:
            logits = Logits(*(part[: max(0, limit - before)] for part in logits))
        self._counts[loader] = before + len(logits.targets)
        return logits

    def count(self, loader: int) -> int:
        """How many samples of a loader this process has seen."""
        return self._counts.get(loader, 0)

    def of_loaders(self, count: int, num_classes: int) -> list[Logits]:
        """All samples of each loader, of which this process may have got none."""
        nothing = torch.zeros(0, num_classes)
        empty = Logits(nothing, nothing, torch.zeros(0, dtype=torch.long))
        return [
            Logits(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
            for batches in (self._batches.get(index, [empty]) for index in range(count))
        ]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, which see different samples and must say the same."""

    trainer: Trainer
    module: LightningModule

    def num_classes(self, known: int | None) -> int:
        """K, which a process that saw no batch learns from the others."""
        if self.trainer.world_size == 1:
            return known or 1
        local = torch.tensor(known or 1, device=self.module.device)
        return int(self.trainer.strategy.reduce(local, reduce_op="max"))

    def total(self, local: int) -> int:
        """The sum over processes."""
        if self.trainer.world_size == 1:
            return local
        number = torch.tensor(local, device=self.module.device)
        return int(self.trainer.strategy.reduce(number, reduce_op="sum"))

    @property
    def reduce(self) -> Callable[[Tensor], Tensor] | None:
        """What `fit_temperatures` calls to add up its sums; None in a single process."""
        return None if self.trainer.world_size == 1 else self._add_up

    def _add_up(self, sums: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(sums.to(self.module.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()

    def predictions(self, metrics: DuoMetrics) -> dict[str, Predictions]:
        """Those of all processes."""
        if self.trainer.world_size > 1:  # they exchange what is on their devices
            metrics = metrics.to(self.module.device)
        return metrics.predictions()

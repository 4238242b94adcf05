"""The processes of a run, which see different samples and must say the same."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_duo.evaluation import DuoMetrics, Predictions


class Group:
    """Processes that share the samples of a stage; by itself, one process that has them all."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device("cpu")

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes, element by element; every process must call it."""
        return values

    def total(self, local: int) -> int:
        """The sum over processes; every process must call it."""
        return local


class Processes(Group):
    """Those of a Trainer.

    Args:
        trainer: The Trainer.
        module: The base.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module

    @property
    @override
    def rank(self) -> int:
        return self.trainer.global_rank

    @property
    @override
    def world_size(self) -> int:
        return self.trainer.world_size

    @property
    @override
    def device(self) -> torch.device:
        return self.module.device

    @override
    def largest(self, values: Tensor) -> Tensor:
        return values if self.world_size == 1 else self._reduced(values, "max")

    @override
    def total(self, local: int) -> int:
        return local if self.world_size == 1 else int(self._reduced(torch.tensor(local), "sum"))

    def num_classes(self, known: int | None) -> int:
        """K, which a process that saw no batch learns from the others."""
        return int(self.largest(torch.tensor(known or 1)))

    @property
    def reduce(self) -> Callable[[Tensor], Tensor] | None:
        """What `fit_temperatures` calls to add up its sums; None in a single process."""
        return None if self.world_size == 1 else lambda sums: self._reduced(sums, "sum")

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        found = self.trainer.strategy.reduce(values.to(self.device), reduce_op=how)
        assert isinstance(found, Tensor)
        return found.cpu()

    def predictions(self, metrics: DuoMetrics) -> dict[str, Predictions]:
        """Those of all processes."""
        if self.world_size > 1:  # they exchange what is on their devices
            metrics = metrics.to(self.device)
        return metrics.predictions()


def agree(problem: str | None, found: Any = None) -> None:
    """Compare with all other processes, each of which calls this at the same time.

    Args:
        problem: What is wrong in this process; None if nothing is.
        found: What must be the same in all, in plain types; None if this process found nothing.

    Raises:
        ValueError: In every process, if anything is wrong in one, or they found different things.
    """
    said: list[Any] = [(problem, found)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, (problem, found))
    for rank, (theirs, _) in enumerate(said):
        if theirs is not None:
            raise ValueError(theirs if theirs == problem else f"in process {rank}: {theirs}")
    known = [theirs for _, theirs in said if theirs is not None]
    if any(theirs != known[0] for theirs in known):
        raise ValueError(
            f"the processes read their batches differently: {known}; pass DuoCallback(..., "
            "batch_fn=lambda batch: (inputs, targets), logits_fn=lambda module, inputs: logits)"
        )

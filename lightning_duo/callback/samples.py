"""The samples of a stage: over all of its dataloaders and processes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_duo.callback.items import Draws, Origins
from lightning_duo.callback.processes import Group
from lightning_duo.logits import LEVELS, MEMORY, Kept, Logits, NewTally, Sample, row_keys
from lightning_duo.nested import Path, path_text

SLACK = 1.5  # as many times its share of the memory a process may fill until all agree


class Seen(NamedTuple):
    """How many rows of a loader a process saw, without repetitions, and how many it keeps."""

    rows: int
    kept: int


def running_loaders(trainer: Trainer) -> CombinedLoader:
    """The dataloaders of the validation or test that runs, and how they are combined.

    ``trainer.val_dataloaders`` does not tell how, and names those of the last fit where
    ``trainer.validate`` runs over others.
    """
    loaders = trainer._evaluation_loop._combined_loader
    assert loaders is not None
    return loaders


class Collected:
    """Logits and targets of each dataloader of a stage, in this process, on the CPU.

    Rows are kept as long as those of all processes and loaders together fit into the memory. Beyond
    it each loader gets an equal share of the memory, and of its rows a sample is kept that depends
    neither on the number of processes nor on the size of batches, as long as no process has more
    than 1.5 times its share of the rows. Until the end a process may hold 1.5 times its share.

    Args:
        loaders: A dataloader, or a collection of them, as the Trainer has them.
        group: The processes.
        memory: Bytes for the rows that are kept and for what will be said of them, of all processes
            together.
        seed: Of the sample of rows.
        new_tally: Makes the tallies of all rows, of loaders of which only a sample is kept.
    """

    def __init__(
        self,
        loaders: Any,
        group: Group | None = None,
        *,
        memory: int = MEMORY,
        seed: int = 0,
        new_tally: NewTally | None = None,
    ) -> None:
        self._new_tally = new_tally
        self._group, self._memory, self._seed = group or Group(), memory, seed
        if not isinstance(loaders, CombinedLoader):
            loaders = CombinedLoader(loaders, "sequential")
        self._draws = dict(_draws(loaders, self._group))
        self._loaders = max(1, len({loader for loader, _ in self._draws}))
        self._kept: dict[int, Kept] = {}
        self._counts: dict[int, int] = {}
        self._unclear: set[int] = set()
        self._full = False
        self.unusable: dict[int, str] = {}
        """Loaders that cannot be measured, and why."""

    def add(
        self, logits: Logits, loader: int, *, items: Tensor | None = None, part: Path = ()
    ) -> None:
        """Keep the rows of the next batch, or a sample of them; for arguments see `own`."""
        logits, origins = self._own(logits, loader, items, part)
        keys = row_keys(origins.items, origins.places, loader=loader, seed=self._seed)
        kept = self._kept.setdefault(loader, Kept(self._new_tally))
        kept.several |= bool((origins.places > 0).any())
        kept.add(logits, origins.items, keys)
        self._make_room()

    def own(
        self, logits: Logits, loader: int, *, items: Tensor | None = None, part: Path = ()
    ) -> Sample:
        """The rows of the next batch of a loader that do not only repeat those of other processes.

        Args:
            logits: Of base and sidekick (R, K), and targets (R,) int64 or (R, K) probabilities.
            loader: Number of the dataloader.
            items: Which item of the batch each row belongs to, from 0, shape (R,); None if it is
                not known, which is row i to item i if there are as many rows as items.
            part: Keys that lead to a dataloader within several that are combined, as ``("a",)``.

        Returns:
            Rows, and the number of each one's item.

        Raises:
            ValueError: If there is no such loader.
        """
        logits, origins = self._own(logits, loader, items, part)
        return Sample(logits, origins.items)

    def _own(
        self, logits: Logits, loader: int, items: Tensor | None, part: Path
    ) -> tuple[Logits, Origins]:
        if (loader, part) not in self._draws:
            known = sorted(map(str, self._draws))
            raise ValueError(
                f"there is no dataloader {loader} with the part {part}; expected one of "
                f"{', '.join(known)}"
            )
        origins = self._draws[loader, part].rows(len(logits.targets), items)
        if origins.unclear:
            self._unclear.add(loader)
        if not bool(origins.own.all()):
            logits = Logits(*(column[origins.own] for column in logits))
            origins = origins.where_own()
        self._counts[loader] = self.count(loader) + len(logits.targets)
        return logits, origins

    def _make_room(self) -> None:
        """Keep fewer rows, if they need more memory than there is for this process."""
        processes = self._group.world_size
        memory = self._memory / processes * (SLACK if processes > 1 else 1)
        self._full |= sum(kept.size for kept in self._kept.values()) > memory
        if self._full:
            for kept in self._kept.values():
                while kept.size > memory / self._loaders and kept.level < LEVELS:
                    kept.thin(kept.level + 1)

    def has_part(self, loader: int, part: Path) -> bool:
        """Whether a path in the batches of a loader leads to those of a loader of its own."""
        return (loader, part) in self._draws

    def count(self, loader: int) -> int:
        """How many rows of a loader this process has seen, without repetitions."""
        return self._counts.get(loader, 0)

    def seen(self, loader: int) -> Seen:
        """How many rows of a loader this process has seen, and how many of them it keeps."""
        kept = self._kept.get(loader)
        return Seen(self.count(loader), 0 if kept is None else kept.rows)

    def of_loaders(self, count: int, num_classes: int) -> list[Sample]:
        """The rows of each loader, of which this process may have got none.

        Every process must call it, and all get their parts of one sample.

        Args:
            count: Number of loaders.
            num_classes: K.
        """
        every = [self._kept.setdefault(loader, Kept(self._new_tally)) for loader in range(count)]
        local = [[kept.level, kept.soft, kept.several, self._full] for kept in every]
        agreed = self._group.largest(torch.tensor(local).long()).tolist()
        full = any(row[-1] for row in agreed)
        full |= self._group.total(sum(kept.size for kept in every)) > self._memory
        samples = []
        for kept, (level, soft, several, _) in zip(every, agreed, strict=True):
            kept.thin(level)
            while full and kept.level < LEVELS:
                if self._group.total(kept.size) <= self._memory / self._loaders:
                    break
                kept.thin(kept.level + 1)
            samples.append(kept.sample(num_classes, soft=bool(soft), several=bool(several)))
        return samples

    def notes(self) -> list[str]:
        """What to warn of at the end of a stage; every process must call it."""
        unclear = [int(loader in self._unclear) for loader in range(self._loaders)]
        found = self._group.largest(torch.tensor(unclear)).tolist()
        notes = []
        for (loader, part), draws in self._draws.items():
            if draws.padding is None or not (draws.is_unknown or found[loader]):
                continue
            why = (
                "its order is not known beforehand"
                if draws.is_unknown
                else "it is not known which rows of a batch belong to which item"
            )
            notes.append(
                f"up to {draws.padding.repeated} of the {draws.padding.items} items of dataloader "
                f"{loader}{path_text(part)} count twice: the distributed sampler repeats them so "
                f"that processes get equally many, and {why}. Use a number of items that "
                f"{self._group.world_size} divides"
            )
        return notes


def _draws(loaders: CombinedLoader, group: Group) -> Iterator[tuple[tuple[int, Path], Draws]]:
    """What each loader draws, by its number and the path that leads to it in batches."""
    if loaders._mode == "sequential":
        for number, loader in enumerate(loaders.flattened):
            if isinstance(loader, CombinedLoader):
                yield from _draws_of_parts(number, loader, group)
            else:
                yield (number, ()), Draws(loader, group)
    else:
        yield from _draws_of_parts(0, loaders, group)


def _draws_of_parts(
    number: int, loaders: CombinedLoader, group: Group
) -> Iterator[tuple[tuple[int, Path], Draws]]:
    parts = [*_parts(loaders.iterables, ())]
    cycles = loaders._mode == "max_size_cycle"
    for index, (path, loader) in enumerate(parts):
        part = index, len(parts) + 1
        yield (number, path), Draws(loader, group, cycles=cycles, part=part)
    # For batches of which nobody says which loader their rows are from.
    yield (number, ()), Draws(None, group, part=(len(parts), len(parts) + 1))


def _parts(loaders: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The loaders in a structure, as `CombinedLoader` takes it, and the paths that lead to them."""
    if isinstance(loaders, dict | list | tuple):
        keys = loaders if isinstance(loaders, dict) else range(len(loaders))
        for key in keys:
            yield from _parts(loaders[key], (*path, key))
    else:
        yield path, loaders

"""What dataloaders draw: which items a batch holds, and which of them another process has too."""

from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor

from lightning_duo.callback.order import (
    Order,
    Padding,
    distributed_sampler,
    order_of,
    padding_of,
)
from lightning_duo.callback.processes import Group

MOST = 20  # bits for the rows or items of a batch where they are numbered within it


class Origins(NamedTuple):
    """Where the R rows of a batch come from."""

    items: Tensor
    """Number of each row's item, shape (R,), int64: unique over the processes, and its index in the
    dataset if that is known. Below 0 where it is not known which item of the batch a row is of."""
    places: Tensor
    """Which row of its item each is, from 0, shape (R,), int64."""
    own: Tensor
    """Whether each counts: not if its item is drawn by another process, or was drawn before."""
    unclear: bool
    """Whether some may count that should not, because the item of each row is not known."""

    def where_own(self) -> "Origins":
        """Those of rows that count."""
        own = self.own
        return Origins(self.items[own], self.places[own], own[own], self.unclear)


class Draws:
    """The items that a dataloader draws in this process, batch after batch.

    Args:
        loader: A dataloader of PyTorch; of anything else the items are only counted.
        group: The processes.
        cycles: Whether the loader starts again when it is through, which repeats its items.
        part: Index and number of the loaders whose items need other numbers than this one's.
    """

    def __init__(
        self, loader: Any, group: Group, *, cycles: bool = False, part: tuple[int, int] = (0, 1)
    ) -> None:
        self._loader, self._group, self._cycles, self._part = loader, group, cycles, part
        self._batches = self._items = 0
        self._order: Order | None = None

    @property
    def padding(self) -> Padding | None:
        """What a distributed sampler repeats of this loader's items."""
        found = padding_of(distributed_sampler(self._loader))
        return found if found is not None and found.repeated else None

    @property
    def is_unknown(self) -> bool:
        """Whether there is no telling which items the batches so far hold."""
        return self._order is not None and not self._order.numbers

    def rows(self, rows: int, items: Tensor | None = None) -> Origins:
        """Where the rows of the next batch come from.

        Args:
            rows: R.
            items: Which item of the batch each row belongs to, from 0, shape (R,); None if it is
                not known, which is row i to item i if there are as many rows as items.
        """
        groups = torch.arange(rows) if items is None else items.cpu().long()
        found = int(groups.max()) + 1 if rows else 0
        numbers, repeats = self._next(found)
        count = len(numbers)
        if count == 1:
            groups = torch.zeros_like(groups)
        places, unclear = _places(groups), False
        if count == 1 or (found == count if items is None else found <= count):
            numbers, own = numbers[groups], ~repeats[groups]
        elif bool(repeats.all()):
            numbers, own = torch.zeros_like(groups), torch.zeros(rows, dtype=torch.bool)
        else:
            numbers, own = _inside(numbers[~repeats].max(), groups), torch.ones(rows).bool()
            unclear = rows > 0 and bool(repeats.any())
        index, parts = self._part
        return Origins(numbers * parts + index, places, own, unclear)

    def _next(self, found: int) -> tuple[Tensor, Tensor]:
        """Numbers of the items of the next batch, and whether each is a repetition."""
        number, self._batches = self._batches, self._batches + 1
        if self._order is None:
            self._order = order_of(self._loader, self._group)
        order = self._order
        length = len(order.numbers) or sized_len(self._loader)
        again = self._cycles and length is not None and number >= length
        if not again and number < len(order.numbers) and len(order.numbers[number]):
            numbers, repeats = order.numbers[number], order.repeats[number]
            if order.ready:
                return _inside(numbers[0], torch.arange(found)), repeats.expand(found)
            return numbers, repeats
        counted, self._items = self._items, self._items + found
        numbers = torch.arange(counted, counted + found)
        numbers = numbers * self._group.world_size + self._group.rank
        return numbers, torch.full((found,), again)


def _inside(number: Tensor, positions: Tensor) -> Tensor:
    """Numbers below 0 for what has only a position behind an item or a batch with a number."""
    return -1 - ((number << MOST) + positions)


def _places(groups: Tensor) -> Tensor:
    """How many elements before each one are of the same group, shape (R,)."""
    counts = torch.bincount(groups)
    if len(groups) == 0 or int(counts.max()) == 1:
        return torch.zeros_like(groups)
    first = counts.cumsum(0) - counts
    position = torch.arange(len(groups))
    if bool((groups[1:] >= groups[:-1]).all()):  # as they mostly are; sorting takes longer
        return position - first[groups]
    order = groups.argsort(stable=True)
    return torch.empty_like(groups).scatter_(0, order, position - first[groups[order]])

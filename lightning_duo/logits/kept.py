"""The rows that are kept of one dataloader: all, or a sample that needs no more memory."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_duo.evaluation import BYTES_OF_A_ROW, Tally
from lightning_duo.logits.check import Logits

LEVELS = 63  # bits of a key
MEMORY = 10**9  # bytes of rows that are kept and judged
NewTally: TypeAlias = Callable[[int], Tally]
"""Number of classes -> a tally of the forms that are to be measured on all rows."""


class Sample(NamedTuple):
    """Rows, and the items that they belong to."""

    logits: Logits
    """Of base and sidekick (R, K), and targets (R,) int64, or (R, K) where any are
    probabilities."""
    items: Tensor | None
    """Number of each row's item, shape (R,), int64; None where every row is an item of its own."""
    tally: Tally | None = None
    """Of all rows of this process, where those here are a sample of them."""


def row_keys(items: Tensor, places: Tensor, *, loader: int, seed: int) -> Tensor:
    """A number for every row that looks random and depends on nothing but where the row is from.

    Args:
        items: Numbers of the rows' items, shape (R,), int64.
        places: Which row of its item each is, shape (R,), int64.
        loader: Number of the dataloader.
        seed: Another seed gives other keys.

    Returns:
        Evenly spread over 0 .. 2^63 - 1, shape (R,), int64.

    Example:
        >>> keys = row_keys(torch.arange(1000), torch.zeros(1000).long(), loader=0, seed=0)
        >>> int((keys < 2**62).sum())
        525

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014): a step of
        SplitMix64 for each of the four numbers.
    """
    start = torch.tensor([seed], dtype=torch.long)
    keys = _mixed(_mixed(start) + loader)
    return _mixed(_mixed(keys + items) + places) & (2**63 - 1)


def _mixed(x: Tensor) -> Tensor:
    """A step of SplitMix64 on 64-bit integers, whose products and sums wrap around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros, whatever the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64."""
    return x - (1 << 64) if x >> 63 else x


class _Chunk(NamedTuple):
    """Rows of a batch."""

    base: Tensor
    sidekick: Tensor
    targets: Tensor
    items: Tensor
    keys: Tensor

    def where(self, kept: Tensor) -> "_Chunk":
        return self if bool(kept.all()) else _Chunk(*(column[kept] for column in self))


class Kept:
    """Rows of one dataloader in this process, on the CPU, in the order in which they came.

    At level j a row is kept if its key is among the lowest 1 / 2^j of all keys. So the rows of all
    processes at one level are the same whichever process saw them, and in whatever batches.

    Args:
        new_tally: Makes the tally that counts all rows, once some are not kept; None for no tally.
    """

    def __init__(self, new_tally: NewTally | None = None) -> None:
        self._chunks: list[_Chunk] = []
        self._new_tally = new_tally
        self._tally: Tally | None = None
        self.level = 0
        """At 0 all rows are kept."""
        self.size = 0
        """Bytes of the kept rows, and of what will be said of them."""
        self.rows = 0
        """How many rows are kept."""
        self.several = False
        """Whether items with several rows were among those seen."""

    def add(self, logits: Logits, items: Tensor, keys: Tensor) -> None:
        """Take the rows of a batch.

        Args:
            logits: Of base and sidekick (R, K), and targets (R,) or (R, K).
            items: Numbers of their items, shape (R,).
            keys: By which rows are kept, from `row_keys`, shape (R,).
        """
        chunk = _Chunk(*logits, items, keys)
        if self.level:
            self._count(chunk)
        chunk = chunk.where(self._are_kept(keys))
        self._chunks.append(_Chunk(*map(_alone, chunk)))
        self.size += _size(self._chunks[-1])
        self.rows += len(chunk.keys)

    def thin(self, level: int) -> None:
        """Keep only rows of a higher level."""
        if level > self.level:
            whole, self.level = not self.level, level
            for i, chunk in enumerate(self._chunks):  # one by one, to need no second copy of all
                if whole:
                    self._count(chunk)
                self._chunks[i] = _Chunk(*map(_alone, chunk.where(self._are_kept(chunk.keys))))
            if len({chunk.targets.ndim for chunk in self._chunks}) == 1:
                # Small pieces would leave holes in the memory that large ones do not fit into.
                self._chunks = [_Chunk(*_joined(self._chunks))]
            self.size = sum(map(_size, self._chunks))
            self.rows = sum(len(chunk.keys) for chunk in self._chunks)

    def _count(self, chunk: _Chunk) -> None:
        """Add rows, of which some will not be kept, to the tally of all."""
        if self._new_tally is not None and len(chunk.keys):
            self._tally = self._tally or self._new_tally(chunk.base.shape[1])
            members = {"base": chunk.base, "sidekick": chunk.sidekick}
            self._tally.update(members, chunk.targets, items=chunk.items if self.several else None)

    def _are_kept(self, keys: Tensor) -> Tensor:
        # A shift by all 63 bits leaves 0, as if every key were low enough.
        return keys >> (LEVELS - self.level) == 0

    @property
    def soft(self) -> bool:
        """Whether any targets are probabilities."""
        return any(chunk.targets.is_floating_point() for chunk in self._chunks)

    def sample(self, num_classes: int, *, soft: bool, several: bool) -> Sample:
        """The rows that are kept, which are given away: there may be no memory for two copies.

        Args:
            num_classes: K.
            soft: Whether all targets must be probabilities.
            several: Whether to say which item each row belongs to.
        """
        none = torch.zeros(0, num_classes)
        number = torch.zeros(0, dtype=torch.long)
        chunks, self._chunks = self._chunks or [_Chunk(none, none, number, number, number)], []
        for i, chunk in enumerate(chunks):
            if soft and not chunk.targets.is_floating_point():
                chunks[i] = chunk._replace(targets=_one_hot(chunk.targets, num_classes))
        base, sidekick, targets, items, _ = _joined(chunks)
        if self.level and self._new_tally is not None:  # so in every process
            self._tally = self._tally or self._new_tally(num_classes)
        return Sample(Logits(base, sidekick, targets), items if several else None, self._tally)


def _joined(chunks: list[_Chunk]) -> list[Tensor]:
    """Each column of all chunks, which are emptied, so that no column is twice in the memory."""
    columns = [list(column) for column in zip(*chunks, strict=True)]
    chunks.clear()
    joined = []
    while columns:
        parts = columns.pop(0)
        joined.append(torch.cat(parts))
    return joined


def _one_hot(targets: Tensor, num_classes: int) -> Tensor:
    return one_hot(targets, num_classes).float()


def _alone(x: Tensor) -> Tensor:
    """A tensor that keeps no memory beyond its own."""
    return (
        x
        if x.untyped_storage().nbytes() == x.nbytes
        else x.clone(memory_format=torch.contiguous_format)
    )


def _size(chunk: _Chunk) -> int:
    return sum(column.nbytes for column in chunk) + len(chunk.keys) * BYTES_OF_A_ROW

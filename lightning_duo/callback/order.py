"""In which order a dataloader draws the items of its dataset, known before it does."""

import copy
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.distributed import (
    DistributedSamplerWrapper,
    _DatasetSamplerWrapper,
)
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_duo.callback.processes import Group
from lightning_duo.isolation import own_stream

STRIDED = DistributedSampler.__iter__, DistributedSamplerWrapper.__iter__
# What holds a state of its own; copied whole.
_STATES = (
    *(Tensor, np.ndarray, set, deque),
    *(torch.Generator, random.Random, np.random.Generator, np.random.RandomState),
)


class Order(NamedTuple):
    """The items of every batch; empty if they cannot be known."""

    numbers: tuple[Tensor, ...] = ()
    """Number of each item, shape (n,), int64, for every batch. It is the item's index in the
    dataset if that is the same in each pass."""
    repeats: tuple[Tensor, ...] = ()
    """Whether each is a repetition, shape (n,), bool, for every batch."""
    ready: bool = False
    """Whether one draw is a whole batch, whose items have no numbers (``batch_size=None``)."""


class Padding(NamedTuple):
    """What a distributed sampler adds so that all processes draw equally many items."""

    items: int
    """How many items there are."""
    repeated: int
    """How many of them are drawn twice."""
    own: int
    """How many draws of this process come before the repetitions."""


def padding_of(sampler: DistributedSampler[Any] | None) -> Padding | None:
    """What PyTorch's distributed sampler, or Lightning's around another sampler, repeats.

    Draw i of process r is number ``i * processes + r`` of its order. It is a repetition where that
    exceeds the number of items.
    """
    if sampler is None or sampler.drop_last or type(sampler).__iter__ not in STRIDED:
        return None
    items = len(sampler.dataset)  # type: ignore[arg-type]
    repeated = sampler.num_samples * sampler.num_replicas - items
    return Padding(items, repeated, len(range(sampler.rank, items, sampler.num_replicas)))


def distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """The sampler that gives each process its part, which may stand inside a batch sampler."""
    batched = getattr(loader, "batch_sampler", None)
    sampler = loader if batched is None else batched
    while not isinstance(sampler, DistributedSampler) and hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    return sampler if isinstance(sampler, DistributedSampler) else None


def _parts(sampler: DistributedSampler[Any] | None) -> int:
    """How many processes share the dataset."""
    return 1 if sampler is None else sampler.num_replicas


def order_of(loader: Any, group: Group) -> Order:
    """Go through the samplers of a dataloader, in copies of them, without fetching any item.

    Two passes start from different random streams. What they agree on holds for the dataloader's
    own pass too.

    Args:
        loader: A dataloader of PyTorch; of anything else the order is not known.
        group: The processes.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return Order()
    batched: Any = loader.batch_sampler
    own_kind = batched is not None and type(batched).__iter__ is not BatchSampler.__iter__
    above: Any = batched if own_kind else (loader if batched is None else batched).sampler
    sampler = distributed_sampler(loader)
    below = None if above is sampler else sampler
    try:
        count = len(loader) if own_kind else len(above)
        copies = _copied((above, below), loader.dataset, {})
        first, second = (_pass(copies, count, seed, group) for seed in range(2))
    except Exception:  # in code of the user's, which fails in its own place if it must
        return Order()
    steady, (draws, under) = first == second, first
    if not steady and (own_kind or below is not None):
        return Order()
    if own_kind and not all(isinstance(batch, list) for batch in draws):
        return Order()
    sizes = [1] * len(draws)
    if own_kind:
        sizes, draws = [len(batch) for batch in draws], list(itertools.chain(*draws))
    elif batched is not None:
        whole, rest = divmod(len(draws), batched.batch_size)
        sizes = [batched.batch_size] * whole + [rest] * (rest > 0 and not batched.drop_last)
    numbers = _numbers(draws, group, indices=steady, parted=_parts(sampler) == group.world_size)
    repeats = _repeats(draws, None if below is None else under, padding_of(sampler))
    total = sum(sizes)
    parts = [torch.split(part[:total], sizes) for part in (numbers, repeats)]
    return Order(parts[0], parts[1], ready=batched is None)


def _pass(
    samplers: tuple[Any, Any], count: int, seed: int, group: Group
) -> tuple[list[Any], list[Any]]:
    """What two samplers give when they are gone through.

    Args:
        samplers: One that gives draws, or batches if it is a batch sampler; and one that it draws
            from, or None.
        count: How many draws or batches the first gives.
        seed: Of the random streams.
        group: The processes.
    """
    above, below = samplers
    with own_stream(group.device, seed):
        given = [] if below is None else _plain(below)
        return _plain(itertools.islice(above, count)), given


def _plain(draws: Iterable[Any]) -> list[Any]:
    """Draws that can be compared: numbers and lists in place of tensors and arrays."""
    return [draw if type(draw) is int else _plain_draw(draw) for draw in draws]


def _plain_draw(draw: Any) -> Any:
    if isinstance(draw, Tensor | np.ndarray | np.generic):
        return draw.tolist()
    return draw if isinstance(draw, str | dict) or not isinstance(draw, Iterable) else _plain(draw)


def _copied(value: Any, data: Any, copies: dict[int, Any]) -> Any:
    """A copy of samplers, with all that going through them may change; the data are shared.

    Args:
        value: A sampler, or a part of one.
        data: The dataset.
        copies: The copies of what was met already, by its identity.

    Raises:
        TypeError: If a part can be gone through only once.
    """
    if value is data or isinstance(value, int | float | str | DataLoader):
        return value
    if isinstance(value, Iterator):
        raise TypeError(f"a {type(value).__name__} can be gone through only once")
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple):
        return tuple(_copied(part, data, copies) for part in value)
    if isinstance(value, _STATES):
        return copies.setdefault(id(value), copy.deepcopy(value))
    if not isinstance(value, list | dict) and not _is_sampler(value):
        return value
    new = copies[id(value)] = copy.copy(value)
    if isinstance(value, list):
        new[:] = [x if type(x) is int else _copied(x, data, copies) for x in value]
    else:
        parts = new if isinstance(value, dict) else vars(new)
        for key, part in parts.items():
            parts[key] = _copied(part, data, copies)
    return new


def _is_sampler(value: Any) -> bool:
    """Whether this draws: not data, which have items by number."""
    if isinstance(value, Sampler | _DatasetSamplerWrapper):
        return True
    return (
        isinstance(value, Iterable)
        and hasattr(value, "__dict__")
        and not hasattr(value, "__getitem__")
    )


def _numbers(draws: list[Any], group: Group, *, indices: bool, parted: bool) -> Tensor:
    """Numbers of what is drawn, no two of them the same in two processes.

    Args:
        draws: All draws of this process.
        group: The processes.
        indices: Whether draws are the same in each pass; else their positions count.
        parted: Whether all processes share one dataset, each drawing its part.
    """
    if indices and all(type(draw) is int for draw in draws):
        numbers = torch.tensor(draws, dtype=torch.long)
        if parted:
            return numbers
    else:
        numbers = torch.arange(len(draws))
    return numbers * group.world_size + group.rank


def _repeats(draws: list[Any], below: list[Any] | None, padding: Padding | None) -> Tensor:
    """Which draws are repetitions, shape (N,), bool.

    Args:
        draws: All draws of this process.
        below: What the distributed sampler gives, if another draws from that.
        padding: What the distributed sampler repeats.
    """
    repeats = torch.zeros(len(draws), dtype=torch.bool)
    if padding is None:
        return repeats
    if below is None:
        repeats[padding.own :] = True
    elif len(below) > padding.own:  # by one at most
        places = [i for i, draw in enumerate(draws) if draw == below[padding.own]]
        repeats[places[-1:]] = True
    return repeats

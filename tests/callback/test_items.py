"""Which rows of which items a stage counts, over simulated processes."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import CombinedLoader
from simulated import Exchange, Numbers, Simulated, Sorted, distributed, of_items
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from lightning_duo.callback.processes import Group
from lightning_duo.callback.samples import Collected
from lightning_duo.logits import Sample

ROW = 2 * 2 * 4 + 3 * 8  # bytes of a row of two classes: logits, target, item and key


class Untouched(Numbers):
    """No item may be fetched."""

    def __getitem__(self, index: int) -> int:
        raise AssertionError("an item was fetched")


class Mixed(Sorted):
    """Batches in an order of the global random stream."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [*super().__iter__()]
        random.shuffle(batches)
        return iter(batches)


def owned(loader: DataLoader, group: Group | None = None, views: int = 1) -> list[Sample]:
    """The rows that count of each batch, if each item has as many views, one after the other."""
    collected = Collected(loader, group)
    found = []
    for x in loader:
        items = None if views == 1 else torch.arange(len(x)).repeat_interleave(views)
        rows = of_items(x.repeat_interleave(views), torch.arange(views).repeat(len(x)))
        found.append(collected.own(rows, 0, items=items))
    assert collected.count(0) == sum(len(sample.logits.targets) for sample in found)
    return found


def all_items(samples: list[Sample]) -> list[int]:
    return [int(i) for sample in samples for i in sample.logits.targets]


# ---- items ----


@settings(max_examples=60, deadline=None)
@given(
    items=st.integers(1, 23),
    processes=st.integers(1, 4),
    batch=st.integers(1, 6),
    views=st.integers(1, 3),
    kind=st.sampled_from([BatchSampler, Sorted]),
)
def test_every_row_of_every_item_counts_once(
    items: int, processes: int, batch: int, views: int, kind: type[BatchSampler]
) -> None:
    exchange, seen, numbers = Exchange(processes), [], []
    for rank in range(processes):
        loader = distributed(Numbers(items), rank, processes, batch, kind)
        for sample in owned(loader, Simulated(rank, exchange), views):
            assert torch.equal(sample.items, sample.logits.targets)  # indices in the dataset
            seen += sample.logits.base.tolist()
            numbers += sample.items.tolist()
    assert sorted(seen) == [[i, view] for i in range(items) for view in range(views)]
    assert sorted(numbers) == sorted([*range(items)] * views)


def test_only_samplers_that_repeat_are_corrected() -> None:
    class InBlocks(DistributedSampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(self.rank * self.num_samples, (self.rank + 1) * self.num_samples))

    def own(sampler: Sampler | None, items: int = 80) -> int:
        return len(all_items(owned(DataLoader(Numbers(items), 16, sampler=sampler))))

    data = Numbers(80)
    assert [own(DistributedSampler(data, 3, rank)) for rank in range(3)] == [27, 27, 26]
    assert own(DistributedSampler(data, 3, 2, drop_last=True)) == 26
    assert own(InBlocks(Numbers(81), 3, 2), 81) == 27
    assert own(None) == 80
    few = [DistributedSampler(Numbers(2), 4, rank) for rank in range(4)]
    assert [own(sampler, 2) for sampler in few] == [1, 1, 0, 0]


@pytest.mark.parametrize("shuffled", ["by the epoch", "by a sampler", "by the global stream"])
def test_the_last_draw_is_the_repetition_whatever_the_order(shuffled: str) -> None:
    data, drawn = Numbers(10), []
    for rank in range(4):
        torch.manual_seed(5)
        if shuffled == "by the epoch":
            sampler = DistributedSampler(data, 4, rank, shuffle=True)
            sampler.set_epoch(3)
        elif shuffled == "by a sampler":
            order = RandomSampler(data, generator=torch.Generator().manual_seed(1))
            sampler = DistributedSamplerWrapper(order, num_replicas=4, rank=rank, shuffle=False)
        else:
            sampler = DistributedSamplerWrapper(
                RandomSampler(data), num_replicas=4, rank=rank, shuffle=False
            )
        drawn += all_items(owned(DataLoader(data, 2, sampler=sampler)))
    assert sorted(drawn) == [*range(10)]


def test_a_batch_sampler_that_drops_the_repetition_loses_nothing_else() -> None:
    data = Numbers(7)
    loader = DataLoader(
        data, 3, sampler=DistributedSampler(data, 2, 1, shuffle=False), drop_last=True
    )
    assert all_items(owned(loader)) == [1, 3, 5]  # and not 0, which begins another batch


def test_a_batch_sampler_around_another_is_looked_into() -> None:
    """As data loaders make them that keep their workers between epochs."""

    class Again:
        def __init__(self, sampler: BatchSampler) -> None:
            self.sampler = sampler

        def __iter__(self) -> Iterator[list[int]]:
            while True:
                yield from iter(self.sampler)

    class Lasting(DataLoader):
        def __len__(self) -> int:
            return len(self.batch_sampler.sampler)

        def __iter__(self) -> Iterator[Tensor]:
            batches = iter(self.batch_sampler)
            return (torch.tensor(next(batches)) for _ in range(len(self)))

    regular = [distributed(Numbers(7), rank, 2, 3).batch_sampler for rank in range(2)]
    loaders = [Lasting(Numbers(7), batch_sampler=Again(sampler)) for sampler in regular]
    assert sorted(i for loader in loaders for i in all_items(owned(loader))) == [*range(7)]


def test_items_of_processes_with_data_of_their_own_have_different_numbers() -> None:
    exchange = Exchange(2)
    for loaders in (
        [DataLoader(Numbers(5), 2) for _ in range(2)],
        [DataLoader(Numbers(5), 2, shuffle=True) for _ in range(2)],
        [DataLoader(Stream(5), 2) for _ in range(2)],
        [DataLoader(Batches(3), batch_size=None) for _ in range(2)],
    ):
        samples = [
            sample
            for rank, x in enumerate(loaders)
            for sample in owned(x, Simulated(rank, exchange))
        ]
        numbers = torch.cat([sample.items for sample in samples])
        assert len(numbers.unique()) == len(numbers) in (10, 18)


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


class Batches(Numbers):
    """Item i is a whole batch."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(3) + 3 * index


def test_a_ready_batch_that_is_repeated_counts_once() -> None:
    data, drawn = Batches(5), []
    for rank in range(2):
        sampler = DistributedSampler(data, 2, rank, shuffle=False)
        drawn += all_items(owned(DataLoader(data, batch_size=None, sampler=sampler)))
    assert sorted(drawn) == [*range(15)]


class Stateful(Sampler):
    """Draws from everything that a sampler may hold, and changes it in place."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.order = data, [*range(len(data))]
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.weights = np.random.default_rng(1), torch.zeros(3)
        self.state = {"passes": 0, "set": set()}

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        self.state["passes"] += 1
        self.state["set"].add(self.python.random())
        self.weights += torch.rand(3, generator=self.torch)
        self.order.sort(key=lambda _: self.numpy.random())
        random.random(), np.random.rand(), torch.rand(3)
        return iter(self.order)


@pytest.mark.parametrize("kind", [BatchSampler, Sorted, Mixed])
def test_nothing_of_a_loader_changes(kind: type[BatchSampler]) -> None:
    data = Untouched(9)
    inner = Stateful(data)
    wrapped = DistributedSamplerWrapper(inner, num_replicas=2, rank=1, shuffle=False)
    loader = DataLoader(data, batch_sampler=kind(wrapped, 4, False))

    def state() -> list[Any]:
        own = [inner.order, inner.weights, inner.state]
        streams = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
        generators = [inner.torch.get_state(), inner.python.getstate(), inner.numpy.bit_generator]
        generators[-1] = str(generators[-1].state)
        return [own, streams, generators, {**vars(wrapped.dataset), "_sampler": id(inner)}]

    before = digest(state())
    collected = Collected(loader, Simulated(1, Exchange(2)))
    for count in (4, 1):
        collected.own(of_items(torch.arange(count)), 0)
    assert digest(state()) == before
    assert collected.count(0) == (4 if kind is BatchSampler else 5)


def test_what_can_be_gone_through_once_is_left_to_the_loader() -> None:
    loader = DataLoader(Numbers(5), batch_sampler=(part for part in ([0, 1], [2, 3], [4])))
    assert all_items(owned(loader)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [[[0, 1], [2]], [torch.tensor([0, 1]), torch.tensor([2])]])
def test_batches_may_be_listed(batch: list) -> None:
    samples = owned(DataLoader(Numbers(3), batch_sampler=batch))
    assert [sample.items.tolist() for sample in samples] == [[0, 1], [2]]


def notes_of(items: int, kind: type[BatchSampler], views: int = 1) -> list[list[str]]:
    """What two processes warn of, if nobody knows which rows belong to which item."""
    exchange, counts = Exchange(2), []
    every = []
    for rank in range(2):
        loader = distributed(Numbers(items), rank, 2, 4, kind)
        every.append(Collected(loader, Simulated(rank, exchange)))
        for x in loader:
            every[-1].own(of_items(x.repeat(views)), 0)
        counts.append(every[-1].count(0))
    notes = exchange.each(lambda rank: every[rank].notes())
    assert sum(counts) == views * (items + (bool(notes[0]) and items % 2))
    return notes


@pytest.mark.parametrize("kind", [Sorted, Mixed])
@pytest.mark.parametrize("views", [1, 2])
def test_a_note_says_what_counts_twice_and_its_remedy_helps(
    kind: type[BatchSampler], views: int
) -> None:
    first, second = notes_of(11, kind, views)
    assert first == second
    if kind is Sorted and views == 1:
        assert first == []
    else:
        why = "order is not known" if kind is Mixed else "which rows of a batch belong"
        (note,) = first
        assert note.startswith("up to 1 of the 11 items of dataloader 0 count twice")
        assert why in note
        assert "number of items that 2 divides" in note
    assert notes_of(12, kind, views) == [[], []]


def test_rows_without_items_count_where_they_can_be_told() -> None:
    """Of 9 items in batches of 4 the second process draws 1, 3, 5, 7 and then 0 once more."""
    exchange = Exchange(2)
    collected = Collected(distributed(Numbers(9), 1, 2, 4), Simulated(1, exchange))
    first = collected.own(of_items(torch.arange(8)), 0)
    second = collected.own(of_items(torch.arange(8)), 0)  # all of the item that is repeated
    assert [len(x.logits.targets) for x in (first, second)] == [8, 0]
    assert len(first.items.unique()) == 8
    assert bool((first.items < 0).all())  # no index in the dataset
    dropped = Collected(DataLoader(Numbers(3), 3)).own(of_items(torch.arange(0)), 0)
    assert len(dropped.logits.targets) == len(dropped.items) == 0


# ---- loaders that are combined ----


def combined(mode: str, exchange: Exchange, rank: int) -> tuple[CombinedLoader, Collected]:
    loaders = {
        "a": distributed(Numbers(5), rank, 2, 2),
        "b": [distributed(Numbers(9), rank, 2, 1, Sorted)],
    }
    found = CombinedLoader(loaders, mode)
    return found, Collected(found, Simulated(rank, exchange))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_items_of_combined_loaders_count_once(mode: str) -> None:
    exchange, drawn = Exchange(2), {"a": [], "b": []}
    numbers: list[int] = []
    for rank in range(2):
        loader, collected = combined(mode, exchange, rank)
        for batch, _, number in loader:
            for name, path in (("a", ("a",)), ("b", ("b", 0))):
                x = batch["a"] if name == "a" else batch["b"][0]
                if x is not None:
                    sample = collected.own(of_items(x), number, part=path)
                    drawn[name] += sample.logits.targets.tolist()
                    numbers += sample.items.tolist()
    assert sorted(drawn["a"]) == [*range(5)]
    # The first two batches are of one item each; else all five.
    expected = [8, 7, 6, 5] if mode == "min_size" else [*range(9)]
    assert sorted(drawn["b"]) == sorted(expected)
    assert len(set(numbers)) == len(numbers)


def test_loaders_one_after_the_other_are_numbered() -> None:
    exchange = Exchange(2)
    loader, collected = combined("sequential", exchange, 1)
    for x, _, number in loader:
        collected.add(of_items(x), number)
    assert [collected.count(number) for number in range(2)] == [2, 4]


def test_a_part_that_is_not_there_is_refused() -> None:
    _, collected = combined("min_size", Exchange(2), 0)
    with pytest.raises(ValueError, match=r"no dataloader 0 with the part \('c',\).*'b', 0"):
        collected.own(of_items(torch.arange(2)), 0, part=("c",))
    collected.own(of_items(torch.arange(2)), 0)  # of nobody knows which

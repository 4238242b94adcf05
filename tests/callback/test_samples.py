"""Which rows a stage keeps of too many, over simulated processes; and two real ones."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from scipy.stats import chisquare
from simulated import Exchange, Numbers, Simulated, Sorted, distributed, of_items
from subprocesses import two_processes
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    SequentialSampler,
    TensorDataset,
)

from lightning_duo import DuoCallback
from lightning_duo.callback.samples import Collected, running_loaders
from lightning_duo.evaluation import BYTES_OF_A_ROW
from lightning_duo.logits import Logits, row_keys

# Bytes of a row of two classes: logits, target, item and key, and what is said of it.
ROW = 2 * 2 * 4 + 3 * 8 + BYTES_OF_A_ROW


# ---- too many rows ----


def ragged(batch: Tensor) -> tuple[Logits, Tensor]:
    """Item i has 1 + i % 3 rows, mixed with those of others."""
    counts = 1 + batch % 3
    items = torch.cat([(counts > row).nonzero().flatten() for row in range(3)])
    rows = torch.cat([torch.full((int((counts > row).sum()),), row) for row in range(3)])
    return of_items(batch[items], rows), items


def sampled(
    processes: int, batch: int, memory: int, *, items: int = 600, seed: int = 0
) -> list[tuple[int, int]]:
    """The (item, row) that are kept, together, in order."""
    exchange, every = Exchange(processes), []
    for rank in range(processes):
        loader = distributed(Numbers(items), rank, processes, batch)
        collected = Collected(loader, Simulated(rank, exchange), memory=memory, seed=seed)
        for x in loader:
            logits, index = ragged(x)
            collected.add(logits, 0, items=index)
            most = memory if processes == 1 else 1.5 * memory / processes
            assert collected.seen(0).kept * ROW <= most
        every.append(collected)
    samples = exchange.each(lambda rank: every[rank].of_loaders(1, 2)[0])
    for one, sample in zip(every, samples, strict=True):
        assert one.seen(0).kept == len(sample.items)
        assert torch.equal(sample.items, sample.logits.targets)
        assert torch.equal(sample.logits.sidekick, sample.logits.base + 0.5)
    assert sum(one.seen(0).rows for one in every) == 2 * items
    return [tuple(row) for sample in samples for row in sample.logits.base.int().tolist()]


@pytest.mark.parametrize("limit", [100, 333, 1200])
def test_the_sample_is_the_same_for_any_processes_and_batches(limit: int) -> None:
    runs = [
        sampled(processes, batch, limit * ROW)
        for processes, batch in [(1, 1), (1, 7), (1, 600), (2, 1), (2, 16), (3, 5)]
    ]
    assert limit / 2 < len(runs[0]) <= limit
    assert len(set(runs[0])) == len(runs[0])
    assert all(sorted(run) == sorted(runs[0]) for run in runs)


def test_another_seed_is_another_sample() -> None:
    one, other = (set(sampled(1, 50, 100 * ROW, seed=seed)) for seed in range(2))
    assert len(one & other) < 0.5 * len(one)


def test_every_row_is_as_likely_to_be_kept() -> None:
    """Of 120 items, whose 240 rows each are kept in about half of the samples or a quarter."""
    counts: dict[tuple[int, int], int] = {}
    for seed in range(200):
        for row in sampled(1, 120, 80 * ROW, items=120, seed=seed):
            counts[row] = counts.get(row, 0) + 1
    assert len(counts) == 240
    found = [*counts.values()]
    assert chisquare(found).pvalue > 0.001
    for row, items in enumerate((120, 80, 40)):
        rate = sum(n for (_, place), n in counts.items() if place == row) / items
        assert rate == pytest.approx(np.mean(found), rel=0.05)


def test_keys_are_spread_evenly_and_depend_on_everything() -> None:
    items, places = torch.arange(-20000, 20000), torch.zeros(40000).long()
    keys = [
        row_keys(items, places, loader=0, seed=0),
        row_keys(items, places + 1, loader=0, seed=0),
        row_keys(items, places, loader=1, seed=0),
        row_keys(items, places, loader=0, seed=1),
        row_keys(items << 20, places, loader=0, seed=0),
    ]
    for one in keys:
        assert chisquare(torch.bincount(one >> 55, minlength=256).numpy()).pvalue > 1e-4
        assert len(one.unique()) == len(one)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            together = (one >> 59) * 16 + (other >> 59)
            assert chisquare(torch.bincount(together, minlength=256).numpy()).pvalue > 1e-4


def test_rows_that_fit_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    base, sidekick = torch.randn(2, 50, 3, generator=generator)
    targets = torch.randint(3, (50,), generator=generator)
    collected = Collected(DataLoader(Numbers(50), 8))
    for rows in torch.arange(50).split(8):
        collected.add(Logits(base[rows], sidekick[rows], targets[rows]), 0)
    found, none = collected.of_loaders(2, 3)
    assert found.items is None  # every row is an item of its own
    for mine, given_ in zip(found.logits, (base, sidekick, targets), strict=True):
        assert torch.equal(mine, given_)
    assert collected.seen(0) == (50, 50)
    assert [tuple(column.shape) for column in none.logits] == [(0, 3), (0, 3), (0,)]


def test_loaders_share_the_memory() -> None:
    """What fits together stays whole; else each loader has its share."""
    loaders = [DataLoader(Numbers(count), 10) for count in (300, 50)]

    def kept(memory: int) -> list[int]:
        collected = Collected(loaders, memory=memory * ROW)
        for number, loader in enumerate(loaders):
            for x in loader:
                collected.add(of_items(x), number)
                assert sum(collected.seen(i).kept for i in range(2)) <= memory
        return [len(sample.logits.targets) for sample in collected.of_loaders(2, 2)]

    assert kept(350) == [300, 50]
    large, small = kept(349)
    assert 349 / 4 < large <= 349 / 2
    assert small == 50


def test_kept_rows_hold_no_more_memory_than_their_own() -> None:
    collected = Collected(DataLoader(Numbers(6), 3))
    large = torch.zeros(1000, 4)
    ref = weakref.ref(large)
    collected.add(Logits(large[:3], large[3:6, :], torch.zeros(3).long()), 0)
    del large
    assert ref() is None


def test_targets_become_probabilities_where_any_are() -> None:
    exchange = Exchange(2)
    loaders = [distributed(Numbers(4), rank, 2, 1) for rank in range(2)]
    every = [Collected(x, Simulated(rank, exchange)) for rank, x in enumerate(loaders)]
    logits, soft = torch.zeros(1, 3), torch.tensor([[0.2, 0.3, 0.5]])
    every[0].add(Logits(logits, logits, torch.tensor([2])), 0)
    every[0].add(Logits(logits, logits, soft), 0)
    every[1].add(Logits(logits, logits, torch.tensor([1])), 0)
    first, second = exchange.each(lambda rank: every[rank].of_loaders(1, 3)[0].logits.targets)
    assert torch.equal(first, torch.cat([torch.tensor([[0.0, 0.0, 1.0]]), soft]))
    assert torch.equal(second, torch.tensor([[0.0, 1.0, 0.0]]))


# ---- Trainers ----


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self(batch[0].flatten(0, -2))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def small_data(items: int, *views: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, *views, 3, generator=generator)
    return TensorDataset(x, torch.arange(items) % 3)


def test_validate_looks_at_its_own_loaders_and_not_at_those_of_fit() -> None:
    found = []

    class Look(Callback):
        def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(running_loaders(trainer).flattened)

    trainer, module = make_trainer(Look(), max_epochs=1, num_sanity_val_steps=0), Plain()
    of_fit, of_validate = (DataLoader(small_data(count), 4) for count in (8, 12))
    trainer.fit(module, of_fit, of_fit)
    trainer.validate(module, of_validate, verbose=False)
    assert found == [[of_fit], [of_validate]]


def flat(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].flatten(0, 1), batch[1].repeat_interleave(4)


def in_a_process(rank: int, processes: int) -> dict[str, Any]:
    """Rows that are measured: of views of each item, and in batches of an order of their own."""
    data, found = small_data(37), {}
    buckets = DataLoader(data, batch_sampler=Sorted(SequentialSampler(data), 4, False))
    # Of 41 items each process has batches of 5; the last holds one item, which is the repeated one.
    views = DataLoader(small_data(41, 4), 5)
    for name, loader, options in (
        ("views", views, {"batch_fn": flat}),
        ("buckets", buckets, {}),
    ):
        torch.manual_seed(0)
        duo = DuoCallback(nn.Linear(3, 3), summary=False, **options)
        strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
        trainer = make_trainer(duo, devices=processes, strategy=strategy)
        module = Plain()
        trainer.validate(module, loader, verbose=False)
        trainer.test(module, loader, verbose=False)
        for stage in ("val", "test"):
            measured = duo.predictions[stage]["duo"]
            found[f"{name} {stage}"] = sorted(measured.nll.tolist())
        found[f"{name} temperatures"] = [*duo.fit.temperatures]
    return found


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    first, second = two_processes("test_samples.in_a_process(rank, 2)", tmp_path, port=11)
    alone = in_a_process(0, 1)
    assert first == second
    assert len(first["views val"]) == len(first["views test"]) == 4 * 41
    assert len(first["buckets val"]) == len(first["buckets test"]) == 37
    for name, values in alone.items():
        assert first[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name

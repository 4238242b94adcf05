"""Two real processes (DDP over gloo) against one process on all the data."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Classifier, make_trainer, small_images, small_net
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_duo import DuoCallback

# 37 validation samples in batches of 8: uneven parts, uneven last batches.
TRAIN, VAL, TEST = small_images(64, 1), small_images(37, 2), small_images(21, 3)


def plain_net(num_classes: int) -> nn.Module:
    """No dropout and no batch statistics, so that two half batches are one whole batch."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, num_classes))


class PlainClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net(4)


class Part(IterableDataset):
    """One process's share of the data, not padded; with ``empty`` the first has it all.

    Iterable, because Lightning refuses a loader that knows it is empty.
    """

    def __init__(self, dataset: TensorDataset, rank: int, world: int, *, empty: bool) -> None:
        self.dataset, self.indices = dataset, list(range(len(dataset)))[rank::world]
        if empty:
            self.indices = list(range(len(dataset))) if rank == 0 else []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.dataset[i] for i in self.indices)


def run(rank: int, world: int, *, empty: bool) -> dict:
    """Fit and test; returns what must not depend on the number of processes."""
    torch.manual_seed(0)

    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.3)

    duo = DuoCallback(
        plain_net, optimizer=sgd, probe=0.5, summary=rank == 0, target_accuracy=0.3, delta=0.3
    )
    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    trainer = make_trainer(
        duo,
        max_epochs=2,
        devices=world,
        strategy=strategy,
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0 if empty else 2,
    )

    def part(data: TensorDataset, batch: int, *, empty: bool) -> DataLoader:
        return DataLoader(Part(data, rank, world, empty=empty), batch)

    module = PlainClassifier()
    train = DataLoader(Subset(TRAIN, range(rank, len(TRAIN), world)), 16 // world)
    trainer.fit(module, train, part(VAL, 8, empty=empty and world > 1))
    weights = {k: v.double().sum().item() for k, v in duo._sidekick.model.state_dict().items()}
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "/val_" in k}
    trainer.test(module, part(TEST, 8, empty=empty and world > 1), verbose=False)
    return {
        "temperatures": duo.fit.temperatures,
        "threshold": duo.calibration.threshold,
        "weights": weights,
        "logged": logged,
        "test": duo.results["test"],
    }


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_end_where_one_does(empty: bool, tmp_path: Path) -> None:
    script = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_distributed
rank = int(os.environ["LOCAL_RANK"])
found = test_distributed.run(rank, 2, empty={empty})
open(f"{tmp_path}/{{rank}}.json", "w").write(json.dumps(found))
"""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 2000 + empty)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={
                # Lightning reseeds every process with a global seed it finds here.
                **{k: v for k, v in os.environ.items() if k != "PL_GLOBAL_SEED"},
                **address,
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "GROUP_RANK": "0",
                "RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "TORCHELASTIC_RUN_ID": "test",
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second

    alone = run(0, 1, empty=False)
    assert first["temperatures"] == pytest.approx(list(alone["temperatures"]), rel=1e-4)
    assert 0 < first["threshold"][1] <= 1
    assert first["threshold"] == pytest.approx(list(alone["threshold"]), rel=1e-4)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-4)
    assert first["logged"] == pytest.approx(alone["logged"], rel=1e-4, abs=1e-5, nan_ok=True)
    for form, values in alone["test"].items():
        assert first["test"][form] == pytest.approx(values, rel=1e-4, abs=1e-5), form


def test_strategies_that_split_the_base_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    duo = DuoCallback(small_net, summary=False)
    trainer = make_trainer(duo)

    class Sharded:
        pass

    monkeypatch.setattr(type(trainer), "strategy", Sharded())
    with pytest.raises(MisconfigurationException, match="not with Sharded"):
        duo.setup(trainer, Classifier(), "fit")

"""Two real processes (DDP over gloo) against one process on all the data."""

import copy
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Classifier, Restless, digest, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from runs import StopAfter
from subprocesses import PATHS, two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_duo import DuoCallback, DuoPredictor, PredictionWriter

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


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def run(rank: int, world: int, folder: Path, *, empty: bool) -> dict:
    """Fit, test, validate and predict; returns what must not depend on the number of processes.

    In float64, so that sums in another order differ by less than what is compared.
    """
    torch.manual_seed(0)
    empty = empty and world > 1

    def trainer_with(*callbacks: Callback, **options: object) -> Trainer:
        ddp = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
        own = {"devices": world, "strategy": ddp, "precision": "64-true"}
        return make_trainer(*callbacks, **{**own, "use_distributed_sampler": False, **options})

    duo = DuoCallback(
        plain_net, optimizer=sgd, probe=0.5, summary=rank == 0, target_accuracy=0.2, delta=0.3
    )
    # Its normalisation statistics differ between processes until they are made the same.
    other = DuoCallback(small_net, name="other", optimizer=sgd, summary=False)
    sanity = {"num_sanity_val_steps": 0 if empty else 2}
    trainer = trainer_with(duo, other, accumulate_grad_batches=2, **sanity)

    def part(data: TensorDataset, batch: int) -> DataLoader:
        return DataLoader(Part(data, rank, world, empty=empty), batch)

    module = PlainClassifier()
    # 60 samples: the last batch is smaller.
    train = DataLoader(Subset(TRAIN, range(rank, 60, world)), 16 // world)
    trainer.fit(module, train, part(VAL, 8))
    sidekick, logged = duo.sidekick, trainer.callback_metrics
    found = {
        "temperatures": [*duo.fit.temperatures, duo.fit.nll],
        "threshold": list(duo.calibration.threshold),
        "weights": [float(v.double().sum()) for v in sidekick.state_dict().values()],
        "logged": {k: float(v) for k, v in logged.items() if "/val_" in k and k[:5] != "other"},
        "same on all": [digest(other.sidekick.state_dict()), *other.fit.temperatures],
    }
    trainer.test(module, part(TEST, 8), verbose=False)
    found["test"] = duo.results["test"]

    # Two trained models: a process without samples does not even know the number of classes.
    trained = DuoCallback(copy.deepcopy(sidekick), summary=False)
    trainer_with(trained).validate(module, part(TEST, 8), verbose=False)
    found["validated"] = [*trained.fit.temperatures, trained.fit.nll]

    # Lightning's own sampler repeats samples, so that processes get equally many: 37 are 38.
    padded = DuoCallback(copy.deepcopy(sidekick), summary=False)
    sampled = trainer_with(padded, use_distributed_sampler=True)
    sampled.validate(module, DataLoader(VAL, 8), verbose=False)
    sampled.test(module, DataLoader(TEST, 8), verbose=False)
    found["without repeats"] = [
        *padded.fit.temperatures,
        *padded.results["test"]["duo"].values(),
        len(padded.predictions["val"]["duo"].confidence),
    ]

    writer = PredictionWriter(folder / f"{world}.npz", probs=True)
    predicting = trainer_with(writer, use_distributed_sampler=True)
    images = DataLoader(VAL.tensors[0], 4)
    predicting.predict(DuoPredictor(duo.module), images, return_predictions=False)
    return found


def run_in_parts(rank: int, folder: Path) -> list[str]:
    """Train in one go, and stopped and resumed; returns the hashes of how each ends."""
    train = DataLoader(Subset(TRAIN, range(rank, 60, 2)), 8)
    val = DataLoader(Subset(VAL, range(rank, 36, 2)), 8)
    ends = []
    for beside in ([], [StopAfter()]):
        path = folder / f"last{len(beside)}.ckpt"
        for part in [*beside, None]:  # the last goes to the end
            torch.manual_seed(rank)  # unlike on every process, as without seed_everything
            duo, module = DuoCallback(Restless, optimizer=sgd, summary=False), PlainClassifier()
            keep = ModelCheckpoint(folder, filename=path.stem, enable_version_counter=False)
            trainer = make_trainer(
                duo,
                keep,
                *([part] if part else []),
                devices=2,
                strategy=DDPStrategy(process_group_backend="gloo"),
                use_distributed_sampler=False,
                enable_checkpointing=True,
            )
            resume = path if beside and part is None else None
            trainer.fit(module, train, val, ckpt_path=resume)
        assert trainer.global_step == 8
        states = [module.state_dict(), duo.sidekick.state_dict(), duo.state_dict()["training"]]
        ends.append(digest([*states, *duo.fit.temperatures, duo.best.step]))
    return ends


def test_two_processes_resume_to_the_bit(tmp_path: Path) -> None:
    for whole, resumed in two_processes(
        "test_distributed.run_in_parts(rank, folder)", tmp_path, port=3
    ):
        assert whole == resumed


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_end_where_one_does(empty: bool, tmp_path: Path) -> None:
    call = f"test_distributed.run(rank, 2, folder, empty={empty})"
    first, second = two_processes(call, tmp_path, port=int(empty))
    assert first == second

    alone = run(0, 1, tmp_path, empty=False)
    assert 0 < first["threshold"][1] <= 1
    assert first["without repeats"][-1] == len(VAL)
    for name in ("temperatures", "threshold", "weights", "validated", "without repeats"):
        assert first[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-6), name
    assert first["logged"] == pytest.approx(alone["logged"], rel=1e-6, abs=1e-6, nan_ok=True)
    for form, values in alone["test"].items():
        assert first["test"][form] == pytest.approx(values, rel=1e-6, abs=1e-6), form
    one, two = (np.load(tmp_path / f"{world}.npz") for world in (1, 2))
    assert one["index"].tolist() == two["index"].tolist() == list(range(37))
    np.testing.assert_allclose(one["probs"], two["probs"], rtol=1e-5)


class ShardedClassifier(PlainClassifier):
    """Splits itself where it is told a mesh of processes, as FSDP2 wants it."""

    def configure_model(self) -> None:
        if self._device_mesh is not None and not isinstance(self.net, FSDPModule):
            for part in (self.net[1], self.net):
                fully_shard(part, mesh=self._device_mesh["data_parallel"])


def run_sharded(rank: int, world: int, folder: Path) -> dict:
    """Fit with a base of which every process holds a shard; test; validate."""
    torch.manual_seed(0)

    def trainer_with(*callbacks: Callback, **options: object) -> Trainer:
        fsdp = ModelParallelStrategy(2, 1, False, process_group_backend="gloo")
        options["strategy"] = fsdp if world > 1 else "auto"
        return make_trainer(*callbacks, devices=world, use_distributed_sampler=False, **options)

    def part(data: TensorDataset, batch: int) -> DataLoader:
        return DataLoader(Subset(data, range(rank, len(data), world)), batch // world)

    duo = DuoCallback(plain_net, optimizer=sgd, probe=0.5, summary=False)
    keep = ModelCheckpoint(folder, filename=f"{world}", save_weights_only=False)
    trainer = trainer_with(duo, keep, enable_checkpointing=True, accumulate_grad_batches=2)
    module = ShardedClassifier()
    val, test = small_images(40, 2), small_images(24, 3)
    trainer.fit(module, part(TRAIN, 16), part(val, 8))
    found = {
        "temperatures": [*duo.fit.temperatures, duo.fit.nll],
        "weights": [float(v.double().sum()) for v in duo.sidekick.state_dict().values()],
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items() if "/val_" in k},
    }
    trainer.test(module, part(test, 8), verbose=False)
    found["test"] = duo.results["test"]["duo"]
    if world > 1:
        with pytest.raises(
            MisconfigurationException, match=r"shard of the base.*trainer\.validate\(.*ckpt_path"
        ):
            _ = duo.module
        return found
    # One process takes over the checkpoint of two, and makes the duo.
    other, whole = DuoCallback(plain_net, summary=False), ShardedClassifier()
    path = folder / "2.ckpt"
    trainer_with(other).test(whole, part(test, 8), ckpt_path=path, verbose=False)
    found["tested"] = other.results["test"]["duo"]
    trainer_with(other).validate(whole, part(val, 8), ckpt_path=path, verbose=False)
    found["refitted"] = [*other.fit.temperatures, other.fit.nll]
    assert other.module(val.tensors[0]).probs.shape == (40, 4)
    return found


def test_a_base_in_shards_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    """FSDP2; Lightning allows it no float64."""
    call = "test_distributed.run_sharded(rank, 2, folder)"
    first, second = two_processes(call, tmp_path, port=2)
    assert first == second
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        alone = run_sharded(0, 1, tmp_path)
    assert alone.pop("tested") == pytest.approx(first["test"], rel=1e-4, abs=1e-5)
    assert alone.pop("refitted") == pytest.approx(first["temperatures"], rel=1e-4)
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


def test_tensor_parallel_bases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    duo = DuoCallback(small_net, summary=False)
    trainer = make_trainer(duo)
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": torch.zeros(2)}  # whose size() is read
    strategy._device_mesh["tensor_parallel"].size = lambda: 2
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size=2"):
        duo.setup(trainer, Classifier(), "fit")


SPAWN = """
{PATHS}
import json
from helpers import loader, make_trainer, small_images
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from test_distributed import PlainClassifier, plain_net
from lightning_duo import DuoCallback

if __name__ == "__main__":
    duo, module = DuoCallback(plain_net, summary=False), PlainClassifier()
    spawn = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    keep = ModelCheckpoint({folder!r}, filename="kept", monitor="duo/val_nll")
    trainer = make_trainer(duo, keep, devices=2, strategy=spawn, enable_checkpointing=True)
    trainer.fit(module, loader(small_images(64, 1)), loader(small_images(40, 2)))
    try:
        duo.module
    except Exception as error:
        print(error)
    logged = trainer.test(module, loader(small_images(32, 3)), ckpt_path={path!r}, verbose=False)
    print(json.dumps(logged[0]))
"""


def test_what_spawned_processes_learn_is_in_their_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "kept.ckpt"
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN.format(PATHS=PATHS, folder=str(tmp_path), path=str(path)))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"DuoCallback: .*keep it in checkpoints.*ckpt_path", run.stderr)
    said, logged = run.stdout.splitlines()[-2:]
    assert re.search(r"temperatures .*in this process.*trainer\.validate", said)

    duo, module = DuoCallback(plain_net, summary=False), PlainClassifier()
    trainer = make_trainer(duo)
    data = loader(small_images(32, 3))
    (expected,) = trainer.test(module, data, ckpt_path=path, verbose=False)
    found = json.loads(logged)
    del found["test_loss"], expected["test_loss"]  # the module logs that of the first process
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "FSDPStrategy",
        "DeepSpeedStrategy",
        "XLAStrategy",
        "SingleDeviceXLAStrategy",
    ],
)
def test_strategies_that_split_the_base_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At set-up; Lightning wants a GPU to make these Trainers, so the strategy is put in."""
    duo = DuoCallback(small_net, summary=False)
    trainer = make_trainer(duo)
    strategy = getattr(strategies, name)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy.__new__(strategy))
    with pytest.raises(MisconfigurationException, match=f"{name}.*strategy=.ddp"):
        duo.setup(trainer, Classifier(), "fit")


@pytest.mark.parametrize("name", ["BitsandbytesPrecision", "TransformerEnginePrecision"])
def test_precisions_that_replace_layers_are_refused(name: str) -> None:
    duo = DuoCallback(small_net, summary=False)
    trainer = make_trainer(duo)
    plugin = getattr(precision, name)
    trainer.strategy.precision_plugin = plugin.__new__(plugin)
    with pytest.raises(MisconfigurationException, match=f"{name}.*precision 32, 64, 16 or bf16"):
        duo.setup(trainer, Classifier(), "fit")

"""Training killed with SIGKILL at any moment, and resumed: it ends where it would have ended.

A process with everything imported forks one child for each run. A child that is to die counts its
calls of functions, of Python's and of C's, and kills itself at the n-th of them, wherever that is:
in a step, in the fit of the temperatures, in the middle of writing a checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Classifier, Restless, digest, loader, make_trainer, small_images
from lightning.pytorch.callbacks import ModelCheckpoint
from subprocesses import PATHS
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_duo import DuoCallback

TRAIN, VAL = small_images(72, 1), small_images(48, 2)
KILLS = [(False, trial) for trial in range(24)] + [(True, trial) for trial in range(8)]


class Resumable(DataLoader):
    """Shuffles by the epoch and knows where it is, as Lightning asks of a loader to resume."""

    def __init__(self) -> None:
        super().__init__(TRAIN, 8)
        self.epoch, self.position = 0, 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(72, generator=torch.Generator().manual_seed(self.epoch))
        for chosen in order.split(8)[self.position :]:
            self.position += 1
            yield [part[chosen] for part in TRAIN.tensors]

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Resuming(Classifier):
    """Its dropout depends on the step only; Lightning does not restore the random streams."""

    def on_train_batch_start(self, batch: list, batch_idx: int) -> None:
        torch.manual_seed(self.trainer.global_step)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": decay, "interval": "step"},
        }


def train(folder: Path, *, still: bool) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; returns hashes of all.

    Args:
        folder: Of the checkpoints.
        still: Whether the base is trained already, and stays as it is.
    """
    L.seed_everything(5, verbose=False)
    module, duo = Resuming(), DuoCallback(Restless, summary=False, target_accuracy=0.5)
    if still:
        module.requires_grad_(False)
        if list(folder.glob("last*.ckpt")):  # which holds its weights
            module.net[1].weight.zero_()
    # Checkpoints at steps 5, 10, ..., and at the validations after batches 4 and 8 of the 9 of an
    # epoch. Lightning itself, with no duo, leaves out a validation that was due at the very batch
    # of the checkpoint, and trains too long where one of an epoch's last batch is resumed twice.
    often = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_last=True)
    best = ModelCheckpoint(folder, filename="best", monitor="duo/val_nll", save_last=True)
    started = []

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
            started.append(trainer.global_step)

    trainer = make_trainer(
        duo,
        Start(),
        often,
        best,
        enable_checkpointing=True,
        max_epochs=3,
        val_check_interval=4,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Resumable(), loader(VAL), ckpt_path="last")
    return {
        "start": started[0] if started else trainer.global_step,  # nothing was left to do
        "step": trainer.global_step,
        "base": digest([module.state_dict(), trainer.optimizers[0].state_dict()]),
        "sidekick": digest(duo.sidekick.state_dict()),
        "training": digest(duo.state_dict()["training"]),
        "best": [duo.best.nll, duo.best.step, digest(duo.best.weights)],
        "temperatures": [*duo.fit.temperatures, duo.fitted_at_step],
        "threshold": list(duo.calibration.threshold),
        "metrics": digest(duo.results["val"]),
        "best score": float(best.best_model_score),
    }


class Killer:
    """Counts calls, and kills the process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.count, self.at = 0, at

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def serve() -> None:
    """Run one job a line in a child of its own, and answer with its exit status."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                killer = Killer(job["kill_at"])
                sys.setprofile(killer)
                found = train(Path(job["folder"]), still=job["still"])
                sys.setprofile(None)
                Path(job["result"]).write_text(json.dumps({**found, "calls": killer.count}))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Server:
    def __init__(self, log: Path) -> None:
        self.log, self.resumed = log, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{PATHS}import test_faults; test_faults.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def run(self, folder: Path, kill_at: int | None = None, *, still: bool = False) -> dict | None:
        """Result of a run; None if it was killed."""
        result = folder / "result.json"
        paths = {"folder": str(folder), "result": str(result)}
        job = {**paths, "kill_at": kill_at, "still": still}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        # Whatever a run prints comes before its status.
        status = ""
        while not status.lstrip("-").isdigit():
            status = self.process.stdout.readline().strip()
        assert status in ("0", str(-signal.SIGKILL)), self.log.read_text()[-3000:]
        return json.loads(result.read_text()) if status == "0" else None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield found
    found.process.stdin.close()
    found.process.wait(timeout=60)


@pytest.fixture(scope="module")
def wholes(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict]:
    """The uninterrupted runs: without and with a base that stays as it is."""
    found = {
        still: server.run(tmp_path_factory.mktemp("whole"), still=still) for still in (False, True)
    }
    for one in found.values():
        assert one["step"] == 27
        assert one["temperatures"][1] > 0
    assert found[True]["base"] != found[False]["base"]
    return found


@pytest.mark.parametrize("still", [False, True])
def test_an_uninterrupted_run_is_the_same_twice(
    still: bool, server: Server, wholes: dict, tmp_path: Path
) -> None:
    found = server.run(tmp_path, still=still)
    assert outcome(found) == outcome(wholes[still])


def outcome(found: dict) -> dict:
    """All but where a run began and how long it took."""
    return {name: value for name, value in found.items() if name not in ("start", "calls")}


@pytest.mark.slow
@pytest.mark.parametrize(("still", "trial"), KILLS)
def test_killed_and_resumed_ends_where_the_uninterrupted_run_does(
    still: bool, trial: int, server: Server, wholes: dict, tmp_path: Path
) -> None:
    """Each trial dies twice: somewhere in the run, and somewhere in what is left of it."""
    whole = wholes[still]
    draws = torch.rand(2, generator=torch.Generator().manual_seed(trial)).tolist()
    assert server.run(tmp_path, 1 + int(draws[0] * whole["calls"]), still=still) is None
    # Of a resumed run the number of calls is not known: it may end before it is to die.
    resumed = bool(list(tmp_path.glob("last*.ckpt")))
    later = 1 + int(draws[1] * (1 - draws[0]) * whole["calls"])
    found = server.run(tmp_path, later, still=still)
    if found is None:
        resumed = bool(list(tmp_path.glob("last*.ckpt")))
        found = server.run(tmp_path, still=still)
    assert outcome(found) == outcome(whole)
    assert resumed == (found["start"] > 0)
    server.resumed += resumed


@pytest.mark.slow
def test_most_of_the_killed_runs_had_something_to_resume(server: Server) -> None:
    """Those that died before their first checkpoint began anew."""
    assert server.resumed > len(KILLS) / 2

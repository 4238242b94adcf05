"""What DuoCallback itself takes of a training step, without the compute of a sidekick.

    python benchmarks/bench_callback.py [--base resnet18] [--size 64] [--batch 32] [--threads 2]

The sidekick is one parameter that ignores its inputs. Every step of one training run is timed in
three parts: inside the callback's hooks, in a plain loop that trains a twin of that sidekick, and
the rest, which is the base's. Hooks less plain loop is bookkeeping: reading the batch, keeping the
random streams, the schedule, logging. Medians (and quartiles) over the steps are shown.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback

CLASSES = 100


class Base(L.LightningModule):
    """An ordinary classifier."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm.create_model(name, num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Nothing(nn.Module):
    """A sidekick that computes nothing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), -1)


class Timed(DuoCallback):
    """Seconds of each training step: in the hooks, in a plain loop, and from start to start."""

    def __init__(self) -> None:
        super().__init__(Nothing, summary=False)
        self.hooks: list[float] = []
        self.plain: list[float] = []
        self.starts: list[float] = []
        self.twin = Nothing(CLASSES)
        self.optimizer = torch.optim.AdamW(self.twin.parameters(), 1e-3)

    def on_train_batch_start(self, *args: Any) -> None:
        """Time the hook."""
        self.starts.append(time.perf_counter())
        super().on_train_batch_start(*args)
        self.hooks.append(time.perf_counter() - self.starts[-1])

    def on_train_batch_end(self, *args: Any) -> None:
        """Time the hook, and then what a plain loop takes to train such a sidekick."""
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        middle = time.perf_counter()
        inputs, targets = args[3]
        nn.functional.cross_entropy(self.twin(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hooks[-1] += middle - start
        self.plain.append(time.perf_counter() - middle)


def measure(base: str, size: int, batch: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step: the base's, the hooks', and those less the plain loop's."""
    torch.manual_seed(0)
    count = batch * steps
    images = torch.randn(count, 3, size, size)
    data = TensorDataset(images, torch.randint(CLASSES, (count,)))
    timed = Timed()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[timed],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )
    trainer.fit(Base(base), DataLoader(data, batch), DataLoader(data, batch))
    found: dict[str, list[float]] = {"step": [], "hooks": [], "bookkeeping": []}
    spans = zip(timed.starts, timed.starts[1:], timed.hooks, timed.plain, strict=False)
    for start, end, hooks, plain in list(spans)[5:]:  # the first build the sidekick and warm up
        found["step"].append(end - start - hooks - plain)
        found["hooks"].append(hooks)
        found["bookkeeping"].append(hooks - plain)
    return found


def quartiles(values: list[float], scale: float) -> str:
    low, middle, high = statistics.quantiles([scale * v for v in values], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = measure(options.base, options.size, options.batch, options.steps)
    table = Table(
        title=f"{options.base}, {options.batch} images of {options.size} pixels, CPU, "
        f"{options.threads} torch threads, torch {torch.__version__}"
    )
    for heading in ("", "ms", "% of the base's step"):
        table.add_column(heading, justify="right")
    table.add_row("base's step", quartiles(found["step"], 1e3), "")
    for name in ("hooks", "bookkeeping"):
        ratios = [part / step for part, step in zip(found[name], found["step"], strict=True)]
        table.add_row(name, quartiles(found[name], 1e3), quartiles(ratios, 100))
    Console().print(table)


if __name__ == "__main__":
    main()

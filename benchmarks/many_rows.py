"""What a validation and a test of very many decisions take: time, and memory of the process.

    python benchmarks/many_rows.py [--pixels 100_000_000] [--classes 19] [--memory BYTES]

Images of 512 x 512 pixels, each pixel a decision, go through `Trainer.validate` and `Trainer.test`
with a `DuoCallback`, four at a time. Both models are a layer of a few numbers, so most of what is
measured is the callback's and the images'. The memory is the largest that the process had so far,
with all that Python and PyTorch take for themselves; "before" is that before the stage began.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_duo import DuoCallback

SIDE, BATCH, CHANNELS = 512, 4, 3


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images whose pixels show their class in three channels, with noise."""

    def __init__(self, count: int, classes: int) -> None:
        self.count = count
        self.colors = torch.randn(classes, CHANNELS, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        targets = torch.randint(len(self.colors), (SIDE, SIDE), generator=generator)
        noise = 0.5 * torch.randn(CHANNELS, SIDE, SIDE, generator=generator)
        return self.colors[targets].permute(2, 0, 1) + noise, targets


def near(colors: Tensor, noise: float) -> nn.Conv2d:
    """Logits of the classes whose colours are the nearest; the colours may be a little off."""
    off = colors + noise * torch.randn(colors.shape, generator=torch.Generator().manual_seed(1))
    layer = nn.Conv2d(CHANNELS, len(off), 1)
    layer.weight.data = 4 * off[:, :, None, None]
    layer.bias.data = -2 * (off**2).sum(1)
    return layer


class Segmenter(LightningModule):
    """A base without any cost."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K, H, W)."""
        return self.layer(x)

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        """Its loss is what tells the callback of logits and targets."""
        nn.functional.cross_entropy(self(batch[0]), batch[1])

    test_step = validation_step


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured(name: str, stage: Callable[[], object], duo: DuoCallback) -> dict[str, object]:
    """Time and memory of a stage, and what was kept."""
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    with redirect_stdout(StringIO()):
        stage()
    seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    kept = len(duo.predictions[name]["duo"].targets)
    duo_nll, base_nll = (duo.results[name][form]["nll"] for form in ("duo", "base"))
    row = {"stage": name, "seconds": round(seconds, 1), "cpu_s": round(busy, 1)}
    row["before_gb"] = round(before, 2)
    return {**row, "peak_gb": round(peak(), 2), "kept": kept, "nll": duo_nll, "nll_base": base_nll}


def main() -> None:
    """Measure, and print a row for each stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, default=10**8)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--memory", type=int, help="fit_memory of the callback")
    given = parser.parse_args()
    images = Images(-(-given.pixels // SIDE**2), given.classes)
    memory = {} if given.memory is None else {"fit_memory": given.memory}
    duo = DuoCallback(near(images.colors, 0.2), summary=False, **memory)
    module, loader = Segmenter(near(images.colors, 0.1)), DataLoader(images, BATCH)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, callbacks=[duo], **options)
    for name, stage in (("val", trainer.validate), ("test", trainer.test)):
        print(json.dumps(measured(name, lambda run=stage: run(module, loader), duo)), flush=True)


if __name__ == "__main__":
    main()

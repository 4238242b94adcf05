"""A sidekick added to a trained base beside one trained with it, on the solar cells of the demo.

    python benchmarks/added.py [--quick] [--seeds 0 1 2]

For each seed a base is trained alone. Then it gets a sidekick in both ways: by training both
together from the start, as the demo does (which gives this base again, bit for bit: checked), and
by `add_sidekick` with the demo's number of epochs. Rows of part "quality" hold the test metrics of
both duos; "nll_change" and "aurc_change" are relative to the scaled base.

Rows of part "time" compare the training of a sidekick that is added, all layers from the start, to
that of the same network as a LightningModule of its own, with the same optimizer, batches and
transform: an epoch each, in turns, from the second batch to the last, without validation (which
runs the base too, once an epoch). Needs what the demo installs: pip install -e '.[dev,demo]'.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from bench_cofinetune import in_turns, now, quiet
from harness import Options, Row, parser, run
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_duo import DuoCallback, add_sidekick

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from demo import SIDEKICK
from solar_cells import NUM_CLASSES, CellClassifier, SolarCells, pretrained_state

SIZE, SIDEKICK_SIZE, EPOCHS = 144, 64, 5
RATE = partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-6)
METRICS = ("accuracy", "nll", "aurc", "ece")


class Clock(L.Callback):
    """Times an epoch of training from its second batch to its last."""

    seconds = start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the time of the second batch."""
        if args[-1] == 1:
            self.start = now()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time of the last."""
        self.seconds = now() - self.start


class Alone(L.LightningModule):
    """The sidekick as a module of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.resize = net, v2.Resize(SIDEKICK_SIZE, antialias=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(self.resize(batch[0])), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = RATE(self.parameters())
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


def trainer(epochs: int, device: str, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        **options,
    )


def quality(seed: int, epochs: int, asked: Options, folder: Path) -> Iterator[Row]:
    """Test metrics of a duo trained together, and of one whose sidekick was added."""
    weights = folder / "sidekick.safetensors"
    save_file(pretrained_state(SIDEKICK), weights)
    options: dict[str, Any] = {
        "sidekick": SIDEKICK,
        "weights": weights,
        "sidekick_transform": v2.Resize(SIDEKICK_SIZE, antialias=True),
        "optimizer": RATE,
        "summary": False,
    }

    def fitted(*callbacks: L.Callback) -> tuple[L.Trainer, CellClassifier, SolarCells]:
        L.seed_everything(seed, verbose=False)
        data, model = SolarCells(SIZE, seed=seed), CellClassifier()
        fitter = trainer(epochs, asked.device, *callbacks)
        fitter.fit(model, data)
        return fitter, model, data

    alone, base, data = fitted()
    alone.save_checkpoint(folder / "base.ckpt")
    together = DuoCallback(**options)
    other, model, _ = fitted(together)
    for mine, theirs in zip(base.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), "the callback has changed the base"
    other.test(model, data, verbose=False)
    adder = trainer(epochs, asked.device)
    fresh = CellClassifier(pretrained=False)
    added = add_sidekick(fresh, data, ckpt_path=str(folder / "base.ckpt"), trainer=adder, **options)
    adder.test(fresh, data, verbose=False)
    for name, duo in (("together", together), ("added", added)):
        results = duo.results["test"]
        scaled = results["base_scaled"]
        yield {
            "part": "quality",
            "seed": seed,
            "method": name,
            "epochs": epochs,
            **{metric: results["duo"][metric] for metric in METRICS},
            **{f"{m}_change": results["duo"][m] / scaled[m] - 1 for m in ("nll", "aurc")},
            "sidekick_nll": results["sidekick"]["nll"],
        }


def training_time(asked: Options) -> Iterator[Row]:
    """An epoch of the sidekick alone, and of one that is added."""
    data = SolarCells(SIZE)
    data.setup("fit")
    base = CellClassifier(pretrained=False)

    def sidekick(num_classes: int = NUM_CLASSES) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(SIDEKICK, num_classes=num_classes)

    def alone() -> float:
        clock = Clock()
        trainer(1, asked.device, clock).fit(Alone(sidekick()), data.train_dataloader())
        return clock.seconds

    def added() -> float:
        clock = Clock()
        add_sidekick(
            base,
            data.train_dataloader(),
            data.val_dataloader(),
            sidekick=sidekick,
            sidekick_transform=v2.Resize(SIDEKICK_SIZE, antialias=True),
            optimizer=RATE,
            probe=0,
            summary=False,
            trainer=trainer(1, asked.device, clock, limit_val_batches=0),
        )
        return clock.seconds

    timing = in_turns({"alone": alone, "added": added}, repeats=asked.repeats)
    for name in ("alone", "added"):
        case = {"part": "time", "method": name, "batches": len(data.train_dataloader())}
        yield case | timing.row(name, "alone")


def measure(asked: Options, seeds: list[int]) -> Iterator[Row]:
    """Rows of all seeds, then of the time."""
    quiet()
    yield from training_time(asked)
    for seed in seeds[:1] if asked.quick else seeds:
        with tempfile.TemporaryDirectory() as folder:
            yield from quality(seed, 1 if asked.quick else EPOCHS, asked, Path(folder))


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given: Any = made.parse_args()
    run("added", given, partial(measure, seeds=given.seeds))


if __name__ == "__main__":
    main()

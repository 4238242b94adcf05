"""What a duo gains beside a deep ensemble of two, on the solar cells of the demo.

    make demo SEED=0 OUTPUT=outputs/demo/seed0     # and other seeds
    python benchmarks/gain.py outputs/demo/seed*   # trains a second base for each

For each run of the demo a second base is trained on the same split from another seed. Compared on
the test split, every form with its temperatures fitted on the validation split: the base, the duo,
and the two bases with one temperature each (fitted as a duo is, so that only the second member
differs) and as the plain mean of their probabilities. "flops" are those of a forward over the
base's; gains are relative to the scaled base. With --quick one run is taken, and its second base
is trained for one epoch: a check that all works, not a comparison. Needs what the demo installs:
pip install -e '.[dev,demo]'.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import timm
from harness import Options, Row, parser, run
from torch import nn
from torchvision.transforms import v2

from lightning_duo import DuoModule, fit_temperatures
from lightning_duo.evaluation import Form, Weighted, evaluate, mean_probability, measure
from lightning_duo.logits import collect_logits

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from solar_cells import NUM_CLASSES, CellClassifier, SolarCells

METRICS = ("nll", "aurc", "accuracy")
SECOND = 1000  # added to the seed of the demo


def second_base(data: SolarCells, epochs: int, seed: int, device: str) -> CellClassifier:
    """The same base trained on the same split from another seed."""
    L.seed_everything(seed, verbose=False)
    model = CellClassifier()
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    return model.eval()


def compare(folder: Path, asked: Options) -> Iterator[Row]:
    """Rows of one run of the demo."""
    demo = json.loads((folder / "results.json").read_text())
    sidekick = timm.create_model("tf_efficientnet_lite0", num_classes=NUM_CLASSES)
    resize = v2.Resize(demo["sidekick_size"], antialias=True)
    parts = CellClassifier(pretrained=False), nn.Sequential(resize, sidekick)
    duo = DuoModule.load(folder / "duo.safetensors", *parts).eval().to(asked.device)
    data = SolarCells(demo["size"], seed=demo["seed"])
    data.setup("fit")
    epochs = min(1, demo["epochs"]) if asked.quick else demo["epochs"]
    other = second_base(data, epochs, SECOND + demo["seed"], asked.device).to(asked.device)
    val, test = (
        {
            "duo": collect_logits(duo.base, duo.sidekick, loader()),
            "second": collect_logits(duo.base, other, loader()),
        }
        for loader in (data.val_dataloader, data.test_dataloader)
    )
    fits = {name: fit_temperatures(*logits) for name, logits in val.items()}
    bases = {"base": 1, "second": 1}
    forms = {
        "second": Form("2 bases", bases, Weighted(fits["second"].temperatures)),
        "mean": Form("2 bases, mean", bases, mean_probability),
    }
    second = test["second"].sidekick
    found = evaluate(*test["duo"], fits["duo"], forms=forms, second=second)
    flops = {"base": 1.0, "sidekick": demo["flops_balance"], "second": 1.0}
    reference = measure(found["base_scaled"])
    for name in ("base", "base_scaled", "duo", *forms):
        judged = found[name]
        values = measure(judged)
        yield {
            "seed": demo["seed"],
            "method": judged.label,
            "flops": sum(times * flops[member] for member, times in judged.forwards.items()),
            **{metric: values[metric] for metric in METRICS},
            **{f"{m}_change": values[m] / reference[m] - 1 for m in METRICS},
        }


def measure_all(asked: Options, folders: list[Path]) -> Iterator[Row]:
    """Rows of all runs."""
    for folder in folders[:1] if asked.quick else folders:
        yield from compare(folder, asked)


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__)
    made.add_argument("demos", nargs="+", type=Path, help="folders that the demo wrote")
    given: Any = made.parse_args()
    run("gain", given, partial(measure_all, folders=given.demos))


if __name__ == "__main__":
    main()

"""A duo on solar cells: what one line adds to the project in solar_cells.py.

Trains the project with a sidekick, tests, and writes the results, a figure, the duo and a report.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from solar_cells import CellClassifier, SolarCells, pretrained_state
from torchvision.transforms import v2

from lightning_duo import DuoCallback
from lightning_duo.report import print_summary, risk_coverage_figure

SIDEKICK = "tf_efficientnet_lite0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the training")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=144, help="pixels a side for the base")
    parser.add_argument("--sidekick-size", type=int, default=64, help="... for the sidekick")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    L.seed_everything(options.seed, verbose=False)
    data = SolarCells(options.size, seed=options.seed)
    model = CellClassifier()
    weights = options.output / f"{SIDEKICK}.safetensors"
    save_file(pretrained_state(SIDEKICK), weights)

    duo = DuoCallback(
        sidekick=SIDEKICK,
        weights=weights,
        sidekick_transform=v2.Resize(options.sidekick_size, antialias=True),
        # A higher rate than by default, as these images are far from those of ImageNet and epochs
        # are few; chosen on the validation set.
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-6),
        # What is less sure than that goes to a human.
        target_accuracy=0.9,
        delta=0.1,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[duo],
        default_root_dir=options.output,
        logger=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)

    results = duo.results["test"]
    fit = duo.fit
    print_summary(results, duo.calibration, data="the held-out test split", balance=duo.balance)
    duo.module.save(options.output / "duo.safetensors")
    figure = risk_coverage_figure(
        duo.predictions["test"], title="Solar cells: error among the answers the model keeps"
    )
    figure.savefig(options.output / "risk_coverage.png")
    written = {
        **results,
        "temperatures": fit.temperatures._asdict(),
        "flops_balance": duo.balance,
        "seconds": time.perf_counter() - started,
        "seed": options.seed,
        "epochs": options.epochs,
        "size": options.size,
        "sidekick_size": options.sidekick_size,
    }
    (options.output / "results.json").write_text(json.dumps(written, indent=2) + "\n")
    report = duo.write_report(options.output / "report.html")
    print(f"Written: results.json, risk_coverage.png, duo.safetensors in {options.output}")
    print(f"Report, to open in a browser: {report}")


if __name__ == "__main__":
    main()

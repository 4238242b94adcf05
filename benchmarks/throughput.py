"""Throughput of pairs and of the models of the paper: what a duo costs, against its FLOPs.

    python benchmarks/throughput.py [--quick] [--device cuda] [--pairs BASE+SIDEKICK ...]

- Pairs: `lightning-duo bench` for several: base, sidekick, duo and an ensemble of two bases, as
  they are, compiled and exported, with the overhead that is measured beside the FLOPs balance.
- Growth: the time of base, sidekick and duo with the batch.
- Zoo (figure 8 of the paper): throughput against FLOPs for single models and for duos of one base
  with each smaller model, with the coefficient of determination R2 of the logarithms. Weights are
  random. Every model is measured in turns with the base, and its throughput is given relative to
  the base's, so that a slow minute of the machine does not move one model against the others. The
  batch is 1 on a CPU and 16 on CUDA, where the paper takes the largest that fits.

Source: Asymmetric Duos, App. A.1 (the zoo) and App. B (figure 8).
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Growth, Options, Row, described, parser, run
from torch import nn

from lightning_duo import DuoModule
from lightning_duo.cost import (
    compare_counters,
    count_flops,
    interleave,
    largest_batch_of_pair,
    measure_throughput,
    peak_memory,
)
from lightning_duo.zoo import build_sidekick

PIXELS = 224
QUICK_PAIRS = ("resnet18+resnet10t",)
PAIRS = ("convnext_base+resnet34",)
COUNTED = (  # whose operations are counted in three ways, and not timed
    "vit_base_patch16_224+resnet34",
    "torchvision/vit_b_16+resnet34",
    "torchvision/swin_b+torchvision/efficientnet_b0",
)
BASE = {"cuda": "torchvision/convnext_large", "cpu": "torchvision/convnext_base"}
QUICK_BASE = "torchvision/resnet50"
QUICK_ZOO = (
    "torchvision/resnet18",
    "torchvision/mnasnet1_0",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/regnet_y_800mf",
    "torchvision/efficientnet_b0",
)
ZOO = (
    *(f"torchvision/efficientnet_b{n}" for n in (0, 1, 2, 4)),
    "torchvision/efficientnet_v2_s",
    *(f"torchvision/mnasnet{width}" for width in ("0_5", "1_0", "1_3")),
    *(f"torchvision/convnext_{size}" for size in ("tiny", "small")),
    *(f"torchvision/resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "torchvision/resnext50_32x4d",
    *(f"torchvision/regnet_y_{size}" for size in ("400mf", "1_6gf", "3_2gf", "8gf")),
    *(f"torchvision/shufflenet_v2_x{width}" for width in ("0_5", "1_0", "2_0")),
    *(f"torchvision/swin_{size}" for size in "tsb"),
    "torchvision/swin_v2_t",
)
LARGE = (  # too slow to be worth the time on a CPU
    "torchvision/convnext_base",
    "torchvision/efficientnet_v2_m",
    "torchvision/regnet_y_16gf",
    "torchvision/resnext101_32x8d",
    "torchvision/swin_v2_s",
    "tf_efficientnetv2_l.in21k_ft_in1k",
    "vit_base_patch16_224",
)
GROWTH = (Growth("batch", {"part": "growth"}, ("ms", "peak_mb")),)


def build(name: str, device: str) -> nn.Module:
    return build_sidekick(name, 1000, pretrained=False).eval().to(device)


def pair(name: str, asked: Options, compiled: bool) -> Iterator[Row]:
    """Rows of one pair, at batch 1 and at the largest that fits."""
    base, sidekick = (build(part, asked.device) for part in name.split("+"))
    sample = torch.randn(1, 3, PIXELS, PIXELS, device=asked.device)
    counted = compare_counters(base, sidekick, sample)
    batch = largest_batch_of_pair(base, sidekick, sample)
    rows = measure_throughput(
        base,
        sidekick,
        sample,
        (batch.size,) if asked.quick or batch.size == 1 else (1, batch.size),
        compiled=compiled,
        exported=("program",) if asked.quick else ("program", "aoti"),
        repeats=asked.repeats,
        budget=40,
        say=lambda message: print(f"{name}: {message}", flush=True),
    )
    for row in rows:
        case = {"part": "pair", "pair": name, "pixels": PIXELS, "dtype": "float32"}
        limited = {"limited_by": batch.limit} if row["batch"] == batch.size else {}
        yield case | row | limited
    yield {"part": "cost", "pair": name, "method": "counters", **counted}


def growth(name: str, asked: Options) -> Iterator[Row]:
    """Time and memory of one pair as the batch grows."""
    base, sidekick = (build(part, asked.device) for part in name.split("+"))
    duo = DuoModule(base, sidekick, (1.0, 1.0)).eval().to(asked.device)
    models = {"base": base, "sidekick": sidekick, "duo": duo}
    sizes = (1, 2, 4) if asked.quick else (1, 2, 4, 8, 16, 32)
    with torch.inference_mode():
        for batch in sizes:
            inputs = torch.randn(batch, 3, PIXELS, PIXELS, device=asked.device)
            methods = {key: partial(model, inputs) for key, model in models.items()}
            timing = interleave(
                methods, repeats=asked.repeats, device=asked.device, budget=3 if asked.quick else 10
            )
            for key, method in methods.items():
                peak = peak_memory(method, asked.device)
                row = {"part": "growth", "pair": name, "batch": batch, **timing.row(key, "base")}
                yield row | {"peak_mb": None if peak is None else peak / 1e6}


def zoo(base_name: str, names: Sequence[str], asked: Options) -> Iterator[Row]:
    """Each model, and the duo of the base with it, in turns with the base."""
    base = build(base_name, asked.device)
    size = 1 if asked.device == "cpu" else 16
    inputs = torch.randn(size, 3, PIXELS, PIXELS, device=asked.device)
    flops = count_flops(base, inputs[:1])
    case = {"part": "zoo", "base": base_name, "pixels": PIXELS, "batch": size}
    for name in names:
        model = build(name, asked.device)
        single = count_flops(model, inputs[:1])
        duo = DuoModule(base, model, (1.0, 1.0)).eval().to(asked.device)
        with torch.inference_mode():
            timing = interleave(
                {key: partial(m, inputs) for key, m in zip("bsd", (base, model, duo), strict=True)},
                repeats=5,
                device=asked.device,
            )
        for method, key, count in (("single", "s", single), ("duo", "d", flops + single)):
            row = {**case, "model": name, "flops": count, **timing.row(key, "b")}
            yield row | {
                "method": method,
                "reference": "base",
                "relative_throughput": 1 / row["ratio"],
                "relative_flops": count / flops,
                "duo_of_parts": timing.ratio("d", "b", "s").median if key == "d" else None,
            }


def determination(rows: Sequence[Row], method: str) -> float:
    """R2 of log throughput on log FLOPs: the square of their correlation."""
    chosen = [row for row in rows if row.get("part") == "zoo" and row["method"] == method]
    flops, throughput = (
        np.log([row[f"relative_{value}"] for row in chosen]) for value in ("flops", "throughput")
    )
    return float(np.corrcoef(flops, throughput)[0, 1] ** 2)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Figure 8: throughput against FLOPs, single models and duos."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    drawn.suptitle(described(rows[0]), fontsize=8)
    for number, method in enumerate(("single", "duo"), 1):
        axes = drawn.add_subplot(1, 2, number)
        chosen = [row for row in rows if row.get("part") == "zoo" and row["method"] == method]
        x = [row["relative_flops"] for row in chosen]
        y = [row["relative_throughput"] for row in chosen]
        axes.scatter(x, y, s=14, color="#0b62c4")
        line = sorted(x)
        axes.plot(line, [1 / v for v in line], lw=1, color="#5b6470", label="1 / FLOPs")
        for row, a, b in zip(chosen, x, y, strict=True):
            label = row["model"].removeprefix("torchvision/")
            axes.annotate(label, (a, b), fontsize=4.5, xytext=(2, 2), textcoords="offset points")
        base = chosen[0]["base"].removeprefix("torchvision/")
        what = "single models" if method == "single" else f"duos with {base}"
        r2 = determination(rows, method)
        axes.set_title(f"{what}: R2 = {r2:.3f} (log-log)", fontsize=9)
        if method == "single":
            axes.set(xscale="log", yscale="log")
        axes.set(xlabel="FLOPs / base's", ylabel="throughput / base's")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    drawn.savefig(path, dpi=130)


def measure(asked: Options, pairs: Sequence[str], compiled: bool) -> Iterator[Row]:
    """Rows of all parts."""
    chosen = pairs or (QUICK_PAIRS if asked.quick else PAIRS)
    for name in chosen:
        yield from pair(name, asked, compiled)
    for name in COUNTED:
        parts = [build(part, asked.device) for part in name.split("+")]
        counted = compare_counters(*parts, torch.randn(1, 3, PIXELS, PIXELS, device=asked.device))
        yield {"part": "cost", "pair": name, "method": "counters", **counted}
    yield from growth(QUICK_PAIRS[0], asked)
    rows = []
    base, names = (
        (QUICK_BASE, QUICK_ZOO)
        if asked.quick
        else (BASE[asked.device], ZOO if asked.device == "cpu" else (*ZOO, *LARGE))
    )
    for row in zoo(base, names, asked):
        rows.append(row)
        yield row
    if not asked.quick and asked.device == "cpu":
        case = {"part": "zoo", "base": base, "pixels": PIXELS, "method": "not measured"}
        for name in LARGE:
            yield {**case, "model": name, "note": "takes too long on a CPU"}
    for method in ("single", "duo"):
        yield {
            "part": "determination",
            "base": base,
            "method": method,
            "models": len(names),
            "r2": determination(rows, method),
        }


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__)
    made.add_argument("--pairs", nargs="+", default=(), help="base+sidekick, names as for the CLI")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given: Any = made.parse_args()
    measured = partial(measure, pairs=given.pairs, compiled=not given.no_compile)
    rows = run("throughput", given, measured, GROWTH)
    suffix = "" if given.device == "cpu" else f"_{given.device}"
    draw(rows, given.output / f"figure8{suffix}.png")


if __name__ == "__main__":
    main()

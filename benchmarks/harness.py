"""What all benchmarks share: options, rows in files, tables, growth and figures.

A benchmark yields rows, plain dicts: the case (sizes, dtype, ...), the method, and what the
library's `Timing.row` says of it. The clock is `lightning_duo.cost.interleave`: warm-up outside it,
synchronised, in turns, ratios turn by turn. Here the machine is written into every row, rows go to
NAME.jsonl and NAME.csv as they come, and growth with size to NAME.growth.jsonl and NAME.png.
"""

import argparse
import csv
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from lightning_duo.cost import environment, installed_version

Row: TypeAlias = dict[str, Any]
TIMES = ("ms", "ms_20", "ms_80", "reference", "ratio", "ratio_20", "ratio_80", "readings")
OTHERS = ("scipy", "scikit-learn", "torchmetrics", "torch-uncertainty", "fvcore")
MACHINE = (*environment(), *OTHERS)
OUTPUT = Path("outputs/bench")


@dataclass(frozen=True)
class Growth:
    """A curve to draw and measure: how a value grows along one size while all else stays."""

    along: str
    """Column of the size."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Values that rows must have to be on the curve; one curve for each method."""
    values: tuple[str, ...] = ("ms",)
    """Columns that grow."""


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for."""

    quick: bool
    device: str
    repeats: int
    threads: int
    given: tuple[str, ...] = ()
    """The options on the command line, but for where the files go."""


def exponent(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Exponent p of value = c * size^p: by least squares over all, and between the two largest.

    They differ where a cost that does not grow hides the growth at small sizes.
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    slope, offset = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - slope * x - offset) ** 2).sum())
    last = np.argsort(x)[-2:]
    top = float(np.diff(y[last])[0] / np.diff(x[last])[0])
    return {"exponent": float(slope), "exponent_top": top, "r2": 1 - rest / spread if spread else 1}


def grow(rows: Sequence[Row], growths: Iterable[Growth]) -> Iterator[Row]:
    """A row for each curve of at least three sizes, with its points and exponents."""
    for growth in growths:
        found = [row for row in rows if growth.where.items() <= row.items() and growth.along in row]
        for value, method in itertools.product(
            growth.values, dict.fromkeys(row["method"] for row in found)
        ):
            chosen = [r for r in found if r["method"] == method and (r.get(value) or 0) > 0]
            points = {row[growth.along]: row[value] for row in chosen}
            if len(points) < len(chosen):
                raise ValueError(f"{growth} takes several rows of {method} at one size")
            if len(points) >= 3:
                sizes, values = zip(*sorted(points.items()), strict=True)
                yield {
                    "along": growth.along,
                    "where": dict(growth.where),
                    "value": value,
                    "method": method,
                    "sizes": sizes,
                    "values": values,
                    **exponent(sizes, values),
                }


UNITS = {"ms": "ms", "peak_mb": "MB at the peak", "images_per_s": "images/s"}
COLORS = ("#0b62c4", "#5b6470", "#b45f06", "#1a7f4b", "#c2263b", "#7a3e9d", "#0d7f8c", "#8a8a00")


def figure(curves: Sequence[Row], path: Path, title: str) -> None:
    """One panel for each group of curves along the same size, both axes logarithmic."""
    from matplotlib.figure import Figure

    def panel(curve: Row) -> tuple[str, str, str]:
        return curve["along"], json.dumps(curve["where"]), curve["value"]

    panels = list(dict.fromkeys(map(panel, curves)))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(5.2 * columns, 4 * lines), layout="constrained")
    drawn.suptitle(title, fontsize=9)
    for number, key in enumerate(panels, 1):
        axes = drawn.add_subplot(lines, columns, number)
        for color, curve in zip(
            itertools.cycle(COLORS), (c for c in curves if panel(c) == key), strict=False
        ):
            label = f"{curve['method']}: {curve['exponent_top']:.2f}"
            axes.plot(curve["sizes"], curve["values"], "o-", ms=3, lw=1.3, color=color, label=label)
        along, where, value = key
        fixed = ", ".join(f"{k} {v}" for k, v in json.loads(where).items())
        axes.set(xscale="log", yscale="log", xlabel=along, ylabel=UNITS.get(value, value))
        axes.set_title(fixed, fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="exponent, two largest sizes", title_fontsize=7)
    drawn.savefig(path, dpi=110)


def described(machine: Mapping[str, Any]) -> str:
    """The machine of a row in a line."""
    return (
        f"{machine['hardware']} ({machine['device']}), threads: {machine['threads']} of "
        f"{machine['cores']} cores, torch {machine['torch']}, triton {machine['triton']}, "
        f"Python {machine['python']}"
    )


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ratio_cell(row: Mapping[str, Any]) -> str:
    """A ratio with its quantiles."""
    if "ratio" not in row:
        return ""
    digits = 3 if row["ratio"] < 10 else 1
    low, middle, high = (f"{row[key]:.{digits}f}" for key in ("ratio_20", "ratio", "ratio_80"))
    return f"{middle} ({low}-{high})"


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns of rows that are neither times nor the machine."""
    known = {*TIMES, *MACHINE, "benchmark", "profile", "date", "command", "commit"}
    if len({row.get("dtype") for row in rows}) == 1:
        known.add("dtype")
    return [c for c in dict.fromkeys(key for row in rows for key in row) if c not in known]


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table of rows."""
    chosen = columns(rows)
    timed = any("ms" in row for row in rows)
    headings = [*chosen, *(("ms (20-80 %)", "ratio (20-80 %)", "to") if timed else ())]
    lines = []
    for row in rows:
        times = f"{row['ms']:.4g} ({row['ms_20']:.3g}-{row['ms_80']:.3g})" if "ms" in row else ""
        chosen_cells = [shown(row.get(column)) for column in chosen]
        ratios = (times, ratio_cell(row), row.get("reference", ""))
        lines.append([*chosen_cells, *(ratios if timed else ())])
    return headings, lines


def parser(doc: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, help="of PyTorch; as many as PyTorch takes if omitted")
    made.add_argument("--repeats", type=int, help="turns of each measurement")
    made.add_argument("--output", type=Path, default=OUTPUT, help="folder for the files")
    return made


def options(given: argparse.Namespace) -> Options:
    """Apply what was given on the command line."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no CUDA device here")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    repeats = given.repeats or (5 if given.quick else 15)
    words = list(sys.argv[1:])
    if "--output" in words:
        start = words.index("--output")
        words[start : start + 2] = []
    return Options(given.quick, given.device, repeats, torch.get_num_threads(), tuple(words))


def run(
    name: str,
    given: argparse.Namespace,
    measure: Callable[[Options], Iterable[Row]],
    growths: Sequence[Growth] = (),
) -> list[Row]:
    """Measure, write the files and say what was found; rows are written as they come."""
    asked = options(given)
    given.output.mkdir(parents=True, exist_ok=True)
    stem = name if asked.device == "cpu" else f"{name}_{asked.device}"
    for old in given.output.glob(f"{stem}.*"):
        old.unlink()  # so that a run that fails leaves nothing of an earlier one
    machine = environment(asked.device)
    machine |= {package: installed_version(package) for package in OTHERS}
    common = {"benchmark": name, "profile": "quick" if asked.quick else "full"}
    common["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    common["command"] = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *asked.given])
    common["commit"] = commit()
    rows: list[Row] = []
    with (given.output / f"{stem}.jsonl").open("w") as file:
        for row in measure(asked):
            rows.append({**common, **row, **{k: row.get(k, v) for k, v in machine.items()}})
            rows[-1].setdefault("dtype", "float32")
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            said = " ".join(f"{key}={shown(row.get(key))}" for key in columns([row]))
            print(f"{name}: {said}, {ratio_cell(row)} of {row.get('reference')}", flush=True)
    write_csv(rows, given.output / f"{stem}.csv")
    curves = list(grow(rows, growths))
    lines = "".join(json.dumps({"benchmark": name, **curve}) + "\n" for curve in curves)
    (given.output / f"{stem}.growth.jsonl").write_text(lines)
    if curves:
        figure(curves, given.output / f"{stem}.png", f"{name}: {described(machine)}")
    for curve in curves:
        print(growth_text(curve))
    return rows


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return found.stdout.strip() or None


def growth_text(curve: Mapping[str, Any]) -> str:
    """What a curve says, in a sentence."""
    fixed = ", ".join(f"{key} {value}" for key, value in curve["where"].items())
    return (
        f"{curve['method']}: {UNITS.get(curve['value'], curve['value'])} grow as {curve['along']}^"
        f"{curve['exponent']:.2f} from {curve['sizes'][0]} to {curve['sizes'][-1]}, "
        f"^{curve['exponent_top']:.2f} between the two largest{f' ({fixed})' if fixed else ''}"
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows with all their columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)

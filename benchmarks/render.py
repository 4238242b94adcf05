"""Turn the rows that benchmarks wrote into Markdown: a summary, and RESULTS.md."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import OTHERS, Row, cells, columns, described, growth_text, ratio_cell

NAMES = ("throughput", "head", "fit", "cofinetune", "metrics", "gain", "added")
TITLES = {
    "throughput": "Throughput of pairs",
    "head": "Head",
    "fit": "Fit of the temperatures",
    "cofinetune": "Training with the callback",
    "metrics": "Metrics",
    "gain": "Gain, beside an ensemble of two",
    "added": "A sidekick that is added to a trained base",
}
FIGURES = {"throughput": ("figure8", "throughput")}
DEVICES = ("cpu", "cuda")
SCRIPTS = {name: f"{name}.py" for name in ("throughput", "gain", "added")}
MEANINGS = {
    "method": "what is measured; the script named above each table says what each does",
    "ms": "time of one call, in milliseconds, warm",
    "ratio": "time over that of the method under `to` (of several together), turn by turn",
    "images_per_s": "samples of a batch over the time of a call that is waited for",
    "limited_by": "why the batch is no larger",
    "peak_mb": "memory that a call needs at its peak beyond what was in use before it, in MB",
    "of_copy": "time over that of copying as many bytes as must be read and written",
    "gb_per_s": "those bytes over the time",
    "passes": "reads of all logits; what ours reads of subsamples before is not counted",
    "excess": "NLL above the lowest that any method found, in nats per sample; of "
    "torch-uncertainty, which fits the base alone, above the lowest of the base",
    "ideal": "the ratio if the images were read once instead of twice, and all else cost the same",
    "workers": "processes that read data; 0: the training process does",
    "steps": "training batches of a run",
    "kept_bytes": "what the metric keeps of a sample",
    "flops": "operations of a forward, a multiply-add counting two; in the gain over the base's",
    "duo_of_parts": "time of the duo over that of base and model together",
    "sidekick_nll": "NLL of the sidekick alone, with a temperature of 1",
    "nll_change": "NLL over that of the base with one temperature, less 1; other changes likewise",
}
LONG = 20  # lines of a table that is folded away


class Target(NamedTuple):
    """What a ratio should be."""

    what: str
    benchmark: str
    where: dict[str, Any]
    holds: Callable[[float], bool]
    wanted: str
    column: str = "ratio"


def at_most(limit: float) -> dict[str, Any]:
    return {"holds": lambda value: value <= limit, "wanted": f"<= {limit:g}"}


def at_least(limit: float) -> dict[str, Any]:
    return {"holds": lambda value: value >= limit, "wanted": f">= {limit:g}"}


BOTH, BOTH_COMPILED = "base + sidekick", "base, compiled + sidekick, compiled"
FIT = {"part": "fit"}


def part(row: Row) -> Row:
    """Targets of a fit are those on all cores too."""
    return {"part": "fit"} if row.get("part") == "fit, all cores" else {}


TARGETS = (
    Target("duo / (base + sidekick), eager", "throughput", {"method": "duo", "reference": BOTH},
           **at_most(1.05)),
    Target("duo / (base + sidekick), compiled", "throughput",
           {"method": "duo, compiled", "reference": BOTH_COMPILED}, **at_most(1.05)),
    Target("co-training / (base + sidekick), images decoded", "cofinetune",
           {"method": "callback"}, **at_most(0.95)),
    Target("training of an added sidekick / of the sidekick alone", "added",
           {"part": "time", "method": "added"}, **at_most(1.05)),
    *(
        Target(f"{what} at {n} x {k}", "fit",
               {**FIT, "method": method, "samples": n, "classes": k}, **goal, column=column)
        for n, k in ((2500, 1000), (7000, 257))
        for what, method, goal, column in (
            ("published fit / ours", "published", at_least(100), "ratio"),
            ("NLL of ours above the lowest", "fit_temperatures", at_most(1e-6), "excess"),
        )
    ),
    Target("torch-uncertainty's fit of one / ours of two, 7000 x 257", "fit",
           {**FIT, "method": "torch-uncertainty", "samples": 7000, "classes": 257}, **at_least(10)),
)  # fmt: skip


def stem(name: str, device: str) -> str:
    """How the files of a benchmark on a device begin."""
    return name if device == "cpu" else f"{name}_{device}"


def load(folder: Path, name: str, kind: str = "jsonl", device: str = "cpu") -> list[Row]:
    """The rows of a benchmark; none if it was not run."""
    path = folder / f"{stem(name, device)}.{kind}"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    made = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return [*made, *("| " + " | ".join(line) + " |" for line in lines)]


def targets(folder: Path) -> list[str]:
    """Each target, for every row that it is about."""
    lines = []
    for target in TARGETS:
        rows = [row for device in DEVICES for row in load(folder, target.benchmark, device=device)]
        wanted = target.where.items()
        found = [row for row in rows if wanted <= {**row, **part(row)}.items()]
        for row in found:
            given = [c for c in columns([row]) if c not in ("method", *target.where)]
            keys = ("pair", "base", "sidekick", "pixels", "batch", "workers", "ranks", "threads")
            case = ", ".join(f"{k} {row[k]}" for k in keys if k in given or k == "threads")
            case += f"; ideal {row['ideal']:.3f}" if "ideal" in row else ""
            case += f", {row['device'].upper()}" if row["device"] != "cpu" else ""
            value = row[target.column]
            text = ratio_cell(row) if target.column == "ratio" else f"{value:.1e}"
            verdict = "yes" if target.holds(value) else "**no**"
            ends = [row.get(f"{target.column}_{end}", value) for end in (20, 80)]
            if len({target.holds(end) for end in ends}) > 1:
                verdict += ", within the spread"
            lines.append([target.what, case, text, target.wanted, verdict])
        if not found:
            lines.append([target.what, "", "not measured", target.wanted, ""])
    return table(("target", "case", "measured (20-80 %)", "wanted", "met"), lines)


def brief(folder: Path) -> list[str]:
    """What a duo costs beside its base and beside two bases, and what each of them gains."""
    files = [load(folder, "throughput", device=device) for device in DEVICES]
    lines = [line for rows in files for line in _costs(rows)]
    headings = ("", "images/s", "time / base (20-80 %)", "compiled", "GFLOPs", "M parameters")
    text = table(headings, lines) if lines else ["Throughput: not measured."]
    gains: dict[str, list[Row]] = {}
    for row in load(folder, "gain"):
        gains.setdefault(row["method"], []).append(row)
    if gains:
        changes = [
            [method, f"{found[0]['flops']:.2f}"]
            + [", ".join(f"{100 * r[f'{m}_change']:+.1f}" for r in found) for m in ("nll", "aurc")]
            for method, found in gains.items()
        ]
        what = "NLL, % of the scaled base's, by seed", "AURC, likewise"
        text += ["", *table(("solar cells, test split", "FLOPs / base", *what), changes)]
        text += [
            "",
            "The last table is of the models of `make demo` on a small test split: the "
            "README of the project says what such gains are worth.",
        ]
    return text


def _costs(rows: Sequence[Row]) -> list[list[str]]:
    """Lines for base, sidekick, duo and two bases of each pair, at its largest batch."""
    lines = []
    for cost in (row for row in rows if row.get("part") == "cost"):
        found = [r for r in rows if r.get("part") == "pair" and r["pair"] == cost["pair"]]
        batch = max((r["batch"] for r in found), default=0)
        times = {
            (r["method"], r["reference"]): r for r in found if r["batch"] == batch and "ms" in r
        }
        flops, parameters = (
            [cost[f"{what}_base"] / unit, cost[f"{what}_sidekick"] / unit]
            for what, unit in (("flops", 1e9), ("parameters", 1e6))
        )
        sizes = {
            "base": (flops[0], parameters[0]),
            "sidekick": (flops[1], parameters[1]),
            "duo": (sum(flops), sum(parameters)),
            "2 bases": (2 * flops[0], 2 * parameters[0]),
        }
        for method, (operations, size) in sizes.items() if found else ():
            eager = times[method, "base"]
            compiled = times.get((f"{method}, compiled", "base, compiled"), {})
            where = "" if cost["device"] == "cpu" else f", {cost['device'].upper()}"
            name = f"{method}, {cost['pair']}, batch {batch}{where}"
            speed = f"{eager['images_per_s']:.3g}"
            more = f"{operations:.1f}", f"{size:.1f}"
            lines.append([name, speed, ratio_cell(eager), ratio_cell(compiled), *more])
    return lines


def overhead(rows: Sequence[Row]) -> list[str]:
    """Measured time of a duo over its base beside 1 + FLOPs balance."""
    lines = []
    costs = {row["pair"]: row for row in rows if row.get("part") == "cost"}
    for row in (row for row in rows if row.get("part") == "pair" and "ratio" in row):
        if row["method"].startswith("duo") and "sidekick" not in row["reference"]:
            cost = f"{1 + costs[row['pair']]['balance']:.3f}"
            lines.append([row["pair"], row["method"], str(row["batch"]), ratio_cell(row), cost])
    return table(("pair", "duo", "batch", "time / base (20-80 %)", "1 + balance"), lines)


def counters(rows: Sequence[Row]) -> list[str]:
    """FLOPs balance by three counters, and where they disagree."""
    lines = []
    for row in (row for row in rows if row.get("part") == "cost"):
        ways = [row[k] for k in ("balance", "balance_fused", "balance_fvcore")]
        shown = ["not measured" if way is None else f"{way:.4f}" for way in ways]
        flops = [f"{row[k] / 1e9:.2f}" for k in ("flops_base", "flops_sidekick")]
        size = [f"{row[k] / 1e6:.1f}" for k in ("parameters_base", "parameters_sidekick")]
        skipped = ", ".join(row["skipped_fvcore"] or ()) or "nothing"
        lines.append([row["pair"], " + ".join(flops), " + ".join(size), *shown, skipped])
    headings = ("pair", "GFLOPs", "M parameters", "balance", "with attention fused", "by fvcore",
                "fvcore leaves out")  # fmt: skip
    return table(headings, lines)


def section(folder: Path, name: str, figures: str | None) -> list[str]:
    """All that a benchmark found, on each device."""
    script = SCRIPTS.get(name, f"bench_{name}.py")
    text = [f"## {TITLES[name]}", ""]
    for device in DEVICES:
        if rows := load(folder, name, device=device):
            text += block(folder, name, rows, device, figures)
        else:
            more = " DEMO_FOLDERS" if name == "gain" else ""
            command = f"`python benchmarks/{script} --device {device}{more}`"
            text += [f"{device.upper()}: not measured; {command}.", ""]
    return text


def block(
    folder: Path, name: str, rows: Sequence[Row], device: str, figures: str | None
) -> list[str]:
    """All rows of a benchmark on a device, their growth and figures."""
    first = rows[0]
    dtypes = sorted({row["dtype"] for row in rows})
    others = [f"{package} {first[package]}" for package in OTHERS if first.get(package)]
    code = [f"code of {first['commit']}"] if first.get("commit") else []
    surroundings = ", ".join([described(first), *others, *dtypes, *code])
    text = [f"`{first['command']}`, {first['date']}: {surroundings}.", ""]
    if name == "throughput":
        text += ["Overhead measured, beside what FLOPs say:", "", *overhead(rows), ""]
        text += ["FLOPs balance by three counters; the first is used:", "", *counters(rows), ""]
        for row in (row for row in rows if row.get("part") == "determination"):
            what = f"{row['method']}s, {row['models']} models, base {row['base']}"
            text += [f"R2 of log throughput on log FLOPs, {what}: {row['r2']:.3f}.", ""]
    kinds = dict.fromkeys(row.get("part", "") for row in rows)
    for kind in (kind for kind in kinds if kind not in ("cost", "determination")):
        headings, lines = cells([row for row in rows if row.get("part", "") == kind])
        folded = figures is not None and len(lines) > LONG
        summary = f"<summary>{len(lines)} rows{f', {kind}' if kind else ''}</summary>"
        text += ["<details>", summary, ""] if folded else []
        text += [*table(headings, lines), "", *(["</details>", ""] if folded else [])]
    if curves := load(folder, name, "growth.jsonl", device):
        text += ["Growth:", "", *(f"- {growth_text(curve)}" for curve in curves), ""]
    if figures is not None:
        files = [f"{stem(drawn, device)}.png" for drawn in FIGURES.get(name, (name,))]
        drawn = [f"![{file}]({figures}/{file})" for file in files if (folder / file).exists()]
        text += [*drawn, ""] if drawn else []
    return text


def summarize(folder: Path) -> Path:
    """Write summary.md: targets and all tables."""
    text = ["# Benchmarks: summary", "", *brief(folder), "", *targets(folder), ""]
    for name in NAMES:
        text += section(folder, name, None)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.md"
    path.write_text("\n".join(text))
    return path


def render(folder: Path, path: Path) -> Path:
    """Write the report, and the rows and figures that it shows into a folder beside it."""
    kept = path.parent / path.stem.lower()
    kept.mkdir(parents=True, exist_ok=True)
    for name, device in itertools.product(NAMES, DEVICES):
        if folder.samefile(kept) or not (folder / f"{stem(name, device)}.jsonl").exists():
            continue
        for found in (stem(found, device) for found in {name, *FIGURES.get(name, ())}):
            for old in kept.glob(f"{found}.*"):
                old.unlink()  # so that no figure of another run stays beside the rows
            for file in (f"{found}.{kind}" for kind in ("jsonl", "growth.jsonl", "png")):
                if (folder / file).exists():
                    shutil.copy(folder / file, kept / file)
    path.write_text(report(kept))
    return path


def report(folder: Path) -> str:
    """RESULTS.md, from the rows in a folder."""
    files = itertools.product(NAMES, DEVICES)
    rows = [row for name, device in files for row in load(folder, name, device=device)]
    profiles = sorted({row["profile"] for row in rows})
    dates = sorted({row["date"] for row in rows})
    text = [
        "# Results of the benchmarks",
        "",
        "Written by `python benchmarks/run_all.py --results benchmarks/RESULTS.md` from rows of "
        f"the {' and '.join(profiles)} profile, gain.py and added.py ({', '.join(dates)}), which "
        f"are in [{folder.name}]({folder.name}); nothing is typed by hand. Every ratio is of times "
        "taken in one process: the median, and the 20 % and 80 % quantiles over the turns. How it "
        "is measured, and what was tried where a target is missed, is in [README.md](README.md).",
        "",
        "## In short",
        "",
        *brief(folder),
        "",
        "## Targets",
        "",
        *targets(folder),
        "",
        "## Columns",
        "",
        *(f"- `{name}`: {meaning}" for name, meaning in MEANINGS.items()),
        "",
    ]  # fmt: skip
    for name in NAMES:
        text += section(folder, name, folder.name)
    return "\n".join(text)

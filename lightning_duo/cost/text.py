"""What `measure_throughput` found, in words and as a table for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_duo.cost.throughput import COMPILED, ENSEMBLE

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 0.25  # a spread of a ratio, relative to it, that tells little


def throughput_table(rows: Sequence[Mapping[str, Any]], title: str) -> "Table":
    """What `measure_throughput` found, a line for each method."""
    from rich.table import Table
    from rich.text import Text

    batches = sorted({row["batch"] for row in rows})
    table = Table(title=Text(title), title_justify="left")
    table.add_column("", no_wrap=True)
    for batch in batches:
        one = "images/s" if batch > 1 else "ms"
        table.add_column(f"{one}, batch {batch}", justify="right")
        table.add_column("time / base", justify="right", no_wrap=True)
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for batch in batches:
            row = find(rows, name, batch=batch)
            if "not_measured" in row:
                cells += ["-", "not measured"]
                continue
            cells += [f"{row['images_per_s' if batch > 1 else 'ms']:.4g}", ratio_text(row)]
        table.add_row(name, *cells)
    return table


def overhead_text(rows: Sequence[Mapping[str, Any]], counted: Mapping[str, Any]) -> list[str]:
    """What the rows say of the duo's overhead, beside what its FLOPs say, in sentences.

    Args:
        rows: What `measure_throughput` found.
        counted: What `compare_counters` found.
    """
    batches = sorted({row["batch"] for row in rows})
    batch = batches[-1]
    measured = {row["method"] for row in rows if "not_measured" not in row}
    text = _counted_text(counted)
    for mode in ("", COMPILED):
        both = f"base{mode} + sidekick{mode}"
        if not {"base" + mode, "sidekick" + mode, "duo" + mode} <= measured:
            continue
        for size in batches:
            of_base = find(rows, "duo" + mode, "base" + mode, batch=size)
            of_both = find(rows, "duo" + mode, both, batch=size)
            text.append(
                f"Measured{mode or ', as it is'}, batch {size}: duo / base {ratio_text(of_base)}, "
                f"duo / (base + sidekick) {ratio_text(of_both)}."
            )
    if ENSEMBLE in measured:
        ensemble = ratio_text(find(rows, ENSEMBLE, batch=batch))
        text.append(f"An ensemble of two bases takes {ensemble} times as long as one.")
    spreads = [_spread(row) for row in rows if "ratio" in row]
    if wide := sum(spread > WIDE for spread in spreads):
        text.append(
            f"{wide} of {len(spreads)} ratios have a spread of over {100 * WIDE:.0f} %: something "
            "else was running; measure again when it is not."
        )
    failed: dict[str, dict[str, None]] = {}  # what one reason kept from being measured, once each
    for row in rows:
        if "not_measured" in row:
            failed.setdefault(row["not_measured"], {})[row["method"]] = None
    return [*text, *(f"Not measured: {'; '.join(names)}: {why}" for why, names in failed.items())]


def _counted_text(counted: Mapping[str, Any]) -> list[str]:
    """FLOPs, parameters and FLOPs balance, and where other counters disagree."""
    parameters = [short_count(counted[f"parameters_{model}"]) for model in ("base", "sidekick")]
    if counted["not_counted"] is not None:
        return [
            f"Parameters: base {parameters[0]}, sidekick {parameters[1]}. FLOPs could not be "
            f"counted: {counted['not_counted']}."
        ]
    flops = [short_count(counted[f"flops_{model}"]) for model in ("base", "sidekick")]
    text = [
        f"FLOPs of one sample: base {flops[0]}, sidekick {flops[1]} (a multiply-add is two); "
        f"parameters {parameters[0]} and {parameters[1]}."
    ]
    balance = counted["balance"]
    if not balance:
        model = "sidekick" if balance == 0 else "base"
        return [*text, f"The {model} has no operation that is counted, so no balance is known."]
    text.append(
        f"FLOPs balance {balance:.3g}: by FLOPs alone the duo takes {1 + balance:.3f} times as "
        "long. Many small layers, and depthwise ones, take longer than their FLOPs say."
    )
    others = {
        "fvcore": counted["balance_fvcore"],
        "PyTorch with attention fused": counted["balance_fused"],
    }
    for name, other in others.items():
        if other is not None and abs(other - balance) > 0.01 * balance:
            skipped = ", ".join(counted["skipped_fvcore"] or ()) if name == "fvcore" else ""
            missing = f", without {skipped}" if skipped else ""
            text.append(f"{name} counts a balance of {other:.3g}{missing}; that is not used.")
    return text


def _spread(row: Mapping[str, Any]) -> float:
    return float((row["ratio_80"] - row["ratio_20"]) / row["ratio"])


def short_count(number: float) -> str:
    """A count in three digits.

    Example:
        >>> short_count(2690), short_count(88_591_464), short_count(999_900)
        ('2.69 k', '88.6 M', '1 M')
    """
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def find(
    rows: Sequence[Mapping[str, Any]], method: str, reference: str | None = None, **case: Any
) -> Mapping[str, Any]:
    """The first row of a method, against a reference, with these values."""
    wanted = {"method": method, **({} if reference is None else {"reference": reference}), **case}
    return next(row for row in rows if wanted.items() <= row.items())


def ratio_text(row: Mapping[str, Any]) -> str:
    """A ratio with its 20 % and 80 % quantiles."""
    digits = 2 if row["ratio"] >= 0.1 else 4
    low, high = row["ratio_20"], row["ratio_80"]
    return f"{row['ratio']:.{digits + 1}f} ({low:.{digits}f}-{high:.{digits}f})"

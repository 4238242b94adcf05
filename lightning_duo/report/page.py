"""What a duo gained, to look at: one HTML file that opens offline."""

import json
from collections.abc import Mapping
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_duo.bootstrap import Bootstrap, Interval, bootstrap
from lightning_duo.calibration import Calibration
from lightning_duo.cost import Cost
from lightning_duo.evaluation import HIGHER_IS_BETTER, Predictions
from lightning_duo.files import whole
from lightning_duo.report.figures import CHOSEN, NAMES, check_matplotlib
from lightning_duo.report.svg import illustrate
from lightning_duo.report.terminal import COLUMNS, Column, best_of, threshold_sentence
from lightning_duo.selective import Threshold, select_thresholds
from lightning_duo.selective.threshold import NOTHING, as_text

ORDER = ("duo", "base_scaled", "base", "sidekick", "unweighted", "uq_only")
REFERENCE = "base_scaled"  # what the duo is compared with: the base, calibrated likewise
WORK = 50_000_000  # samples times resamples, about a minute on a core
MILESTONES = (0.9, 0.95, 0.98, 0.99)  # target accuracies that the page spells out
DELTA = 0.05  # of the guarantee the report offers, if the calibration has none


def write_report(
    path: str | Path,
    predictions: Mapping[str, Predictions],
    calibration: Calibration,
    *,
    data: str,
    held_out: bool,
    cost: Cost | None = None,
    resamples: int | None = None,
) -> Path:
    """Write a report on a duo as one HTML file, which opens offline.

    It holds the metrics of all forms with bootstrap intervals and the paired difference to the
    scaled base, the risk-coverage curves, a reliability diagram, histograms of confidence, the
    temperatures and cost, and a control that turns a target accuracy into a threshold, its coverage
    and the number of deferrals.

    Args:
        path: The file to write, ``*.html``. It appears whole or not at all.
        predictions: Form -> predictions, as `evaluation.evaluate` gives them.
        calibration: Temperatures and threshold of the duo.
        data: What was measured, as in "the test set".
        held_out: Whether these are other samples than those the temperatures were fitted on.
        cost: FLOPs and parameters, if known.
        resamples: Of the bootstrap; by default 1000, above 50 000 samples fewer, but at least 100.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the path is not named ``*.html``.

    Source: Asymmetric Duos, Sec. 5.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"a report is named *.html, got {path}")
    check_matplotlib()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("lightning_duo.report").joinpath("page.html").read_text("utf-8")
    )
    missing = [form for form in ORDER if form not in predictions]
    if missing:
        raise ValueError(f"a report needs the predictions of {ORDER}; {missing} are missing")
    shown = {form: predictions[form] for form in ORDER}
    if resamples is None:
        resamples = max(100, min(1000, WORK // len(shown["duo"].targets)))
    found = bootstrap(shown, resamples=resamples)
    page = template.render(
        data=data,
        held_out=held_out,
        today=date.today().isoformat(),
        samples=len(shown["duo"].targets),
        resamples=resamples,
        names=NAMES,
        order=ORDER,
        rows=_rows(found),
        lead=_lead(found),
        fit=calibration.fit,
        threshold_sentence=threshold_sentence(calibration),
        accepted=_accepted(shown["duo"], calibration.threshold, held_out=held_out),
        cost=cost,
        metric=_metric,
        figures=illustrate(shown),
        control=_control(shown, calibration),
    )
    with whole(path) as file:
        # A number and its unit stay on one line.
        file.write_text(page.replace(" %", "\u00a0%"), encoding="utf-8")
    return path


def _rows(found: Bootstrap) -> list[dict[str, Any]]:
    """The metrics table: each row a metric, its value and interval for every form."""
    rows = []
    for metric, column in COLUMNS.items():
        change = found.difference("duo", REFERENCE, metric)
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        better = min(sign * change.low, sign * change.high) > 0
        worse = max(sign * change.low, sign * change.high) < 0
        rows.append(
            {
                "heading": column.heading,
                "arrow": "↑" if HIGHER_IS_BETTER[metric] else "↓",
                "aim": "higher" if HIGHER_IS_BETTER[metric] else "lower",
                "meaning": column.meaning,
                "change": _signed(change, column),
                "verdict": "better" if better else "worse" if worse else "unclear",
                "best": best_of(metric, found.estimates),
                "cells": {
                    form: [column.text(x) for x in found.interval(form, metric)] for form in ORDER
                },
            }
        )
    return rows


def _signed(change: Interval, column: Column) -> list[str]:
    texts = [column.text(value) for value in change]
    return [t if t[0] in "-n" or float(t) == 0 else f"+{t}" for t in texts]


def _metric(number: int) -> str:
    """A count in three digits with its unit prefix, as in 1.35 G."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{prefix}"
    return str(number)


def _lead(found: Bootstrap) -> dict[str, tuple[str, str]]:
    """Metric -> what the duo and another model reach, for the first paragraph."""
    return {
        metric: (
            COLUMNS[metric].text(found.estimates["duo"][metric]),
            COLUMNS[metric].text(found.estimates[other][metric]),
        )
        for metric, other in (("accuracy", "base"), ("aurc", REFERENCE), ("sac98", REFERENCE))
    }


def _accepted(
    duo: Predictions, threshold: Threshold | None, *, held_out: bool
) -> dict[str, str] | None:
    """What the threshold accepts of these samples, and how much of it is right."""
    if threshold is None or not threshold.coverage:
        return None
    from scipy.stats import binomtest

    accepted = duo.confidence >= threshold.value
    count, right = int(accepted.sum()), int(duo.correct[accepted].sum())
    share = 100 * count / len(accepted)
    parts = {"value": as_text(threshold.value), "coverage": f"{share:.1f}"}
    if count:
        parts["accuracy"] = f"{100 * right / count:.1f}"
    if count and held_out:  # the samples that chose the threshold give no honest interval
        low, high = binomtest(right, count).proportion_ci(0.95)
        parts |= {"low": f"{100 * low:.1f}", "high": f"{100 * high:.1f}"}
    return parts


def _control(predictions: Mapping[str, Predictions], calibration: Calibration) -> dict[str, Any]:
    """What the reader's choice of a target accuracy leads to, for every target offered."""
    duo, reference = predictions["duo"], predictions[REFERENCE]
    # From a little below the accuracy of accepting everything, in tenths of a percent.
    lowest = min(float(model.correct.double().mean()) for model in (duo, reference)) - 0.05
    step = 1 if lowest >= 0.7 else 5
    targets = [i / 1000 for i in range(max(step, int(200 * lowest) * 5), 1001, step)]
    wanted = calibration.target_accuracy or 0.95
    if calibration.target_accuracy is not None:
        targets = sorted({*targets, wanted})
    delta = calibration.delta or DELTA
    found = {}
    for name, model in (("", duo), ("base_", reference)):
        samples = model.confidence, model.correct
        found[f"{name}measured"] = select_thresholds(*samples, targets)
        sure = [target for target in targets if target < 1]  # nothing guarantees 1
        found[f"{name}guaranteed"] = [
            *select_thresholds(*samples, sure, delta=delta),
            NOTHING,
        ]
    start = min(range(len(targets)), key=lambda i: abs(targets[i] - wanted))
    table = {name: [_plain(threshold) for threshold in values] for name, values in found.items()}
    choices = {"targets": targets, **table, "line": CHOSEN}
    milestones = sorted({min(filter(at.__le__, targets)) for at in MILESTONES})
    return {
        "json": json.dumps(choices, separators=(",", ":")),
        "last": len(targets) - 1,
        "start": start,
        "target": targets[start],
        "lowest": targets[0],
        "kind": "measured" if calibration.delta is None else "guaranteed",
        "delta": delta,
        "milestones": [
            {"target": t, **{name: values[targets.index(t)] for name, values in table.items()}}
            for t in milestones
        ],
    }


def _plain(threshold: Threshold) -> list[float] | None:
    """Value, in the digits of float32, and coverage; None, as JSON knows no infinity, for none."""
    if not threshold.coverage:
        return None
    return [float(as_text(threshold.value)), round(threshold.coverage, 6)]

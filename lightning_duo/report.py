"""What a duo gained, to look at: one HTML file that opens offline."""

import io
import json
import os
import re
from collections.abc import Mapping
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_duo.bootstrap import Bootstrap, Interval, bootstrap
from lightning_duo.calibration import Calibration
from lightning_duo.cost import Cost
from lightning_duo.evaluation import HIGHER_IS_BETTER, Predictions
from lightning_duo.figures import (
    CHOSEN,
    COLORS,
    FIGURES,
    NAMES,
    SHOWN,
    check_matplotlib,
    reliability,
)
from lightning_duo.selective import accuracy_at_coverage, generalized_risk_coverage_curve
from lightning_duo.summary import COLUMNS, Column, best_of, threshold_sentence
from lightning_duo.threshold import NOTHING, Threshold, as_text, select_thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    template = environment.from_string(files("lightning_duo").joinpath("report.html").read_text())
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
        figures=_figures(shown),
        control=_control(shown, calibration),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # A number and its unit stay on one line.
    partial.write_text(page.replace(" %", "\u00a0%"), encoding="utf-8")
    os.replace(partial, path)
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


def _figures(predictions: Mapping[str, Predictions]) -> list[dict[str, Any]]:
    """Each figure as SVG, with what it shows in words and in numbers."""
    tables = {
        "risk_coverage": _risk_table(predictions),
        "reliability": _reliability_table(predictions),
        "confidence": _confidence_table(predictions),
    }
    return [
        {"name": name, "svg": _svg(FIGURES[name](predictions), name), **tables[name]}
        for name in FIGURES
    ]


def _risk_table(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    rows, generalized = [], {}
    for name in SHOWN:
        curve = generalized_risk_coverage_curve(predictions[name].score, predictions[name].correct)
        generalized[name] = curve.risk
    total = len(predictions["duo"].targets)
    for tenth in range(1, 11):
        row = [f"{10 * tenth} %"]
        for name in SHOWN:
            score, correct = predictions[name].score, predictions[name].correct
            risk = 1 - float(accuracy_at_coverage(score.double(), correct, tenth / 10))
            row.append(f"{100 * risk:.2f} %")
        last = -(-tenth * total // 10) - 1
        row.append(f"{100 * float(generalized['duo'][last]):.2f} %")
        rows.append(row)
    middle = ", ".join(f"{NAMES[name]} {rows[4][i + 1]}" for i, name in enumerate(SHOWN))
    return {
        "title": "Risk and coverage",
        "caption": (
            "Error rate among the answers that are kept when the least sure are deferred. Lower is "
            "better; at the right end everything is answered. The dashed vertical line is at the "
            "coverage chosen above."
        ),
        "alt": f"Curves of risk against coverage. When half is answered: {middle} wrong.",
        "headings": ["coverage", *(NAMES[name] for name in SHOWN), "duo, of all samples"],
        "table": rows,
    }


def _reliability_table(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    rows = []
    columns = {name: predictions[name] for name in ("base", "duo")}
    found = {n: reliability(p.confidence, p.correct) for n, p in columns.items()}
    for index in range(len(found["duo"][0])):
        row = [f"{100 * index / 15:.0f} to {100 * (index + 1) / 15:.0f} %"]
        if not any(count[index] > 0 for count, _, _ in found.values()):
            continue
        for count, mean, accuracy in found.values():
            filled = count[index] > 0
            row.append(f"{int(count[index])}")
            row.append(f"{100 * float(mean[index]):.1f} %" if filled else "n/a")
            row.append(f"{100 * float(accuracy[index]):.1f} %" if filled else "n/a")
        rows.append(row)
    return {
        "title": "Reliability",
        "caption": (
            "Accuracy of the predictions at each confidence. On the diagonal a confidence of 80 % "
            "is right in 80 % of the cases; below it a model is too sure. Larger points stand for "
            "more samples."
        ),
        "alt": "Accuracy against confidence of base, sidekick and duo beside the diagonal.",
        "headings": [
            "confidence",
            *(f"{n}: {c}" for n in columns for c in ("samples", "confidence", "accuracy")),
        ],
        "table": rows,
    }


def _confidence_table(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    rows = []
    for tenth in range(10):
        row = [f"{10 * tenth} to {10 * tenth + 10} %"]
        for name in ("base", "duo"):
            confidence, correct = predictions[name].confidence, predictions[name].correct
            inside = (10 * confidence.double()).ceil().clamp(1, 10) == tenth + 1
            row += [str(int((inside & correct).sum())), str(int((inside & ~correct).sum()))]
        rows.append(row)
    median = {
        kind: 100 * float(predictions["duo"].confidence[which].median()) if which.any() else 0
        for kind, which in (
            ("right", predictions["duo"].correct),
            ("wrong", ~predictions["duo"].correct),
        )
    }
    return {
        "title": "Confidence of right and wrong predictions",
        "caption": (
            "Each histogram is in percent of its own predictions, on a logarithmic scale. The "
            "further the wrong ones lie to the left of the right ones, the better a threshold "
            "tells them apart."
        ),
        "alt": (
            "Histograms of confidence. Median of the duo's right predictions: "
            f"{median['right']:.0f} %, of its wrong ones: {median['wrong']:.0f} %."
        ),
        "headings": ["confidence", "base: right", "base: wrong", "duo: right", "duo: wrong"],
        "table": rows,
    }


def _svg(figure: "Figure", name: str) -> str:
    """The figure as SVG that takes its width from the page and its colours from the page's CSS."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    span = figure.axes[0].get_position().width * figure.bbox_inches.width * 72
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(
        r'^.*?<svg[^>]* (viewBox="[^"]*")[^>]*>',
        rf'<svg xmlns="http://www.w3.org/2000/svg" \1 data-span="{span:.2f}" aria-hidden="true">',
        svg,
        count=1,
        flags=re.DOTALL,
    )
    # One page holds several figures, whose parts matplotlib gives the same names.
    svg = re.sub(rf'\bid="(?!{CHOSEN})', f'id="{name}-', svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for role, color in COLORS.items():
        svg = svg.replace(color, f"var(--{role})")
    return svg

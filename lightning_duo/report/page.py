"""What a duo gained, to look at: one HTML file that opens offline."""

import json
from collections.abc import Mapping
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_duo.bootstrap import Bootstrap, Interval, bootstrap
from lightning_duo.calibration import Calibration
from lightning_duo.cost import Cost
from lightning_duo.cost.text import short_count
from lightning_duo.evaluation import MEASURES, Measure, Predictions
from lightning_duo.files import whole
from lightning_duo.report.figures import CHOSEN, check_matplotlib
from lightning_duo.report.looks import COLORS, DARK, label
from lightning_duo.report.svg import illustrate
from lightning_duo.report.terminal import threshold_sentence
from lightning_duo.selective import Threshold, select_thresholds
from lightning_duo.selective.threshold import NOTHING, as_text

if TYPE_CHECKING:
    from jinja2 import Template

FIRST = ("duo", "base_scaled", "base", "sidekick")  # others follow in their order
REFERENCES = ("base_scaled", "base")  # what the duo is compared with: the first that is there
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
    seen: int | None = None,
    seen_by_fit: int | None = None,
) -> Path:
    """Write a report on a duo as one HTML file, which opens offline.

    It holds the metrics of all forms with bootstrap intervals and the paired difference to the
    scaled base (the base, where that is missing), the risk-coverage curves, a reliability diagram,
    histograms of confidence, the temperatures, the cost of each form, and a control that turns a
    target accuracy into a threshold, its coverage and the number of deferrals.

    Args:
        path: The file to write, ``*.html``. It appears whole or not at all.
        predictions: Form -> predictions, as `evaluation.evaluate` gives them: "duo", one of
            "base_scaled" and "base", and any others.
        calibration: Temperatures and threshold of the duo.
        data: What was measured, as in "the test set".
        held_out: Whether these are other samples than those the temperatures were fitted on.
        cost: FLOPs and parameters of base and sidekick, if known.
        resamples: Of the bootstrap; by default 1000, above 50 000 samples fewer, but at least 100.
        seen: How many decisions there were, if these are a random sample of them.
        seen_by_fit: How many there were when a random sample of them fitted the temperatures.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the path is not named ``*.html``, or predictions are missing.

    Source: Asymmetric Duos, Sec. 5.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"a report is named *.html, got {path}")
    check_matplotlib()
    shown, reference = _ordered(predictions)
    dependent = shown["duo"].several_of_an_item() is not None  # which guarantees nothing
    if resamples is None:
        resamples = max(100, min(1000, WORK // len(shown["duo"].targets)))
    found = bootstrap(shown, resamples=resamples)
    page = _template().render(
        data=data,
        held_out=held_out,
        today=date.today().isoformat(),
        samples=len(shown["duo"].targets),
        seen=seen,
        fitted=calibration.samples,
        seen_by_fit=seen_by_fit,
        resamples=resamples,
        drawn="items, each with all of its samples" if dependent else "samples",
        names={form: label(shown, form) for form in shown},
        plain="base" if "base" in shown else reference,
        reference=reference,
        rows=_rows(found, reference),
        text=lambda metric, form: MEASURES[metric].text(found.estimates[form][metric]),
        fit=calibration.fit,
        threshold_sentence=threshold_sentence(calibration),
        accepted=_accepted(
            shown["duo"], calibration.threshold, interval=held_out and not dependent
        ),
        cost=cost,
        costs=_costs(shown, cost),
        count=short_count,
        figures=illustrate(shown),
        control=_control(shown["duo"], shown[reference], calibration, guaranteed=not dependent),
        colors=COLORS,
        dark=DARK,
    )
    with whole(path) as file:
        # A number and its unit stay on one line.
        file.write_text(page.replace(" %", "\u00a0%"), encoding="utf-8")
    return path


def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(
        files("lightning_duo.report").joinpath("page.html").read_text("utf-8")
    )


def _ordered(predictions: Mapping[str, Predictions]) -> tuple[dict[str, Predictions], str]:
    """The forms in the order of the page, and the one that the duo is compared with."""
    reference = next((form for form in REFERENCES if form in predictions), None)
    if "duo" not in predictions or reference is None:
        raise ValueError(
            "a report compares the predictions of 'duo' with those of 'base_scaled' or 'base'; "
            f"there are those of {sorted(predictions)}"
        )
    order = dict.fromkeys([*(form for form in FIRST if form in predictions), *predictions])
    return {form: predictions[form] for form in order}, reference


def _rows(found: Bootstrap, reference: str) -> list[dict[str, Any]]:
    """The metrics table: each row a metric, its value and interval for every form."""
    rows = []
    for metric in found.estimates["duo"]:
        measure = MEASURES[metric]
        change = found.difference("duo", reference, metric)
        sign = 1 if measure.higher_is_better else -1
        better = min(sign * change.low, sign * change.high) > 0
        worse = max(sign * change.low, sign * change.high) < 0
        rows.append(
            {
                "measure": measure,
                "change": _signed(change, measure),
                "verdict": "better" if better else "worse" if worse else "unclear",
                "best": measure.best({form: of[metric] for form, of in found.estimates.items()}),
                "cells": {
                    form: [measure.text(x) for x in found.interval(form, metric)]
                    for form in found.estimates
                },
            }
        )
    return rows


def _signed(change: Interval, measure: Measure) -> list[str]:
    texts = [measure.text(value) for value in change]
    return [t if t[0] in "-n" or float(t) == 0 else f"+{t}" for t in texts]


def _costs(shown: Mapping[str, Predictions], cost: Cost | None) -> list[list[str]]:
    """Each form with the forwards that it takes for a sample, and their FLOPs."""
    flops = {} if cost is None else {"base": cost.flops_base, "sidekick": cost.flops_sidekick}
    rows = []
    for form, found in shown.items():
        runs = [name if n == 1 else f"{n:g} \u00d7 {name}" for name, n in found.forwards.items()]
        known = runs and flops.keys() >= found.forwards.keys()
        total = sum(n * flops[name] for name, n in found.forwards.items()) if known else None
        rows.append(
            [
                label(shown, form),
                " + ".join(runs) or "not known",
                "not known" if total is None else short_count(total),
            ]
        )
    return rows


def _accepted(
    duo: Predictions, threshold: Threshold | None, *, interval: bool
) -> dict[str, str] | None:
    """What the threshold accepts of these samples, and how much of it is right.

    ``interval`` says whether one would be honest: the samples are independent, and others than
    those that chose the threshold.
    """
    if threshold is None or not threshold.coverage:
        return None
    from scipy.stats import binomtest

    accepted = duo.confidence >= threshold.value
    count, right = int(accepted.sum()), int(duo.correct[accepted].sum())
    share = 100 * count / len(accepted)
    parts = {"value": as_text(threshold.value), "coverage": f"{share:.1f}"}
    if count:
        parts["accuracy"] = f"{100 * right / count:.1f}"
    if count and interval:
        low, high = binomtest(right, count).proportion_ci(0.95)
        parts |= {"low": f"{100 * low:.1f}", "high": f"{100 * high:.1f}"}
    return parts


def _control(
    duo: Predictions, reference: Predictions, calibration: Calibration, *, guaranteed: bool
) -> dict[str, Any]:
    """What the reader's choice of a target accuracy leads to, for every target offered.

    ``guaranteed`` says whether thresholds with a guarantee are offered too.
    """
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
        if guaranteed:
            found[f"{name}guaranteed"] = [*select_thresholds(*samples, sure, delta=delta), NOTHING]
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
        "guaranteed": guaranteed,
        "kind": "guaranteed" if guaranteed and calibration.delta is not None else "measured",
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

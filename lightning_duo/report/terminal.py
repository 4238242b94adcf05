"""The metrics of a duo in words and in a table for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_duo.calibration import Calibration
from lightning_duo.evaluation import MEASURES
from lightning_duo.evaluation.forms import LABELS
from lightning_duo.selective.threshold import as_text
from lightning_duo.temperature import TemperatureFit

if TYPE_CHECKING:
    from rich.table import Table

# Beside the metrics of a model, where only a sample of the decisions is kept: on how many it was
# measured, and how many there were.
MEASURED, SEEN = "measured", "seen"


def summary_table(
    results: Mapping[str, Mapping[str, float]],
    fit: TemperatureFit,
    *,
    data: str,
    balance: float | None,
) -> "Table":
    """Metrics of the models and of the duo, best of each column in bold.

    Args:
        results: Model -> metric -> value, as `DuoMetrics.compute` gives them. Models that are none
            of the seven forms of a duo follow these, under their keys.
        fit: The temperatures the duo uses.
        data: What the metrics were measured on, for the title.
        balance: FLOPs balance, or None if it is not known.

    Returns:
        A table that rich prints.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = {
        name: measure
        for name, measure in MEASURES.items()
        if measure.summary and all(name in row for row in results.values())
    }
    others = " and ".join(measure.label for measure in shown.values() if measure.unit != "%")
    cost = "" if balance is None else f"sidekick FLOPs / base FLOPs: {100 * balance:.1f} %; "
    table = Table(
        title=f"Asymmetric duo on {escape(data)}",
        caption=(
            f"duo logits = {fit.temperatures.base:.3g} x base + "
            f"{fit.temperatures.sidekick:.3g} x sidekick; {cost}all but {others} in %"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for measure in shown.values():
        table.add_column(measure.heading, justify="right", no_wrap=True)
    best = {m: shown[m].best({name: row[m] for name, row in results.items()}) for m in shown}
    for model in dict.fromkeys([*(name for name in LABELS if name in results), *results]):
        cells = []
        for metric, measure in shown.items():
            text = measure.text(results[model][metric])
            cells.append(f"[bold]{text}[/bold]" if model in best[metric] else text)
        name = escape(LABELS.get(model, model))
        table.add_row(name, *cells, style="green" if model == "duo" else None)
    return table


def threshold_sentence(calibration: Calibration) -> str:
    """What the duo accepts, in words; empty if no target accuracy was asked for."""
    chosen, target, delta = calibration.threshold, calibration.target_accuracy, calibration.delta
    if chosen is None or target is None:
        return ""
    sure = "" if delta is None else f" with probability {100 * (1 - delta):g} % on new data"
    if not chosen.coverage:
        return f"No threshold reaches {100 * target:g} % accuracy{sure}: the duo accepts nothing."
    return (
        f"Accepted from confidence {as_text(chosen.value)} on: {100 * chosen.coverage:.1f} % of "
        f"the {calibration.samples} calibration samples, to be {100 * target:g} % right{sure}."
    )


def sample_sentence(results: Mapping[str, Mapping[str, float]], calibration: Calibration) -> str:
    """What is from a sample of the decisions, and from how many; empty if they were all kept.

    Args:
        results: Model -> metric -> value.
        calibration: What was fitted.
    """
    if SEEN not in results["duo"]:
        return ""
    measured, seen = (int(results["duo"][name]) for name in (MEASURED, SEEN))
    whole = [LABELS.get(name, name) for name, row in results.items() if row[MEASURED] == seen]
    others = f" {' and '.join(whole).capitalize()} are measured on all." if whole else ""
    fitted = " and its temperatures are fitted" if calibration.samples == measured else ""
    return (
        f"The duo is measured{fitted} on {measured:,} of {seen:,} decisions, a random sample."
        f"{others}"
    )


def gain_sentence(
    results: Mapping[str, Mapping[str, float]], fit: TemperatureFit, balance: float | None
) -> str:
    """What the sidekick brought, beside the base with its temperature alone.

    Args:
        results: Model -> metric -> value; "duo" and "base_scaled" are compared.
        fit: The temperatures.
        balance: FLOPs balance, or None if it is not known.
    """
    if not any(fit.temperatures):
        return (
            "Neither model tells anything about these samples (both temperatures are 0): the duo "
            "calls every answer as likely as any other."
        )
    if not fit.temperatures.sidekick:
        return (
            "The sidekick adds nothing here (its temperature is 0): the duo is the scaled base. "
            "One without published weights takes longer to train, and no linear probe (probe=0)."
        )
    changes = []
    for metric in ("nll", "aurc"):
        before, after = results["base_scaled"][metric], results["duo"][metric]
        if before > 0:
            changes.append(f"{MEASURES[metric].label} {100 * (after / before - 1):+.1f} %")
    found = ", ".join(changes) or "nothing left to gain"
    large = balance is not None and balance > 1
    cost = " The sidekick costs more than the base." if large else ""
    return f"Duo against scaled base: {found} (less is better).{cost}"


def print_summary(
    results: Mapping[str, Mapping[str, float]],
    calibration: Calibration,
    *,
    data: str,
    balance: float | None,
) -> None:
    """Print the table, and what the duo accepts.

    The lines go to rich's own console. Lightning draws its bar there too, so a bar that is still
    live moves down below them.

    Args:
        results: Model -> metric -> value.
        calibration: Temperatures and threshold of the duo.
        data: What was measured, as in "the test set".
        balance: FLOPs balance, or None if it is not known.
    """
    from rich import get_console
    from rich.markup import escape

    console = get_console()
    console.print(summary_table(results, calibration.fit, data=data, balance=balance))
    console.print(gain_sentence(results, calibration.fit, balance), highlight=False)
    for sentence in (sample_sentence(results, calibration), threshold_sentence(calibration)):
        if sentence:
            console.print(sentence, highlight=False)
    duo = results["duo"]
    if duo.get("coverage"):
        console.print(
            f"On {escape(data)} it accepts {100 * duo['coverage']:.1f} %, and "
            f"{100 * duo['selective_accuracy']:.1f} % of them are right.",
            highlight=False,
        )

"""The metrics of a duo in words and in a table for the terminal."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lightning_duo.calibration import Calibration
from lightning_duo.evaluation import HIGHER_IS_BETTER
from lightning_duo.report.figures import NAMES
from lightning_duo.selective.threshold import as_text
from lightning_duo.temperature import TemperatureFit

if TYPE_CHECKING:
    from rich.table import Table


class Column(NamedTuple):
    """How a metric is shown."""

    heading: str
    factor: float
    decimals: int
    meaning: str

    def text(self, value: float) -> str:
        """The number as it is printed, without its unit."""
        text = f"{self.factor * value:.{self.decimals}f}"
        return "n/a" if math.isnan(value) else text.lstrip("-") if float(text) == 0 else text


COLUMNS = {
    "accuracy": Column("acc", 100, 1, "share of right predictions, %"),
    "f1": Column("F1", 100, 1, "mean F1 over the classes, %"),
    "nll": Column("NLL", 1, 3, "negative log-likelihood, nats"),
    "brier": Column("Brier", 1, 3, "squared error of the probabilities, summed over classes"),
    "ece": Column("ECE", 100, 1, "gap between confidence and accuracy in 15 bins, %"),
    "auroc": Column("AUROC", 100, 1, "chance that a right answer is surer than a wrong one, %"),
    "fpr95": Column("FPR95", 100, 1, "wrong answers kept where 95 % of the right are kept, %"),
    "aurc": Column("AURC", 100, 2, "error rate averaged over all coverages, %"),
    "e_aurc": Column("E-AURC", 100, 2, "AURC above that of a perfect ranking, %"),
    "augrc": Column("AUGRC", 100, 2, "undetected errors among all samples, averaged, %"),
    "sac98": Column("SAC98", 100, 1, "share that can be answered with 98 % right, %"),
}
SUMMARY = ("accuracy", "f1", "nll", "brier", "ece", "auroc", "aurc", "sac98")  # fit 80 columns


def summary_table(
    results: Mapping[str, Mapping[str, float]],
    fit: TemperatureFit,
    *,
    data: str,
    balance: float | None,
) -> "Table":
    """Metrics of the models and of the duo, best of each column in bold.

    Args:
        results: Model -> metric -> value, as `DuoMetrics.compute` gives them.
        fit: The temperatures the duo uses.
        data: What the metrics were measured on, for the title.
        balance: FLOPs balance, or None if it is not known.

    Returns:
        A table that rich prints.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    cost = "" if balance is None else f"sidekick FLOPs / base FLOPs: {100 * balance:.1f} %; "
    table = Table(
        title=f"Asymmetric duo on {escape(data)}",
        caption=(
            f"duo logits = {fit.temperatures.base:.3g} x base + "
            f"{fit.temperatures.sidekick:.3g} x sidekick; {cost}all but NLL and Brier in %"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for metric in SUMMARY:
        table.add_column(heading(metric), justify="right", no_wrap=True)
    best = {metric: best_of(metric, results) for metric in SUMMARY}
    for model in (name for name in NAMES if name in results):
        cells = []
        for metric in SUMMARY:
            text = COLUMNS[metric].text(results[model][metric])
            cells.append(f"[bold]{text}[/bold]" if model in best[metric] else text)
        table.add_row(NAMES[model], *cells, style="green" if model == "duo" else None)
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


def gain_sentence(
    results: Mapping[str, Mapping[str, float]], fit: TemperatureFit, balance: float | None
) -> str:
    """What the sidekick brought, beside the base with its temperature alone.

    Args:
        results: Model -> metric -> value; "duo" and "base_scaled" are compared.
        fit: The temperatures.
        balance: FLOPs balance, or None if it is not known.
    """
    if not fit.temperatures.sidekick:
        return (
            "The sidekick adds nothing here (its temperature is 0): the duo is the scaled base. "
            "One without published weights takes longer to train, and no linear probe (probe=0)."
        )
    changes = []
    for metric in ("nll", "aurc"):
        before, after = results["base_scaled"][metric], results["duo"][metric]
        if before > 0:
            changes.append(f"{COLUMNS[metric].heading} {100 * (after / before - 1):+.1f} %")
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

    Args:
        results: Model -> metric -> value.
        calibration: Temperatures and threshold of the duo.
        data: What was measured, as in "the test set".
        balance: FLOPs balance, or None if it is not known.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(summary_table(results, calibration.fit, data=data, balance=balance))
    console.print(gain_sentence(results, calibration.fit, balance), highlight=False)
    if sentence := threshold_sentence(calibration):
        console.print(sentence, highlight=False)
    duo = results["duo"]
    if duo.get("coverage"):
        console.print(
            f"On {escape(data)} it accepts {100 * duo['coverage']:.1f} %, and "
            f"{100 * duo['selective_accuracy']:.1f} % of them are right.",
            highlight=False,
        )


def heading(metric: str) -> str:
    """Short name of a metric, with an arrow to the better side."""
    return f"{COLUMNS[metric].heading}{'↑' if HIGHER_IS_BETTER[metric] else '↓'}"


def best_of(metric: str, results: Mapping[str, Mapping[str, float]]) -> set[str]:
    """The models with the best value of a metric; none if it is undefined for all."""
    values = {m: row[metric] for m, row in results.items() if not math.isnan(row[metric])}
    if not values:
        return set()
    top = (max if HIGHER_IS_BETTER[metric] else min)(values.values())
    return {model for model, value in values.items() if value == top}

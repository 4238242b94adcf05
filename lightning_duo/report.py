"""What a duo gained, to look at: the summary table and the risk-coverage figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_duo.selective import risk_coverage_curve
from lightning_duo.temperature import TemperatureFit

if TYPE_CHECKING:
    from rich.table import Table

# Metric -> (heading, whether higher is better, factor, decimals)
COLUMNS = {
    "accuracy": ("acc", True, 100, 1),
    "f1": ("F1", True, 100, 1),
    "nll": ("NLL", False, 1, 3),
    "brier": ("Brier", False, 1, 3),
    "ece": ("ECE", False, 100, 1),
    "auroc": ("AUROC", True, 100, 1),
    "aurc": ("AURC", False, 100, 2),
    "sac98": ("SAC98", True, 100, 1),
}
NAMES = {
    "base": "base",
    "base_scaled": "base, scaled",
    "sidekick": "sidekick",
    "sidekick_scaled": "sidekick, scaled",
    "unweighted": "unweighted",
    "uq_only": "UQ only",
    "duo": "duo",
}


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
    from rich.table import Table

    cost = "unknown" if balance is None else f"{100 * balance:.1f} %"
    table = Table(
        title=f"Asymmetric duo on {data}",
        caption=(
            f"duo logits = {fit.temperatures.base:.3g} x base + "
            f"{fit.temperatures.sidekick:.3g} x sidekick; sidekick FLOPs / base FLOPs: {cost}; "
            "all but NLL and Brier in %"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for heading, higher, _, _ in COLUMNS.values():
        table.add_column(f"{heading}{'↑' if higher else '↓'}", justify="right", no_wrap=True)
    best = {
        metric: (max if higher else min)(row[metric] for row in results.values())
        for metric, (_, higher, _, _) in COLUMNS.items()
    }
    for model in (name for name in NAMES if name in results):
        cells = []
        for metric, (_, _, factor, decimals) in COLUMNS.items():
            value = results[model][metric]
            text = f"{factor * value:.{decimals}f}"
            cells.append(f"[bold]{text}[/bold]" if value == best[metric] else text)
        table.add_row(NAMES[model], *cells, style="green" if model == "duo" else None)
    return table


def save_risk_coverage_figure(
    path: str | Path, models: Mapping[str, tuple[Tensor, Tensor]], *, title: str
) -> None:
    """Draw risk against coverage, one curve a model, into an image file.

    Args:
        path: Where to write; the ending chooses the format.
        models: Name -> (confidence (N,), correct (N,)).
        title: What the figure shows.

    Source: Asymmetric Duos, Sec. 5.3.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    styles = ["--", ":", "-", "-."]
    for i, (name, (confidence, correct)) in enumerate(models.items()):
        curve = risk_coverage_curve(confidence, correct)
        area = 100 * float(curve.risk.double().mean())
        axes.plot(
            100 * curve.coverage.cpu(),
            100 * curve.risk.cpu(),
            styles[i % len(styles)],
            linewidth=1.8,
            label=f"{name} (AURC {area:.2f} %)",
        )
    axes.set(
        xlabel="coverage: % of samples answered, surest first",
        ylabel="risk: % of answers wrong",
        title=title,
        xlim=(0, 100),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

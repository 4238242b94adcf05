"""Figures of what a duo gains, drawn by matplotlib: for a logger, a file or the report."""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_duo.evaluation import Predictions
from lightning_duo.evaluation.forms import LABELS
from lightning_duo.evaluation.judged import BINS
from lightning_duo.report.looks import COLORS, looks
from lightning_duo.selective import aurc, expected_calibration_error, risk_coverage_curve
from lightning_duo.selective.calibration import calibration_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.8, 3.4)  # inches; text is of 8.5 points
COLUMNS = 2  # of panels
POINTS = 400  # of a curve; more cannot be seen
CHOSEN = "chosen-coverage"  # id of the line at the coverage that the report's reader chooses


def risk_coverage_figure(
    models: Mapping[str, Predictions], *, title: str | None = None
) -> "Figure":
    """Risk against coverage of base, sidekick, duo and further forms.

    Args:
        models: Form -> predictions, of which those of `looks` are drawn.
        title: What the figure shows.

    Returns:
        A matplotlib figure, which no global state knows of.

    Raises:
        ImportError: If matplotlib is missing.

    Source: Asymmetric Duos, Sec. 5.3.
    """

    def draw(axes: "Axes") -> None:
        top = 0.0
        for name, look in looks(models).items():
            score, correct = models[name].score, models[name].correct
            curve = risk_coverage_curve(score.double(), correct)
            kept = torch.linspace(0, len(score) - 1, min(POINTS, len(score))).round().long()
            coverage, risk = 100 * curve.coverage[kept], 100 * curve.risk[kept]
            # The rate among the first few samples leaps and would set the scale.
            top = max(top, float(risk[coverage >= 5].max()))
            label = f"{look.label} (AURC {100 * float(aurc(score, correct)):.2f} %)"
            axes.plot(coverage, risk, ls=look.style, color=look.color, linewidth=1.8, label=label)
        axes.axvline(100, color=COLORS["ink"], linewidth=1, gid=CHOSEN, visible=title is None)
        axes.set(
            xlabel="coverage: % of samples answered, surest first",
            ylabel="risk: % of answers wrong",
            xlim=(0, 100),
            ylim=(0, max(1.1 * top, 0.1)),
        )
        axes.legend(frameon=False, loc="upper left")

    return _figure(draw, title)


def reliability_figure(models: Mapping[str, Predictions], *, title: str | None = None) -> "Figure":
    """Accuracy against confidence in 15 bins, of the same models; the diagonal is honest.

    The area of a point grows with the number of samples in its bin.

    Args:
        models: Form -> predictions, of which those of `looks` are drawn.
        title: What the figure shows.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is missing.

    Source: Guo et al. (2017).
    """

    def draw(axes: "Axes") -> None:
        axes.plot([0, 100], [0, 100], color=COLORS["faint"], linewidth=1.2)
        for name, look in looks(models).items():
            confidence, correct = models[name].confidence, models[name].correct
            count, mean, accuracy = reliability(confidence, correct)
            filled = count > 0
            error = 100 * float(expected_calibration_error(confidence, correct))
            x, y = 100 * mean[filled], 100 * accuracy[filled]
            axes.plot(x, y, linestyle=look.style, color=look.color, linewidth=1.2)
            axes.scatter(
                x,
                y,
                8 + 150 * count[filled] / count.sum(),
                color=look.color,
                alpha=0.8,
                linewidths=0,
                label=f"{look.label} (ECE {error:.1f} %)",
            )
        axes.set(
            xlabel="confidence, %",
            ylabel="accuracy, %",
            xlim=(0, 101),
            ylim=(0, 103),
            aspect="auto",
        )
        legend = axes.legend(frameon=False, loc="upper left")
        for handle in legend.legend_handles:
            handle.set_sizes([30])  # type: ignore[union-attr]

    return _figure(draw, title)


def confidence_figure(models: Mapping[str, Predictions], *, title: str | None = None) -> "Figure":
    """Histograms of the confidence of right and of wrong predictions.

    Args:
        models: Form -> predictions, of which those of `looks` are drawn, but no sidekick.
        title: What the figure shows.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is missing.
    """
    shown = {name: look for name, look in looks(models).items() if name != "sidekick"}

    def draw(*panels: "Axes") -> None:
        for (name, look), axes in zip(shown.items(), panels, strict=True):
            correct = models[name].correct
            for kind, which in (("right", correct), ("wrong", ~correct)):
                scores = 100 * models[name].confidence[which].double()
                height = torch.histc(scores, bins=25, min=0, max=100) / max(1, len(scores))
                axes.stairs(
                    100 * height,
                    torch.linspace(0, 100, 26),
                    fill=kind == "right",
                    alpha=0.55 if kind == "right" else 1,
                    color=COLORS[kind],
                    linewidth=1.6,
                    label=f"{kind} ({len(scores)})",
                )
            of = f" of the {look.label}, %" if name in LABELS else f", %\n{look.label}"
            axes.set(xlabel=f"confidence{of}", xlim=(0, 100))
            # Most of the confidences are near 1; on a linear scale the others would not be seen.
            axes.set(yscale="log", ylim=(0.1, 300), yticks=[0.1, 1, 10, 100])
            axes.set_yticklabels(["0.1", "1", "10", "100"])
            axes.minorticks_off()
            axes.legend(frameon=False, loc="upper left")
        for axes in panels[::COLUMNS]:
            axes.set_ylabel("% of the right, % of the wrong")

    return _figure(draw, title, panels=len(shown))


FIGURES: dict[str, Callable[..., "Figure"]] = {
    "risk_coverage": risk_coverage_figure,
    "reliability": reliability_figure,
    "confidence": confidence_figure,
}


def log_figures(
    loggers: Iterable[Any], models: Mapping[str, Predictions], name: str, *, step: int
) -> int:
    """Send every figure to the loggers that take figures; others are passed over.

    Args:
        loggers: Lightning loggers: those with ``log_image(key, images, step)``, such as W&B's, and
            those which, or whose ``experiment``, has ``add_figure(tag, figure, global_step)``, as
            TensorBoard's.
        models: Form -> predictions.
        name: Of a figure, with ``{figure}`` for its kind.
        step: The Trainer's global step.

    Returns:
        Number of loggers that took them.
    """
    takers = 0
    for logger in loggers:
        adder = logger if hasattr(logger, "add_figure") else getattr(logger, "experiment", None)
        add_figure = getattr(adder, "add_figure", None)
        if add_figure is None and not hasattr(logger, "log_image"):
            continue
        takers += 1
        for kind, draw in FIGURES.items():
            tag = name.format(figure=kind)
            figure = draw(models, title=tag)
            if add_figure is not None:
                add_figure(tag, figure, global_step=step)
            else:
                takes_step = "step" in signature(logger.log_image).parameters
                at = {"step": step} if takes_step else {}
                logger.log_image(key=tag, images=[_picture(figure)], **at)
    return takers


def check_matplotlib() -> None:
    """Raise ImportError, which names the remedy, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("figures and reports need matplotlib: pip install matplotlib")


def _picture(figure: "Figure") -> Any:
    """The figure as an image, (height, width, 4) of uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def reliability(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of samples, mean confidence and accuracy of each of 15 bins, (15,) each, float64.

    Args:
        confidence: Probabilities of the predictions, shape (N,).
        correct: Whether each prediction is right, shape (N,).

    Returns:
        Counts, means and accuracies; the latter two are NaN in empty bins.
    """
    bin_of = calibration_bins(confidence, BINS)
    columns = torch.stack([torch.ones_like(bin_of), confidence.double(), correct.double()])
    sums = torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, bin_of.cpu(), columns.cpu())
    return sums[0], sums[1] / sums[0], sums[2] / sums[0]


def _figure(draw: Callable[..., None], title: str | None, panels: int = 1) -> "Figure":
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = COLORS["ink"]
    style: Any = {
        "font.size": 8.5,
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLORS["faint"],
        "grid.linewidth": 0.5,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.fontsize": 8,
    }
    with rc_context(style):
        columns, rows = min(COLUMNS, panels), -(-panels // COLUMNS)
        figure = Figure((SIZE[0], SIZE[1] * rows), layout="constrained", dpi=150)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        draw(*grid[:panels])
        for axes in grid[panels:]:
            axes.remove()
        if title is not None:
            figure.suptitle(title)
    return figure

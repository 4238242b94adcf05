"""The figures of the report: each as SVG, in words and in numbers."""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_duo.evaluation import Predictions
from lightning_duo.report.figures import CHOSEN, FIGURES, reliability
from lightning_duo.report.looks import COLORS, label, looks
from lightning_duo.selective import accuracy_at_coverage, generalized_risk_coverage_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Models: TypeAlias = Mapping[str, Predictions]


def illustrate(predictions: Models) -> list[dict[str, Any]]:
    """Each figure with its name, title, caption, alternative text and table.

    Args:
        predictions: Form -> predictions, with the duo.

    Returns:
        A mapping for each figure: name, svg, title, caption, alt, headings, table.
    """
    names = {name: label(predictions, name) for name in looks(predictions)}
    tables = {
        "risk_coverage": _risk_table(predictions, names),
        "reliability": _reliability_table(predictions, names),
        "confidence": _confidence_table(predictions, names),
    }
    return [
        {"name": name, "svg": _svg(FIGURES[name](predictions), name), **tables[name]}
        for name in FIGURES
    ]


def _risk_table(predictions: Models, names: dict[str, str]) -> dict[str, Any]:
    rows, duo = [], predictions["duo"]
    generalized = generalized_risk_coverage_curve(duo.score, duo.correct).risk
    for tenth in range(1, 11):
        row = [f"{10 * tenth} %"]
        for name in names:
            score, correct = predictions[name].score, predictions[name].correct
            risk = 1 - float(accuracy_at_coverage(score.double(), correct, tenth / 10))
            row.append(f"{100 * risk:.2f} %")
        last = -(-tenth * len(generalized) // 10) - 1
        row.append(f"{100 * float(generalized[last]):.2f} %")
        rows.append(row)
    middle = ", ".join(f"{name} {rows[4][i]}" for i, name in enumerate(names.values(), 1))
    return {
        "title": "Risk and coverage",
        "caption": (
            "Error rate among the answers that are kept when the least sure are deferred. Lower is "
            "better; at the right end everything is answered. The dashed vertical line is at the "
            "coverage chosen above."
        ),
        "alt": f"Curves of risk against coverage. When half is answered: {middle} wrong.",
        "headings": ["coverage", *names.values(), f"{names['duo']}, of all samples"],
        "table": rows,
    }


def _reliability_table(predictions: Models, names: dict[str, str]) -> dict[str, Any]:
    rows, models = [], {name: predictions[name] for name in names}
    found = {name: reliability(p.confidence, p.correct) for name, p in models.items()}
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
        "alt": f"Accuracy against confidence of {', '.join(names.values())} beside the diagonal.",
        "headings": [
            "confidence",
            *(f"{n}: {c}" for n in names.values() for c in ("samples", "confidence", "accuracy")),
        ],
        "table": rows,
    }


def _confidence_table(predictions: Models, names: dict[str, str]) -> dict[str, Any]:
    names = {name: text for name, text in names.items() if name != "sidekick"}  # as in the figure
    rows = []
    for tenth in range(10):
        row = [f"{10 * tenth} to {10 * tenth + 10} %"]
        for name in names:
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
        "headings": [
            "confidence",
            *(f"{n}: {kind}" for n in names.values() for kind in ("right", "wrong")),
        ],
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

"""How models look in figures and tables: labels, colours, lines."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_duo.evaluation import Predictions
from lightning_duo.evaluation.forms import LABELS

# One colour a role, each used for nothing else, so that the report can exchange them in the dark.
# Those of models differ for every kind of colour blindness too.
COLORS = {
    "ink": "#24292e",
    "faint": "#d1d5da",
    "base": "#5b6470",
    "sidekick": "#b45f06",
    "duo": "#0b62c4",
    "right": "#1a7f4b",
    "wrong": "#c2263b",
    "further1": "#702592",
    "further2": "#108563",
    "further3": "#685218",
}
DARK = {
    "ink": "#e3e8ee",
    "faint": "#38424d",
    "base": "#a9b4c0",
    "sidekick": "#f0a04b",
    "duo": "#66b2ff",
    "right": "#4fc586",
    "wrong": "#ff7b86",
    "further1": "#c350b7",
    "further2": "#7df7c0",
    "further3": "#eed831",
}
STYLES = {"base": "--", "sidekick": ":", "duo": "-"}
FURTHER_STYLES = ("-.", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)))


class Look(NamedTuple):
    """How a model is drawn."""

    label: str
    color: str
    style: Any
    """Of its line, as matplotlib has it."""


def looks(models: Mapping[str, Predictions]) -> dict[str, Look]:
    """The models that figures show: base, sidekick, duo and those that no duo has, each its look.

    Args:
        models: Form -> predictions.

    Returns:
        Form -> look, in the order of drawing. The first nine further forms differ in colour or
        style, the first three in both.
    """
    further = [name for name in models if name not in LABELS]
    drawn: dict[str, tuple[str, Any]]
    drawn = {name: (name, style) for name, style in STYLES.items() if name in models}
    for i, name in enumerate(further):
        drawn[name] = f"further{i % 3 + 1}", FURTHER_STYLES[(i + i // 3) % 3]
    return {
        name: Look(label(models, name).replace("$", r"\$"), COLORS[role], style)
        for name, (role, style) in drawn.items()
    }


def label(models: Mapping[str, Predictions], name: str) -> str:
    """What to call a model: its label, or else its key."""
    return models[name].label or name

"""Base, sidekick, duo and anything beside them, measured on the same samples."""

from lightning_duo.evaluation.duo import DuoMetrics, evaluate
from lightning_duo.evaluation.forms import Form, Weighted, duo_forms, judge, mean_probability
from lightning_duo.evaluation.measures import (
    HIGHER_IS_BETTER,
    MEASURES,
    Measure,
    measure,
    measure_accepted,
)
from lightning_duo.evaluation.predictions import Predictions

__all__ = [
    "HIGHER_IS_BETTER",
    "MEASURES",
    "DuoMetrics",
    "Form",
    "Measure",
    "Predictions",
    "Weighted",
    "duo_forms",
    "evaluate",
    "judge",
    "mean_probability",
    "measure",
    "measure_accepted",
]

"""Base, sidekick, duo and anything beside them, measured on the same samples."""

from lightning_duo.evaluation.duo import BYTES_OF_A_ROW, DuoMetrics, evaluate
from lightning_duo.evaluation.forms import (
    Form,
    Weighted,
    duo_forms,
    judge,
    mean_probability,
    single_forms,
)
from lightning_duo.evaluation.measures import (
    HIGHER_IS_BETTER,
    MEASURES,
    Measure,
    measure,
    measure_accepted,
)
from lightning_duo.evaluation.predictions import Predictions
from lightning_duo.evaluation.tally import Tally

__all__ = [
    "BYTES_OF_A_ROW",
    "HIGHER_IS_BETTER",
    "MEASURES",
    "DuoMetrics",
    "Form",
    "Measure",
    "Predictions",
    "Tally",
    "Weighted",
    "duo_forms",
    "evaluate",
    "judge",
    "mean_probability",
    "measure",
    "measure_accepted",
    "single_forms",
]

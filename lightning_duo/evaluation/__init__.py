"""Base, sidekick, duo and anything beside them, measured on the same samples."""

from lightning_duo.evaluation.forms import (
    HIGHER_IS_BETTER,
    DuoMetrics,
    Predictions,
    evaluate,
    measure,
    measure_accepted,
)

__all__ = [
    "HIGHER_IS_BETTER",
    "DuoMetrics",
    "Predictions",
    "evaluate",
    "measure",
    "measure_accepted",
]

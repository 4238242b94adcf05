"""Selective classification: curves, areas and thresholds over (confidence, correct)."""

from lightning_duo.selective.calibration import brier_scores, expected_calibration_error
from lightning_duo.selective.functions import (
    RiskCoverageCurve,
    accuracy_at_coverage,
    augrc,
    aurc,
    correctness_auroc,
    coverage_at_accuracy,
    e_aurc,
    fpr_at_tpr,
    generalized_risk_coverage_curve,
    risk_coverage_curve,
)
from lightning_duo.selective.threshold import Threshold, select_threshold, select_thresholds

__all__ = [
    "RiskCoverageCurve",
    "Threshold",
    "accuracy_at_coverage",
    "augrc",
    "aurc",
    "brier_scores",
    "correctness_auroc",
    "coverage_at_accuracy",
    "e_aurc",
    "expected_calibration_error",
    "fpr_at_tpr",
    "generalized_risk_coverage_curve",
    "risk_coverage_curve",
    "select_threshold",
    "select_thresholds",
]

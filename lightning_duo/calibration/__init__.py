"""Duos of two trained models without training: temperatures, a threshold, their file."""

from lightning_duo.calibration.calibration import Calibration
from lightning_duo.calibration.fit import (
    calibrate,
    calibrate_checked,
    check_request,
    choose_threshold,
)
from lightning_duo.calibration.models import CalibratedModels, calibrate_models

__all__ = [
    "CalibratedModels",
    "Calibration",
    "calibrate",
    "calibrate_checked",
    "calibrate_models",
    "check_request",
    "choose_threshold",
]

"""Asymmetric duos for PyTorch Lightning: a small sidekick makes a large model's confidence honest.

Names are imported when first used, so that a service that needs only `DuoModule` does not pay for
Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_duo.callback import DuoCallback
    from lightning_duo.module import DuoModule, DuoOutput
    from lightning_duo.predict import DuoPredictor, PredictionWriter
    from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures
    from lightning_duo.threshold import Threshold, select_threshold

__version__ = "0.1.0"
__all__ = [
    "DuoCallback",
    "DuoModule",
    "DuoOutput",
    "DuoPredictor",
    "PredictionWriter",
    "TemperatureFit",
    "Temperatures",
    "Threshold",
    "fit_temperatures",
    "select_threshold",
]

_HOME = {
    "DuoCallback": "callback",
    "DuoModule": "module",
    "DuoOutput": "module",
    "DuoPredictor": "predict",
    "PredictionWriter": "predict",
    "TemperatureFit": "temperature",
    "Temperatures": "temperature",
    "Threshold": "threshold",
    "fit_temperatures": "temperature",
    "select_threshold": "threshold",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

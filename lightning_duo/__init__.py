"""Asymmetric duos for PyTorch Lightning: a small sidekick makes a large model's confidence honest.

Names are imported when first used, so that a service that needs only `DuoModule` does not pay for
Lightning. What logits decide (`Classes`, `Labels`) is in `lightning_duo.tasks`, a call of a model
(`Call`) in `lightning_duo.base`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_duo._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_duo.base import LogitsOf
    from lightning_duo.callback import DuoCallback, add_sidekick
    from lightning_duo.module import DuoModule, DuoOutput
    from lightning_duo.predict import DuoPredictor, PredictionWriter
    from lightning_duo.selective import Threshold, select_threshold
    from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures

__all__ = [
    "DuoCallback",
    "DuoModule",
    "DuoOutput",
    "DuoPredictor",
    "LogitsOf",
    "PredictionWriter",
    "TemperatureFit",
    "Temperatures",
    "Threshold",
    "add_sidekick",
    "fit_temperatures",
    "select_threshold",
]

_HOME = {
    "DuoCallback": "callback",
    "DuoModule": "module",
    "DuoOutput": "module",
    "DuoPredictor": "predict",
    "LogitsOf": "base",
    "PredictionWriter": "predict",
    "TemperatureFit": "temperature",
    "Temperatures": "temperature",
    "Threshold": "selective",
    "add_sidekick": "callback",
    "fit_temperatures": "temperature",
    "select_threshold": "selective",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

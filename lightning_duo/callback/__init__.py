"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

from lightning_duo.callback.add import EPOCHS, add_sidekick
from lightning_duo.callback.duo import DuoCallback
from lightning_duo.callback.options import OptimizerFn, Options, SchedulerFn
from lightning_duo.callback.restored import Saved, duo_of_saved

__all__ = [
    "EPOCHS",
    "DuoCallback",
    "OptimizerFn",
    "Options",
    "Saved",
    "SchedulerFn",
    "add_sidekick",
    "duo_of_saved",
]

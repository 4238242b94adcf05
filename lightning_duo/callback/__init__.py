"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

from lightning_duo.callback.add import add_sidekick
from lightning_duo.callback.duo import DuoCallback

__all__ = ["DuoCallback", "add_sidekick"]

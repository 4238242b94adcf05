"""Sidekicks by name: models of timm, torchvision and transformers, their weights and heads."""

from lightning_duo.zoo.build import build_sidekick
from lightning_duo.zoo.heads import head_parameters
from lightning_duo.zoo.images import data_config, input_size
from lightning_duo.zoo.names import REMOTE, SidekickSource, check_source

__all__ = [
    "REMOTE",
    "SidekickSource",
    "build_sidekick",
    "check_source",
    "data_config",
    "head_parameters",
    "input_size",
]

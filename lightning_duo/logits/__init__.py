"""Logits of two trained models on the same samples: from files, or from the models."""

from lightning_duo.logits.check import Logits, check_logits, read_logits
from lightning_duo.logits.collect import CollectedLogits, collect_logits
from lightning_duo.logits.kept import LEVELS, MEMORY, Kept, NewTally, Sample, row_keys

__all__ = [
    "LEVELS",
    "MEMORY",
    "CollectedLogits",
    "Kept",
    "Logits",
    "NewTally",
    "Sample",
    "check_logits",
    "collect_logits",
    "read_logits",
    "row_keys",
]

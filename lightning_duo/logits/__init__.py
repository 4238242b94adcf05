"""Logits of two trained models on the same samples: from files, or from the models."""

from lightning_duo.logits.check import Logits, check_logits, read_logits
from lightning_duo.logits.collect import collect_logits

__all__ = ["Logits", "check_logits", "collect_logits", "read_logits"]

"""A duo as one file that runs where this library is not installed."""

from lightning_duo.export.duo import SUFFIX, Format, export_duo

__all__ = ["SUFFIX", "Format", "export_duo"]

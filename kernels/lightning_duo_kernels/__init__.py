"""The duo head as one operator; imports torch only, so a service can ship it alone."""

from lightning_duo_kernels.head import HeadOutput, duo_head

__all__ = ["HeadOutput", "duo_head"]

"""The duo head as one operator; imports torch (and triton) only, so a service can ship it alone."""

from lightning_duo_kernels.composite import weighted_sum
from lightning_duo_kernels.head import HeadOutput, duo_head

__all__ = ["HeadOutput", "duo_head", "weighted_sum"]

"""What a duo costs: FLOPs, memory, time."""

from lightning_duo.cost.flops import (
    Cost,
    compare_counters,
    count_flops,
    count_flops_fvcore,
    count_parameters,
    flops_balance,
    measure_cost,
)
from lightning_duo.cost.memory import free_memory, largest_batch, peak_memory
from lightning_duo.cost.text import find, overhead_text, ratio_text, throughput_table
from lightning_duo.cost.throughput import Ensemble, largest_batch_of_pair, measure_throughput
from lightning_duo.cost.timing import Spread, Timing, environment, installed_version, interleave

__all__ = [
    "Cost",
    "Ensemble",
    "Spread",
    "Timing",
    "compare_counters",
    "count_flops",
    "count_flops_fvcore",
    "count_parameters",
    "environment",
    "find",
    "flops_balance",
    "free_memory",
    "installed_version",
    "interleave",
    "largest_batch",
    "largest_batch_of_pair",
    "measure_cost",
    "measure_throughput",
    "overhead_text",
    "peak_memory",
    "ratio_text",
    "throughput_table",
]

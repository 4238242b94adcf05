"""How long the selective metrics take, beside one sort of the same confidences.

    python benchmarks/bench_metrics.py [--repeats 7] [--threads 1]

No metric of a ranking can be faster than ranking, so each is shown as a multiple of torch.sort;
runs are interleaved and medians shown. Last comes what the AURC metric keeps per sample.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_duo import metrics, selective
from lightning_duo.threshold import select_thresholds

SIZES = (10**4, 10**5, 10**6)
METHODS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "torch.sort": lambda confidence, correct: confidence.sort(descending=True),
    "aurc": selective.aurc,
    "e_aurc": selective.e_aurc,
    "augrc": selective.augrc,
    "correctness_auroc": selective.correctness_auroc,
    "coverage_at_accuracy": lambda *data: selective.coverage_at_accuracy(*data, 0.9),
    "fpr_at_tpr": selective.fpr_at_tpr,
    "select_threshold": lambda *data: select_thresholds(*data, [0.9]),
    "select_threshold, delta": lambda *data: select_thresholds(*data, [0.9], delta=0.05),
}


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Confidences of a calibrated model that is right 80 % of the time."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(count, generator=generator) ** 0.25
    return confidence, torch.rand(count, generator=generator) < confidence


def median_seconds(data: tuple[Tensor, Tensor], repeats: int) -> dict[str, float]:
    """Each method's median time over interleaved runs, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats + 1):
        for name, method in METHODS.items():
            start = time.perf_counter()
            method(*data)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def bytes_per_sample(data: tuple[Tensor, Tensor]) -> float:
    """What an AURC metric keeps of batches of 100."""
    metric = metrics.AURC()
    for confidence, correct in zip(*(part.split(100) for part in data), strict=True):
        metric.update(confidence.clone(), correct.clone())
    kept = metric.confidence + metric.correct
    return sum(part.untyped_storage().nbytes() for part in kept) / len(data[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title=f"CPU, {options.threads} torch threads, torch {torch.__version__}")
    for heading in ("N", "method", "ms (median)", "of one sort"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for count in SIZES:
        medians = median_seconds(samples(count), options.repeats)
        for name, median in medians.items():
            ratio = median / medians["torch.sort"]
            table.add_row(f"{count}", name, f"{1000 * median:.2f}", f"{ratio:.2f}")
        table.add_section()
    console = Console(width=100)
    console.print(table)
    console.print(f"AURC() keeps {bytes_per_sample(samples(10**4)):.1f} bytes a sample")


if __name__ == "__main__":
    main()

"""Wall time and memory of several methods, measured in turns so that ratios can be trusted."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHORTEST = 0.002  # seconds of one reading; what is faster is called several times in it
MOST_CALLS = 10_000
PACKAGES = ("torch", "torchvision", "triton", "timm", "lightning", "lightning_duo")


class Spread(NamedTuple):
    """Middle of several readings, and where most of them lie."""

    median: float
    low: float
    """20 % quantile."""
    high: float
    """80 % quantile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and quantiles, between neighbouring readings by linear interpolation.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
            Spread(median=3.5, low=2.0, high=5.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        median = statistics.median(values)
        return cls(median, min(median, fifths[0]), max(median, fifths[-1]))  # but for rounding


@dataclass(frozen=True)
class Timing:
    """Readings of several methods, taken in the same turns."""

    seconds: Mapping[str, Sequence[float]]
    """Method -> seconds of one call, a reading a turn; all methods have as many."""

    def spread(self, method: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds[method])

    def ratio(self, method: str, *others: str) -> Spread:
        """Time of a method over that of others together, turn by turn.

        What slows the machine for a while slows both parts of a turn, so this varies less than the
        ratio of two medians, and its spread says how much.

        Example:
            >>> Timing({"duo": [6.0, 12.0], "base": [4.0, 8.0], "sidekick": [1.0, 2.0]}).ratio(
            ...     "duo", "base", "sidekick"
            ... )
            Spread(median=1.2, low=1.2, high=1.2)
        """
        turns = zip(self.seconds[method], *(self.seconds[name] for name in others), strict=True)
        return Spread.of([first / sum(rest) for first, *rest in turns])

    def row(self, method: str, *reference: str) -> dict[str, Any]:
        """One line of a table: milliseconds of a call, and times the reference's."""
        spread, ratio = self.spread(method), self.ratio(method, *reference)
        return {
            "method": method,
            "ms": 1e3 * spread.median,
            "ms_20": 1e3 * spread.low,
            "ms_80": 1e3 * spread.high,
            "reference": " + ".join(reference),
            "ratio": ratio.median,
            "ratio_20": ratio.low,
            "ratio_80": ratio.high,
            "readings": len(self.seconds[method]),
        }


def interleave(
    methods: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    device: str | torch.device = "cpu",
    budget: float | None = None,
    overlap: bool = True,
) -> Timing:
    """Time methods side by side.

    Two calls of each come first, outside the clock, since the first may compile, allocate or read
    from disk. Then each turn takes one reading of every method; a turn begins one method further
    than the one before, so that none always follows the same other. On CUDA the device is idle
    when a reading starts, and again before it ends. A method that takes less than 2 ms is called
    several times in a reading.

    Args:
        methods: Name -> what to time, called without arguments.
        repeats: Turns.
        device: Where the methods run.
        budget: Seconds that all turns together should take; as many turns are left out as that
            needs, but three remain.
        overlap: Whether calls of one reading may overlap on CUDA, as in a stream of batches; else
            each is waited for, which is latency.

    Returns:
        The readings.

    Example:
        >>> timing = interleave({"sum": lambda: sum(range(1000)), "nothing": lambda: None})
        >>> timing.ratio("sum", "nothing").median > 1
        True
    """
    device = torch.device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    pause = _nothing if overlap else wait
    calls, expected = {}, 0.0
    for name, method in methods.items():
        method()
        seconds = _reading(method, 1, wait, pause)
        calls[name] = min(MOST_CALLS, max(1, round(SHORTEST / max(seconds, 1e-7))))
        expected += seconds * calls[name]
    if budget is not None:
        repeats = max(3, min(repeats, int(budget / max(expected, 1e-9))))
    readings: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for _ in range(repeats):
        for name in order:
            readings[name].append(_reading(methods[name], calls[name], wait, pause))
        order.append(order.pop(0))
    return Timing(readings)


def _reading(
    method: Callable[[], object], calls: int, wait: Callable[[], None], pause: Callable[[], None]
) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        method()
        pause()
    wait()
    return (time.perf_counter() - start) / calls


def _nothing() -> None:
    pass


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What every figure depends on besides the code: hardware, threads and versions.

    Args:
        device: Where the methods run.

    Returns:
        Plain values: ``device``, ``hardware``, ``cores``, ``threads``, ``python``, and the
        versions of PyTorch, Triton, Lightning, timm, torchvision and this library, None if missing;
        on CUDA also ``cuda`` and whether float32 convolutions run in TF32.
    """
    cuda = torch.device(device).type == "cuda"
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": torch.device(device).type,
        "hardware": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "tf32": torch.backends.cudnn.allow_tf32 if cuda else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

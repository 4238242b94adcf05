"""How much memory a call takes, and the largest batch that fits."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_duo.base import Call
from lightning_duo.cost.timing import interleave
from lightning_duo.nested import leaves, mapped

MOST_IMAGES = 128  # in a batch, as in the paper (App. A.2)
SHARE_OF_MEMORY = 0.5  # of what the system has free, that one forward may take


class Batch(NamedTuple):
    """The batch that a throughput is measured with."""

    size: int
    limit: str
    """What keeps it from being larger, in words."""


def batch_of(sample: Any, size: int) -> Call:
    """A batch of copies of one sample.

    Args:
        sample: An input of batch one, or a `Call` of such inputs.
        size: How many.
    """

    def copies(x: torch.Tensor) -> torch.Tensor:
        return x.expand(size, *x.shape[1:]).contiguous() if x.ndim else x

    found: Call = mapped(Call.with_input(sample), copies)
    return found


def device_of(sample: Any) -> torch.device:
    """Where the tensors of an input or a `Call` are."""
    return next((x.device for _, x in leaves(sample)), torch.device("cpu"))


def largest_batch(
    module: nn.Module,
    sample: Any,
    *,
    most: int = MOST_IMAGES,
    seconds: float | None = None,
) -> Batch:
    """Halve the batch until one forward fits.

    On CUDA a batch is tried until one does not run out of memory. On the CPU, where a process that
    takes too much is killed, its memory is predicted from batches of one and three, and may be half
    of what is free.

    Args:
        module: The largest of the models to run; see `largest_batch_of_pair`.
        sample: An input of batch one, or a `Call` of several, on the module's device.
        most: Where to begin.
        seconds: Longest forward, predicted from batches of one and four; None for any.

    Returns:
        The size, and what limits it.

    Raises:
        RuntimeError: If not even one sample fits.

    Source: Asymmetric Duos, App. A.2 (the largest batch that fits, at most 128).
    """

    def run(size: int) -> Callable[[], Any]:
        inputs = batch_of(sample, size)
        return lambda: inputs.of(module)

    def fits(size: int) -> bool:
        if device.type != "cuda":
            return used + (size - 1) * more <= SHARE_OF_MEMORY * free
        try:
            run(size)()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        return True

    device = device_of(sample)
    with torch.inference_mode():
        if device.type != "cuda":
            run(1)()
            bytes_in = sum(x.nbytes for _, x in leaves(sample))
            first, third = (peak_memory(run(size)) or 0 for size in (1, 3))
            used, more, free = first, max(bytes_in, (third - first) // 2), free_memory()
        size, limit = most, "the largest that is tried"
        while not fits(size):
            size, limit = size // 2, "a larger one would not fit into memory"
            if not size:
                raise RuntimeError("not even one sample fits into memory; choose smaller models")
        if seconds is not None:
            found = interleave({"1": run(1), "4": run(4)}, repeats=3, device=device)
            one, four = (found.spread(name).median for name in ("1", "4"))
            while size > 1 and one + (size - 1) * max(0.0, four - one) / 3 > seconds:
                size //= 2
                limit = f"the forward of a larger one would take over {seconds:g} s, as estimated"
    return Batch(size, limit)


def peak_memory(method: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes a call needs at its peak beyond what was in use before.

    On CUDA as PyTorch's allocator counts them; on the CPU as Linux counts the memory of this
    process, in steps of a page, where memory that was freed before and kept for reuse may hide
    some of it.

    Args:
        method: Called once; call it once before, so that nothing of its set-up counts.
        device: Where it runs.

    Returns:
        The bytes, or None on the CPU of another system.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    import psutil

    gc.collect()
    getattr(psutil, "heap_trim", gc.collect)()  # not every C library can give memory back
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
        before = int(psutil.Process().memory_info().rss)
        method()
        # psutil does not give the peak, which only this file resets and states.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return max(0, 1024 * peak - before)


def free_memory() -> int:
    """Bytes that this machine could still give; the container's, if less.

    psutil knows the machine only, so the limit of a container is read from its control group.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((group / "memory.current").read_text())
        stated = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    return min(free, int(limit) - used + int(stated.get("inactive_file", 0)))

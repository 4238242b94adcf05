"""Random numbers that nobody else notices."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def own_stream(device: torch.device, seed: int | None = None) -> Generator[None, None, None]:
    """Leave the random streams of Python, NumPy, PyTorch and the device as they were before.

    Args:
        device: Whose stream is kept besides that of the CPU.
        seed: From which all streams start inside, at least 0; by default they go on from where
            they are.

    Example:
        >>> import random
        >>> with own_stream(torch.device("cpu"), seed=1):
        ...     inside = random.random()
        >>> with own_stream(torch.device("cpu"), seed=1):
        ...     assert random.random() == inside
    """
    accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    place = () if device.index is None else (device.index,)
    kept = accelerator.get_rng_state(*place) if accelerator else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # Not torch.manual_seed, which seeds every device of the machine.
            torch.default_generator.manual_seed(seed)
            if accelerator:  # the process's current device, as the Trainer makes it
                accelerator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator:
            accelerator.set_rng_state(kept, *place)

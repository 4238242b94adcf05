"""Running a user's code without leaving traces: in modes, gradients, buffers, logs and streams."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def evaluating(module: nn.Module) -> Generator[None, None, None]:
    """Eval mode without gradients; every submodule gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def unnoticed(module: nn.Module) -> Generator[None, None, None]:
    """Undo what a forward that the user does not know of does: to buffers, such as counters.

    What it logs is dropped.
    """
    kept = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    silenced = [
        (part, name)
        for part in module.modules()
        for name in ("log", "log_dict")
        if callable(getattr(type(part), name, None)) and name not in vars(part)
    ]
    for part, name in silenced:
        vars(part)[name] = _nothing
    try:
        yield
    finally:
        for part, name in silenced:
            del vars(part)[name]
        with torch.no_grad():
            for part, name, buffer, values in kept:
                part._buffers[name] = buffer
                if not same_values(buffer, values):
                    buffer.copy_(values)


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""


@contextmanager
def frozen(module: nn.Module) -> Generator[None, None, None]:
    """Parameters that want no gradient, for a while.

    PyTorch's counter expects to find the graph of what does, and without gradients a view of a
    parameter has none: it fails on learned queries, such as SigLIP's pooling.
    """
    trained = [
        p
        for p in module.parameters()
        if not is_lazy(p) and p.requires_grad and p.is_leaf and not p.is_inference()
    ]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


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


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether the values are equal, NaN to NaN too."""
    return one.shape == other.shape and bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())

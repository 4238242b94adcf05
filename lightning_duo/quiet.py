"""Running a user's module without leaving traces in it."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_duo.batch import same_values


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

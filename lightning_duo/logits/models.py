"""Base and sidekick, called for one batch after the other as in a run."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call, as_module, has_forward, logits_in, logits_like
from lightning_duo.batch import describe
from lightning_duo.inputs import Calling
from lightning_duo.isolation import evaluating, own_stream, unnoticed
from lightning_duo.logits.messages import say, warn
from lightning_duo.logits.read import REMEDY
from lightning_duo.members import found_logits
from lightning_duo.nested import Path, leaves, mapped
from lightning_duo.text import check_tokens


class Models:
    """A trained base and a trained sidekick.

    Args:
        base: The base, or any callable in its place.
        sidekick: The sidekick, likewise; it may be on another device.
        logits_at: Where the logits are in what the models return, as of `DuoModule`.

    Raises:
        ValueError: If the base has no forward, a model has no values, or the sidekick cannot read
            the base's tokens.
    """

    def __init__(
        self, base: Callable[..., Any], sidekick: Callable[..., Any], logits_at: Path
    ) -> None:
        base, sidekick = as_module(base), as_module(sidekick)
        if not has_forward(getattr(base, "_orig_mod", base)):  # of a compiled one
            raise ValueError(
                f"{type(base).__name__} has no forward; pass the part of it that gives logits, or "
                "LogitsOf(lambda module, inputs: logits, base) of lightning_duo"
            )
        self.base, self.sidekick, self.logits_at = base, sidekick, logits_at
        self.devices = [_device_of(name, getattr(self, name)) for name in ("base", "sidekick")]
        for problem in check_tokens(base, sidekick):
            warn(problem)
        self.calling = Calling(sidekick, base, None, say)

    @contextmanager
    def unchanged(self) -> Generator[None, None, None]:
        """Both in eval mode; afterwards modes, buffers and random streams are as before."""
        both = nn.ModuleList([self.base, self.sidekick])
        with ExitStack() as stack:
            for device in dict.fromkeys(self.devices):
                stack.enter_context(own_stream(device))
            stack.enter_context(unnoticed(both))
            stack.enter_context(evaluating(both))
            yield

    def logits(self, call: Call) -> tuple[Tensor, Tensor]:
        """Logits of base and sidekick, in the shape of the base's, float32 on the CPU.

        Args:
            call: The base's.

        Raises:
            ValueError: If a model cannot run it or gives no logits, or their shapes differ.
        """
        base = self._run("base", self.base, call, self.devices[0])
        first = found_logits("base", logits_in(base, self.logits_at), base)
        sidekick = self._run("sidekick", self.sidekick, self.calling.of(call), self.devices[1])
        second = found_logits("sidekick", logits_like(first, sidekick, self.logits_at), sidekick)
        return _plain(first), _plain(second)

    def _run(self, name: str, model: nn.Module, call: Call, device: torch.device) -> Any:
        try:
            # A copy: a model that begins with an operation in place would change the data.
            return mapped(call, lambda x: x.to(device, copy=True)).of(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model may raise
            seen = " and ".join([describe(leaf) for _, leaf in leaves(call)][:3]) or "no tensor"
            remedy = REMEDY
            if name == "sidekick":
                remedy = "put what it needs in front of it, as in nn.Sequential(Resize(96), model)"
            raise ValueError(
                f"the {name} cannot run {seen}: {type(error).__name__}: {error}; {remedy}"
            ) from error


def _device_of(name: str, model: nn.Module) -> torch.device:
    """Where a model wants its inputs: where its first weights are."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError(
            f"the {name} is on the meta device, so its weights have no values; build it on the CPU "
            "and load its weights"
        )
    return device


def _plain(logits: Tensor) -> Tensor:
    """Without what a subclass adds: one with metadata would carry them along."""
    return logits.as_subclass(Tensor).float().cpu()

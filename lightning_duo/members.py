"""Two models that are called together, and the logits of each."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call, Function, as_module, logits_in, logits_like
from lightning_duo.batch import describe
from lightning_duo.nested import Path, mapped


class Members(nn.Module):
    """A base and a sidekick, called with the same arguments.

    Args:
        base: A model, or any callable that gives logits.
        sidekick: The same, perhaps on another device.
        logits_at: Keys, positions and names of attributes that lead to the logits in what the
            models return.

    Raises:
        TypeError: If either cannot be called, or ``logits_at`` is no tuple.
    """

    logits_at: Path = ()  # here too for what earlier versions pickled

    def __init__(
        self, base: Callable[..., Any], sidekick: Callable[..., Any], logits_at: Path = ()
    ) -> None:
        super().__init__()
        for name, model in (("base", base), ("sidekick", sidekick)):
            if isinstance(model, type) or not callable(model):
                raise TypeError(
                    f"the {name} must be a model, or another callable that gives logits, got "
                    f"{model!r}"
                )
        if not isinstance(logits_at, tuple):
            raise TypeError(
                f"logits_at must be a tuple of keys, positions and names, such as ('out', 0), got "
                f"{logits_at!r}"
            )
        self.base, self.sidekick = as_module(base), as_module(sidekick)
        self.logits_at = logits_at

    @property
    def device(self) -> torch.device:
        """Where the base is; where the sidekick is if the base has no weights here."""
        return _device_of(self.base) or _device_of(self.sidekick) or torch.device("cpu")

    @property
    def cannot_export(self) -> str:
        """Why this duo runs in Python only, with what to do; empty if it can be exported."""
        for name in ("base", "sidekick"):
            model = getattr(self, name)
            if isinstance(model, Function):
                return (
                    f"the {name} of this duo is a plain callable, {model.function!r}, which no "
                    "file can hold; call the duo in Python, or make a torch.nn.Module of it"
                )
        return ""

    def member_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits of base and sidekick, in the shape of the base's, of one dtype, on one device.

        The base is given a copy of the tensors in its arguments, whatever holds them: one that
        begins with an operation in place would change what the sidekick sees.

        Raises:
            ValueError: If either gives no logits, or their shapes differ, apart from dimensions
                of size 1.
        """
        base = self.base_logits(
            *(mapped(value, Tensor.clone) for value in args),
            **{name: mapped(value, Tensor.clone) for name, value in kwargs.items()},
        )
        output = self._sidekick_output(Call(args, kwargs))
        mine = logits_in(output, self.logits_at)
        outer = mine is not None and base.ndim == 3 and base.shape == (1, *mine.shape)
        if isinstance(self.base, Function) and outer:  # it would be read as one sample
            raise ValueError(
                f"the base gives logits {tuple(base.shape)}, the sidekick {tuple(base.shape[1:])}; "
                "take the outer list of the base's answer away"
            )
        sidekick = found_logits("sidekick", logits_like(base, output, self.logits_at), output)
        return of_one_dtype(base, beside(base, sidekick))

    def base_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of the base alone, in its shape and dtype.

        Raises:
            ValueError: If it gives none.
        """
        output = self.base(*args, **kwargs)
        return found_logits("base", logits_in(output, self.logits_at), output)

    def sidekick_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of the sidekick alone, in its shape and dtype.

        Where ``logits_at`` ends in a position of dimension 1, logits of two dimensions are taken
        for those of that position already.

        Raises:
            ValueError: If it gives none.
        """
        output = self._sidekick_output(Call(args, kwargs))
        return found_logits("sidekick", logits_in(output, self.logits_at, fewest=3), output)

    def _sidekick_output(self, call: Call) -> Any:
        """What the sidekick returns; it gets its inputs on its own device if that is another."""
        place = _device_of(self.sidekick)
        if place is not None and place != _device_of(self.base):
            call = mapped(call, lambda x: x.to(place))
        return call.of(self.sidekick)


def found_logits(member: str, logits: Tensor | None, output: Any) -> Tensor:
    """The logits of a member of a duo, or an error that says where they are looked for."""
    if logits is None:
        raise ValueError(
            f"the {member} must return floating-point logits, such as (N, K), or an object or "
            f"mapping with them under 'logits', got {describe(output)}; pass logits_at=... with "
            "the keys that lead to them, such as (0,) for the first of a tuple"
        )
    return logits


def _device_of(model: nn.Module) -> torch.device | None:
    """Where a model wants its inputs: where its first weights are.

    None if it has no weights, or they are on the meta device until they are needed.
    """
    first: Tensor | None = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None or first.device.type == "meta" else first.device


def beside(base: Tensor, other: Tensor) -> Tensor:
    """The other tensor on the device of the base's logits."""
    return other if other.device == base.device else other.to(base.device)


def of_one_dtype(base: Tensor, sidekick: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of both in the dtype that they share, else in float32."""
    if base.dtype != sidekick.dtype or base.dtype == torch.float64:
        return base.float(), sidekick.float()
    return base, sidekick

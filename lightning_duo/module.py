"""The deployable pair: both models, two temperatures, one head."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import Self, override

from lightning_duo.base import LogitsOf, as_logits
from lightning_duo.files import whole
from lightning_duo.temperature import UNWEIGHTED
from lightning_duo_kernels import duo_head, weighted_sum

Mode = Literal["weighted", "unweighted", "uq_only"]


class DuoOutput(NamedTuple):
    """What a duo says of each sample."""

    probs: Tensor
    """Class probabilities, shape (N, K), float32."""
    prediction: Tensor
    """Predicted class, shape (N,), int64."""
    confidence: Tensor
    """Probability of the prediction, shape (N,), float32."""
    accept: Tensor
    """Whether the confidence reaches the threshold, shape (N,), bool."""


class DuoModule(nn.Module):
    """A base and a sidekick that predict together.

    Both see the same input ``x``; put what the sidekick needs (another resolution, say) in front
    of it, as in ``nn.Sequential(Resize(96), model)``. The temperatures (2,) and the threshold
    are float32 buffers, which stay float32 when the module is converted to half precision.

    Args:
        base: Maps ``x`` to logits (N, K), or to an object or mapping with ``logits``.
        sidekick: The same, for the same classes.
        temperatures: Non-negative multipliers (base, sidekick), from `fit_temperatures`.
        mode: ``weighted``; ``unweighted``, with both temperatures 0.5 whatever is given; or
            ``uq_only``, where the base predicts and the duo says how sure that is.
        threshold: Lowest confidence to accept, in [0, 1]; ``inf`` accepts nothing.

    Raises:
        ValueError: If temperatures are negative or not finite, the mode is unknown, or the
            threshold is neither in [0, 1] nor ``inf``.

    Example:
        >>> import torch
        >>> duo = DuoModule(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), (1.0, 0.5))
        >>> duo(torch.randn(2, 4)).probs.shape
        torch.Size([2, 3])

    Source: Asymmetric Duos, Sec. 3.1.
    """

    temperatures: Tensor
    threshold: Tensor

    def __init__(
        self,
        base: nn.Module,
        sidekick: nn.Module,
        temperatures: Sequence[float],
        *,
        mode: Mode = "weighted",
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        weights = torch.as_tensor(
            UNWEIGHTED if mode == "unweighted" else temperatures, dtype=torch.float32
        ).detach()
        weights = weights.clone()
        if weights.shape != (2,) or not (weights.isfinite() & (weights >= 0)).all():
            raise ValueError(
                "temperatures must be two finite numbers (base, sidekick), each at least 0, got "
                f"{temperatures}"
            )
        if not (0 <= threshold <= 1 or threshold == math.inf):
            raise ValueError(
                "threshold must be a confidence in [0, 1], or inf to accept nothing, got "
                f"{threshold}"
            )
        self.base, self.sidekick, self.mode = base, sidekick, mode
        self.register_buffer("temperatures", weights)
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))

    @override
    def forward(self, x: Any) -> DuoOutput:
        """Predict; ``x`` is what the base's forward takes."""
        base, sidekick = self.member_logits(x)
        head = duo_head(base, sidekick, self.temperatures, uq_only=self.mode == "uq_only")
        assert head.probs is not None
        return DuoOutput(
            head.probs, head.prediction, head.confidence, head.confidence >= self.threshold
        )

    def logits(self, x: Any) -> Tensor:
        """Weighted sum of both models' logits, shape (N, K), float32."""
        return weighted_sum(*self.member_logits(x), self.temperatures)

    def member_logits(self, x: Any) -> tuple[Tensor, Tensor]:
        """Logits of base and sidekick, each (N, K), of one dtype.

        The base is given a copy of the tensors in ``x`` (itself a tensor, or tuples, lists and
        dicts of them): one that begins with an operation in place would change what the sidekick
        sees.

        Raises:
            ValueError: If either gives no logits, or their shapes differ.
        """
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
        base, sidekick = as_logits(self.base(copied)), as_logits(self.sidekick(x))
        if base is None or sidekick is None:
            raise ValueError(
                f"the {'base' if base is None else 'sidekick'} of a DuoModule must return "
                "floating-point logits (N, K), or an object or mapping with them under 'logits'"
            )
        if base.shape != sidekick.shape:
            raise ValueError(
                f"base and sidekick must give logits of one shape, got {tuple(base.shape)} and "
                f"{tuple(sidekick.shape)}; give both the same number of classes"
            )
        if base.dtype != sidekick.dtype or base.dtype == torch.float64:
            base, sidekick = base.float(), sidekick.float()
        return base, sidekick

    @override
    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.4g}" for weight in self.temperatures.tolist())
        return (
            f"DuoModule(base={_described(self.base)}, sidekick={_described(self.sidekick)}, "
            f"mode={self.mode!r}, temperatures=({weights}), threshold={self.threshold.item():.4g})"
        )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.half()` and friends must not round two numbers that scale every logit.
        exact = {name: self._buffers[name] for name in ("temperatures", "threshold")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def save(self, path: str | Path) -> None:
        """Write weights, temperatures, threshold and mode to one safetensors file.

        The file appears whole or not at all.

        Raises:
            ValueError: If a module keeps state that is no tensor.
        """
        tensors: dict[str, Tensor] = {}
        written: set[int] = set()
        for name, value in self.state_dict().items():
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
                what = str(value.layout) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name} is no dense tensor with values ({what}), and a duo file can hold "
                    "nothing else; if a module's get_extra_state returns it, return a tensor "
                    "there, or use torch.save(duo.state_dict(), path)"
                )
            own = value.contiguous()
            # The format stores no aliases: tied weights are written once for every name.
            memory = own.untyped_storage().data_ptr()
            tensors[_eager_name(name)] = own.clone() if memory in written else own
            written.add(memory)
        with whole(path) as file:
            file.touch()
            usual = file.stat().st_mode  # the format's own writer leaves files to their owner alone
            save_file(tensors, file, metadata={"format": "lightning_duo/1", "mode": self.mode})
            file.chmod(usual)

    @classmethod
    def load(cls, path: str | Path, base: nn.Module, sidekick: nn.Module) -> Self:
        """Read a saved duo into modules of the same architecture.

        Args:
            path: What `save` wrote.
            base: A base of the saved architecture; its weights are overwritten.
            sidekick: A sidekick of the saved architecture, with what stood in front of it.

        Returns:
            The duo, in eval mode, on the device of its modules.

        Raises:
            ValueError: If the file is no saved duo, or does not fit the modules.
        """
        mode, _ = read_header(path)
        duo = cls(base, sidekick, (1.0, 0.0), mode=mode)
        try:
            own = {_eager_name(name): name for name in duo.state_dict()}
            duo.load_state_dict({own.get(k, k): v for k, v in load_file(path).items()})
        except RuntimeError as error:
            raise ValueError(
                f"the duo in {path} does not fit these modules; build base and sidekick as they "
                f"were when it was saved: {error}"
            ) from error
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        duo.temperatures, duo.threshold = duo.temperatures.to(device), duo.threshold.to(device)
        return duo.eval()


def _described(model: nn.Module) -> str:
    """A model in a few words."""
    parts = list(model) if isinstance(model, nn.Sequential) and len(model) <= 3 else [model]
    names = [type(part.module if isinstance(part, LogitsOf) else part).__name__ for part in parts]
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{' -> '.join(names)} ({count:,} parameters)"


def _eager_name(name: str) -> str:
    """Name of a tensor without what `torch.compile` adds to those of the models it wraps."""
    return name.replace("_orig_mod.", "")


def read_header(path: str | Path) -> tuple[Mode, dict[str, list[int]]]:
    """Mode and shapes of all tensors of a saved duo.

    Raises:
        ValueError: If the file is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a duo saved by DuoModule.save ({error})") from error
    if metadata.get("format") != "lightning_duo/1":
        raise ValueError(f"{path} is not a duo saved by DuoModule.save: it has no such metadata")
    mode = metadata["mode"]
    assert mode in get_args(Mode)
    return mode, shapes

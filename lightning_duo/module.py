"""The deployable pair: both models, two temperatures, one head."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_duo.base import Fitting, LogitsOf, logits_in, logits_like
from lightning_duo.batch import describe
from lightning_duo.nested import Path as Keys
from lightning_duo.nested import mapped
from lightning_duo.saved import eager_name, read_header, write_duo
from lightning_duo.tasks import Classes, Labels, Task, task_from_state, task_state
from lightning_duo.temperature import UNWEIGHTED
from lightning_duo_kernels import duo_head, weighted_sum
from lightning_duo_kernels.head import HeadOutput

Mode = Literal["weighted", "unweighted", "uq_only"]
_NOTHING: Any = object()  # in place of a first argument, where all are given by name


class DuoOutput(NamedTuple):
    """What a duo says of each sample, or of each pixel, token or label of a sample."""

    probs: Tensor
    """Probabilities in the shape of the base's logits, such as (N, K) or (N, K, H, W), float32: of
    the classes; for `Labels` that the label holds."""
    prediction: Tensor
    """Predicted class, shape (N,) or (N, H, W), say, int64; for `Labels` 0 or 1 in the shape of
    the base's logits."""
    confidence: Tensor
    """Probability of the prediction, in the prediction's shape, float32."""
    accept: Tensor
    """Whether the confidence reaches the threshold, in the prediction's shape, bool."""


class DuoModule(nn.Module):
    """A base and a sidekick that predict together.

    A duo is called as the base is: both models get the same arguments. Put what the sidekick needs
    (another resolution, say) in front of it, as in ``nn.Sequential(Resize(96), model)``. The
    temperatures (2,) and the threshold are float32 buffers, which stay float32 when the module is
    converted to half precision.

    Args:
        base: Returns logits, such as (N, K), or a structure that holds them: where ``logits_at``
            leads, or else under the key or attribute ``logits``.
        sidekick: The same, for the same classes or labels; its structure may be another.
        temperatures: Non-negative multipliers (base, sidekick), from `fit_temperatures`.
        mode: ``weighted``; ``unweighted``, with both temperatures 0.5 whatever is given; or
            ``uq_only``, where the base predicts and the duo says how sure that is.
        threshold: Lowest confidence to accept, in [0, 1]; ``inf`` accepts nothing.
        task: What the logits decide: `Classes` or `Labels` of `lightning_duo.tasks`.
        logits_at: Keys, positions and names of attributes that lead to the logits in what the
            models return, such as ``(0,)`` for the first of a tuple. The last may be ``"[:, -1]"``
            or ``"[:, 0]"``, for the last or first position of dimension 1, such as the last step
            of a recurrent network or a class token.

    Raises:
        ValueError: If temperatures are negative or not finite, the mode is unknown, or the
            threshold is neither in [0, 1] nor ``inf``.
        TypeError: If the task or ``logits_at`` is of another type.

    Example:
        >>> import torch
        >>> duo = DuoModule(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), (1.0, 0.5))
        >>> duo(torch.randn(2, 4)).probs.shape
        torch.Size([2, 3])
        >>> convs = torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(3, 5, 1)
        >>> DuoModule(*convs, (1.0, 0.5))(torch.zeros(2, 3, 8, 8)).prediction.shape
        torch.Size([2, 8, 8])

    Source: Asymmetric Duos, Sec. 3.1.
    """

    cannot_export: str = ""
    """Why a duo of this class runs in Python only, with what to do; empty if it can be exported."""

    temperatures: Tensor
    threshold: Tensor
    task: Task = Classes()  # here too for what earlier versions pickled
    logits_at: Keys = ()

    def __init__(
        self,
        base: nn.Module,
        sidekick: nn.Module,
        temperatures: Sequence[float],
        *,
        mode: Mode = "weighted",
        threshold: float = 0.0,
        task: Task = Classes(),  # noqa: B008 (it is frozen)
        logits_at: Keys = (),
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if not isinstance(task, Classes | Labels):
            raise TypeError(f"task must be Classes(...) or Labels(...), got {task!r}")
        if not isinstance(logits_at, tuple):
            raise TypeError(
                f"logits_at must be a tuple of keys, positions and names, such as ('out', 0), got "
                f"{logits_at!r}"
            )
        self.base, self.sidekick, self.mode = base, sidekick, mode
        self.task, self.logits_at = task, logits_at
        weights = UNWEIGHTED if mode == "unweighted" else temperatures
        self.register_buffer("temperatures", _checked_temperatures(weights))
        self.register_buffer("threshold", _checked_threshold(threshold))

    @override
    def forward(self, x: Any = _NOTHING, /, *args: Any, **kwargs: Any) -> DuoOutput:
        """Predict; the arguments are those of the base's forward."""
        # torch.export needs a name for the first argument; it has trouble with *args alone.
        given = () if x is _NOTHING else (x, *args)
        return self.head(*self.member_logits(*given, **kwargs))

    def head(
        self, base: Tensor, sidekick: Tensor, *, rows_head: Callable[..., HeadOutput] = duo_head
    ) -> DuoOutput:
        """Predict from the logits of both models.

        Args:
            base: Logits of the base, of any shape that the task knows.
            sidekick: Logits of the sidekick, of the same shape and dtype.
            rows_head: What predicts for logits (R, K), called as `duo_head` is.
        """
        rows = self._rows(base, sidekick)
        found = rows_head(*rows, self.temperatures, uq_only=self.mode == "uq_only")
        assert found.probs is not None
        accept = found.confidence >= self.threshold
        parts = (found.probs, found.prediction, found.confidence, accept)
        return DuoOutput(*(self.task.back(part, base) for part in parts))

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Weighted sum of both models' logits in the shape of the base's, float32."""
        base, sidekick = self.member_logits(*args, **kwargs)
        return self.task.back(weighted_sum(*self._rows(base, sidekick), self.temperatures), base)

    def member_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits of base and sidekick, in the shape of the base's and of one dtype.

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
        output = self.sidekick(*args, **kwargs)
        sidekick = _found("sidekick", logits_like(base, output, self.logits_at), output)
        return _of_one_dtype(base, sidekick)

    def base_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of the base alone, in its shape and dtype.

        Raises:
            ValueError: If it gives none.
        """
        output = self.base(*args, **kwargs)
        return _found("base", logits_in(output, self.logits_at), output)

    def sidekick_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of the sidekick alone, in its shape and dtype.

        Where ``logits_at`` ends in a position of dimension 1, logits of two dimensions are taken
        for those of that position already.

        Raises:
            ValueError: If it gives none.
        """
        output = self.sidekick(*args, **kwargs)
        return _found("sidekick", logits_in(output, self.logits_at, fewest=3), output)

    def _rows(self, base: Tensor, sidekick: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both as rows (R, K), of one dtype."""
        return _of_one_dtype(
            self.task.rows(base, member="base").logits,
            self.task.rows(sidekick, member="sidekick").logits,
        )

    @override
    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.4g}" for weight in self.temperatures.tolist())
        task = "" if self.task == Classes() else f", task={self.task}"
        return (
            f"DuoModule(base={_described(self.base)}, sidekick={_described(self.sidekick)}, "
            f"mode={self.mode!r}, temperatures=({weights}), threshold={self.threshold.item():.4g}"
            f"{task})"
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
        """Write weights, temperatures, threshold, mode and task to one safetensors file.

        Which arguments of the base's call the sidekick does not take is written too. The file
        appears whole or not at all.

        Raises:
            ValueError: If a module keeps state that is no tensor.
        """
        more: dict[str, Any] = {}
        if self.task != Classes() or self.logits_at:
            more = {"task": task_state(self.task), "logits_at": self.logits_at}
        for fitting in (part for part in self.sidekick.modules() if isinstance(part, Fitting)):
            more["sidekick_drops"] = sorted(fitting.dropped)
        write_duo(path, self.state_dict(), self.mode, more)

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
        header = read_header(path)
        mode: Any = header.mode
        task, keys = task_from_state(header.more.get("task")), header.more.get("logits_at", ())
        if "sidekick_drops" in header.more:
            sidekick = Fitting(sidekick, header.more["sidekick_drops"])
        duo = cls(base, sidekick, (1.0, 0.0), mode=mode, task=task, logits_at=tuple(keys))
        try:
            own = {eager_name(name): name for name in duo.state_dict()}
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


def _found(name: str, logits: Tensor | None, output: Any) -> Tensor:
    """The logits of a model, or an error that says where they are looked for."""
    if logits is None:
        raise ValueError(
            f"the {name} of a DuoModule must return floating-point logits, such as (N, K), or an "
            f"object or mapping with them under 'logits', got {describe(output)}; pass "
            "DuoModule(..., logits_at=...) with the keys that lead to them, such as (0,) for the "
            "first of a tuple"
        )
    return logits


def _of_one_dtype(base: Tensor, sidekick: Tensor) -> tuple[Tensor, Tensor]:
    if base.dtype != sidekick.dtype or base.dtype == torch.float64:
        return base.float(), sidekick.float()
    return base, sidekick


def _checked_temperatures(values: Sequence[float]) -> Tensor:
    weights = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    if weights.shape != (2,) or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(
            "temperatures must be two finite numbers (base, sidekick), each at least 0, got "
            f"{values}"
        )
    return weights


def _checked_threshold(value: float) -> Tensor:
    if not (0 <= value <= 1 or value == math.inf):
        raise ValueError(
            f"threshold must be a confidence in [0, 1], or inf to accept nothing, got {value}"
        )
    return torch.tensor(value, dtype=torch.float32)

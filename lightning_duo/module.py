"""The deployable pair: both models, two temperatures, one head."""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_duo.base import Fitting, Function, LogitsFn, LogitsOf, as_module
from lightning_duo.members import Members, beside, of_one_dtype
from lightning_duo.nested import Path as Keys
from lightning_duo.saved import eager_name, read_header, write_duo
from lightning_duo.tasks import Classes, Labels, Task, task_from_state, task_state
from lightning_duo.temperature import UNWEIGHTED
from lightning_duo.zoo import SidekickSource
from lightning_duo_kernels import duo_head, weighted_sum
from lightning_duo_kernels.head import HeadOutput

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

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


class DuoModule(Members):
    """A base and a sidekick that predict together.

    A duo is called as the base is: both models get the same arguments. Put what the sidekick needs
    (another resolution, say) in front of it, as in ``nn.Sequential(Resize(96), model)``. The
    temperatures (2,) and the threshold are float32 buffers, which stay float32 when the module is
    converted to half precision.

    Args:
        base: Returns logits, such as (N, K), or a structure that holds them: where ``logits_at``
            leads, or else under the key or attribute ``logits``. A model; or any callable, such as
            the client of a service, which may also return an array or lists of numbers.
        sidekick: The same, for the same classes or labels; its structure may be another. It may be
            on another device than the base; it is given its inputs there.
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

    temperatures: Tensor
    threshold: Tensor
    task: Task = Classes()  # here too for what earlier versions pickled

    def __init__(
        self,
        base: Callable[..., Any],
        sidekick: Callable[..., Any],
        temperatures: Sequence[float],
        *,
        mode: Mode = "weighted",
        threshold: float = 0.0,
        task: Task = Classes(),  # noqa: B008 (it is frozen)
        logits_at: Keys = (),
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if not isinstance(task, Classes | Labels):
            raise TypeError(f"task must be Classes(...) or Labels(...), got {task!r}")
        super().__init__(base, sidekick, logits_at)
        self.mode, self.task = mode, task
        weights = UNWEIGHTED if mode == "unweighted" else temperatures
        self.register_buffer("temperatures", _checked_temperatures(weights).to(self.device))
        self.register_buffer("threshold", _checked_threshold(threshold).to(self.device))

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
        temperatures, threshold = beside(base, self.temperatures), beside(base, self.threshold)
        found = rows_head(*rows, temperatures, uq_only=self.mode == "uq_only")
        assert found.probs is not None
        accept = found.confidence >= threshold
        parts = (found.probs, found.prediction, found.confidence, accept)
        return DuoOutput(*(self.task.back(part, base) for part in parts))

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Weighted sum of both models' logits in the shape of the base's, float32."""
        base, sidekick = self.member_logits(*args, **kwargs)
        temperatures = beside(base, self.temperatures)
        return self.task.back(weighted_sum(*self._rows(base, sidekick), temperatures), base)

    def _rows(self, base: Tensor, sidekick: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both as rows (R, K), of one dtype."""
        return of_one_dtype(
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
    def load(cls, path: str | Path, base: Callable[..., Any], sidekick: Callable[..., Any]) -> Self:
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
            sidekick = Fitting(as_module(sidekick), header.more["sidekick_drops"])
        duo = cls(base, sidekick, (1.0, 0.0), mode=mode, task=task, logits_at=tuple(keys))
        try:
            own = {eager_name(name): name for name in duo.state_dict()}
            duo.load_state_dict({own.get(k, k): v for k, v in load_file(path).items()})
        except RuntimeError as error:
            raise ValueError(
                f"the duo in {path} does not fit these modules; build base and sidekick as they "
                f"were when it was saved: {error}"
            ) from error
        return duo.eval()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        base: "LightningModule | type[LightningModule] | nn.Module",
        sidekick: SidekickSource | None = None,
        *,
        name: str | None = None,
        sidekick_transform: Callable[[Any], Any] | None = None,
        logits_fn: LogitsFn | None = None,
        weights_only: bool = True,
    ) -> "DuoModule":
        """The duo of a checkpoint that a Trainer with `DuoCallback` has saved.

        Base and sidekick are those of that moment; `Trainer.validate` with the checkpoint pairs its
        base with the best sidekick instead.

        Args:
            path: The checkpoint, ``*.ckpt``.
            base: Your LightningModule, whose weights are overwritten; or its class, if its
                hyperparameters were saved; or a module like the part of it that its steps call.
            sidekick: By default the one that the run had, if that was given by its name; else a
                module like it, or the function that made it.
            name: Of the callback, if the run had several.
            sidekick_transform: As in the run; not needed for transforms of torchvision or PyTorch
                without weights.
            logits_fn: As in the run, if it had one.
            weights_only: Whether to refuse a checkpoint that holds more than tensors and plain
                types; reading any other runs code that it names, so trust where it comes from.

        Returns:
            The duo, in eval mode, on the CPU or where the base is; it shares the base's weights.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no duo, none with temperatures, or another one than these
                modules make; or if something that the run was given is missing.

        Example:
            >>> duo = DuoModule.from_checkpoint("run.ckpt", MyModel)  # doctest: +SKIP
        """
        # What reads runs stands above; a service that loads saved duos does not need it.
        restored = import_module("lightning_duo.callback.restored")
        duo: DuoModule = restored.duo_from_checkpoint(
            path,
            base,
            sidekick,
            name=name,
            sidekick_transform=sidekick_transform,
            logits_fn=logits_fn,
            weights_only=weights_only,
        )
        return duo


def _described(model: nn.Module) -> str:
    """A model in a few words."""
    if isinstance(model, Function):
        return str(getattr(model.function, "__qualname__", type(model.function).__name__))
    parts = list(model) if isinstance(model, nn.Sequential) and len(model) <= 3 else [model]
    names = [type(part.module if isinstance(part, LogitsOf) else part).__name__ for part in parts]
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{' -> '.join(names)} ({count:,} parameters)"


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

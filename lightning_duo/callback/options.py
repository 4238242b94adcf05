"""What the user asked of the callback: checked once, never changed."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_duo.base import LogitsFn
from lightning_duo.batch import BatchFn
from lightning_duo.calibration import check_request
from lightning_duo.evaluation import MEASURES
from lightning_duo.logits import MEMORY
from lightning_duo.report import check_matplotlib
from lightning_duo.tasks import Classes, Labels, Task, task_state
from lightning_duo.zoo import SidekickSource, check_source

OptimizerFn: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFn: TypeAlias = Callable[[Optimizer], LRScheduler]
MetricNames: TypeAlias = Literal["all"] | Sequence[str]

METRICS = ("accuracy", "nll", "brier", "ece", "aurc", "sac98")  # logged by default
FORMS = ("base", "base_scaled", "sidekick", "duo")  # whose metrics are logged


@dataclass(frozen=True)
class Options:
    """The arguments of `DuoCallback`, which describes them.

    Raises:
        ValueError: If no model is called ``sidekick``, or a value is out of range.
        TypeError: If something that is called is not callable.
        ImportError: If figures are wanted and matplotlib is missing.
        FileNotFoundError: If the weights file does not exist.
    """

    sidekick: SidekickSource
    num_classes: int | None = None
    pretrained: bool = True
    weights: str | Path | None = None
    sidekick_transform: Callable[[Any], Any] | None = None
    batch_fn: BatchFn | None = None
    logits_fn: LogitsFn | None = None
    task: Task | None = None
    head: str | None = None
    probe: float = 0.3
    optimizer: OptimizerFn | None = None
    lr_scheduler: SchedulerFn | None = None
    calibration_loader: int = 0
    target_accuracy: float | None = None
    delta: float | None = None
    metrics: MetricNames = METRICS
    fit_memory: int = MEMORY
    figures: bool = False
    summary: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name == "":
            raise ValueError("name must not be empty; leave it out, or pass a name")
        if self.calibration_loader < 0:
            raise ValueError(f"calibration_loader must be 0, 1, ..., got {self.calibration_loader}")
        check_source(self.sidekick, self.weights)
        fewest = 1 if isinstance(self.task, Labels) else 2
        if self.num_classes is not None and self.num_classes < fewest:
            raise ValueError(f"num_classes must be at least {fewest}, got {self.num_classes}")
        if self.task is not None and not isinstance(self.task, Classes | Labels):
            raise TypeError(
                "task must be lightning_duo.tasks.Classes(...) or Labels(), got "
                f"{type(self.task).__name__}"
            )
        if self.sidekick_transform is not None and not callable(self.sidekick_transform):
            raise TypeError("sidekick_transform must be callable: inputs -> the sidekick's inputs")
        if not 0 <= self.probe <= 1:
            raise ValueError(
                f"probe must be a fraction of the training in [0, 1], got {self.probe}"
            )
        for name in ("optimizer", "lr_scheduler"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"{name} must be callable, such as functools.partial(torch.optim.AdamW, "
                    f"lr=1e-4) for the optimizer; got {value!r}"
                )
        if self.fit_memory < 1:
            raise ValueError(f"fit_memory must be a number of bytes, got {self.fit_memory}")
        check_request(self.target_accuracy, self.delta)
        object.__setattr__(self, "metrics", _known_metrics(self.metrics))
        if self.figures:
            check_matplotlib()

    @property
    def prefix(self) -> str:
        """What stands before every logged name."""
        return "" if self.name is None else f"{self.name}/"

    @property
    def sidekick_name(self) -> str:
        """What messages and checkpoints call the sidekick's architecture."""
        if isinstance(self.sidekick, str):
            return self.sidekick
        if isinstance(self.sidekick, nn.Module):
            return type(self.sidekick).__name__
        return str(getattr(self.sidekick, "__name__", "callable"))

    @property
    def knows_the_task(self) -> bool:
        """Whether a sidekick that was just built may have a trained head."""
        return isinstance(self.sidekick, nn.Module) or self.weights is not None

    @property
    def transform_name(self) -> str | None:
        """What checkpoints call the transform."""
        given = self.sidekick_transform
        if given is None or isinstance(given, nn.Module):
            return None if given is None else repr(given)
        return str(getattr(given, "__qualname__", type(given)))

    def state(self) -> dict[str, Any]:
        """How the user says to read a step, in plain types; of functions whether there is one."""
        return {
            "batch_fn": self.batch_fn is not None,
            "logits_fn": self.logits_fn is not None,
            "head": self.head,
            "task": self.task and task_state(self.task),
        }

    def measured_names(self, *, several: bool = True) -> list[str]:
        """Names of what a validation logs for each dataloader, without prefix.

        Args:
            several: Whether items have several decisions.
        """
        metrics = [name for name in self.metrics if several or not MEASURES[name].needs_items]
        names = [f"{form}/val_{metric}" for form in FORMS for metric in metrics]
        if self.target_accuracy is not None:
            names += ["duo/val_coverage", "duo/val_selective_accuracy"]
        return names

    def make_optimizer(self, parameters: list[nn.Parameter], *, probing: bool) -> Optimizer:
        """Optimizer of one phase of the sidekick's training (paper, A.2)."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return AdamW(parameters, lr=1e-3 if probing else 3e-4, weight_decay=1e-6)

    def make_scheduler(self, optimizer: Optimizer, steps: int | None) -> LRScheduler:
        """Scheduler of a phase of that many optimizer steps; None if it has no known end."""
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                raise MisconfigurationException(
                    "the sidekick's lr_scheduler is stepped after every update without a metric, "
                    "so ReduceLROnPlateau cannot be used; pass another scheduler"
                )
            return scheduler
        warmup = 100 if steps is None else max(1, round(0.05 * steps))

        def factor(step: int) -> float:
            if step < warmup or steps is None:
                return min(1.0, (step + 1) / (warmup + 1))
            fallen = min(1.0, (step - warmup) / max(1, steps - warmup))  # training may go on
            return (1 + math.cos(math.pi * fallen)) / 2

        return LambdaLR(optimizer, factor)


def _known_metrics(asked: MetricNames) -> tuple[str, ...]:
    """The metrics to log, in the order of the table of all."""
    if asked == "all":
        return tuple(MEASURES)
    names = asked if isinstance(asked, list | tuple | set) else (asked,)
    if any(name not in MEASURES for name in names) or isinstance(asked, str):
        raise ValueError(
            f'metrics must be "all" or names among {", ".join(MEASURES)}, such as '
            f'metrics=("nll", "aurc"); got {asked!r}'
        )
    return tuple(metric for metric in MEASURES if metric in asked)

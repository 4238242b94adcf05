"""The decisions that the outputs of two models hold: all of them, or a sample."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_duo.logits.check import Logits
from lightning_duo.logits.kept import LEVELS, Kept, Sample, row_keys
from lightning_duo.tasks import Classes, Labels, Rows, Task, task_of

IGNORED = -100  # target that losses of PyTorch leave out by default
FEW = 20  # decisions, whose logits may all look like probabilities by chance


class Decisions:
    """Rows of both models, batch after batch, and what is wrong with them.

    Beyond the memory a sample of the rows is kept, the same in whatever batches they come.

    Args:
        task: What the logits decide; None if shapes are to tell.
        memory: Bytes for the rows that are kept and for what will be said of them.
    """

    def __init__(self, task: Task | None, memory: int) -> None:
        self.task = task
        self.seen = 0
        """How many rows there were."""
        self._memory, self._items, self._kept = memory, 0, Kept()
        self._classes = 0
        self._like_probabilities = {"base": True, "sidekick": True}

    def add(self, base: Tensor, sidekick: Tensor, targets: Tensor) -> None:
        """Take the outputs of both models for a batch, in one shape, and its targets.

        Raises:
            ValueError: If it is not clear what is to be decided, targets do not fit, or a model
                gives probabilities where logits belong.
        """
        targets = _checked_targets(targets, base)
        self.task = self.task or task_of(base, targets)
        task = _ignoring(self.task)
        if isinstance(task, Classes):
            _check_range(targets, base, task)
        outputs = {"base": base, "sidekick": sidekick}
        mine, other = (task.rows(x, targets, name) for name, x in outputs.items())
        for name, rows in zip(outputs, (mine, other), strict=True):
            self._look(name, outputs[name], rows.logits, task)
        self._keep(mine, other, len(base))
        if self.seen >= FEW:
            self._refuse_probabilities()

    def _keep(self, base: Rows, sidekick: Rows, count: int) -> None:
        """Keep rows, or a sample of them, of so many items."""
        assert base.targets is not None
        items = torch.arange(count) if base.items is None else base.items
        places = torch.arange(len(items)) - torch.searchsorted(items, items)
        keys = row_keys(items + self._items, places, loader=0, seed=0)
        kept = self._kept
        kept.several |= bool((places > 0).any())
        kept.add(Logits(base.logits, sidekick.logits, base.targets), items + self._items, keys)
        while kept.size > self._memory and kept.level < LEVELS:
            kept.thin(kept.level + 1)
        self.seen, self._items = self.seen + len(items), self._items + count
        self._classes = base.logits.shape[1]

    def _look(self, name: str, output: Tensor, rows: Tensor, task: Task) -> None:
        """Note whether outputs may be probabilities; refuse them where they cannot be any."""
        inside = bool(((output >= 0) & (output <= 1)).all())
        if isinstance(task, Labels) and name in task.probabilities and not inside:
            raise ValueError(
                f"task says that the {name} gives probabilities, but its outputs go from "
                f"{float(output.min()):g} to {float(output.max()):g}; leave {name!r} out of "
                "Labels(probabilities=...) if they are logits"
            )
        sums = isinstance(task, Labels) or bool(((rows.sum(1) - 1).abs() < 1e-3).all())
        self._like_probabilities[name] &= inside and sums

    def _refuse_probabilities(self) -> None:
        """Raise ValueError if a model for classes ends in softmax."""
        for name, like in self._like_probabilities.items():
            if like and isinstance(self.task, Classes):
                raise ValueError(
                    f"the {name} gives probabilities (numbers >= 0 that sum to 1 over the classes) "
                    "where logits belong; take the softmax off its end, or pass LogitsOf(lambda "
                    f"model, x: model(x).log(), {name}) of lightning_duo"
                )

    def sample(self) -> Sample:
        """The rows that are kept, which are given away.

        Raises:
            ValueError: If there is none.
        """
        if not self._items:
            raise ValueError("the data hold no batch, so there is nothing to fit or measure")
        if not self._kept.rows:
            why = "the memory holds no decision; pass more" if self.seen else "no target counts"
            raise ValueError(f"there is nothing to fit or measure, as {why}")
        self._refuse_probabilities()
        kept = self._kept
        return kept.sample(self._classes, soft=kept.soft, several=kept.several)

    def problems(self) -> list[str]:
        """What to warn of at the end."""
        if not isinstance(self.task, Labels) or self.seen < FEW:
            return []
        return [
            f"all outputs of the {name} are between 0 and 1, as probabilities are; pass task="
            f"Labels(probabilities=({name!r},)) if they are, naming both models if both give them"
            for name, like in self._like_probabilities.items()
            if like and name not in self.task.probabilities
        ]


def _ignoring(task: Task) -> Task:
    """The same task, which leaves -100 out too: no class has that number."""
    if isinstance(task, Classes) and task.ignore_index is None:
        return replace(task, ignore_index=IGNORED)
    return task


def _checked_targets(targets: Tensor, base: Tensor) -> Tensor:
    """Targets on the CPU, whole numbers as int64: in a smaller type -100 may be another number."""
    if targets.shape[:1] != base.shape[:1]:
        raise ValueError(
            f"a batch has {len(targets) if targets.ndim else 'no'} targets, but the base gives "
            f"logits of shape {tuple(base.shape)} for it; both must be of the same items"
        )
    targets = targets.detach().as_subclass(Tensor).cpu()
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    return targets.long() if whole else targets


def _check_range(targets: Tensor, base: Tensor, task: Classes) -> None:
    """Raise ValueError for class indices that are none."""
    if targets.dtype != torch.int64 or base.ndim < 2 or base.shape[task.dim] < 2:
        return
    counted, classes = targets[targets != task.ignore_index], base.shape[task.dim]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        raise ValueError(
            f"targets must be in 0..{classes - 1} for {classes} classes, got {int(counted.min())}.."
            f"{int(counted.max())}; if one of them means that no class counts, pass "
            "task=Classes(ignore_index=...) of lightning_duo.tasks with it (of tokens with dim=-1 "
            "too), else pass a batch_fn that gives others"
        )

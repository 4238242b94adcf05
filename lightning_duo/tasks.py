"""What a model's output decides: a class of each sample, pixel or token, or several labels."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

NEAREST = 1e-7  # to 0 or 1 that a probability may come before its logit is taken


class Rows(NamedTuple):
    """Decisions, one a row."""

    logits: Tensor
    """Shape (R, K)."""
    targets: Tensor | None
    """True classes, shape (R,), int64; or their probabilities, shape (R, K)."""
    items: Tensor | None
    """Which item of the batch (image, sentence, graph) each row belongs to, shape (R,), int64; None
    where row i is item i."""


@dataclass(frozen=True)
class Classes:
    """One of K classes for every sample, or for every pixel or token of a sample.

    Args:
        dim: Dimension of the output that holds the classes: 1 for (N, K) and (N, K, H, W), -1 for
            tokens (N, T, K).
        ignore_index: Target of rows that do not count, such as padding.

    Example:
        >>> rows = Classes(dim=-1, ignore_index=-100).rows(
        ...     torch.zeros(2, 3, 5), torch.tensor([[1, 4, -100], [0, -100, -100]])
        ... )
        >>> rows.logits.shape, rows.items
        (torch.Size([3, 5]), tensor([0, 0, 1]))
    """

    dim: int = 1
    ignore_index: int | None = None

    def outputs(self, output: Tensor) -> int:
        """How many outputs a head needs that is to give the same: K."""
        self._check(output)
        return output.shape[self.dim]

    def rows(self, output: Tensor, targets: Tensor | None = None, member: str = "base") -> Rows:
        """The decisions that an output holds.

        Args:
            output: Logits, with the K classes in dimension ``dim``; the first is the batch.
            targets: True classes in the shape of the output without that dimension, or class
                probabilities in the shape of the output.
            member: Whose output it is.

        Raises:
            ValueError: If shapes, dtypes or values do not fit.
        """
        self._check(output)
        logits = output if self._is_rows(output) else output.movedim(self.dim, -1)
        places = logits.shape[:-1]
        items = None if len(places) == 1 else _items(places, output.device)
        rows = Rows(logits if items is None else logits.flatten(0, -2), None, items)
        if targets is None:
            return rows
        if targets.is_floating_point() and targets.shape == output.shape:
            soft = targets.movedim(self.dim, -1).reshape(-1, logits.shape[-1])
            return rows._replace(targets=_checked_soft(soft))
        targets = self._indices(targets, places)
        if self.ignore_index is None:
            return rows._replace(targets=check_targets(targets, logits.shape[-1]))
        kept = targets != self.ignore_index
        if bool(kept.all()):
            return rows._replace(targets=check_targets(targets, logits.shape[-1]))
        return Rows(
            rows.logits[kept],
            check_targets(targets[kept], logits.shape[-1]),
            _all_items(rows, items)[kept],
        )

    def back(self, values: Tensor, output: Tensor) -> Tensor:
        """Values of rows in the places of the output that they are of.

        Args:
            values: One a row, shape (R,), or one for each class, shape (R, K).
            output: The output whose `rows` they are of.

        Returns:
            Shape of the output, for (R,) without its classes.
        """
        if self._is_rows(output):
            return values
        shape = output.movedim(self.dim, -1).shape
        if values.ndim == 1:
            return values.view(shape[:-1])
        return values.view(shape).movedim(-1, self.dim)

    def _is_rows(self, output: Tensor) -> bool:
        """Whether an output is (N, K) already, as most are: then no views of it are made."""
        return output.ndim == 2 and self.dim in (1, -1)

    def _check(self, output: Tensor) -> None:
        if output.ndim < 2 or not output.is_floating_point():
            raise ValueError(
                "expected floating-point logits with a dimension for the classes, such as (N, K) "
                f"or (N, K, H, W), got {output.dtype} of shape {tuple(output.shape)}"
            )
        if output.shape[self.dim] < 2:
            raise ValueError(
                f"a duo needs logits of K >= 2 classes, got shape {tuple(output.shape)} with the "
                f"classes in dimension {self.dim}; if each value is the logit of a label of its "
                "own, pass task=Labels()"
            )

    def _indices(self, targets: Tensor, places: torch.Size) -> Tensor:
        if targets.shape != places:
            if targets.numel() != places.numel() or targets.is_floating_point():
                raise ValueError(
                    f"targets {tuple(targets.shape)} of {targets.dtype} do not fit logits with "
                    f"classes for each of {tuple(places)} places; expected class indices in that "
                    "shape, or probabilities in the shape of the logits"
                )
        return targets.reshape(-1)


@dataclass(frozen=True)
class Labels:
    """Labels that each hold or do not, apart from the others: binary, or multi-label.

    Every value of the output is the logit z of a decision of its own, whose classes 0 and 1 have
    the logits (0, z).

    Args:
        probabilities: Which of "base" and "sidekick" give probabilities where others give logits.

    Example:
        >>> Labels().rows(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]]))
        Rows(logits=tensor([[ 0.,  2.],
                [ 0., -1.]]), targets=tensor([1, 0]), items=None)
    """

    probabilities: tuple[str, ...] = ()

    def outputs(self, output: Tensor) -> int:
        """How many outputs a head needs that is to give the same: 1, or one for each label."""
        return 1 if output.ndim == 1 else output.shape[1]

    def rows(self, output: Tensor, targets: Tensor | None = None, member: str = "base") -> Rows:
        """The decisions that an output holds.

        Args:
            output: Logits, shape (N,), (N, L) or with more dimensions.
            targets: In the same shape, of any dtype: 0, 1 or a probability between them; NaN where
                a label is missing, which leaves the decision out.
            member: Whose output it is, "base" or "sidekick".

        Raises:
            ValueError: If shapes, dtypes or values do not fit.
        """
        if not output.is_floating_point() or output.ndim < 1:
            raise ValueError(
                f"expected floating-point logits (N,) or (N, L), got {output.dtype} of shape "
                f"{tuple(output.shape)}"
            )
        z = output.reshape(-1)
        if member in self.probabilities:
            z = z.float().clamp(NEAREST, 1 - NEAREST).logit()
        single = z.numel() == output.shape[0]  # len would be a constant in an export
        items = None if single else _items(output.shape, output.device)
        rows = Rows(torch.stack([torch.zeros_like(z), z], dim=1), None, items)
        if targets is None:
            return rows
        if targets.numel() != z.numel():
            raise ValueError(
                f"targets {tuple(targets.shape)} do not fit logits {tuple(output.shape)}; each "
                "label needs a target of 0 or 1"
            )
        y = targets.reshape(-1)
        if y.is_floating_point() and bool((missing := y.isnan()).any()):
            kept = ~missing
            rows = Rows(rows.logits[kept], None, _all_items(rows, items)[kept])
            y = y[kept]
        if bool(((y != 0) & (y != 1)).any()):
            if not y.is_floating_point() or bool(((y < 0) | (y > 1)).any()):
                raise ValueError(
                    f"targets of labels must be 0 or 1, or a probability, got {float(y.min()):g} "
                    f"to {float(y.max()):g}"
                )
            return rows._replace(targets=torch.stack([1 - y, y], dim=1))
        return rows._replace(targets=y.long())

    def back(self, values: Tensor, output: Tensor) -> Tensor:
        """Values of rows in the places of the output that they are of.

        Args:
            values: One a row, shape (R,), or one for each of the two classes, shape (R, 2), of
                which that of class 1 is taken.
            output: The output whose `rows` they are of.
        """
        return (values if values.ndim == 1 else values[:, 1]).view(output.shape)


Task: TypeAlias = Classes | Labels
_TASKS: dict[str, type[Classes] | type[Labels]] = {"classes": Classes, "labels": Labels}


def task_of(logits: Tensor, targets: Tensor, *, labels: bool = False) -> Task:
    """The task that shapes and dtypes leave no doubt about.

    Args:
        logits: What the base gives.
        targets: Of the same batch.
        labels: Whether it is known that each logit is of a label of its own.

    Raises:
        ValueError: If there are several tasks that it may be, or none.

    Example:
        >>> task_of(torch.zeros(2, 7, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64))
        Classes(dim=1, ignore_index=None)
    """
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    if labels and targets.numel() == logits.numel():
        return Labels()
    if logits.ndim == 2 and logits.shape[1] > 1:
        if targets.shape == logits.shape and targets.is_floating_point():
            return Classes()
    dims = dict.fromkeys((1, logits.ndim - 1)) if whole and logits.ndim > 1 else ()
    fits = [
        dim
        for dim in dims
        if logits.shape[dim] > 1 and targets.shape == logits.shape[:dim] + logits.shape[dim + 1 :]
    ]
    if len(fits) == 1:  # else the sizes of both dimensions are the same
        return Classes(dim=1 if fits == [1] else -1)
    raise ValueError(
        f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} of {targets.dtype} do "
        "not say what is to be decided: a duo needs logits of K >= 2 classes and one class index "
        "for each sample (or pixel or token), or one target of 0 or 1 for each logit; pass "
        "task=lightning_duo.tasks.Labels() if each logit is a label of its own (binary, "
        "multi-label), or task=Classes(dim=...) with the dimension of the classes"
    )


def task_state(task: Task) -> dict[str, Any]:
    """A task in types that JSON and checkpoints hold."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(task).items()}
    return {"kind": type(task).__name__.lower(), **values}


def task_from_state(state: dict[str, Any] | None) -> Task:
    """The task that `task_state` described; None, as files of earlier versions have it: (N, K)."""
    if state is None:
        return Classes()
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in state.items() if k != "kind"
    }
    return _TASKS[state["kind"]](**values)


def _items(places: torch.Size, device: torch.device) -> Tensor:
    """For each place of a batch the number of its item, (R,)."""
    each = places[1:].numel()
    return torch.arange(places[0], device=device).repeat_interleave(each)


def _all_items(rows: Rows, items: Tensor | None) -> Tensor:
    return torch.arange(len(rows.logits), device=rows.logits.device) if items is None else items


def _checked_soft(targets: Tensor) -> Tensor:
    total = targets.float().sum(1)
    if bool((targets < 0).any()) or bool(((total - 1).abs() > 0.01).any()):
        raise ValueError(
            "targets in the shape of the logits must be class probabilities, at least 0 and with a "
            "sum of 1 over the classes; several labels of a sample are a task of their own: pass "
            "task=Labels()"
        )
    return targets


def check_targets(targets: Tensor, num_classes: int, *, values: bool = True) -> Tensor:
    """Return the targets as int64 class indices of shape (N,), or say why they are none.

    Args:
        targets: True classes, shape (N,), an integer dtype.
        num_classes: K.
        values: Whether to look at the values too.

    Raises:
        ValueError: If they have another shape or dtype, or are outside 0..K-1.
    """
    if not isinstance(targets, Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with a tensor of targets, got "
            f"{type(targets).__name__}"
        )
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            "expected one class index for each decision, shape (N,) and an integer dtype, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}; convert them in batch_fn, as in "
            "targets.long(), or pass task=lightning_duo.tasks.Labels() if each logit is a label of "
            "its own (binary, multi-label)"
        )
    targets = targets.long()  # PyTorch cannot compare unsigned numbers
    if values and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"targets must be in 0..{num_classes - 1} for {num_classes} classes, got "
            f"{int(targets.min())}..{int(targets.max())}; where the step shifts, drops or picks "
            "labels, do so in DuoCallback(..., batch_fn=lambda batch: (inputs, targets)) too"
        )
    return targets

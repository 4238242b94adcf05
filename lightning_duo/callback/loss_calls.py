"""The losses that a step computes: their functions as they are called, or made by hand."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric
from typing_extensions import override

from lightning_duo.callback.by_hand import LOGARITHMS, SOFT, ByHand, Kind
from lightning_duo.callback.lineage import Lineage, tensors
from lightning_duo.callback.terms import Terms

LOSSES: dict[Callable[..., Any], Kind] = {
    F.cross_entropy: "classes",
    F.nll_loss: "classes",
    F.multi_margin_loss: "classes",
    F.binary_cross_entropy_with_logits: "labels",
    F.multilabel_soft_margin_loss: "labels",
    F.soft_margin_loss: "labels",
    F.binary_cross_entropy: "probabilities",
}

By: TypeAlias = Literal["step", "metrics", "hand"]
"""Who computes the losses of a step: it by their functions, metrics, or it without functions."""


class Loss(NamedTuple):
    """A call of a loss function."""

    kind: Kind
    logits: Tensor
    """Or probabilities, in the shape that the loss was given."""
    targets: Tensor | None
    """None for a loss made by hand of which they are not seen."""
    options: dict[str, Any]
    """Its other arguments by name: weight, label_smoothing, ignore_index, ..."""
    counts: Tensor | None = None
    """Which of its terms count, one after the other, if it does not sum them up itself."""
    factors: tuple[Tensor, ...] = ()
    """What a step multiplies with, where a loss of labels is made by hand: among them the
    targets."""


def of_one_output(losses: Sequence[Loss]) -> list[Loss]:
    """The same losses, but one in place of those of labels that stand side by side in one tensor.

    As where a step goes over the labels, or classes, with a loss for each.
    """
    joined: list[Loss] = []
    for _, alike in itertools.groupby(losses, _place):
        same = list(alike)
        starts = [loss.logits.storage_offset() for loss in same]
        if same[0].kind != "labels" or len(same) < 2 or starts != sorted(set(starts)):
            joined += same
            continue
        logits = torch.stack([loss.logits for loss in same], 1)
        targets = [loss.targets for loss in same if loss.targets is not None]
        joined.append(same[0]._replace(logits=logits, targets=torch.stack(targets, 1), counts=None))
    return joined


def _place(loss: Loss) -> Any:
    """The same for losses of labels that stand side by side in one tensor."""
    z, y = loss.logits, loss.targets
    if loss.kind != "labels" or y is None or y.shape != z.shape or z.layout != torch.strided:
        return id(loss)
    return id(loss) if z._base is None else (id(z._base), z.shape, z.stride())


def width_of(loss: Loss) -> int:
    """How many outputs its logits have."""
    return loss.logits.shape[1] if loss.logits.ndim > 1 else 1


def number_of(loss: Loss, losses: Sequence[Loss]) -> int:
    """Which loss this is, of those of its kind with as many outputs."""
    before = itertools.takewhile(lambda other: other.logits is not loss.logits, losses)
    alike = [
        other for other in before if (other.kind, width_of(other)) == (loss.kind, width_of(loss))
    ]
    return len(alike)


class LossMode(TorchFunctionMode):
    """Notes losses while it is active; a new one for every step, as kept ones recompile.

    Args:
        batch: Of the step.
        follow: Whether to follow what each tensor is made of, too, which takes far longer: without,
            losses that the step writes out are not found.
    """

    def __init__(self, batch: Any = None, *, follow: bool = True) -> None:
        super().__init__()
        self.follow = follow
        self.losses: list[Loss] = []
        self.lineage = Lineage(batch if follow else None)
        self.by_hand = ByHand(self.lineage)
        self.of_metrics: list[Loss] = []
        self.terms = Terms(self.lineage)

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result  # what is compiled must stay what it is without this
        if func in LOSSES:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            logits, targets = given.pop("input"), given.pop("target")
            if func is F.soft_margin_loss:  # of -1 and 1
                targets = (targets > 0).to(logits.dtype)
            loss = Loss(LOSSES[func], logits, targets, given)
            if _in_a_metric():
                self.of_metrics.append(loss)
            else:
                self.terms.begin(len(self.losses), result, targets)
                self.note(loss)
        else:
            self.terms.see(func, args, kwargs, result)
        if self.follow:
            self.lineage.note(func, tensors((args, kwargs)), result)
        if self.follow or func in LOGARITHMS or func in SOFT:
            self.by_hand.see(func, args, kwargs, result)
        return result

    def note(self, loss: Loss) -> None:
        """Keep a loss."""
        self.losses.append(loss)

    @property
    def by(self) -> By:
        """Who computes the losses that are found."""
        return "step" if self.losses else "metrics" if self.of_metrics else "hand"

    def found(self) -> list[Loss]:
        """The losses; where there are none those of metrics, or those probably made by hand."""
        if self.losses:
            return [
                loss._replace(counts=self.terms.counts(number))
                for number, loss in enumerate(self.losses)
            ]
        return self.of_metrics or [
            Loss(one.kind, one.logits, one.targets, {}, one.counts, tuple(one.factors))
            for one in self.by_hand.found()
        ]


def _in_a_metric() -> bool:
    """Whether a metric of torchmetrics computes this, which is no loss of the step."""
    own = inspect.currentframe()
    frame = None if own is None else own.f_back
    del own  # a frame that holds itself would keep all that the others hold
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Metric):
            return True
        if frame.f_code.co_name.endswith("_step"):
            return False
        frame = frame.f_back
    return False

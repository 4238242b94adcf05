"""The losses that a step computes: their functions as they are called, or made by hand."""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from torchmetrics import Metric
from typing_extensions import override

Kind: TypeAlias = Literal["classes", "labels", "probabilities"]
"""What a loss says of its logits: one class of several, labels apart from each other, or labels
whose probabilities it is given."""

LOSSES: dict[Callable[..., Any], Kind] = {
    F.cross_entropy: "classes",
    F.nll_loss: "classes",
    F.multi_margin_loss: "classes",
    F.binary_cross_entropy_with_logits: "labels",
    F.multilabel_soft_margin_loss: "labels",
    F.soft_margin_loss: "labels",
    F.binary_cross_entropy: "probabilities",
}
# Of these a loss by hand is made.
SOFT: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys(
        (F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax), "classes"
    ),
    **dict.fromkeys((Tensor.softmax, torch.logsumexp, Tensor.logsumexp), "classes"),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.logsigmoid), "labels"),
}
LOGARITHMS = (torch.log, Tensor.log, torch.clamp, Tensor.clamp)
# With these it picks the target; the position of the class indices among the arguments.
PICKS: dict[Callable[..., Any], int] = {
    torch.gather: 2,
    Tensor.gather: 2,
    Tensor.scatter: 2,
    Tensor.scatter_: 2,
    torch.scatter: 2,
    F.one_hot: 0,
}
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
REDUCTIONS = (torch.sum, Tensor.sum, torch.mean, Tensor.mean)


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
    """Which of its terms count, if it does not sum them up itself: what the step multiplies them
    with, or picks of them."""
    factors: tuple[Tensor, ...] = ()
    """What a step multiplies with, where a loss of labels is made by hand: among them the
    targets."""


class LossMode(TorchFunctionMode):
    """Notes losses while it is active; a new one for every step, as kept ones recompile."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Loss] = []
        self.terms: list[Tensor] = []  # what the losses returned
        self.all_count: set[int] = set()  # losses all of whose terms are summed up
        self.soft: deque[tuple[Kind | None, Tensor, Tensor]] = deque(maxlen=16)
        self.picked: deque[Tensor] = deque(maxlen=16)
        self.factors: deque[Tensor] = deque(maxlen=16)
        # What modules with weights gave, and what was made of that, where no graph tells.
        self._made: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result  # what is compiled must stay what it is without this
        if func in LOSSES:
            if _in_a_metric():
                return result
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            logits, targets = given.pop("input"), given.pop("target")
            if func is F.soft_margin_loss:  # of -1 and 1
                targets = (targets > 0).to(logits.dtype)
            self.note(Loss(LOSSES[func], logits, targets, given))
            self.terms.append(result)
        elif func in SOFT or func in LOGARITHMS:
            if isinstance(result, Tensor) and args:
                self.soft.append((SOFT.get(func), args[0], result))
        elif func in PICKS:
            place = PICKS[func]
            self.picked += args[place : place + 1] or [kwargs.get("index", kwargs.get("input"))]
        elif func in PRODUCTS and len(args) == 2:
            self._note_product(*args)
            self._note_product(*reversed(args))
        elif func is Tensor.__getitem__:
            self._note_part(*args)
        elif func in REDUCTIONS:
            self.all_count.update(i for i, terms in enumerate(self.terms) if args[0] is terms)
        if any(self.is_made(x) for x in _tensors((args, kwargs))):
            self.note_made(result)
        return result

    def is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from a module with weights."""
        return tensor.grad_fn is not None or tensor in self._made

    def note_made(self, output: Any) -> None:
        """Keep what comes from a module with weights; graphs keep what has a gradient."""
        for tensor in _tensors(output):
            if tensor.is_floating_point() and tensor.grad_fn is None:
                self._made[tensor] = True

    def _note_product(self, one: Any, other: Any) -> None:
        """Keep what a loss's terms, or the logarithms of probabilities, are multiplied with."""
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or other.requires_grad:
            return
        self.factors.append(other)
        for i, terms in enumerate(self.terms):
            if one is terms and terms.ndim and other.shape == terms.shape:
                self._count(i, other)
        soft = any(one is found and kind == "classes" for kind, _, found in self.soft)
        if any(other is found for _, _, found in self.soft):
            return  # an entropy, perhaps
        if soft and one.shape == other.shape:
            self.picked.append(other.abs())

    def _note_part(self, whole: Tensor, part: Any) -> None:
        """Keep what picks of a loss's terms, or of the logarithms of probabilities."""
        if isinstance(part, tuple) and self.soft:
            self.picked += [part[-1]]
        for i, terms in enumerate(self.terms):
            if whole is terms and isinstance(part, Tensor) and part.shape == terms.shape:
                self._count(i, part)

    def _count(self, number: int, weights: Tensor) -> None:
        """Note which terms of a loss are weighted or picked, beside those that were before."""
        before, now = self.losses[number].counts, weights != 0
        now = now if before is None else now | before
        self.losses[number] = self.losses[number]._replace(counts=now)

    def note(self, loss: Loss) -> None:
        """Keep a loss."""
        self.losses.append(loss)

    def found(self) -> list[Loss]:
        """The losses; where there are none, those that were probably made by hand."""
        if self.losses:
            # Terms that are picked here and summed up as a whole there all count.
            return [
                loss._replace(counts=None) if i in self.all_count else loss
                for i, loss in enumerate(self.losses)
            ]
        picked = [t for t in self.picked if isinstance(t, Tensor)]
        found = []
        for kind, x, _ in reversed(self.soft):
            fits = [t for t in picked if kind == "classes" and _fits(t, x)]
            factors = tuple(t for t in self.factors if kind == "labels" and t.numel() == x.numel())
            # Alone they are no loss: gates, attention, an expected value.
            if kind is not None and (fits or factors):
                found.append(Loss(kind, x, fits[-1] if fits else None, {}, factors=factors))
        return found


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors among the arguments or results of a function."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _fits(targets: Tensor, logits: Tensor) -> bool:
    """Whether these may be class indices for logits (N, K, ...), or their probabilities."""
    if targets.dtype == torch.int64:
        return logits.ndim > 1 and targets.numel() * logits.shape[1] == logits.numel()
    return targets.is_floating_point() and targets.shape == logits.shape


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

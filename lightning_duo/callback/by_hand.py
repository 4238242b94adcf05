"""Losses that a step writes out itself, recognised by what becomes of its probabilities."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_duo.callback.lineage import Lineage, tensors

Kind: TypeAlias = Literal["classes", "labels", "probabilities"]
"""What a loss says of its logits: one class of several, labels apart from each other, or labels
whose probabilities it is given."""

SOFT: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax), "classes"),
    **dict.fromkeys((torch.softmax, Tensor.softmax, torch.logsumexp, Tensor.logsumexp), "classes"),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.logsigmoid), "labels"),
}
LOGARITHMS = (torch.log, Tensor.log, torch.clamp, Tensor.clamp)
# Functions that use class indices, and the position of these among their arguments.
PICKS: dict[Callable[..., Any], int] = {
    **dict.fromkeys((torch.gather, Tensor.gather), 2),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim, Tensor.__getitem__), 1),
}
ONE_HOT: dict[Callable[..., Any], int] = {
    F.one_hot: 0,
    **dict.fromkeys((torch.scatter, Tensor.scatter, Tensor.scatter_), 2),
}
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_)
DIFFERENCES = (torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__)
FILLS = (Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill)
CHOICES = (torch.where, Tensor.where)
LAYERS = (
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm),
    *(Tensor.mm, torch.bmm, Tensor.bmm, torch.baddbmm, torch.einsum, F.conv1d, F.conv2d, F.conv3d),
)
REGRESSIONS = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss),
    *(F.gaussian_nll_loss, F.cosine_embedding_loss, F.cosine_similarity, F.margin_ranking_loss),
    *(F.triplet_margin_loss, F.triplet_margin_with_distance_loss, F.hinge_embedding_loss),
)
RECENT = 16  # of everything that is remembered


class Soft(NamedTuple):
    """A softmax or sigmoid; or a logarithm of one, which has no kind and no number."""

    kind: Kind | None
    logits: Tensor
    result: Tensor
    number: int = 0
    bare: tuple[Tensor, ...] = ()
    """The logits, and probabilities that are no logarithms."""


class Candidate(NamedTuple):
    """What may be a loss."""

    kind: Kind
    logits: Tensor
    targets: Tensor | None
    """None where they are one of the factors."""
    counts: Tensor | None
    """Which of its terms count, as a mask; None for all."""
    factors: list[Tensor]
    """What it is multiplied with."""


class _Use(NamedTuple):
    """Values of which some are picked, or that are weighted."""

    values: Tensor
    soft: frozenset[int]
    """Numbers of the softmax and sigmoid that they are made of."""
    by: Tensor
    """Class indices at which they are picked, or factors."""
    picks: bool
    by_one_hot: bool = False
    """Whether they are picked by a product with the one-hot form of the indices."""
    later: bool = False
    """Whether some were picked of them before."""


class ByHand:
    """Follows the probabilities of a step.

    Args:
        lineage: What the tensors of the step were made of.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.soft: deque[Soft] = deque(maxlen=RECENT)
        self._lineage = lineage
        self._uses: deque[_Use] = deque(maxlen=2 * RECENT)
        self._spent: set[int] = set()  # ingredients of something else: gates, attention
        self._count = 0

    def see(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Take account of a function that was called, when the lineage knows of its result.

        Args:
            function: The function.
            args: Its positional arguments.
            kwargs: The others.
            result: What it returned.
        """
        if function in SOFT or function in LOGARITHMS:
            if isinstance(result, Tensor) and args:
                self._note_soft(function, args[0], result)
        elif function in ONE_HOT:
            indices = _argument(args, kwargs, ONE_HOT[function])
            if isinstance(indices, Tensor) and not self._lineage.is_learnt(indices):
                self._lineage.note_one_hot(indices, result)
        elif function in PICKS:
            indices = _argument(args, kwargs, PICKS[function])
            if function is Tensor.__getitem__ and isinstance(indices, tuple):
                indices = indices[-1]
            if isinstance(indices, Tensor):
                picks = indices.dtype != torch.bool
                self._note_use(args[0], indices, picks=picks)
                if picks:
                    self._lineage.note_picked(result)
        elif function in FILLS and len(args) == 3 and args[2] == 0:
            self._note_use(args[0], ~args[1], picks=False)
        elif function in REGRESSIONS:
            for tensor in tensors((args, kwargs)):
                self._spent |= self._lineage.of(tensor).soft
        elif function in PRODUCTS or function in LAYERS or function in CHOICES:
            self._note_factors(function, list(tensors((args, kwargs))), result)
        elif function in DIFFERENCES:
            self._note_differences(list(tensors((args, kwargs))))

    def found(self) -> Iterator[Candidate]:
        """What may be a loss."""
        for soft in self.soft:
            kind, z = soft.kind, soft.logits
            if kind is None or soft.number in self._spent:
                continue
            uses = [u for u in self._uses if soft.number in u.soft or u.values is z]
            picked = [u for u in uses if u.picks and _fits(u.by, z)]
            factors = [u.by for u in uses if not u.picks]
            masks = [u.by for u in uses if not u.picks and (u.later or not picked)]
            if picked and _opposites(by for by in masks if by.dtype != torch.bool):
                continue  # what is picked is that of a yes and of a no: censored, say
            if kind == "classes":
                counts = _counts(masks, z)
                rows = [by for by in factors if _are_probabilities(by, z)]
                for targets in [u.by for u in picked] or map(torch.abs, rows):
                    yield Candidate(kind, z, targets, counts, [])
            elif picked:
                for indices in [u.by for u in picked if u.by_one_hot]:
                    yield Candidate(kind, z, _one_hot(indices, z), None, [])
            else:
                mine = [u for u in uses if u.by.numel() == z.numel()]
                fewest = min((len(u.soft) for u in mine), default=0)
                factors = [u.by for u in mine if len(u.soft) == fewest]
                some = [u.by.reshape(-1) != 0 for u in mine if len(u.soft) > fewest]
                counts = torch.stack(some).all(0) if some else None
                # What is weighted later holds terms of yes and of no; a mask is there as it is.
                every = (u.by for u in self._uses if u.by.numel() == z.numel())
                if _opposites(every) or any(_holds(u.values, soft.bare) for u in mine):
                    yield Candidate(kind, z, None, counts, factors)

    def _note_soft(self, function: Any, logits: Tensor, result: Tensor) -> None:
        kind = SOFT.get(function)
        if kind is not None:
            self._count += 1
            self._lineage.note_soft(self._count, result)
        bare = (logits, result.detach().exp() if function is F.logsigmoid else result)
        self.soft.append(Soft(kind, logits, result, self._count if kind else 0, bare))

    def _note_use(self, values: Any, by: Tensor, *, picks: bool, by_one_hot: bool = False) -> None:
        if not isinstance(values, Tensor) or self._lineage.is_learnt(by):
            return
        made = self._lineage.of(values)
        numbers = made.soft
        if picks and len({id(s.logits) for s in self.soft if s.number in numbers}) > 1:
            self._spent |= numbers  # of a mixture nobody has the logits
        self._uses.append(_Use(values, numbers, by, picks, by_one_hot, made.picked))

    def _note_factors(self, function: Any, given: list[Tensor], result: Any) -> None:
        for tensor in given:
            numbers = self._lineage.of(tensor).soft
            for other in given:
                theirs = self._lineage.of(other)
                if other is tensor or theirs.soft:
                    continue  # an entropy, perhaps
                if function in CHOICES and other.dtype != torch.bool:
                    continue  # what is chosen instead
                if self._lineage.is_learnt(other) and other.numel() > 1:
                    if numbers and function not in CHOICES:
                        self._spent |= numbers
                        self._lineage.forget_soft(result)
                elif function not in LAYERS or function is torch.einsum:
                    for indices in theirs.picks:
                        self._note_use(tensor, indices, picks=True, by_one_hot=True)
                        self._lineage.note_picked(result)
                    if not theirs.picks:
                        self._note_use(tensor, other, picks=False)
                        if function in CHOICES and all(
                            self._lineage.of(x).soft for x in given if x.dtype != torch.bool
                        ):
                            self._note_use(tensor, ~other.bool(), picks=False)

    def _note_differences(self, given: list[Tensor]) -> None:
        """Note from what probabilities differ: labels, or the one-hot form of classes."""
        for tensor, other in itertools.permutations(given, 2):
            theirs, numbers = self._lineage.of(other), self._lineage.of(tensor).soft
            if not numbers or theirs.soft or other.numel() != tensor.numel():
                continue
            if any(_holds(tensor, soft.bare) for soft in self.soft if soft.number in numbers):
                for by in theirs.picks or (other,):
                    picks = by is not other
                    self._note_use(tensor, by, picks=picks, by_one_hot=picks)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in ("index", "indices", "input") if name in kwargs), None)


def _fits(targets: Tensor, logits: Tensor) -> bool:
    """Whether these may be class indices for logits (N, K, ...)."""
    whole = targets.dtype == torch.int64 and logits.ndim > 1
    return whole and targets.numel() * logits.shape[1] == logits.numel()


def _opposites(factors: Iterable[Tensor]) -> bool:
    """Whether one of these is 1 where another is 0, as with the labels of yes and of no."""
    flat = [by.detach().reshape(-1).double() for by in factors]
    pairs = itertools.combinations(flat, 2)
    return any(len(a) == len(b) and torch.allclose(a + b, torch.ones_like(a)) for a, b in pairs)


def _are_probabilities(by: Tensor, logits: Tensor) -> bool:
    """Whether these may be the targets' probabilities, or one class each with a weight."""
    if by.shape != logits.shape or not by.is_floating_point():
        return False
    one, sums = (by != 0).sum(1) <= 1, by.abs().sum(1)
    return bool((one | ((sums - 1).abs() < 1e-2)).all())


def _holds(values: Tensor, many: Iterable[Tensor]) -> bool:
    """Whether these are the numbers of one of many tensors, in their order."""
    flat = values.detach().reshape(-1)
    return any(torch.equal(flat, one.detach().reshape(-1)) for one in many)


def _counts(factors: Sequence[Tensor], logits: Tensor) -> Tensor | None:
    """Which decisions count, one after the other, by what their terms are multiplied with."""
    places = logits.numel() // logits.shape[1] if logits.ndim > 1 and logits.shape[1] else 0
    masks = [
        by.reshape(-1) != 0
        for by in factors
        if by.numel() == places and places < logits.numel() and bool((by == 0).any())
    ]
    if not masks:
        return None
    every = torch.stack(masks)  # one upon the other, or one beside the other
    return every.all(0) if bool(every.all(0).any()) else every.any(0)


def _one_hot(indices: Tensor, logits: Tensor) -> Tensor:
    shape = (logits.shape[0], 1, *logits.shape[2:])
    return torch.zeros_like(logits).scatter_(1, indices.reshape(shape), 1.0)

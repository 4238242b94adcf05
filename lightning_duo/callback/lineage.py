"""What the tensors of a step were made of."""

import itertools
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_duo.nested import Path, leaves

# Of their arguments these take the shape only.
_BLANK = frozenset(
    {
        *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
        *(torch.rand_like, torch.randn_like, torch.randint_like),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
    }
)
# Of their other arguments these take shape or type only.
_LIKE = frozenset({Tensor.type_as, Tensor.to, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as})


class Made(NamedTuple):
    """What a tensor was made of."""

    learnt: bool = False
    """Whether a module with weights had a part in it, where no graph tells."""
    parts: frozenset[Path] = frozenset()
    """Of the batch."""
    soft: frozenset[int] = frozenset()
    """Numbers of the softmax and sigmoid whose probabilities it was made of."""
    picks: tuple[Tensor, ...] = ()
    """Class indices of which it is the one-hot form."""
    picked: bool = False
    """Whether probabilities in it were picked by class indices."""


NOTHING = Made()


class Lineage:
    """Remembers of tensors, as long as they live, what they were made of.

    Args:
        batch: Whose tensors are parts.
    """

    def __init__(self, batch: Any = None) -> None:
        self._made: MutableMapping[Tensor, Made] = WeakTensorKeyDictionary()
        for path, leaf in leaves(batch):
            self._made[leaf] = Made(parts=frozenset({path}))

    def of(self, tensor: Tensor) -> Made:
        """What a tensor was made of."""
        return self._made.get(tensor, NOTHING)

    def is_learnt(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from a module with weights."""
        return tensor.grad_fn is not None or self.of(tensor).learnt

    def note(self, function: Any, given: Iterable[Tensor], result: Any) -> None:
        """Remember what a function made of its arguments."""
        if function is Tensor.__setitem__:
            changed, *others = given
            self._keep([changed], [changed, *others])
        elif not isinstance(result, Tensor | tuple | list) or isinstance(result, torch.Size):
            return
        elif function is torch.broadcast_tensors:  # each is made of one
            for tensor, made in zip(given, result, strict=True):
                self._keep([made], [tensor])
        elif function not in _BLANK:
            some = itertools.islice(given, 1) if function in _LIKE else given
            self._keep(tensors(result), some)

    def note_soft(self, number: int, result: Tensor) -> None:
        """Remember that a tensor holds probabilities, or their logarithms."""
        self._made[result] = self.of(result)._replace(soft=frozenset({number}), picks=())

    def note_one_hot(self, indices: Tensor, result: Tensor) -> None:
        """Remember the class indices of a one-hot form."""
        self._made[result] = self.of(result)._replace(picks=(indices,))

    def note_picked(self, result: Any) -> None:
        """Remember that class indices have picked what is in a function's result."""
        for tensor in tensors(result):
            self._made[tensor] = self.of(tensor)._replace(picked=True)

    def note_learnt(self, given: Any, output: Any) -> None:
        """Remember that a module with weights made its output, of what it was given."""
        inputs = [tensor for _, tensor in leaves(given)]
        mine = {id(tensor) for tensor in inputs}
        for _, tensor in leaves(output):
            if id(tensor) not in mine:
                self._keep([tensor], [*inputs, tensor])
                self._made[tensor] = self.of(tensor)._replace(learnt=True, picks=())

    def forget_soft(self, result: Any) -> None:
        """Remember that no probabilities are left in a function's result."""
        for tensor in tensors(result):
            self._made[tensor] = self.of(tensor)._replace(soft=frozenset())

    def _keep(self, results: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        made = NOTHING
        for tensor in given:
            made = _joined(made, self.of(tensor))
            if tensor.grad_fn is not None or isinstance(tensor, nn.Parameter):
                made = made._replace(learnt=True)
        if made.learnt:
            made = made._replace(picks=())
        if made != NOTHING:
            for tensor in results:
                self._made[tensor] = made


def _joined(one: Made, other: Made) -> Made:
    if one == NOTHING or other == NOTHING:
        return other if one == NOTHING else one
    known = {id(tensor) for tensor in one.picks}
    picks = (*one.picks, *(t for t in other.picks if id(t) not in known))
    learnt, picked = one.learnt or other.learnt, one.picked or other.picked
    return Made(learnt, one.parts | other.parts, one.soft | other.soft, picks, picked)


def tensors(values: Any) -> Iterator[Tensor]:
    """Tensors among the arguments or results of a function."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)

"""What a step does with the terms of a loss: which of them it sums up."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_duo.callback.by_hand import CHOICES, FILLS, LAYERS, PRODUCTS
from lightning_duo.callback.lineage import Lineage, tensors

# They put values in other places, or leave some out.
_SHAPES: frozenset[Callable[..., Any]] = frozenset(
    {
        *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten),
        *(Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.expand),
        *(Tensor.transpose, torch.transpose, Tensor.t, torch.t, Tensor.permute, torch.permute),
        *(Tensor.__getitem__, torch.masked_select, Tensor.masked_select),
        *(torch.index_select, Tensor.index_select, torch.take, Tensor.take),
    }
)
_WEIGHTED = frozenset({*PRODUCTS, *LAYERS, torch.dot, Tensor.dot, torch.inner, Tensor.inner})
_NONE = -1  # place of a value that is made of no term, or that does not count


class _Held(NamedTuple):
    """Values that are made of the terms of a loss."""

    loss: int
    places: Tensor
    """Of which term each of them is made; its shape is theirs."""
    total: int
    """How many terms there are."""


class Terms:
    """Follows the terms of losses that do not sum them up themselves.

    A term that is multiplied with 0, filled, or not picked does not count. What the model itself
    chooses, such as hard examples, leaves out nothing.

    Args:
        lineage: What the tensors of the step were made of.
    """

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self._held: MutableMapping[Tensor, _Held] = WeakTensorKeyDictionary()
        self._masked: dict[int, Tensor] = {}
        self._summed: dict[int, Tensor] = {}
        self.any = False
        """Whether a loss left it to the step to sum up its terms."""
        self._pseudo: set[int] = set()  # losses whose targets the model chooses too

    def begin(self, number: int, terms: Any, targets: Tensor) -> None:
        """Follow what a loss has returned.

        Args:
            number: Of the loss.
            terms: What it returned.
            targets: What it was given.
        """
        if isinstance(terms, Tensor) and terms.ndim:
            self.any = True
            places = torch.arange(terms.numel(), device=terms.device).view(terms.shape)
            self._held[terms] = _Held(number, places, terms.numel())
            if self._lineage.is_learnt(targets):
                self._pseudo.add(number)

    def counts(self, number: int) -> Tensor | None:
        """Which terms of a loss are summed up, one after the other; None for all."""
        return self._summed.get(number, self._masked.get(number))

    def see(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Take account of a function that was called."""
        if not len(self._held):
            return
        given = list(tensors((args, kwargs)))
        one = next((tensor for tensor in given if tensor in self._held), None)
        if one is None:
            return
        if function is Tensor.__setitem__:
            self._note_filled(*args)
        elif isinstance(result, Tensor) and result.is_floating_point():
            others = [tensor for tensor in given if tensor not in self._held]
            held = self._held[one]
            places = self._places(function, args, kwargs, one, others)
            if places is not held.places:
                _add(self._masked, held, places)
            if places.shape == result.shape:
                self._held[result] = held._replace(places=places)
            else:
                _add(self._summed, held, places)
        elif any(tensor.is_floating_point() for tensor in tensors(result)):
            _add(self._summed, self._held[one], self._held[one].places)  # sorted, say

    def _places(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        one: Tensor,
        others: list[Tensor],
    ) -> Tensor:
        """Where the values of a result come from, or those that are summed up in it."""
        number, places, _ = self._held[one]
        if number not in self._pseudo and any(map(self._lineage.is_learnt, others)):
            return places
        if function in _SHAPES and one is args[0]:
            return function(places, *args[1:], **kwargs)  # type: ignore[no-any-return]
        if function in FILLS and one is args[0] and args[2:] == (0,):
            return places.masked_fill(args[1], _NONE)
        if function in CHOICES and len(args) == 3:
            yes, no = (self._held[x].places if _is(x, self._held) else _NONE for x in args[1:])
            return torch.where(args[0], yes, no)
        if function in _WEIGHTED:
            for other in others:
                if _broadcasts(other, places):
                    places = places.masked_fill(other.expand_as(places) == 0, _NONE)
        return places

    def _note_filled(self, whole: Tensor, part: Any, value: Any) -> None:
        """Note values that a step replaces by others."""
        if whole not in self._held or any(map(self._lineage.is_learnt, tensors(part))):
            return
        held = self._held[whole]
        places = held.places.clone()
        places[part] = self._held[value].places if _is(value, self._held) else _NONE
        self._held[whole] = held._replace(places=places)
        _add(self._masked, held, places)


def _is(value: Any, held: MutableMapping[Tensor, _Held]) -> bool:
    return isinstance(value, Tensor) and value in held


def _broadcasts(other: Tensor, places: Tensor) -> bool:
    pairs = zip(reversed(other.shape), reversed(places.shape), strict=False)
    return 0 < other.ndim <= places.ndim and all(a in (1, b) for a, b in pairs)


def _add(counts: dict[int, Tensor], held: _Held, places: Tensor) -> None:
    """Note of which terms values are made, beside those that were noted before."""
    now = torch.zeros(held.total, dtype=torch.bool, device=places.device)
    now[places[places != _NONE]] = True
    before = counts.get(held.loss)
    counts[held.loss] = now if before is None else now | before

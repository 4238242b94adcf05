"""What was learnt of a step, and how later steps of its kind are read with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.callback.layout import Spread, fitted, only, tensor_at
from lightning_duo.callback.taken import Taken, Template, is_plain
from lightning_duo.callback.watch import Called
from lightning_duo.nested import Path, at, path_text, without
from lightning_duo.tasks import Classes, Task, task_from_state, task_state


class Example(NamedTuple):
    """A call that made logits, with what it should have said."""

    call: Call
    """Without the labels."""
    logits: Tensor | None
    """The base's, detached, as its module gives them; None where they are not wanted."""
    targets: Tensor
    """In the places of the logits; see `tasks`."""
    part: Path = ()
    """Which of several loaders, combined in one batch, it comes from."""
    items: Tensor | None = None
    """Which item of the batch each entry of the first dimension belongs to, for several views of
    one; None where entry i is item i, or it is not known."""
    versions: Sequence[tuple[Tensor, int]] = ()
    """How often the tensors of the call had been changed in place when it was made."""

    @property
    def is_single(self) -> bool:
        """Whether it is one sample with nothing to take statistics over."""
        return self.targets.shape[:1] == (1,) and self.targets.ndim <= 2


@dataclass(frozen=True)
class Piece:
    """Where the targets of a call are in the batch."""

    targets: Path | None
    """None: the step makes them."""
    spread: Spread = ""
    """How views of one item, several for each target, follow each other."""
    offset: int = 0
    """What the step adds to the targets."""
    mask: Path | None = None
    """Where in the batch it is said which rows count; all of them by default."""
    number: int = 0
    """Which of the calls of its module in a step it is of."""

    def items(self, batch: Any, logits: Tensor) -> Tensor | None:
        """Which item each entry of the logits is a view of; None where there is one of each."""
        if not self.spread or self.targets is None:
            return None
        views = torch.arange(len(logits), device=logits.device)
        count = len(at(batch, self.targets))
        return views % count if self.spread == "repeat" else views // (len(logits) // count)

    def read(self, batch: Any, logits: Tensor, task: Task) -> Tensor:
        """The targets of these logits, in their places.

        Raises:
            LookupError: If the batch has no such part, or it does not fit.
        """
        if self.targets is None:
            raise LookupError("the step makes its targets itself")
        found = fitted(at(batch, self.targets), logits, task, self.spread)
        if found is None:
            raise LookupError(
                f"the targets batch{path_text(self.targets, batch)} do not fit the logits "
                f"{tuple(logits.shape)}"
            )
        if self.offset:
            found = found + self.offset
        if self.mask is None:
            return found
        mask = at(batch, self.mask).reshape(-1).bool()
        return only(found, mask.nonzero().flatten(), task)


@dataclass(frozen=True)
class Reading:
    """How the logits and targets of a step are found.

    They are outputs of a module that the step calls and parts of its batch, or have to be watched
    for in every step.
    """

    module: str
    """Name of the module that gives the logits, as in ``named_modules``."""
    logits_at: Path
    """Where in its output they are."""
    task: Task
    pieces: tuple[Piece, ...]
    """One for each of its calls in a step that count."""
    calls: int = 1
    """How many calls of it a step makes."""
    labels: tuple[Path, ...] = ()
    """Arguments of the call that hold the targets: ("kwargs", "labels"), say."""
    names: tuple[str, ...] = ()
    """Of the positional arguments of that module's forward."""
    template: Template | None = None
    """Argument -> part of the batch that it is; None if any is made by the step."""
    constants: tuple[tuple[Path, Any], ...] = ()
    """Arguments that are plain values, such as flags."""
    whole: bool = False
    """Whether the step itself makes the logits, from what modules give it."""
    unmixed: bool = False
    """Whether the sidekick sees the parts of the batch, and not what the step made of them."""
    guessed: bool = False
    """Whether the user told, or no loss was seen."""
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    """Of the loss: class weights, smoothing; the sidekick learns with them."""
    heads: int = field(default=1, compare=False)
    """Of how many heads the step computes a loss."""
    shared: frozenset[Path] = field(default=frozenset(), compare=False)
    """Parts of the batch of which the step makes both its logits and its targets."""
    others: frozenset[Path] = field(default=frozenset(), compare=False)
    """Parts of the batch of which the step makes its logits, beside those of the call."""

    @property
    def watching(self) -> bool:
        """Whether every step has to be watched."""
        return self.whole or any(piece.targets is None for piece in self.pieces)

    @property
    def same_for(self) -> tuple[Any, ...]:
        """What two readings of one kind of step share, whatever their batches."""
        where = self.module, self.logits_at, self.calls
        return *where, self.task, self.pieces, self.labels, self.whole

    def read(self, calls: Sequence[Called], batch: Any) -> list[Example]:
        """Read a step whose calls of the module were seen.

        Raises:
            LookupError: If the step did something else than what was learnt.
        """
        mine = [called for called in calls if called.name == self.module]
        if len(mine) != self.calls:
            raise LookupError(
                f"the step calls {self.name} {len(mine)} times, not {self.calls} as before"
            )
        examples = []
        for piece in self.pieces:
            called = mine[piece.number]
            logits = tensor_at(called.output, self.logits_at)
            targets = piece.read(batch, logits, self.task)
            part = (piece.targets or ())[:1] if len(self.pieces) > 1 else ()
            items = piece.items(batch, logits)
            bare = self.call_of(batch) if self.unmixed else self.bare(called.call)
            examples.append(Example(bare, logits.detach(), targets, part, items, called.versions))
        return examples

    def part_of(self, base: nn.Module) -> nn.Module:
        """The module that it names."""
        return base.get_submodule(self.module) if self.module else base

    def call_of(self, batch: Any) -> Call:
        """The call that the step would make of a batch.

        Raises:
            LookupError: If it is made of more than parts of the batch.
        """
        if self.template is None:
            raise LookupError(f"{self.name} is called with more than parts of the batch")
        given = [(where, at(batch, path)) for where, path in self.template]
        given += self.constants
        args = sorted(
            ((place, value) for (kind, place), value in given if kind == "args"),
            key=lambda one: int(one[0]),
        )
        kwargs = {str(key): value for (kind, key), value in given if kind == "kwargs"}
        return self.bare(Call(tuple(value for _, value in args), kwargs))

    def blank(self, batch: Any, outputs: int) -> Tensor:
        """Zeros in the shape of the only call's logits, as far as its targets tell it.

        They take no memory.

        Args:
            batch: The batch.
            outputs: K.

        Raises:
            LookupError: If the batch has no such targets.
        """
        targets = self.pieces[0].targets
        if targets is None:
            raise LookupError("the step makes its targets itself")
        leaf = at(batch, targets)
        shape = list(leaf.shape)
        if isinstance(self.task, Classes):
            dim = len(shape) if self.task.dim == -1 else self.task.dim
            soft = leaf.is_floating_point() and shape[dim : dim + 1] == [outputs]
            if not soft:
                shape.insert(dim, outputs)
        return torch.zeros((), device=leaf.device).expand(shape)

    def bare(self, call: Call) -> Call:
        """A call without its labels."""
        for path in sorted(self.labels, key=lambda path: (len(path), str(path)), reverse=True):
            if path[0] == "kwargs" and len(path) == 2:
                call = call._replace(kwargs={k: v for k, v in call.kwargs.items() if k != path[1]})
            elif path[0] == "args" and len(path) == 2:
                place = int(path[1])  # what follows is named, as it would move up
                later = zip(self.names[place + 1 :], call.args[place + 1 :], strict=False)
                call = Call(call.args[:place], {**dict(later), **call.kwargs})
            else:
                call = without(call, path)
        return call

    @property
    def name(self) -> str:
        """The module as code in the user's class would name it."""
        return f"self.{self.module}" if self.module else "self"

    def text(self, call: Call, taken: Taken) -> str:
        """What was learnt, in one line.

        Args:
            call: An example.
            taken: The batch that it is of.
        """
        parts = dict(self.template or ())

        def said(where: Path, value: Any) -> str:
            path = parts.get(where, taken.path_of(value))
            if path is not None:
                return f"batch{path_text(path, taken.batch)}"
            if is_plain(value):
                return repr(value)
            kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
            return f"a {kind} that the step makes"

        texts = [said(("args", i), value) for i, value in enumerate(call.args)]
        texts += [f"{key}={said(('kwargs', key), value)}" for key, value in call.kwargs.items()]
        where = path_text(self.logits_at) if self.logits_at else ""
        paths = {piece.targets for piece in self.pieces if piece.targets is not None}
        found = sorted(f"batch{path_text(path, taken.batch)}" for path in paths)
        targets = ", ".join(found) or "as the step makes them"
        if self.whole:
            return f"base: the step itself, from {self.name}(...); targets: {targets}"
        return f"base: {self.name}({', '.join(texts)}){where}; targets: {targets}"

    def state(self) -> dict[str, Any]:
        """In plain types, for checkpoints."""
        return {
            "module": self.module,
            "logits_at": list(self.logits_at),
            "task": task_state(self.task),
            "pieces": [
                [_listed(p.targets), p.spread, p.offset, _listed(p.mask), p.number]
                for p in self.pieces
            ],
            "calls": self.calls,
            "labels": [list(path) for path in self.labels],
            "names": list(self.names),
            "template": None
            if self.template is None
            else [[list(a), list(b)] for a, b in self.template],
            "constants": [[list(a), value] for a, value in self.constants],
            "whole": self.whole,
            "unmixed": self.unmixed,
            "guessed": self.guessed,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Reading":
        """What `state` described."""
        template = state["template"]
        return cls(
            state["module"],
            tuple(state["logits_at"]),
            task_from_state(state["task"]),
            tuple(Piece(_path(t), s, o, _path(m), n) for t, s, o, m, n in state["pieces"]),
            state["calls"],
            tuple(tuple(path) for path in state["labels"]),
            tuple(state["names"]),
            None if template is None else tuple((tuple(a), tuple(b)) for a, b in template),
            tuple((tuple(a), value) for a, value in state["constants"]),
            state["whole"],
            state["unmixed"],
            state["guessed"],
        )


def _listed(path: Path | None) -> list[Any] | None:
    return None if path is None else list(path)


def _path(path: list[Any] | None) -> Path | None:
    return None if path is None else tuple(path)

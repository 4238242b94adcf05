"""Seeing what a step does: the losses it computes, and the modules it calls, with what."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric

from lightning_duo.base import Call
from lightning_duo.callback.lineage import Lineage
from lightning_duo.callback.loss_calls import By, Loss, LossMode
from lightning_duo.nested import leaves

RECENT = 64  # calls of modules deep inside others that are remembered
OUTER = 2  # levels of modules whose calls are all remembered


class Called(NamedTuple):
    """A call of a module during a step."""

    name: str
    """Of the module, as in ``named_modules``; empty for the user's module itself."""
    call: Call
    output: Any
    depth: int
    """Number of modules within whose forward it was made."""
    versions: list[tuple[Tensor, int]]
    """How often the tensors of the call had been changed in place, when it began if that was seen,
    else when it ended."""
    weighted: bool = True
    """Whether the module has parameters."""


class Seen(NamedTuple):
    """What a step did."""

    losses: list[Loss]
    calls: list[Called]
    sources: list[tuple[Tensor, Tensor]]
    """Results of softmax, sigmoid and logarithm, each with what it was computed of."""
    by: By = "hand"
    """Who computes the losses; those that are written out are a guess."""
    lineage: Lineage = Lineage()
    """What its tensors were made of."""
    terms: bool = False
    """Whether it sums up the terms of a loss itself."""


class Watch:
    """Looks at the steps of one batch, from its start to its end.

    Compiled code is looked at from outside: whatever is inside it would be compiled anew, to
    something else.

    Args:
        module: The base.
        names: Modules whose calls are to be seen; None for all.
        losses: Whether to look for losses too.
        mode: What notes the losses.
    """

    def __init__(
        self,
        module: LightningModule,
        *,
        names: frozenset[str] | None,
        losses: bool,
        mode: Callable[[Any], LossMode] = LossMode,
    ) -> None:
        self.module, self.names, self.losses, self.mode = module, names, losses, mode
        self.seen = Seen([], [], [])
        self.given: tuple[Any, ...] = ()
        """What the step was given: its batch, and the numbers of that and of the loader."""
        self._mode: LossMode | None = None
        self._open: list[list[tuple[Tensor, int]]] = []  # of the calls that are going on
        self._taken: Callable[[], None] = _nothing

    def follow(self, trainer: Trainer, stage: str) -> None:
        """Look at the steps that a Trainer's strategy runs, until `finish`.

        Args:
            trainer: The user's.
            stage: "training", "validation" or "test".
        """
        self._taken = _take_step(trainer.strategy, f"{stage}_step", self)

    def finish(self) -> None:
        """Look no longer; may be called again."""
        self._taken()
        self._taken = _nothing  # it refers to this, and what was seen should go with the step

    @contextmanager
    def looking(self, *given: Any) -> Iterator[None]:
        """Around the step itself, of which the last of several evaluations counts.

        Args:
            given: What the step is given.
        """
        self.seen, self.given = Seen([], [], []), given
        with ExitStack() as stack:
            if self.names is None or "" in self.names:
                stack.enter_context(self._replaced("", self.module))
            for name, part in self._parts():
                if _is_compiled(part):
                    stack.enter_context(self._replaced(name, part))
                else:
                    for handle in self._hooked(name, part):
                        stack.callback(handle.remove)
            stack.callback(self._open.clear)
            if self.losses:
                stack.callback(self._note_losses)
                self._mode = stack.enter_context(self.mode(given[0] if given else None))
            yield

    def _note_losses(self) -> None:
        if self._mode is not None:
            sources = [(soft.result, soft.logits) for soft in self._mode.by_hand.soft]
            found, by, terms = self._mode.found(), self._mode.by, self._mode.terms.any
            self.seen = Seen(found, self.seen.calls, sources, by, self._mode.lineage, terms)
        self._mode = None

    @contextmanager
    def _replaced(self, name: str, part: nn.Module) -> Iterator[None]:
        """See the calls of a module that hooks do not see.

        They are those of the user's own, whose forward a step may call by its name, and those of
        modules that `torch.nn.Module.compile` has compiled with their hooks.
        """
        key = "_compiled_call_impl" if _is_compiled(part) else "forward"
        own, function = vars(part), getattr(part, key)
        before = own.get(key)

        def seen(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            self._enter(part, args, kwargs)
            with self._unseen() if _is_compiled(part) else nullcontext():
                output = function(*args, **kwargs)
            self._leave(name, part, Call(args, dict(kwargs)), output)
            return output

        own[key] = seen
        try:
            yield
        finally:
            if own.get(key) is seen:
                del own[key]
                if before is not None:
                    own[key] = before

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        if _is_compiled(self.module):
            return
        inside: tuple[str, ...] = ()  # a compiled module's parts are not called one by one
        for name, part in self._named():
            if not name or (inside and name.startswith(inside)):
                continue
            if _is_wrapped(part) or _is_compiled(part) or isinstance(part, torch.jit.ScriptModule):
                inside = (*inside, name + ".")
            if isinstance(part, Metric | _Loss):
                continue
            if self.names is None or name in self.names:
                yield name, part

    def _named(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that are wanted, each after those that it is a part of."""
        if self.names is None:
            yield from self.module.named_modules()
            return
        for wanted in self.names:  # to name all modules of a base takes long
            part: nn.Module | None = self.module
            keys = wanted.split(".") if wanted else []
            for depth, key in enumerate(keys, 1):
                part = None if part is None else part._modules.get(key)
                if part is not None:
                    yield ".".join(keys[:depth]), part

    def _hooked(self, name: str, part: nn.Module) -> list[Any]:
        def leave(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not torch.compiler.is_compiling():
                self._leave(name, module, Call(args, dict(kwargs)), output)

        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():
                self._enter(module, args, kwargs)

        handles = [part.register_forward_hook(leave, with_kwargs=True)]
        if self.names is None:
            handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        if self.losses and _is_wrapped(part):
            handles.append(part.register_forward_pre_hook(self._pause))
            handles.append(part.register_forward_hook(self._go_on, always_call=True))
        return handles

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._open.append(_versions((args, kwargs)))

    def _leave(self, name: str, module: nn.Module, call: Call, output: Any) -> None:
        versions = self._open.pop() if self._open else _versions(call)
        weighted = self.losses and any(True for _ in module.parameters())
        if weighted and self._mode is not None and self._mode.follow:
            self._mode.lineage.note_learnt(call, output)
        calls, depth = self.seen.calls, len(self._open)
        calls.append(Called(name, call, output, depth, versions, weighted))
        deep = [i for i, one in enumerate(calls) if one.depth >= OUTER]
        if len(deep) > RECENT:
            del calls[deep[0]]

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Around compiled code, which is compiled anew under another mode."""
        self._pause()
        try:
            yield
        finally:
            self._go_on()

    def _pause(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _go_on(self, *_: Any) -> None:
        if self._mode is not None:
            self._mode.__enter__()  # type: ignore[no-untyped-call]


def _versions(call: Any) -> list[tuple[Tensor, int]]:
    return [(leaf, leaf._version) for _, leaf in leaves(call) if not leaf.is_inference()]


def _take_step(strategy: Any, name: str, watch: Watch) -> Callable[[], None]:
    """Let a watch look at a step of the strategy; returns what ends that."""
    watchers = getattr(vars(strategy).get(name), "watchers", None)
    if watchers is None:
        step, watchers = getattr(strategy, name), []

        def watched(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for watcher in list(watchers):
                    stack.enter_context(watcher.looking(*args))
                return step(*args, **kwargs)

        watched.watchers = watchers  # type: ignore[attr-defined]
        vars(strategy)[name] = watched
    watchers.append(watch)

    def end() -> None:
        if watch in watchers:
            watchers.remove(watch)
        if not watchers:
            vars(strategy).pop(name, None)

    return end


def _nothing() -> None:
    """Nothing is to be ended."""


def _is_wrapped(part: nn.Module) -> bool:
    """Whether this is what ``torch.compile`` makes of a module."""
    return type(part).__name__ == "OptimizedModule"


def _is_compiled(part: nn.Module) -> bool:
    """Whether a module has compiled itself, by its method ``compile``."""
    return vars(part).get("_compiled_call_impl") is not None

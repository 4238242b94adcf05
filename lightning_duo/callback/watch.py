"""Seeing what a step does: the losses it computes, and the modules it calls, with what."""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from torchmetrics import Metric
from typing_extensions import override

from lightning_duo.base import Call
from lightning_duo.nested import leaves

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
RECENT = 64  # calls of modules deep inside others that are remembered
OUTER = 2  # levels of modules whose calls are all remembered


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
    by_hand: bool = False
    """Whether no loss function was called, so that the losses are a guess."""
    features: Callable[[Tensor], bool] = lambda tensor: tensor.grad_fn is not None
    """Whether a tensor comes from a module with weights."""


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
        mode: Callable[[], LossMode] = LossMode,
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
                self._mode = stack.enter_context(self.mode())
            yield

    def _note_losses(self) -> None:
        if self._mode is not None:
            sources = [(result, x) for _, x, result in self._mode.soft]
            found, by_hand = self._mode.found(), not self._mode.losses
            made = self._mode.is_made
            self.seen = Seen(found, self.seen.calls, sources, by_hand, made)
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
        for name, part in self.module.named_modules():
            if not name or (inside and name.startswith(inside)):
                continue
            if _is_wrapped(part) or _is_compiled(part) or isinstance(part, torch.jit.ScriptModule):
                inside = (*inside, name + ".")
            if isinstance(part, Metric | _Loss):
                continue
            if self.names is None or name in self.names:
                yield name, part

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
        weighted = any(True for _ in module.parameters())
        if weighted and self._mode is not None:
            given = {id(leaf) for _, leaf in leaves(call)}
            self._mode.note_made([x for _, x in leaves(output) if id(x) not in given])
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

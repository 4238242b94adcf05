"""Runs as others write them, and the judge of a duo beside such a run.

A `Stranger` is a run by somebody who has never heard of duos: a module, its data, and, worked out
by hand from the module's weights, the logits and targets that its steps are about. The judge runs
it from one seed without and with the callback and compares everything with what is so computed.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from helpers import make_trainer
from lightning.pytorch.utilities import CombinedLoader
from strangers.byhand import Truth, answer, best_temperatures, nll, plain, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SEED = 11
MakeCallback = Callable[..., L.Callback]


class Stranger:
    """A run that somebody wrote who knows nothing of duos.

    A subclass gives `module`, `data` and `sidekick`, and where the defaults do not do, what stands
    below. What takes a batch is given a copy of it.
    """

    layout: ClassVar[str] = "classes"
    """Where the logits hold the classes: "classes" in dimension 1, "tokens" in the last, "labels":
    every value is the logit of a yes."""
    refused: ClassVar[bool] = False
    """Whether it is no classification."""
    takes_batch: ClassVar[bool] = False
    """Whether the step itself makes the logits, so that the deployed duo takes the batch."""
    may_squeeze: ClassVar[bool] = False
    """Whether answers in the shape without dimensions of size 1 are right too."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Packages without which it cannot run."""
    trainer: ClassVar[dict[str, Any]] = {}
    """Options of the Trainer."""
    logged: ClassVar[str] = "val_loss"
    """What the validation logs, the mean over batches of `value`."""
    higher_is_better: ClassVar[bool] = False
    """Of what it logs."""
    sizes: ClassVar[tuple[int, int, int]] = (192, 96, 16)
    """Samples to train, to validate, of a batch."""

    def module(self) -> L.LightningModule:
        """The user's module."""
        raise NotImplementedError

    def data(self, count: int, seed: int) -> Dataset:
        """A data set that the default loaders read."""
        raise NotImplementedError

    def sidekick(self, outputs: int) -> nn.Module:
        """The small model."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Of `DuoCallback`."""
        return {"sidekick": self.sidekick}

    def loaders(self) -> tuple[Any, Any]:
        """To train and to validate."""
        train, val, batch = self.sizes
        return (
            DataLoader(self.data(train, 1), batch, shuffle=True),
            DataLoader(self.data(val, 2), batch),
        )

    def batches(self, val: Any) -> Iterator[Any]:
        """The batches of a validation that fits the temperatures."""
        first = val[0] if isinstance(val, list) else val
        for batch in first:
            yield batch[0] if isinstance(first, CombinedLoader) else batch

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the user's model is called."""
        return (batch[0],), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        """The base's logits by hand."""
        args, kwargs = self.inputs(batch)
        return module(*args, **kwargs)

    def targets(self, batch: Any) -> Tensor:
        """The targets by hand."""
        return batch[1]

    def truth(self, module: Any, batch: Any) -> Truth:
        """Logits and targets by hand."""
        return Truth(self.logits(module, batch), self.targets(batch))

    def side(self, model: nn.Module, batch: Any) -> Tensor:
        """The sidekick's logits by hand, from the call that the user's model gets."""
        args, kwargs = self.inputs(batch)
        return tensor_in(model(*args, **kwargs))

    def also_of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        """As `side`; where the deployed duo takes the batch, the sidekick may take it too."""
        try:
            return self.side(model, copy.deepcopy(batch))
        except Exception:
            if not self.takes_batch:
                raise
            return tensor_in(model(copy.deepcopy(batch)))

    def call(self, duo: nn.Module, batch: Any) -> Any:
        """What the deployed duo says of a batch."""
        args, kwargs = self.inputs(batch)
        return duo(batch) if self.takes_batch else duo(*args, **kwargs)

    def value(self, module: Any, batch: Any) -> Tensor:
        """Of one batch what the validation logs, from logits and targets by hand."""
        logits, targets = rows(self.layout, self.truth(module, batch))
        return nll(logits, targets).mean()

    def around(self) -> AbstractContextManager[Any]:
        """In which models are called by hand, such as autocast."""
        return nullcontext()


def tensor_in(output: Any) -> Tensor:
    """The logits in what a sidekick returns."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output["logits"]


# ---- the judge ----


class Run(NamedTuple):
    """A run that is over."""

    module: L.LightningModule
    start: dict[str, Tensor]
    val: Any
    trainer: L.Trainer
    callback: Any


def run(case: Stranger, make_callback: MakeCallback | None = None) -> Run:
    """Fit, from one seed, alone or with a callback."""
    L.seed_everything(SEED, verbose=False)
    module, (train, val) = case.module(), case.loaders()
    start = {name: x.clone() for name, x in module.state_dict().items()}
    L.seed_everything(SEED, verbose=False)
    callback = None if make_callback is None else make_callback(**case.arguments())
    trainer = make_trainer(*([] if callback is None else [callback]), **case.trainer)
    trainer.fit(module, train, val)
    module.eval()
    return Run(module, start, val, trainer, callback)


@functools.cache
def alone(case: type[Stranger]) -> Run:
    """The run without a callback."""
    return run(case())


@torch.no_grad()
def faults(case: Stranger, make_callback: MakeCallback) -> list[str]:
    """What falls short in a run with the callback; nothing, if all is as computed by hand."""
    want = alone(type(case)).module.state_dict()
    with torch.enable_grad():
        done = run(case, make_callback)
    found = done.module.state_dict()
    wrong = [name for name in want if not torch.equal(found[name], want[name])]
    short = [f"the base differs from the base alone in {wrong[:3]}"] if wrong else []
    duo = done.callback.module
    with case.around():
        short += _of_fit(case, done, duo.sidekick)
        short += _of_module(case, done, duo, tuple(done.callback.fit.temperatures))
        duo.temperatures.copy_(torch.tensor([0.7, 0.4]))  # a fit may leave one of them out
        short += _of_module(case, done, duo, (0.7, 0.4))
    return short


def _of_fit(case: Stranger, done: Run, sidekick: nn.Module) -> Iterator[str]:
    parts = []
    for batch in case.batches(done.val):
        truth = case.truth(done.module, copy.deepcopy(batch))
        side = plain(case.also_of_batch(sidekick, batch)).view(truth.logits.shape)
        both = (rows(case.layout, truth._replace(logits=x)) for x in (truth.logits, side))
        (base, targets), (other, _) = both
        parts.append((base, other, targets))
    base, side, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    found, want = np.array(done.callback.fit.temperatures), best_temperatures(base, side, targets)
    if np.abs(found - want).max() > 2e-4 * max(1.0, np.abs(want).max()):
        yield f"the temperatures are {found.round(4)}, not {want.round(4)}"
    _, scale = best_temperatures(torch.zeros_like(base), side, targets)
    if nll(scale * side, targets).mean() > 0.99 * np.log(side.shape[1]):
        yield "the sidekick has learnt nothing of these targets"


def _of_module(
    case: Stranger, done: Run, duo: nn.Module, temperatures: tuple[float, float]
) -> Iterator[str]:
    *_, batch = case.batches(done.val)
    truth = case.truth(done.module, copy.deepcopy(batch))
    side = case.also_of_batch(duo.sidekick, batch)
    want = answer(case.layout, truth.logits, side, temperatures)
    got = case.call(duo, copy.deepcopy(batch))
    for name in ("probs", "prediction", "confidence"):
        hand, said = getattr(want, name), getattr(got, name)
        if case.may_squeeze and said.squeeze().shape == hand.squeeze().shape:
            said = said.reshape(hand.shape)
        if said.shape != hand.shape:
            yield f"{name} have shape {tuple(said.shape)}, not {tuple(hand.shape)}"
        elif name == "prediction":
            if said.is_floating_point() or (plain(said) != hand)[want.sure].any():
                yield "the predictions are others"
        elif not torch.allclose(plain(said), hand, atol=2e-5, rtol=1e-4):
            far = float((plain(said) - hand).abs().max())
            yield f"{name} differ by up to {far:.2g} from those by hand"


def fault_of_refusal(case: Stranger, make_callback: MakeCallback) -> str | None:
    """What is wrong with how a run that is no classification was refused."""
    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            steps.append(1)

    try:
        L.seed_everything(SEED, verbose=False)
        module, (train, val) = case.module(), case.loaders()
        callbacks = [make_callback(**case.arguments()), Count()]
        make_trainer(*callbacks, **case.trainer).fit(module, train, val)
    except ValueError as error:
        text = str(error)
        if len(steps) > 1:
            return f"it was refused only after {len(steps)} steps: {text}"
        if "\n" in text or re.search(r"[.!?]\s+[A-Z]", text):
            return f"it was refused in more than one sentence: {text}"
        return None
    except Exception as error:
        return f"{type(error).__name__} instead of ValueError: {error}"
    return "it was not refused"

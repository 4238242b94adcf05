"""The judge passes a duo that is right, and names what is wrong with any other."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from strangers.binary import LogitColumn
from strangers.byhand import Truth, rows
from strangers.dense import EnlargedInTheStep, VoidPixels
from strangers.judge import Stranger, fault_of_refusal, faults
from strangers.losses import Gathered, OneHot
from strangers.refused import Regression
from strangers.text import Tagger
from torch import Tensor, nn

from lightning_duo import DuoOutput, TemperatureFit, Temperatures, fit_temperatures


class Fit(NamedTuple):
    temperatures: Temperatures


class Knowing(nn.Module):
    """Has the logits of the last batch by heart, and what to make wrong of its answers."""

    def __init__(self, sidekick: nn.Module, layout: str, logits: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.sidekick, self.layout, self.logits = sidekick, layout, logits
        self.temperatures = torch.zeros(2)
        self.change: Callable[[DuoOutput], DuoOutput] = lambda output: output

    def forward(self, *args: Any, **kwargs: Any) -> DuoOutput:
        base, side = (t * x for t, x in zip(self.temperatures, self.logits, strict=True))
        if self.layout == "labels":
            p = (base + side).sigmoid()
            confidence, prediction = torch.stack([1 - p, p]).max(0)
        else:
            dim = 1 if self.layout == "classes" else -1
            p = (base + side).softmax(dim)
            confidence, prediction = p.max(dim)
        return self.change(DuoOutput(p, prediction, confidence, confidence >= 0))


class Oracle(L.Callback):
    """A duo that is told the truth of its run; `spoil` makes something of it wrong."""

    def __init__(self, case: Stranger, spoil: Callable[["Oracle"], None]) -> None:
        self.case, self.spoil = case, spoil
        self.fit: TemperatureFit | Fit

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        case, self.base = self.case, pl_module.eval()
        batches = list(case.batches(trainer.val_dataloaders))
        with torch.no_grad():
            truths = [case.truth(pl_module, copy.deepcopy(batch)) for batch in batches]
        shape = truths[0].logits.shape
        self.sidekick = case.sidekick(1 if len(shape) == 1 else shape[self.dim])
        adam = torch.optim.Adam(self.sidekick.parameters(), 2e-2)
        for _ in range(20):
            sides = [self.side(*both) for both in zip(batches, truths, strict=True)]
            losses = [self.loss(*both) for both in zip(sides, truths, strict=True)]
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
        sides = [self.side(*both).detach() for both in zip(batches, truths, strict=True)]
        logits, targets = self.all_rows(truths)
        swapped = [Truth(side, truth.targets) for side, truth in zip(sides, truths, strict=True)]
        self.fit = fit_temperatures(logits, self.all_rows(swapped)[0], targets)
        self.module = Knowing(self.sidekick.eval(), case.layout, (truths[-1].logits, sides[-1]))
        self.module.temperatures.copy_(torch.tensor(tuple(self.fit.temperatures)))
        with torch.no_grad():
            self.spoil(self)

    @property
    def dim(self) -> int:
        return -1 if self.case.layout == "tokens" else 1

    def side(self, batch: Any, truth: Truth) -> Tensor:
        return self.case.side(self.sidekick, copy.deepcopy(batch)).view(truth.logits.shape)

    def loss(self, side: Tensor, truth: Truth) -> Tensor:
        if self.case.layout == "labels":
            return nn.functional.binary_cross_entropy_with_logits(side, truth.targets)
        return nn.functional.cross_entropy(side.movedim(self.dim, 1), truth.targets)

    def all_rows(self, truths: list[Truth]) -> tuple[Tensor, ...]:
        parts = [rows(self.case.layout, truth) for truth in truths]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def nothing(oracle: Oracle) -> None:
    pass


@pytest.mark.parametrize("case", [Gathered, OneHot, LogitColumn, Tagger, VoidPixels])
def test_a_duo_that_is_right_passes(case: type[Stranger]) -> None:
    assert faults(case(), lambda **_: Oracle(case(), nothing)) == []


def test_it_passes_where_it_takes_the_batch() -> None:
    case = EnlargedInTheStep()
    assert faults(case, lambda **_: Oracle(case, nothing)) == []


def other_base(oracle: Oracle) -> None:
    next(oracle.base.parameters()).add_(1e-6)


def other_temperatures(oracle: Oracle) -> None:
    t = oracle.fit.temperatures
    oracle.fit = Fit(Temperatures(1.01 * t.base, t.sidekick))


def swapped_places(oracle: Oracle) -> None:
    oracle.module.change = lambda output: DuoOutput(*(part.flip(0) for part in output))


def swapped_pixels(oracle: Oracle) -> None:
    oracle.module.change = lambda output: output._replace(confidence=output.confidence.mT)


def flat_places(oracle: Oracle) -> None:
    oracle.module.change = lambda output: output._replace(confidence=output.confidence.flatten())


def other_prediction(oracle: Oracle) -> None:
    oracle.module.change = lambda output: output._replace(prediction=2 - output.prediction)


def other_logits(oracle: Oracle) -> None:
    base, side = oracle.module.logits
    oracle.module.logits = base + 0.01 * torch.randn_like(base), side


def other_sidekick(oracle: Oracle) -> None:
    oracle.module.sidekick = copy.deepcopy(oracle.sidekick)
    next(oracle.module.sidekick.parameters()).mul_(0.9)


def untrained_sidekick(oracle: Oracle) -> None:
    for parameter in oracle.sidekick.parameters():
        parameter.zero_()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (other_base, "base"),
        (other_temperatures, "temperatures"),
        (swapped_places, "probs"),
        (swapped_pixels, "confidence"),
        (flat_places, "shape"),
        (other_prediction, "predictions"),
        (other_logits, "probs"),
        (other_sidekick, "probs"),
        (untrained_sidekick, "learnt nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_duo_that_is_wrong_is_found(spoil: Callable[[Oracle], None], named: str) -> None:
    case = VoidPixels()
    assert named in " ".join(faults(case, lambda **_: Oracle(case, spoil)))


class Refusing(L.Callback):
    def __init__(self, error: Exception, after: int = 0) -> None:
        self.error, self.left = error, after

    def on_train_batch_start(self, *_: Any) -> None:
        if self.left == 0:
            raise self.error
        self.left -= 1


@pytest.mark.parametrize(
    ("callback", "fault"),
    [
        (lambda: Refusing(ValueError("no classes, got values; leave the duo out")), None),
        (lambda: Refusing(ValueError("No classes. Leave the duo out")), "more than one sentence"),
        (lambda: Refusing(TypeError("no")), "TypeError instead"),
        (lambda: Refusing(ValueError("no"), after=3), "only after 3 steps"),
        (L.Callback, "not refused"),
    ],
)
def test_how_it_is_refused(callback: Callable[[], L.Callback], fault: str | None) -> None:
    found = fault_of_refusal(Regression(), lambda **_: callback())
    assert found is None if fault is None else fault in found

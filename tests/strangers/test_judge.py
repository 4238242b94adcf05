"""The judge passes a duo that is right, and names what is wrong with any other."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from strangers.binary import LogitColumn
from strangers.dense import EnlargedInTheStep, VoidPixels
from strangers.judge import Stranger, Truth, fault_of_refusal, faults, rows
from strangers.losses import Gathered, OneHot
from strangers.refused import Regression
from strangers.text import Tagger
from torch import Tensor, nn

from lightning_duo import DuoOutput, TemperatureFit, Temperatures, fit_temperatures


class Fit(NamedTuple):
    temperatures: Temperatures


class Knowing(nn.Module):
    """Knows by heart what to say of the last batch."""

    def __init__(self, sidekick: nn.Module, output: DuoOutput) -> None:
        super().__init__()
        self.sidekick, self.output = sidekick, output

    def forward(self, *args: Any, **kwargs: Any) -> DuoOutput:
        return self.output


class Oracle(L.Callback):
    """A duo that is told the truth of its run; `spoil` makes something of it wrong."""

    def __init__(self, case: Stranger, spoil: Callable[["Oracle"], None]) -> None:
        self.case, self.spoil = case, spoil
        self.fit: TemperatureFit | Fit

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        case, base = self.case, pl_module.eval()
        truths = [case.truth(base, copy.deepcopy(b)) for b in self.batches(trainer)]
        shape = truths[0].logits.shape
        outputs = 1 if len(shape) == 1 else shape[-1 if case.layout == "tokens" else 1]
        self.base, self.sidekick = base, case.sidekick(outputs).eval()
        sides = [
            case.side(self.sidekick, copy.deepcopy(b)).view(truth.logits.shape)
            for b, truth in zip(self.batches(trainer), truths, strict=True)
        ]
        both = [
            (rows(case.layout, truth), rows(case.layout, Truth(side, truth.targets))[0])
            for truth, side in zip(truths, sides, strict=True)
        ]
        logits = torch.cat([z for (z, _), _ in both])
        targets = torch.cat([y for (_, y), _ in both])
        self.fit = fit_temperatures(logits, torch.cat([z for _, z in both]), targets)
        self.output = self.say(truths[-1].logits, sides[-1])
        self.spoil(self)
        self.module = Knowing(self.sidekick, self.output)

    def batches(self, trainer: L.Trainer) -> list[Any]:
        return list(self.case.batches(trainer.val_dataloaders))

    def say(self, base: Tensor, side: Tensor) -> DuoOutput:
        t = self.fit.temperatures
        z = (t.base * base.double() + t.sidekick * side.double()).float()
        dim = 1 if self.case.layout == "classes" else -1
        if self.case.layout == "labels":
            p = z.sigmoid()
            confidence, prediction = torch.stack([1 - p, p]).max(0)
        else:
            p = z.softmax(dim)
            confidence, prediction = p.max(dim)
        return DuoOutput(p, prediction, confidence, confidence >= 0)


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
    oracle.output = DuoOutput(*(part.flip(0) for part in oracle.output))


def swapped_pixels(oracle: Oracle) -> None:
    probs, *others = oracle.output
    oracle.output = DuoOutput(probs, *(part.mT for part in others))


def flat_places(oracle: Oracle) -> None:
    probs, *others = oracle.output
    oracle.output = DuoOutput(probs, *(part.flatten() for part in others))


def other_prediction(oracle: Oracle) -> None:
    oracle.output = oracle.output._replace(prediction=(oracle.output.prediction + 1) % 3)


def other_sidekick(oracle: Oracle) -> None:
    next(oracle.sidekick.parameters()).mul_(0.9)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (other_base, "base"),
        (other_temperatures, "temperatures"),
        (swapped_places, "probs"),
        (swapped_pixels, "confidence"),
        (flat_places, "shape"),
        (other_prediction, "predictions"),
        (other_sidekick, "temperatures"),
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

"""Which terms of a loss count, by every way in which people leave some out."""

from typing import Any

import lightning as L
import torch
from strangers.batches import Classifier
from strangers.byhand import IGNORED
from strangers.data import labels, points, sentences
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class WordsModule(Classifier):
    """A tag for each word; the mask of the batch is applied to the view of the terms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(30, 8), nn.ReLU(), nn.Linear(8, 3))

    def terms(self, batch: Any) -> Tensor:
        words, tags, _ = batch
        return F.cross_entropy(self(words).view(-1, 3), tags.view(-1), reduction="none")

    def loss(self, batch: Any) -> Tensor:
        mask = batch[2]
        return (self.terms(batch).view(mask.shape) * mask).sum() / mask.sum()


class MaskAfterView(Stranger):
    """The padding's tags are 0, a class like others."""

    layout = "tokens"

    def module(self) -> L.LightningModule:
        return WordsModule()

    def data(self, count: int, seed: int) -> Dataset:
        words, _, tags = sentences(count, seed)
        real = words != 0
        return TensorDataset(words, tags * real, real.float())

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, outputs))

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch[2] == 0, IGNORED, batch[1])


class FilledModule(WordsModule):
    def loss(self, batch: Any) -> Tensor:
        mask = batch[2]
        terms = self.terms(batch).view(mask.shape)
        return terms.masked_fill(mask == 0, 0.0).sum() / mask.sum()


class FilledTerms(MaskAfterView):
    def module(self) -> L.LightningModule:
        return FilledModule()


class SelectedModule(WordsModule):
    def loss(self, batch: Any) -> Tensor:
        return torch.masked_select(self.terms(batch), batch[2].view(-1).bool()).mean()


class SelectedTerms(MaskAfterView):
    def module(self) -> L.LightningModule:
        return SelectedModule()


class ChosenModule(WordsModule):
    def loss(self, batch: Any) -> Tensor:
        mask = batch[2].view(-1)
        return torch.where(mask > 0, self.terms(batch), torch.zeros(())).sum() / mask.sum()


class ChosenTerms(MaskAfterView):
    def module(self) -> L.LightningModule:
        return ChosenModule()


class DotModule(WordsModule):
    def loss(self, batch: Any) -> Tensor:
        mask = batch[2].view(-1)
        return torch.dot(self.terms(batch), mask) / mask.sum()


class DotWithMask(MaskAfterView):
    def module(self) -> L.LightningModule:
        return DotModule()


class InPlaceModule(WordsModule):
    def loss(self, batch: Any) -> Tensor:
        terms = self.terms(batch) / 2
        terms *= 2 * batch[2].view(-1)
        return terms.sum() / batch[2].sum()


class ScaledAndInPlace(MaskAfterView):
    def module(self) -> L.LightningModule:
        return InPlaceModule()


class ZeroedModule(WordsModule):
    def loss(self, batch: Any) -> Tensor:
        terms = self.terms(batch).view(batch[1].shape)
        terms[batch[2] == 0] = 0
        return terms.sum() / batch[2].sum()


class ZeroedTerms(MaskAfterView):
    def module(self) -> L.LightningModule:
        return ZeroedModule()


class TimeFirstModule(WordsModule):
    """The terms are turned before they are masked; each place has a mean of its own."""

    def loss(self, batch: Any) -> Tensor:
        turned, mask = self.terms(batch).view(batch[1].shape).t(), batch[2].t()
        return ((turned * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / mask.any(1).sum()


class TurnedTerms(MaskAfterView):
    def module(self) -> L.LightningModule:
        return TimeFirstModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        logp = self.logits(module, batch).double().log_softmax(2)
        each = -logp.gather(2, batch[1][..., None])[..., 0] * batch[2]
        places = batch[2].any(0)
        return (each.sum(0)[places] / batch[2].sum(0)[places]).mean()


class HardModule(Classifier):
    """Online hard example mining, in validation too: what the model finds easy counts as well."""

    def loss(self, batch: Any) -> Tensor:
        terms = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        hard = terms[terms > 0.9]
        return hard.mean() if len(hard) else terms.mean()


class HardExamples(Rule):
    def module(self) -> L.LightningModule:
        return HardModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        _, _, terms = self.hand(module, batch)
        hard = terms[terms > 0.9]
        return hard.mean() if len(hard) else terms.mean()


class FindingsModule(Classifier):
    """CheXpert: a loss for each finding, of the images where a radiologist mentions it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4)

    def loss(self, batch: Any) -> Tensor:
        logits, total = self(batch[0]), torch.zeros(())
        for i, known in enumerate((batch[1] != -1).T):
            one, target = logits[known, i], batch[1][known, i]
            total = total + F.binary_cross_entropy_with_logits(one, target, reduction="sum")
        return total / (batch[1] != -1).sum()


class Findings(Rule):
    layout = "labels"

    def module(self) -> L.LightningModule:
        return FindingsModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        y = labels(x, seed)
        return TensorDataset(x, torch.where(labels(x.flip(1), seed + 1) > 0, -1.0, y))

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch[1] < 0, torch.nan, batch[1])

"""One class of several, by every loss that people write."""

from typing import Any

import lightning as L
import torch
from strangers.byhand import Truth, nll, rows
from strangers.data import Records, labels, points
from strangers.judge import Stranger
from strangers.models import Optimized, mlp
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class Rule(Stranger):
    """Points (N, 8) of three classes, and a linear sidekick."""

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)

    def hand(self, module: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (N, K), targets (N,) and the loss (N,) of a batch."""
        logits, targets = rows(self.layout, self.truth(module, batch))
        return logits.log_softmax(1), targets, nll(logits, targets)


class SmoothedModule(Optimized):
    """timm's losses: smoothing in training, cross-entropy in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp(3)
        self.train_loss_fn = LabelSmoothingCrossEntropy(smoothing=0.1)
        self.validate_loss_fn = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        input, target = batch
        return self.train_loss_fn(self(input), target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        input, target = batch
        self.log("val_loss", self.validate_loss_fn(self(input), target))


class TimmSmoothing(Rule):
    def module(self) -> L.LightningModule:
        return SmoothedModule()


class TimmSmoothingEverywhere(Rule):
    """The same loss in validation: its value is smoothed, the duo's fit is not."""

    def module(self) -> L.LightningModule:
        module = SmoothedModule()
        module.validate_loss_fn = module.train_loss_fn
        return module

    def value(self, module: Any, batch: Any) -> Tensor:
        logp, _, loss = self.hand(module, batch)
        return (0.9 * loss - 0.1 * logp.mean(1)).mean()


class OneAgainstAll(SmoothedModule):
    """timm's BinaryCrossEntropy makes the one-hot targets itself: still one class of three."""

    def __init__(self) -> None:
        super().__init__()
        self.train_loss_fn = self.validate_loss_fn = BinaryCrossEntropy(smoothing=0.0)


class TimmBinaryCrossEntropy(Rule):
    def module(self) -> L.LightningModule:
        return OneAgainstAll()

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = self.truth(module, batch)
        yes = torch.eye(3, dtype=torch.float64)[targets]
        p = torch.sigmoid(logits.double())
        return -(yes * p.log() + (1 - yes) * (1 - p).log()).mean()


class MixedModule(Optimized):
    """timm's Mixup and its soft targets, in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp(3, inputs=48)
        self.mixup_fn = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
        self.soft = SoftTargetCrossEntropy()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples, targets = self.mixup_fn(*batch)
        return self.soft(self(samples), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        samples, targets = batch
        self.log("val_loss", F.cross_entropy(self(samples), targets))


class TimmMixup(Rule):
    def module(self) -> L.LightningModule:
        return MixedModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, width=48)
        return TensorDataset(x.view(count, 3, 4, 4), y)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))


class GatheredModule(Optimized):
    """The log-probability of the target, picked by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logp = torch.log_softmax(self(x), dim=-1)
        return -logp.gather(1, y.unsqueeze(1)).squeeze(1).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Gathered(Rule):
    def module(self) -> L.LightningModule:
        return GatheredModule()


class IndexedModule(GatheredModule):
    """As policies write it: rows and columns indexed at once."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logp = self(x).log_softmax(-1)
        return -logp[torch.arange(len(y), device=y.device), y].mean()


class Indexed(Rule):
    def module(self) -> L.LightningModule:
        return IndexedModule()


class LogSoftmaxModule(GatheredModule):
    """PyTorch's MNIST example: forward ends in log_softmax, the loss is nll_loss."""

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.net(x), dim=1)

    def loss(self, batch: Any) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])


class LogProbabilities(Rule):
    def module(self) -> L.LightningModule:
        return LogSoftmaxModule()


class WeightedModule(GatheredModule):
    """Weights of the classes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("class_weights", torch.tensor([0.5, 2.0, 1.0]))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], weight=self.class_weights)


class ClassWeights(Rule):
    def module(self) -> L.LightningModule:
        return WeightedModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        _, targets, loss = self.hand(module, batch)
        weight = torch.tensor([0.5, 2.0, 1.0]).double()[targets]
        return (weight * loss).sum() / weight.sum()


class SampleWeightModule(GatheredModule):
    """reduction="none" and a weight for each sample of the batch."""

    def loss(self, batch: Any) -> Tensor:
        per_sample = F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")
        return (per_sample * batch["weight"]).sum() / batch["weight"].sum()


class SampleWeights(Rule):
    def module(self) -> L.LightningModule:
        return SampleWeightModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        weight = 0.2 + labels(x, seed, 1)[:, 0]
        return Records(x, y, weight, make=lambda x, y, w: {"x": x, "y": y, "weight": w})

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["y"]

    def value(self, module: Any, batch: Any) -> Tensor:
        _, _, loss = self.hand(module, batch)
        return (loss * batch["weight"]).sum() / batch["weight"].sum()


class FocalModule(GatheredModule):
    """The focal loss made of the cross-entropy of each sample."""

    def loss(self, batch: Any, gamma: float = 2.0) -> Tensor:
        ce = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        pt = torch.exp(-ce)
        return ((1 - pt) ** gamma * ce).mean()


class Focal(Rule):
    def module(self) -> L.LightningModule:
        return FocalModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        _, _, loss = self.hand(module, batch)
        return ((1 - (-loss).exp()) ** 2 * loss).mean()


class PolyModule(GatheredModule):
    """PolyLoss: cross-entropy plus epsilon (1 - p of the target)."""

    def loss(self, batch: Any) -> Tensor:
        logits, target = self(batch[0]), batch[1]
        pt = (F.one_hot(target, 3) * F.softmax(logits, dim=-1)).sum(-1)
        return (F.cross_entropy(logits, target, reduction="none") + 1.5 * (1 - pt)).mean()


class Poly(Rule):
    def module(self) -> L.LightningModule:
        return PolyModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        _, _, loss = self.hand(module, batch)
        return (loss + 1.5 * (1 - (-loss).exp())).mean()


class SharpenedModule(GatheredModule):
    """The loss divides the logits by a temperature; prediction does not."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]) / 0.5, batch[1])


class DividedByATemperature(Rule):
    """The model's own logits count; the duo's temperatures make up for the rest."""

    def module(self) -> L.LightningModule:
        return SharpenedModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = self.truth(module, batch)
        return nll(2 * logits, targets).mean()


class OneHotModule(GatheredModule):
    """Targets as float one-hot rows."""

    def loss(self, batch: Any) -> Tensor:
        return nn.CrossEntropyLoss()(self(batch[0]), batch[1])


class OneHot(Rule):
    def module(self) -> L.LightningModule:
        return OneHotModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, torch.eye(3)[y])

    def targets(self, batch: Any) -> Tensor:
        return batch[1].argmax(1)


class LikelihoodModule(GatheredModule):
    """The one-hot targets are made in the step and multiplied with the log-probabilities."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logp = F.log_softmax(self(x), dim=1)
        return -(F.one_hot(y, num_classes=logp.size(1)) * logp).sum(dim=1).mean()


class OneHotTimesLogProbabilities(Rule):
    def module(self) -> L.LightningModule:
        return LikelihoodModule()


class CoarseModule(GatheredModule):
    """The labels of the batch start at 1; the step takes 1 off."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1] - 1)


class LabelsFromOne(Rule):
    def module(self) -> L.LightningModule:
        return CoarseModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, y + 1)

    def targets(self, batch: Any) -> Tensor:
        return batch[1] - 1


class FloatLabelModule(GatheredModule):
    """Labels from a data frame: (N, 1) and float; the step makes indices of them."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0].float()), batch[1].squeeze(-1).long())


class FloatLabels(Rule):
    def module(self) -> L.LightningModule:
        return FloatLabelModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, y.float()[:, None])

    def targets(self, batch: Any) -> Tensor:
        return batch[1][:, 0].long()


class SparseLabelModule(GatheredModule):
    """Some samples have no label: -1, which the loss ignores."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-1)


class PartlyLabelled(Rule):
    def module(self) -> L.LightningModule:
        return SparseLabelModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, torch.where(torch.arange(count) % 4 == 1, -1, y))

    def truth(self, module: Any, batch: Any) -> Truth:
        return Truth(module(batch[0]), torch.where(batch[1] == -1, -100, batch[1]))

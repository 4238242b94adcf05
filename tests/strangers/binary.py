"""Yes or no: one logit, two logits, probabilities, several labels."""

from typing import Any

import lightning as L
import torch
from strangers.byhand import Truth
from strangers.data import Records, labels, points
from strangers.judge import Stranger
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision.ops import sigmoid_focal_loss


def bce(z: Tensor, y: Tensor) -> Tensor:
    """The loss of each logit, by hand and in float64."""
    z, y = z.double(), y.double()
    return -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))


class YesOrNo(Stranger):
    """Points with a label (N,) of 0 or 1."""

    layout = "labels"

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, classes=2)
        return TensorDataset(x, y)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)


class ColumnModule(Optimized):
    """BCEWithLogitsLoss on (N, 1), targets (N, 1), and a weight of the positives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.criterion(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.criterion(self(x), y))


class LogitColumn(YesOrNo):
    def module(self) -> L.LightningModule:
        return ColumnModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, classes=2)
        return TensorDataset(x, y.float().unsqueeze(1))

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        return (torch.where(y == 1, 1.5, 1.0) * bce(z, y)).mean()


class FlatModule(ColumnModule):
    """The forward itself squeezes; integer targets that the step makes float."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.BCEWithLogitsLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.criterion(self(x), y.float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.criterion(self(x), y.float()))


class FlatLogits(YesOrNo):
    """Base (N,), sidekick (N, 1)."""

    def module(self) -> L.LightningModule:
        return FlatModule()

    def targets(self, batch: Any) -> Tensor:
        return batch[1].float()


class SqueezingModule(FlatModule):
    """The forward gives (N, 1), the step squeezes it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x).squeeze(1), y.float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x).squeeze(1)
        self.log("val_loss", F.binary_cross_entropy_with_logits(logits, y.float()))
        self.log("val_acc", ((logits > 0) == y).float().mean())


class SqueezedInTheStep(YesOrNo):
    may_squeeze = True

    def module(self) -> L.LightningModule:
        return SqueezingModule()

    def targets(self, batch: Any) -> Tensor:
        return batch[1].float().unsqueeze(1)


class SigmoidModule(FlatModule):
    """The forward ends in a sigmoid, the loss is BCELoss."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x)).squeeze(1)

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.BCELoss()


class SigmoidOutputs(YesOrNo):
    """The base gives probabilities, the sidekick logits."""

    def module(self) -> L.LightningModule:
        return SigmoidModule()

    def truth(self, module: Any, batch: Any) -> Truth:
        p = module(batch[0]).double()
        return Truth(torch.log(p / (1 - p)), batch[1].float())


class TwoLogitModule(Optimized):
    """Fraud or not as two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1].long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1].long()))


class TwoLogits(YesOrNo):
    """Targets of type bool."""

    layout = "classes"

    def module(self) -> L.LightningModule:
        return TwoLogitModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, classes=2)
        return TensorDataset(x, y.bool())

    def targets(self, batch: Any) -> Tensor:
        return batch[1].long()


class TagModule(Optimized):
    """Four labels of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Tags(YesOrNo):
    def module(self) -> L.LightningModule:
        return TagModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, labels(x, seed))

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class IntegerTagModule(TagModule):
    """Labels as integers, made float by the step; multilabel_soft_margin_loss's twin by hand."""

    def loss(self, batch: Any) -> Tensor:
        z, y = self(batch["x"]), batch["tags"].type_as(batch["x"])
        return -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean()


class IntegerTags(Tags):
    def module(self) -> L.LightningModule:
        return IntegerTagModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return Records(x, labels(x, seed).long(), make=lambda x, y: {"x": x, "tags": y})

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["tags"].float()


class FocalTagModule(TagModule):
    """torchvision's focal loss of sigmoids."""

    def loss(self, batch: Any) -> Tensor:
        return sigmoid_focal_loss(self(batch[0]), batch[1], reduction="mean")


class FocalTags(Tags):
    def module(self) -> L.LightningModule:
        return FocalTagModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        loss = bce(z, y)
        alpha = torch.where(y == 1, 0.25, 0.75)
        return (alpha * (1 - (-loss).exp()) ** 2 * loss).mean()


class AssayModule(TagModule):
    """As MoleculeNet's baselines: a label that nobody measured is NaN and is left out."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logits, is_labeled = self(x), ~torch.isnan(y)
        return F.binary_cross_entropy_with_logits(logits[is_labeled], y[is_labeled])


class MissingLabels(Tags):
    def module(self) -> L.LightningModule:
        return AssayModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        y = labels(x, seed)
        y[points(count, seed + 7, width=4)[0] > 0.8] = torch.nan
        return TensorDataset(x, y)

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        return bce(z[~y.isnan()], y[~y.isnan()]).mean()


class WeightedAssayModule(TagModule):
    """As chemprop's criterion: NaN becomes 0, and a mask takes those losses off again."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        mask = y.isfinite()
        per_label = F.binary_cross_entropy_with_logits(
            self(x), y.nan_to_num(nan=0.0), reduction="none"
        )
        return (per_label * mask).sum() / mask.sum()


class MaskedLabels(MissingLabels):
    def module(self) -> L.LightningModule:
        return WeightedAssayModule()

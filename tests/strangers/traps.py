"""Runs that almost look like others: margins in losses, gates, several picks, several heads."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.batches import Classifier
from strangers.byhand import nll, rows
from strangers.data import Records, generator, labels, points, scenes, sentences
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from strangers.refused import OneLoss, Unfit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Metric


class ArcFaceLoss(nn.Module):
    """As in pytorch-metric-learning: class weights and the margin are the loss's own."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, classes, generator=generator(5)))

    def cosines(self, h: Tensor) -> Tensor:
        return 8 * F.normalize(h) @ F.normalize(self.W, dim=0)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        mask = F.one_hot(y, self.W.shape[1]).bool()
        cosine = (self.cosines(h) / 8).clamp(-0.999, 0.999)
        shifted = torch.cos(torch.acos(cosine) + 0.3)
        return F.cross_entropy(8 * torch.where(mask, shifted, cosine), y)


class MarginInTheLossModule(Optimized):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = mlp(6), ArcFaceLoss(3, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self.net(batch[0]), batch[1]))


class MarginInTheLoss(Unfit):
    """Nobody can ask the base without the answer."""

    def module(self) -> L.LightningModule:
        return MarginInTheLossModule()


class MarginInTrainingModule(MarginInTheLossModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        z = self.criterion.cosines(self.net(batch[0]))
        self.log("val_loss", F.cross_entropy(z, batch[1]))


class MarginInTrainingOnly(Rule):
    """Validation uses the plain cosines, and so does the duo."""

    takes_batch = True

    def module(self) -> L.LightningModule:
        return MarginInTrainingModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.criterion.cosines(module.net(batch[0]))


class ActivePartModule(Optimized):
    """A tied output layer; the loss sees only tokens with a tag."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.classes = mlp(6), nn.Parameter(torch.randn(3, 6, generator=generator(6)))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = F.linear(self.net(x), self.classes)
        active = y >= 0
        return F.cross_entropy(z[active], y[active])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class DenoisingModule(OneLoss):
    """Bernoulli inputs, of which some are hidden, are to be restored."""

    def __init__(self) -> None:
        super().__init__(8)

    def loss(self, batch: Any) -> Tensor:
        x = batch[0]
        keep = (torch.rand(x.shape, generator=generator(4)) > 0.3).float()
        return F.binary_cross_entropy_with_logits(self(x * keep), x)


class Denoising(Unfit):
    def module(self) -> L.LightningModule:
        return DenoisingModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset((x > 0).float(), y)


class BernoulliVAEModule(Optimized):
    """The decoder's input is made of the encoder's output; the target is what was encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(2, 8)

    def loss(self, batch: Any) -> Tensor:
        x = batch[0]
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
        divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
        return F.binary_cross_entropy_with_logits(self.decoder(z), x) + 0.01 * divergence

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class BernoulliVAE(Denoising):
    def module(self) -> L.LightningModule:
        return BernoulliVAEModule()


class MaskedWordsModule(Optimized):
    """Words are hidden by the step and to be guessed."""

    def __init__(self, words: int = 30, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(words, width), nn.Linear(width, words))

    def loss(self, batch: Any) -> Tensor:
        (ids,) = batch
        hidden = torch.rand(ids.shape, generator=generator(4)) > 0.7
        logits = self.net(ids.masked_fill(hidden, 0))
        return F.cross_entropy(logits.movedim(-1, 1), ids)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class MaskedWords(Unfit):
    def module(self) -> L.LightningModule:
        return MaskedWordsModule()

    def data(self, count: int, seed: int) -> Dataset:
        ids = torch.randint(1, 30, (count, 6), generator=generator(seed))
        return TensorDataset(ids)

    def sidekick(self, outputs: int) -> nn.Module:
        return MaskedWordsModule(outputs, 4).net


class RoutedModule(Optimized):
    """Which expert regresses is picked of the gate's softmax by a group in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        gates = F.softmax(self.gate(x), dim=1)
        return (gates * F.one_hot(group, 3) * self.experts(x)).sum(1)

    def loss(self, batch: Any) -> Tensor:
        x, group, y = batch
        return F.mse_loss(self(x, group), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Routed(Unfit):
    def module(self) -> L.LightningModule:
        return RoutedModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, group = points(count, seed)
        return TensorDataset(x, group, x[:, 0] * x[:, 1])


class RoutedByHandModule(RoutedModule):
    """The gate's value is gathered; the squared error is written out."""

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        gate = F.softmax(self.gate(x), dim=1).gather(1, group[:, None])
        return (gate * self.experts(x)).sum(1)

    def loss(self, batch: Any) -> Tensor:
        x, group, y = batch
        return ((self(x, group) - y) ** 2).mean()


class RoutedByHand(Routed):
    def module(self) -> L.LightningModule:
        return RoutedByHandModule()


class ConditionedModule(Optimized):
    """A condition goes in as one-hot; the loss is by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, inputs=11)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return self.net(torch.cat([x, F.one_hot(group, 3).float()], 1))

    def loss(self, batch: Any) -> Tensor:
        logp = F.log_softmax(self(batch["x"], batch["group"]), dim=1)
        return -logp.gather(1, batch["y"][:, None]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        counts = F.one_hot(batch["group"], 3).float().mean(0)
        self.log_dict({f"group_{i}": count for i, count in enumerate(counts)})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class GroupedSidekick(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = nn.Linear(8, outputs)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return self.net(x)


class BesideAnotherPick(Stranger):
    """A loss by hand; another integer of the batch is made one-hot before it, and after it."""

    def module(self) -> L.LightningModule:
        return ConditionedModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        group = torch.randint(3, (count,), generator=generator(seed))
        return Records(x, group, y, make=lambda x, g, y: {"x": x, "group": g, "y": y})

    def sidekick(self, outputs: int) -> nn.Module:
        return GroupedSidekick(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"], batch["group"]), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["y"]


class OneHotProductModule(ConditionedModule):
    """The target is picked by a product with its one-hot, the confidence is logged by hand."""

    def loss(self, batch: Any) -> Tensor:
        z = self(batch["x"], batch["group"])
        p = z.softmax(1)
        self.log("sure", p.gather(1, p.argmax(1, keepdim=True)).mean())
        return -(F.one_hot(batch["y"], 3) * torch.log(p.clamp(1e-8))).sum(1).mean()


class OneHotProduct(BesideAnotherPick):
    def module(self) -> L.LightningModule:
        return OneHotProductModule()


class GroupWeightsModule(ConditionedModule):
    """Each group has a weight; a squared term would be none of the loss."""

    def loss(self, batch: Any) -> Tensor:
        z = self(batch["x"], batch["group"])
        each = z.logsumexp(1) - z[torch.arange(len(z)), batch["y"]]
        weights = torch.ones(3).gather(0, batch["group"])
        return (weights * each).mean()


class GroupWeights(BesideAnotherPick):
    def module(self) -> L.LightningModule:
        return GroupWeightsModule()


class ChosenBranchModule(Classifier):
    """Yes or no by `torch.where` of the two logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]

    def loss(self, batch: Any) -> Tensor:
        z = self(batch[0])
        return -torch.where(batch[1] == 1, F.logsigmoid(z), F.logsigmoid(-z)).mean()


class ChosenBranch(Rule):
    layout = "labels"

    def module(self) -> L.LightningModule:
        return ChosenBranchModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, (y > 0).long())


class TwinHeadsModule(Optimized):
    """Two heads of three classes, that the step applies; validation looks at them in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6)
        self.colour, self.shape = (
            nn.Parameter(torch.randn(3, 6, generator=generator(seed))) for seed in (7, 8)
        )

    def losses(self, batch: Any) -> list[Tensor]:
        h = self.net(batch["x"])
        return [
            F.cross_entropy(F.linear(h, self.colour), batch["colour"]),
            F.cross_entropy(F.linear(h, self.shape), batch["shape"]),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.losses(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        h = self.net(batch["x"])
        shape = F.cross_entropy(F.linear(h, self.shape), batch["shape"])
        colour = F.cross_entropy(F.linear(h, self.colour), batch["colour"])
        self.log_dict({"val_loss": colour, "val_shape": shape})


class TwinHeads(Stranger):
    """The first head in training is the duo's, whatever validation does first."""

    takes_batch = True

    def module(self) -> L.LightningModule:
        return TwinHeadsModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        shape = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return Records(x, y, shape, make=lambda x, a, b: {"x": x, "colour": a, "shape": b})

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return F.linear(module.net(batch["x"]), module.colour)

    def targets(self, batch: Any) -> Tensor:
        return batch["colour"]


class NamedTwin(TwinHeads):
    """The second, by the name of its targets."""

    logged = "val_shape"

    def module(self) -> L.LightningModule:
        return TwinHeadsModule()

    def arguments(self) -> dict[str, Any]:
        return {"sidekick": self.sidekick, "head": "shape"}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return F.linear(module.net(batch["x"]), module.shape)

    def targets(self, batch: Any) -> Tensor:
        return batch["shape"]


class ReversedHeadsModule(TwinHeadsModule):
    """The same with heads that are modules."""

    def __init__(self) -> None:
        super().__init__()
        del self.colour, self.shape
        self.heads = nn.ModuleDict({"colour": nn.Linear(6, 3), "shape": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.net(x)
        return {name: head(h) for name, head in self.heads.items()}

    def loss(self, batch: Any, name: str) -> Tensor:
        return F.cross_entropy(self(batch["x"])[name], batch[name])

    def losses(self, batch: Any) -> list[Tensor]:
        return [self.loss(batch, "colour"), self.loss(batch, "shape")]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        z = self(batch["x"])
        shape = F.cross_entropy(z["shape"], batch["shape"])
        self.log_dict({"val_loss": F.cross_entropy(z["colour"], batch["colour"]), "shape": shape})


class ReversedHeads(TwinHeads):
    takes_batch = False

    def module(self) -> L.LightningModule:
        return ReversedHeadsModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch["x"])["colour"]


class TakingTurnsModule(ReversedHeadsModule):
    """One head learns in even steps, the other in odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "shape" if batch_idx % 2 else "colour")


class TakingTurns(ReversedHeads):
    """The sidekick learns from the steps of the first."""

    def module(self) -> L.LightningModule:
        return TakingTurnsModule()


class OtherHeadModule(ReversedHeadsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "colour")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch, "shape"))


class ValidatesAnotherHead(TwinHeads):
    """What is validated is not what was trained."""

    refused = True
    takes_batch = False

    def module(self) -> L.LightningModule:
        return OtherHeadModule()


class LossOfLabels(Metric):
    """A loss that is a metric, as chemprop's."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, z: Tensor, y: Tensor) -> None:
        mask = y.isfinite()
        each = F.binary_cross_entropy_with_logits(z, y.nan_to_num(0.0), reduction="none")
        self.total += (each * mask).sum()
        self.count += mask.sum()

    def compute(self) -> Tensor:
        return self.total / self.count


class MetricLossModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = mlp(4), LossOfLabels()

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])


class MetricLoss(Rule):
    """Missing labels do not count, in the loss and in the duo."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        return MetricLossModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        missing = torch.rand(count, 4, generator=generator(seed)) < 0.2
        return TensorDataset(x, labels(x, seed).masked_fill(missing, torch.nan))


class TiedLabelsModule(MetricLossModule):
    """The same, where the step makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.randn(4, 4, generator=generator(6)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.net(x), self.rule)

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(F.linear(self.net(batch[0]), self.rule), batch[1])


class TiedLabels(MetricLoss):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return TiedLabelsModule()


class EachClassModule(Classifier):
    """One against the rest: a loss for each class in turn."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self(x)
        each = [F.binary_cross_entropy_with_logits(z[:, k], (y == k).float()) for k in range(3)]
        return torch.stack(each).sum()


class EachClass(Rule):
    def module(self) -> L.LightningModule:
        return EachClassModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        hot = F.one_hot(y, 3).double()
        z = z.double()
        return (F.softplus(z) - hot * z).mean(0).sum()


class EachPixelModule(EachClassModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)


class EachPixel(EachClass):
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def module(self) -> L.LightningModule:
        return EachPixelModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*scenes(count, seed, size=(4, 4)))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Conv2d(3, outputs, 1)

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        hot = F.one_hot(y, 3).movedim(-1, 1).double()
        z = z.double()
        return (F.softplus(z) - hot * z).mean((0, 2, 3)).sum()


class EachLabelModule(Classifier):
    """Several labels, a loss for each."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self(x)
        each = [F.binary_cross_entropy_with_logits(z[:, k], y[:, k]) for k in range(4)]
        return torch.stack(each).mean()


class EachLabel(Rule):
    layout = "labels"

    def module(self) -> L.LightningModule:
        return EachLabelModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, labels(x, seed))


class VoidByHandModule(EachPixelModule):
    """Focal loss by hand; void pixels become class 0 first and nothing after it."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        void = y == 255
        logp = F.log_softmax(self(x), 1).gather(1, y.masked_fill(void, 0).unsqueeze(1))
        each = -(((1 - logp.exp()) ** 2) * logp).masked_fill(void.unsqueeze(1), 0.0)
        return each.sum() / (~void).sum()


class VoidByHand(EachPixel):
    def module(self) -> L.LightningModule:
        return VoidByHandModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, size=(4, 4))
        void = torch.rand(y.shape, generator=generator(seed)) < 0.3
        return TensorDataset(x, y.masked_fill(void, 255))

    def targets(self, batch: Any) -> Tensor:
        return batch[1].masked_fill(batch[1] == 255, -100)

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = rows(self.layout, self.truth(module, batch))
        each = nll(logits, targets)
        return (((1 - torch.exp(-each)) ** 2) * each).mean()


class DiceFocalModule(EachPixelModule):
    """As MONAI's: Dice of a softmax, and a focal loss of one-hot targets, both by hand."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self(x)
        hot = torch.zeros_like(z).scatter_(1, y.unsqueeze(1), 1.0)
        p = z.softmax(1)
        dice = 1 - (2 * (p * hot).sum((2, 3)) / (p + hot).sum((2, 3))).mean()
        each = z - z * hot - F.logsigmoid(z)
        return dice + (F.logsigmoid(-z * (2 * hot - 1)).exp() ** 2 * each).mean()


class DiceFocal(EachPixel):
    logged, higher_is_better = "val_acc", True

    def module(self) -> L.LightningModule:
        return DiceFocalModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        return (z.argmax(1) == y).double().mean()


class FocalOnlyModule(DiceFocalModule):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self(x)
        hot = torch.zeros_like(z).scatter_(1, y.unsqueeze(1), 1.0)
        each = z - z * hot - F.logsigmoid(z)
        return (F.logsigmoid(-z * (2 * hot - 1)).exp() ** 2 * each).mean()


class FocalOnly(DiceFocal):
    def module(self) -> L.LightningModule:
        return FocalOnlyModule()


class MaskedByHandModule(MetricLossModule):
    """Binary cross-entropy by hand with a mask of the batch."""

    def loss(self, batch: Any) -> Tensor:
        x, y, mask = batch
        z = self(x)
        each = -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
        return (each * mask).sum() / mask.sum()


class MaskedByHand(MetricLoss):
    def module(self) -> L.LightningModule:
        return MaskedByHandModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        known = torch.rand(count, 4, generator=generator(seed)) > 0.3
        return TensorDataset(x, labels(x, seed), known.float())

    def targets(self, batch: Any) -> Tensor:
        return batch[1].masked_fill(batch[2] == 0, torch.nan)


class Slotted:
    """A batch with places for its attributes alone, as classes of attrs have them."""

    __slots__ = ("species", "traits")

    def __init__(self, traits: Tensor, species: Tensor) -> None:
        self.traits, self.species = traits, species


class SlottedModule(Classifier):
    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch.traits, batch.species

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch


def slotted(samples: list[Any]) -> Slotted:
    return Slotted(*(torch.stack(part) for part in zip(*samples, strict=True)))


class SlottedBatches(Rule):
    def module(self) -> L.LightningModule:
        return SlottedModule()

    def loaders(self) -> tuple[Any, Any]:
        return tuple(
            DataLoader(self.data(count, seed), 16, collate_fn=slotted)
            for count, seed in ((192, 1), (96, 2))
        )

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.traits,), {}

    def targets(self, batch: Any) -> Tensor:
        return batch.species


class ActivePart(Rule):
    """Items without a label (-1) count nowhere; the deployed duo answers for them too."""

    takes_batch = True

    def module(self) -> L.LightningModule:
        return ActivePartModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        hidden = torch.rand(count, generator=generator(seed)) < 0.2
        return TensorDataset(x, y.masked_fill(hidden, -1))

    def logits(self, module: Any, batch: Any) -> Tensor:
        return F.linear(module.net(batch[0]), module.classes)

    def targets(self, batch: Any) -> Tensor:
        return batch[1].masked_fill(batch[1] < 0, -100)


class TiedTaggerModule(Optimized):
    """Tags from a tied output layer; padding is cut off before the loss."""

    def __init__(self, words: int = 30, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Embedding(words, width)
        self.tags = nn.Parameter(torch.randn(3, width, generator=generator(6)))

    def active(self, batch: Any) -> Tensor:
        return (batch["labels"] != -100).view(-1)

    def loss(self, batch: Any) -> Tensor:
        z = self.net(batch["ids"]) @ self.tags.T
        active = self.active(batch)
        return F.cross_entropy(z.view(-1, 3)[active], batch["labels"].view(-1)[active])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class TiedTagger(Stranger):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return TiedTaggerModule()

    def data(self, count: int, seed: int) -> Dataset:
        ids, lengths, tags = sentences(count, seed)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        names = ("ids", "mask", "labels")
        make = lambda *parts: dict(zip(names, parts, strict=True))  # noqa: E731
        return Records(ids, mask.long(), tags.masked_fill(~mask, -100), make=make)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, outputs))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["ids"],), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return (module.net(batch["ids"]) @ module.tags.T).view(-1, 3)

    def targets(self, batch: Any) -> Tensor:
        return batch["labels"].view(-1)


class MaskedTaggerModule(TiedTaggerModule):
    def active(self, batch: Any) -> Tensor:
        return batch["mask"].view(-1) == 1


class TiedMaskedTagger(TiedTagger):
    """The same with the attention's mask, which leaves the places out of the duo's answer too."""

    def module(self) -> L.LightningModule:
        return MaskedTaggerModule()

    def data(self, count: int, seed: int) -> Dataset:
        ids, lengths, tags = sentences(count, seed)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        names = ("ids", "mask", "labels")
        make = lambda *parts: dict(zip(names, parts, strict=True))  # noqa: E731
        return Records(ids, mask.long(), tags, make=make)

    def logits(self, module: Any, batch: Any) -> Tensor:
        return super().logits(module, batch)[batch["mask"].view(-1) == 1]

    def targets(self, batch: Any) -> Tensor:
        return super().targets(batch)[batch["mask"].view(-1) == 1]

    def side(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["ids"]).view(-1, 3)[batch["mask"].view(-1) == 1]

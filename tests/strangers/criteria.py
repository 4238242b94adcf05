"""Losses as other libraries and papers write them, and several of them in one step."""

from typing import Any

import lightning as L
import torch
from strangers.data import Records, generator, points
from strangers.judge import Stranger, Truth
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from strangers.refused import OneLoss
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class NamedCriterion(nn.Module):
    """Takes what a model gives, and all of a batch by name."""

    def forward(self, logits: Tensor, label: Tensor, **others: Any) -> Tensor:
        return F.cross_entropy(logits, label)


class PassedOnModule(OneLoss):
    """self.criterion(outputs, **batch), where the batch has more than the criterion needs."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = NamedCriterion()

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self(batch["x"]), **batch)


class PassedOn(Rule):
    def module(self) -> L.LightningModule:
        return PassedOnModule()

    def data(self, count: int, seed: int) -> Dataset:
        make = lambda x, y: {"id": y * 0 + 2, "x": x, "label": y}  # noqa: E731
        return Records(*points(count, seed), make=make)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["x"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["label"]


class FocalLoss(nn.Module):
    """Made of softmax and gather."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        p = F.softmax(logits, dim=1).gather(1, target.view(-1, 1)).view(-1)
        return (-((1 - p) ** 2) * torch.log(p)).mean()


class LossTableModule(OneLoss):
    """Losses in a ModuleDict, weighted by a table; validation logs one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(
            {"focal": FocalLoss(), "ce": nn.CrossEntropyLoss(label_smoothing=0.1)}
        )
        self.weights = {"focal": 0.5, "ce": 1.0}

    def loss(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        return sum(self.weights[name] * f(logits, batch[1]) for name, f in self.losses.items())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class LossTable(Rule):
    def module(self) -> L.LightningModule:
        return LossTableModule()


class KendallModule(Optimized):
    """A body and two heads, losses weighed by learnt uncertainties."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.side = mlp(8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.log_vars = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return self.kind(h), self.side(h).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, value, y = batch
        kind, side = self(x)
        losses = torch.stack([F.mse_loss(side, value), F.cross_entropy(kind, y)])
        return (torch.exp(-self.log_vars) * losses + self.log_vars).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _, y = batch
        self.log("val_loss", F.cross_entropy(self(x)[0], y))


class LearntUncertainties(Rule):
    """A regression, of which the loss comes first, beside the classes."""

    def module(self) -> L.LightningModule:
        return KendallModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, x[:, 0] * x[:, 1], y)

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[0]

    def targets(self, batch: Any) -> Tensor:
        return batch[2]


class PretextModule(Optimized):
    """A self-supervised task before the classes: how far the input was rolled."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pretext, self.head = mlp(8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        rolls = torch.arange(len(x), device=x.device) % 4
        rolled = torch.stack([row.roll(int(r)) for row, r in zip(x, rolls, strict=True)])
        guess = self.pretext(self.body(rolled).relu())
        auxiliary = F.cross_entropy(guess, rolls)
        return 0.3 * auxiliary + F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class PretextFirst(Rule):
    """Targets from the batch go before targets that the step makes."""

    def module(self) -> L.LightningModule:
        return PretextModule()


class SemiSupervisedModule(Optimized):
    """An autoencoder of binary inputs whose code is classified too; the reconstruction first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.classifier = mlp(6), nn.Linear(6, 8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x).relu())

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        code = self.encoder(x).relu()
        rebuilt = F.binary_cross_entropy_with_logits(self.decoder(code), x)
        return rebuilt, F.cross_entropy(self.classifier(code), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rebuilt, named = self.losses(batch)
        return rebuilt + named

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rebuilt, named = self.losses(batch)
        self.log_dict({"val_rebuilt": rebuilt, "val_loss": named})


class ReconstructionFirst(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return SemiSupervisedModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset((x > 0).float(), y)


class DomainModule(Optimized):
    """DANN: source (0) against target (1) domain, then the classes of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.domain, self.head = mlp(8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, other = batch
        loss = x.new_zeros(())
        for number, inputs in enumerate((x, other)):
            guess = self.domain(self.body(inputs).relu()).squeeze(-1)
            loss = loss + F.binary_cross_entropy_with_logits(
                guess, torch.full_like(guess, float(number))
            )
        return 0.1 * loss + F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class DomainAdversary(Rule):
    def module(self) -> L.LightningModule:
        return DomainModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed), 1 + points(count, seed + 7)[0])


class HandSmoothedModule(OneLoss):
    """Smoothed one-hot targets times log-probabilities."""

    smoothing = 0.1

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logp = F.log_softmax(self(x), dim=-1)
        soft = F.one_hot(y, 3).float() * (1 - self.smoothing) + self.smoothing / 3
        return -(soft * logp).sum(dim=-1).mean()


class HandSmoothed(Rule):
    """Smoothing is how the loss is made; the targets are the labels."""

    def module(self) -> L.LightningModule:
        return HandSmoothedModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        logp, _, loss = self.hand(module, batch)
        return (0.9 * loss - 0.1 * logp.mean(1)).mean()


class AnnotatedModule(OneLoss):
    """The Annotated Transformer's LabelSmoothing: a filled distribution, scatter_, KLDivLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.KLDivLoss(reduction="sum")

    def loss(self, batch: Any) -> Tensor:
        x, target = batch
        logp = F.log_softmax(self(x), dim=-1)
        true_dist = logp.data.clone()
        true_dist.fill_(0.1 / 2)
        true_dist.scatter_(1, target.data.unsqueeze(1), 0.9)
        return self.criterion(logp, true_dist.clone().detach()) / len(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class SmoothedByDivergence(Rule):
    def module(self) -> L.LightningModule:
        return AnnotatedModule()


class MONAIFocalModule(OneLoss):
    """MONAI's softmax focal loss, whose one_hot scatters by keywords."""

    def loss(self, batch: Any) -> Tensor:
        logits, labels = self(batch[0]), batch[1][:, None]
        target = torch.zeros(len(labels), 3).scatter_(dim=1, index=labels.long(), value=1)
        input_ls = logits.log_softmax(1)
        loss = -(1 - input_ls.exp()).pow(2.0) * input_ls * target
        return loss.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class MONAIFocal(Rule):
    def module(self) -> L.LightningModule:
        return MONAIFocalModule()


class KorniaFocalModule(OneLoss):
    """kornia's focal loss: a one-hot tensor with an epsilon, and powers of probabilities."""

    def loss(self, batch: Any) -> Tensor:
        logits, labels = self(batch[0]), batch[1]
        log_soft = logits.log_softmax(1)
        one_hot = torch.zeros((len(labels), 3)).scatter_(1, labels.unsqueeze(1), 1.0) + 1e-6
        focal = -0.25 * torch.pow(1.0 - log_soft.exp(), 2.0) * log_soft
        return torch.sum(one_hot * focal, dim=1).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class KorniaFocal(Rule):
    def module(self) -> L.LightningModule:
        return KorniaFocalModule()


class GeneralisedModule(OneLoss):
    """Generalised cross-entropy for noisy labels: no logarithm anywhere, also in validation."""

    def loss(self, batch: Any) -> Tensor:
        p = F.softmax(self(batch[0]), dim=1)
        picked = torch.gather(p, 1, batch[1].unsqueeze(1))
        return ((1 - picked**0.7) / 0.7).mean()


class Generalised(Rule):
    def module(self) -> L.LightningModule:
        return GeneralisedModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        _, _, loss = self.hand(module, batch)
        return ((1 - torch.exp(-loss) ** 0.7) / 0.7).mean()


class BehaviourModule(OneLoss):
    """Behaviour cloning: the log-probability of the actions under a Categorical."""

    def loss(self, batch: Any) -> Tensor:
        observations, actions = batch
        return -Categorical(logits=self(observations)).log_prob(actions).mean()


class BehaviourCloning(Rule):
    def module(self) -> L.LightningModule:
        return BehaviourModule()


class BalancedModule(OneLoss):
    """Class-balanced loss: weights of the samples from counts of this batch, one-hot sigmoids."""

    def loss(self, batch: Any) -> Tensor:
        logits, labels = self(batch[0]), batch[1]
        counts = torch.bincount(labels, minlength=3).clamp(min=1)
        weights = (1 - 0.99) / (1 - 0.99**counts)
        weights = weights / weights.sum() * 3
        one_hot = F.one_hot(labels, 3).float()
        weights = (weights[None] * one_hot).sum(1, keepdim=True).expand(-1, 3)
        return F.binary_cross_entropy_with_logits(logits, one_hot, weight=weights)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class ClassBalanced(Rule):
    def module(self) -> L.LightningModule:
        return BalancedModule()


class BatchWeightsModule(OneLoss):
    """Class weights of each batch's own counts."""

    def loss(self, batch: Any) -> Tensor:
        counts = torch.bincount(batch[1], minlength=3).float() + 1
        return F.cross_entropy(self(batch[0]), batch[1], weight=counts.sum() / counts)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class BatchWeights(Rule):
    def module(self) -> L.LightningModule:
        return BatchWeightsModule()


class AdjustedModule(OneLoss):
    """Logit adjustment: log priors are added for the training's loss only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prior", torch.tensor([0.2, 0.3, 0.5]))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]) + self.prior.log(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class LogitAdjustment(Rule):
    def module(self) -> L.LightningModule:
        return AdjustedModule()


class LDAMModule(OneLoss):
    """LDAM: margins of the classes on the target's logit, and a scale; in validation too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("margins", torch.tensor([0.5, 0.3, 0.2]))

    def loss(self, batch: Any) -> Tensor:
        logits, target = self(batch[0]), batch[1]
        index = torch.zeros_like(logits, dtype=torch.bool)
        index.scatter_(1, target.data.view(-1, 1), 1)
        moved = logits - self.margins[target].view(-1, 1)
        return F.cross_entropy(3.0 * torch.where(index, moved, logits), target)


class LDAM(Rule):
    def module(self) -> L.LightningModule:
        return LDAMModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        z = z.double() - torch.eye(3)[y] * module.margins[y, None]
        return (torch.logsumexp(3 * z, 1) - 3 * z.gather(1, y[:, None])[:, 0]).mean()


class SupportVectorModule(OneLoss):
    """MultiMarginLoss: a linear SVM's loss of several classes."""

    def loss(self, batch: Any) -> Tensor:
        return nn.MultiMarginLoss()(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class MultiMargin(Rule):
    def module(self) -> L.LightningModule:
        return SupportVectorModule()


class SoftMarginModule(OneLoss):
    """SoftMarginLoss wants -1 and 1; the batch has 0 and 1."""

    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.soft_margin_loss(self(x).squeeze(1), (2 * y - 1).float())


class SoftMargin(Rule):
    layout = "labels"
    may_squeeze = True

    def module(self) -> L.LightningModule:
        return SoftMarginModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed, classes=2))

    def targets(self, batch: Any) -> Tensor:
        return batch[1][:, None]


class CoralModule(OneLoss):
    """Ordinal ranks: one score and K - 1 thresholds, levels made in the step."""

    def __init__(self) -> None:
        super().__init__(1)
        self.thresholds = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.thresholds

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        levels = (y[:, None] > torch.arange(2, device=y.device)).float()
        return F.binary_cross_entropy_with_logits(self(x), levels)


class OrdinalLevels(Rule):
    """A yes or no for each threshold."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        return CoralModule()

    def targets(self, batch: Any) -> Tensor:
        return (batch[1][:, None] > torch.arange(2)).float()


class HierarchyModule(OneLoss):
    """The coarse class is looked up in a table; its loss, of the same logits, stands first."""

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("coarse_of", torch.tensor([0, 0, 1, 1]))

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = self(x)
        p = logits.softmax(1)
        coarse = torch.stack([p[:, :2].sum(1), p[:, 2:].sum(1)], 1)
        upper = F.nll_loss(torch.log(coarse), self.coarse_of[y])
        return upper, F.cross_entropy(logits, y)

    def loss(self, batch: Any) -> Tensor:
        upper, fine = self.losses(batch)
        return 0.5 * upper + fine

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.losses(batch)[1])


class Hierarchy(Rule):
    def module(self) -> L.LightningModule:
        return HierarchyModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed, classes=4))


class DigitsModule(Optimized):
    """Several attributes, a head for each, targets in the columns of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.body(x).relu()
        return [head(h) for head in self.heads]

    def loss(self, batch: Any) -> list[Tensor]:
        x, y = batch
        return [F.cross_entropy(z, y[:, i]) for i, z in enumerate(self(x))]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.loss(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch)[0])


class ColumnsOfTargets(Rule):
    """The first head counts."""

    def module(self) -> L.LightningModule:
        return DigitsModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, torch.stack([y, (x[:, 0] > 0).long()], 1))

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[0]

    def targets(self, batch: Any) -> Tensor:
        return batch[1][:, 0]


class UnknownModule(OneLoss):
    """A label of -1 means that nobody knows: those samples do not go into the loss."""

    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        known = y >= 0
        logits = self(x).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits[known], y[known].float())


class UnknownLabels(SoftMargin):
    def module(self) -> L.LightningModule:
        return UnknownModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, classes=2)
        y[torch.rand(count, generator=generator(seed)) < 0.25] = -1
        return TensorDataset(x, y)

    def targets(self, batch: Any) -> Tensor:
        return batch[1][:, None].float().masked_fill(batch[1][:, None] < 0, torch.nan)


class TwoHotModule(OneLoss):
    """Two classes as one-hot rows, each with a sigmoid."""

    def __init__(self) -> None:
        super().__init__(2)

    def loss(self, batch: Any) -> Tensor:
        one_hot = F.one_hot(batch[1], num_classes=2).float()
        return F.binary_cross_entropy_with_logits(self(batch[0]), one_hot)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class TwoHot(Rule):
    def module(self) -> L.LightningModule:
        return TwoHotModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed, classes=2))


class NormalizedSoftmaxLoss(nn.Module):
    """pytorch_metric_learning's: the loss has the weights of the classes and makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(8, 3, generator=generator(5)))

    def logits(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings) @ F.normalize(self.W, dim=0) / 0.1

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(embeddings), labels, reduction="none").mean()


class EmbeddingModule(Optimized):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.loss_func = mlp(8), NormalizedSoftmaxLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_func(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss_func(self(batch[0]), batch[1]))


class WeightsInTheLoss(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return EmbeddingModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.loss_func.logits(module(batch[0]))


class MultiDiceModule(Optimized):
    """Soft Dice of several classes by hand: one_hot moved to the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, mask = batch
        p = self(image).softmax(dim=1)
        hot = F.one_hot(mask, 3).permute(0, 3, 1, 2).float()
        both, each = (p * hot).sum((0, 2, 3)), (p + hot).sum((0, 2, 3))
        return 1 - (2 * both / each).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class MultiDice(Stranger):
    sizes = (96, 48, 8)

    def module(self) -> L.LightningModule:
        return MultiDiceModule()

    def arguments(self) -> dict[str, Any]:
        fast = lambda parameters: torch.optim.Adam(parameters, 0.1)  # noqa: E731
        return {**super().arguments(), "optimizer": fast}

    def data(self, count: int, seed: int) -> Dataset:
        from strangers.data import scenes

        return TensorDataset(*scenes(count, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Conv2d(3, outputs, 1)


class SupConModule(Optimized):
    """Supervised contrastive loss, by hand, and cross-entropy beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.project, self.head = mlp(8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return F.normalize(self.project(h)), self.head(h)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z, logits = self(x)
        alike = z @ z.T / 0.5
        alike = alike.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
        logp = alike - torch.logsumexp(alike, 1, keepdim=True)
        same = (y[:, None] == y[None]).float().fill_diagonal_(0)
        contrast = -((same * logp).sum(1) / same.sum(1).clamp(min=1)).mean()
        return contrast + F.cross_entropy(logits, y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0])[1], batch[1]))


class ContrastBesideClasses(Rule):
    def module(self) -> L.LightningModule:
        return SupConModule()

    def truth(self, module: Any, batch: Any) -> Truth:
        return Truth(module(batch[0])[1], batch[1])

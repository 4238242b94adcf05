"""Steps that do more than one forward, or less, or elsewhere."""

import copy
from typing import Any, ClassVar

import lightning as L
import torch
from strangers.batches import Classifier
from strangers.data import images
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class EpochEndModule(Classifier):
    """Validation keeps logits; the loss is computed when the epoch ends."""

    def on_validation_epoch_start(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.kept.append((self(x), y))

    def on_validation_epoch_end(self) -> None:
        logits, targets = (torch.cat(part) for part in zip(*self.kept, strict=True))
        self.log("val_loss", F.cross_entropy(logits, targets))


class LossAtTheEnd(Rule):
    def module(self) -> L.LightningModule:
        return EpochEndModule()


class PredictingModule(Classifier):
    """Validation returns predicted classes; the model is switched to eval by hand."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.net.eval()
        logits = self.net(x)
        self.log("val_acc", (logits.argmax(1) == y).float().mean())
        return {"preds": logits.argmax(1), "probs": logits.softmax(1), "target": y}


class ReturnsPredictions(Rule):
    logged, higher_is_better = "val_acc", True

    def module(self) -> L.LightningModule:
        return PredictingModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        return (self.logits(module, batch).argmax(1) == batch[1]).double().mean()


class FrozenModule(Classifier):
    """The body runs under no_grad in the step; only the head learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.net = mlp(16, width=32), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.body(x)
        return self.net(h)

    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            h = self.body(batch[0])
        return F.cross_entropy(self.net(h), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-2)


class FrozenBody(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return FrozenModule()


class TimmStyle(nn.Module):
    """forward_features and forward_head, as timm's models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class MethodsModule(Classifier):
    """The step calls the model's methods and not the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TimmStyle()

    def loss(self, batch: Any) -> Tensor:
        features = self.net.forward_features(batch[0])
        return F.cross_entropy(self.net.forward_head(features), batch[1])


class MethodsOfTheModel(Stranger):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return MethodsModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*images(count, seed, strength=0.5))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(27, outputs))


class MembersModule(Classifier):
    """An ensemble: each member has its loss; validation averages probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([mlp(3), mlp(3), mlp(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.stack([net(x).softmax(1) for net in self.net]).mean(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(net(batch[0]), batch[1]) for net in self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        p = torch.stack([net(batch[0]).softmax(1) for net in self.net]).mean(0)
        self.log("val_loss", F.nll_loss(torch.log(p), batch[1]))


class MeanOfProbabilities(Rule):
    """The deployed base is the ensemble that validation sees."""

    takes_batch = True

    def module(self) -> L.LightningModule:
        return MembersModule()


class MeanLogitsModule(MembersModule):
    """Both steps take the mean of two modules' logits."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.net[0](x) + self.net[1](x)) / 2

    def loss(self, batch: Any) -> Tensor:
        one, other = self.net[0](batch[0]), self.net[1](batch[0])
        return F.cross_entropy(torch.mean(torch.stack([one, other]), 0), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class MeanOfLogits(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return MeanLogitsModule()


class ExpertsModule(Classifier):
    """A mixture of experts with a loss that balances them, computed by the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.net = nn.Linear(8, 3), nn.ModuleList([mlp(3) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(self.gate(x), dim=-1)
        every = torch.stack([net(x) for net in self.net], 1)
        balance = 3 * (gates.mean(0) ** 2).sum()
        return (gates.unsqueeze(-1) * every).sum(1), balance

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, balance = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.01 * balance


class MixtureOfExperts(Rule):
    def module(self) -> L.LightningModule:
        return ExpertsModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[0]


class GatherExpertsModule(ExpertsModule):
    """The same with a loss by hand: the gate's softmax is none of it."""

    def loss(self, batch: Any) -> Tensor:
        logits, _ = self(batch[0])
        return -F.log_softmax(logits, 1).gather(1, batch[1][:, None]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        gates = F.softmax(self.gate(batch[0]), dim=-1)
        return loss + 0.01 * 3 * (gates.mean(0) ** 2).sum()


class LossByHandBesideAGate(MixtureOfExperts):
    def module(self) -> L.LightningModule:
        return GatherExpertsModule()


class CoTeachingModule(Classifier):
    """Two nets teach each other with the samples of small loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = mlp(3), mlp(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        one, two = self.net(x), self.other(x)
        first = F.cross_entropy(one, y, reduction="none").argsort()[: 3 * len(y) // 4]
        second = F.cross_entropy(two, y, reduction="none").argsort()[: 3 * len(y) // 4]
        return F.cross_entropy(one[second], y[second]) + F.cross_entropy(two[first], y[first])


class CoTeaching(Rule):
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 4}

    def module(self) -> L.LightningModule:
        return CoTeachingModule()


class SharpnessModule(Classifier):
    """SAM: a second pass where the weights are a little worse."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, parameters = self.optimizers(), list(self.parameters())
        self.manual_backward(self.loss(batch))
        steps = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in parameters]
        with torch.no_grad():
            for p, step in zip(parameters, steps, strict=True):
                p.add_(step)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for p, step in zip(parameters, steps, strict=True):
                p.sub_(step)
        optimizer.step()
        optimizer.zero_grad()


class SharpnessAware(Rule):
    def module(self) -> L.LightningModule:
        return SharpnessModule()


class QuasiNewtonModule(Classifier):
    """LBFGS evaluates a training step several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class QuasiNewton(Rule):
    def module(self) -> L.LightningModule:
        return QuasiNewtonModule()


class MetaModule(Classifier):
    """MAML's inner step: functional_call with other weights, first half against second."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weights = dict(self.net.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(self.net, weights, (x,)), y)
        grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), grads, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.net, fast, (x,)), y)


class InnerLoop(Rule):
    def module(self) -> L.LightningModule:
        return MetaModule()


class WholeCompiled(Rule):
    """torch.compile of the LightningModule itself."""

    def module(self) -> L.LightningModule:
        return torch.compile(Classifier(), backend="eager")  # type: ignore[return-value]


class CompiledLossModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = torch.compile(F.cross_entropy, backend="eager")

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])


class CompiledLoss(Rule):
    def module(self) -> L.LightningModule:
        return CompiledLossModule()


class TwinModule(Classifier):
    """Mean teacher: a slow copy, and a squared difference of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, noisy = self(x), x + 0.1 * torch.randn_like(x)
        with torch.no_grad():
            wanted = self.teacher(noisy).softmax(1)
        return F.cross_entropy(logits, y) + F.mse_loss(logits.softmax(1), wanted)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.net.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, 0.1)


class MeanTeacher(Rule):
    def module(self) -> L.LightningModule:
        return TwinModule()


class EntropyModule(Classifier):
    """A loss by hand, and an entropy of the same softmax that is only logged."""

    def loss(self, batch: Any) -> Tensor:
        p = self(batch[0]).softmax(-1)
        loss = -torch.log(p[torch.arange(len(p)), batch[1]]).mean()
        with torch.no_grad():
            self.spread = -(p * p.log()).sum(-1).mean()
        return loss


class LoggedEntropy(Rule):
    def module(self) -> L.LightningModule:
        return EntropyModule()


class NormalisingModule(Classifier):
    """The step normalises and reshapes before it calls the net, and shifts labels after."""

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), y


class NormalisedInTheStep(Rule):
    def module(self) -> L.LightningModule:
        return NormalisingModule()

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = batch[0]
        return ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),), {}

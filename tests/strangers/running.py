"""How it is run: copies for validation, several loaders, own optimizers, precision, compilers."""

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from strangers.byhand import Truth
from strangers.data import Records, points
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class PlainModule(Optimized):
    """What everybody writes; the subclasses do one thing in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


class AveragedModule(PlainModule):
    """Validation uses PyTorch's moving average of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def on_train_batch_end(self, *args: Any) -> None:
        self.ema.update_parameters(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.ema(x), y))


class MovingAverage(Rule):
    def module(self) -> L.LightningModule:
        return AveragedModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.ema(batch[0])


class SeveralLoadersModule(PlainModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


class SeveralLoaders(Rule):
    """The first of three validation loaders fits the temperatures."""

    logged = "val_loss/dataloader_idx_0"

    def module(self) -> L.LightningModule:
        return SeveralLoadersModule()

    def loaders(self) -> tuple[Any, Any]:
        train, val = super().loaders()
        return train, [val, *(DataLoader(self.data(32, seed), 16) for seed in (8, 9))]


class MetricsModule(Optimized):
    """Validation has metrics of probabilities, but no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = mlp(3)
        metrics = {
            "acc": MulticlassAccuracy(num_classes=3, average="micro"),
            "f1": MulticlassF1Score(num_classes=3),
        }
        self.valid_metrics = MetricCollection(metrics, prefix="val_")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.classifier(batch["features"]), batch["species"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        probs = self.classifier(batch["features"]).softmax(dim=-1)
        self.valid_metrics.update(probs, batch["species"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.valid_metrics.compute())
        self.valid_metrics.reset()


class MetricsOnly(Stranger):
    logged = "val_acc"
    higher_is_better = True

    def module(self) -> L.LightningModule:
        return MetricsModule()

    def data(self, count: int, seed: int) -> Dataset:
        return Records(*points(count, seed), make=lambda x, y: {"features": x, "species": y})

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["features"],), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.classifier(batch["features"])

    def targets(self, batch: Any) -> Tensor:
        return batch["species"]

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = self.truth(module, batch)
        return (logits.argmax(1) == targets).double().mean()


class ManualModule(PlainModule):
    """Manual optimization, an optimizer for the body and one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        body, head = self.optimizers()
        loss = F.cross_entropy(self(x), y)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        if batch_idx % 2 == 0:
            head.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.net[0].parameters(), lr=1e-2),
            torch.optim.SGD(self.net[2].parameters(), lr=0.1),
        ]


class TwoOptimizers(Rule):
    def module(self) -> L.LightningModule:
        return ManualModule()


class Accumulated(Rule):
    trainer: ClassVar[dict[str, Any]] = {
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 1.0,
        "max_epochs": 5,
    }

    def module(self) -> L.LightningModule:
        return PlainModule()


class HalfPrecision(Rule):
    trainer: ClassVar[dict[str, Any]] = {"precision": "bf16-mixed"}

    def module(self) -> L.LightningModule:
        return PlainModule()

    def around(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)


class CheckpointedModule(PlainModule):
    """The body's activations are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        features = checkpoint(self.net[:2], x, use_reentrant=False)
        return self.net[2](features)


class ActivationCheckpointing(Rule):
    def module(self) -> L.LightningModule:
        return CheckpointedModule()


class CompiledModule(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class CompiledPart(Rule):
    def module(self) -> L.LightningModule:
        return CompiledModule()


class BothModule(PlainModule):
    """A batch of each of two sources, a loss of each."""

    def loss(self, batch: Any) -> Tensor:
        losses = [F.cross_entropy(self(x), y) for x, y in (batch["site_a"], batch["site_b"])]
        return torch.stack(losses).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=32)


class TwoSources(Rule):
    """The fit counts the samples of both."""

    def module(self) -> L.LightningModule:
        return BothModule()

    def loaders(self) -> tuple[Any, Any]:
        def both(count: int, seed: int) -> CombinedLoader:
            parts = {"site_a": self.data(count, seed), "site_b": self.data(count, seed + 20)}
            loaders = {name: DataLoader(data, 16) for name, data in parts.items()}
            return CombinedLoader(loaders, "min_size")

        return both(128, 1), both(64, 2)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.cat([batch["site_a"][0], batch["site_b"][0]]),), {}

    def targets(self, batch: Any) -> Tensor:
        return torch.cat([batch["site_a"][1], batch["site_b"][1]])

    def value(self, module: Any, batch: Any) -> Tensor:
        return 2 * super().value(module, batch)  # a sum of two means


class FixMatchModule(PlainModule):
    """Confident predictions on unlabelled data are targets for their noisy versions."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u,) = batch["labelled"], batch["unlabelled"]
        logits_x, logits_u = self(torch.cat([x, u + 0.3 * torch.randn_like(u)])).split(len(x))
        with torch.no_grad():
            probs, pseudo = self(u).softmax(dim=-1).max(dim=-1)
        mask = (probs >= 0.7).float()
        loss_u = (F.cross_entropy(logits_u, pseudo, reduction="none") * mask).mean()
        return F.cross_entropy(logits_x, y) + loss_u


class PseudoLabels(Rule):
    def module(self) -> L.LightningModule:
        return FixMatchModule()

    def loaders(self) -> tuple[Any, Any]:
        train, val = super().loaders()
        unlabelled = DataLoader(TensorDataset(points(128, 5)[0]), 16, shuffle=True)
        both = {"labelled": train, "unlabelled": unlabelled}
        return CombinedLoader(both, "max_size_cycle"), val


class RDropModule(PlainModule):
    """Two passes with other dropout and a divergence between them; one pass in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        one, two = self(x), self(x)
        ce = 0.5 * (F.cross_entropy(one, y) + F.cross_entropy(two, y))
        p, q = F.log_softmax(one, dim=-1), F.log_softmax(two, dim=-1)
        kl = F.kl_div(p, q, log_target=True, reduction="batchmean")
        return ce + 0.5 * kl


class RDrop(Rule):
    def module(self) -> L.LightningModule:
        return RDropModule()


class AdversarialModule(PlainModule):
    """FGSM: the loss counts on inputs that the gradient of a first loss made worse."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(self(x), y), x)
        worse = (x + 0.1 * gradient.sign()).detach()
        return F.cross_entropy(self(worse), y)


class Adversarial(Rule):
    def module(self) -> L.LightningModule:
        return AdversarialModule()


class AugmentedModule(PlainModule):
    """Validation takes the mean of two views' logits."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = (self(x) + self(0.9 * x)) / 2
        self.log("val_loss", F.cross_entropy(logits, y))


class AugmentedInValidation(Rule):
    """Only validation's step makes these logits, and validation is what the duo deploys."""

    takes_batch = True

    def module(self) -> L.LightningModule:
        return AugmentedModule()

    def truth(self, module: Any, batch: Any) -> Truth:
        x, y = batch
        return Truth((module.net(x) + module.net(0.9 * x)) / 2, y)


class NamedBatchModule(PlainModule):
    """Steps with unusual signatures, on a batch that is a list of dicts, stacked in the step."""

    def loss(self, samples: list[dict[str, Tensor]]) -> Tensor:
        x = torch.stack([sample["x"] for sample in samples])
        y = torch.stack([sample["y"] for sample in samples])
        return F.cross_entropy(self(x), y)

    def training_step(self, samples: list[dict[str, Tensor]]) -> Tensor:
        return self.loss(samples)

    def validation_step(self, samples: list[dict[str, Tensor]]) -> None:
        self.log("val_loss", self.loss(samples), batch_size=len(samples))


class ListOfSamples(Rule):
    """As detectors' batches: collate_fn=list."""

    def module(self) -> L.LightningModule:
        return NamedBatchModule()

    def loaders(self) -> tuple[Any, Any]:
        train, val = (
            Records(*points(count, seed), make=lambda x, y: {"x": x, "y": y})
            for count, seed in ((192, 1), (96, 2))
        )
        return (
            DataLoader(train, 16, shuffle=True, collate_fn=list),
            DataLoader(val, 16, collate_fn=list),
        )

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.stack([sample["x"] for sample in batch]),), {}

    def targets(self, batch: Any) -> Tensor:
        return torch.stack([sample["y"] for sample in batch])

"""Runs that are no classification, and a sidekick that gives no logits."""

from typing import Any

import lightning as L
import torch
from strangers.data import points, sentences
from strangers.judge import Stranger
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class Unfit(Stranger):
    """Points, and a linear sidekick; `loss` is all that differs."""

    refused = True

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)


class OneLoss(Optimized):
    """Steps around a loss."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.net = mlp(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class RegressionModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0]).squeeze(-1), batch[1])


class Regression(Unfit):
    def module(self) -> L.LightningModule:
        return RegressionModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, x[:, 0] * x[:, 1])


class SeveralValuesModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        return F.smooth_l1_loss(self(batch[0]), batch[1])


class SeveralValues(Unfit):
    def module(self) -> L.LightningModule:
        return SeveralValuesModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, x[:, :3].abs())


class CountModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(1)
        self.criterion = nn.PoissonNLLLoss()

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self(batch[0])[:, 0], batch[1].float())


class Counts(Unfit):
    """Integers, but how many of something."""

    def module(self) -> L.LightningModule:
        return CountModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, (3 * x[:, 0].abs()).long())


class AutoencoderModule(OneLoss):
    """MNIST's autoencoder: binary cross-entropy to the grey values of the input itself."""

    def __init__(self) -> None:
        super().__init__(8)

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        return F.binary_cross_entropy_with_logits(self(x), x)


class Autoencoder(Unfit):
    def module(self) -> L.LightningModule:
        return AutoencoderModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x.sigmoid(), y)


class TripletModule(OneLoss):
    """The net embeds anchor, positive and negative."""

    def loss(self, batch: Any) -> Tensor:
        anchor, positive, negative = (self(x) for x in batch)
        return F.triplet_margin_loss(anchor, positive, negative)


class MetricLearning(Unfit):
    def module(self) -> L.LightningModule:
        return TripletModule(6)

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, x + 0.1, x.roll(1, 0))


class SimCLRModule(OneLoss):
    """NT-Xent: each view's target is the position of the other view."""

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        views = torch.cat([x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)])
        z = F.normalize(self(views), dim=-1)
        similarity = z @ z.T / 0.5
        similarity.fill_diagonal_(-9e15)
        n = len(x)
        target = torch.cat([torch.arange(n) + n, torch.arange(n)])
        return F.cross_entropy(similarity, target)


class Contrastive(Unfit):
    def module(self) -> L.LightningModule:
        return SimCLRModule(6)


class CLIPModule(OneLoss):
    """Two towers; the target of row i is i, in both directions."""

    def __init__(self) -> None:
        super().__init__(6)
        self.text = nn.Linear(8, 6)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def loss(self, batch: Any) -> Tensor:
        image, text = F.normalize(self(batch[0])), F.normalize(self.text(batch[1]))
        logits = self.logit_scale.exp() * image @ text.t()
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class Pairs(Unfit):
    def module(self) -> L.LightningModule:
        return CLIPModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, x.flip(1))


class MoCoModule(OneLoss):
    """The positive pair stands first, so that all targets are 0."""

    def __init__(self) -> None:
        super().__init__(6)
        self.register_buffer("queue", F.normalize(torch.randn(6, 20), dim=0))

    def loss(self, batch: Any) -> Tensor:
        q = F.normalize(self(batch[0]), dim=1)
        with torch.no_grad():
            k = F.normalize(self(batch[0] + 0.1), dim=1)
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ self.queue], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


class MomentumContrast(Unfit):
    def module(self) -> L.LightningModule:
        return MoCoModule()


class GANModule(Optimized):
    """Lightning's example: two optimizers, the discriminator's targets are ones and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(4, 8), mlp(1)
        self.automatic_optimization = False

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        imgs, _ = batch
        z = torch.randn(len(imgs), 4).type_as(imgs)
        ones = torch.ones(len(imgs), 1).type_as(imgs)
        for_generator, for_discriminator = self.optimizers()

        self.toggle_optimizer(for_generator)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), ones)
        self.manual_backward(g_loss)
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        real_loss = self.adversarial_loss(self.discriminator(imgs), ones)
        fake = self.discriminator(self(z).detach())
        d_loss = (real_loss + self.adversarial_loss(fake, torch.zeros_like(ones))) / 2
        self.manual_backward(d_loss)
        for_discriminator.step()
        for_discriminator.zero_grad()
        self.untoggle_optimizer(for_discriminator)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        real = self.discriminator(batch[0])
        self.log("val_real", self.adversarial_loss(real, torch.ones_like(real)))

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in parts], []


class Adversaries(Unfit):
    def module(self) -> L.LightningModule:
        return GANModule()


class ClassifierModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class SidekickOfProbabilities(Unfit):
    """The run is a classification; the sidekick ends in a softmax."""

    def module(self) -> L.LightningModule:
        return ClassifierModule()

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, outputs), nn.Softmax(dim=1))


class LanguageModule(Optimized):
    """The next word: the targets are the inputs, shifted by one."""

    def __init__(self, words: int = 30, width: int = 8) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(words, width), nn.GRU(width, width)
        self.decoder = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embedding(ids))[0])

    def loss(self, batch: Any) -> Tensor:
        (ids,) = batch
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.reshape(-1, 30), ids[:, 1:].reshape(-1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class LanguageModel(Unfit):
    def module(self) -> L.LightningModule:
        return LanguageModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(sentences(count, seed)[0])

    def sidekick(self, outputs: int) -> nn.Module:
        return LanguageModule(outputs, 4)


class CoxModule(OneLoss):
    """Cox's partial likelihood of survival times, of which some are censored."""

    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        x, time, event = batch
        order = time.argsort(descending=True)
        risk = self(x).squeeze(1)[order]
        return -((risk - risk.logcumsumexp(0)) * event[order]).sum() / event.sum().clamp(min=1)


class Survival(Unfit):
    def module(self) -> L.LightningModule:
        return CoxModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, x[:, 0].exp(), (y > 0).float())

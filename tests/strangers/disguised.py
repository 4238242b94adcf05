"""Runs that are no classification, though they hold softmaxes, sigmoids, logits and integers."""

from typing import Any

import lightning as L
import torch
from strangers.data import Records, generator, points
from strangers.models import Optimized, mlp
from strangers.refused import OneLoss, Unfit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class SquaredOneHotModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())


class SquaredOneHot(Unfit):
    """Least squares on one-hot rows: outputs that are no logits."""

    def module(self) -> L.LightningModule:
        return SquaredOneHotModule()


class RatingsModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        x, ratings, _ = batch
        return F.kl_div(F.log_softmax(self(x), 1), ratings, reduction="batchmean")


class RatingsAndRater(Unfit):
    """A distribution of ratings, and who rated: a number that looks like a class."""

    def module(self) -> L.LightningModule:
        return RatingsModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, torch.softmax(x[:, :3], 1), (y + 1) % 3)


class EnergyModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        noise = torch.randn(x.shape, generator=generator(3))
        energy = lambda one: -torch.logsumexp(self(one), dim=1)  # noqa: E731
        return (energy(x) - energy(noise)).mean() + 0.1 * (energy(x) ** 2).mean()


class EnergyModel(Unfit):
    """A joint energy model trained without the labels that its batches have."""

    def module(self) -> L.LightningModule:
        return EnergyModule()


class ExpertsModule(Optimized):
    """A gate's softmax weighs three experts, who regress."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (F.softmax(self.gate(x), dim=-1) * self.experts(x)).sum(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1].float()))


class GatedRegression(Unfit):
    """Stars from 0 to 2 by a mixture of as many experts."""

    def module(self) -> L.LightningModule:
        return ExpertsModule()


class AttentionModule(ExpertsModule):
    """A softmax over the instances of a bag pools them; the pooled value is a count."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.score(x), dim=1)
        return (weights * self.value(x)).sum(1).squeeze(-1)


class PooledRegression(Unfit):
    def module(self) -> L.LightningModule:
        return AttentionModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count * 5, seed)
        return TensorDataset(x.view(count, 5, 8), y.view(count, 5).sum(1).clamp(max=4))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)


class BinaryDecoderModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(8)

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        return F.mse_loss(torch.sigmoid(self(x)), x)


class BinaryAutoencoder(Unfit):
    """Inputs of 0 and 1, rebuilt through a sigmoid under a squared error."""

    def module(self) -> L.LightningModule:
        return BinaryDecoderModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset((x > 0).float(), y)


class MaskedModule(BinaryDecoderModule):
    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        hidden = torch.rand(x.shape, generator=generator(4)) > 0.5
        error = (self(x.masked_fill(hidden, 0.0)) - x) ** 2
        return (error * hidden).sum() / hidden.sum()


class MaskedAutoencoder(BinaryAutoencoder):
    def module(self) -> L.LightningModule:
        return MaskedModule()


class AgeModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        x, age = batch
        expected = (F.softmax(self(x), dim=1) * torch.arange(3.0)).sum(1)
        return F.l1_loss(expected, age.float())


class ExpectedValue(Unfit):
    """Ages as the mean of a softmax's distribution, under an absolute error."""

    def module(self) -> L.LightningModule:
        return AgeModule()


class MarginRankingModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        a, b, better = batch
        return nn.MarginRankingLoss(0.1)(self(a)[:, 0], self(b)[:, 0], better)


class Ranking(Unfit):
    """Pairs, and which of the two is better: 1 or -1."""

    def module(self) -> L.LightningModule:
        return MarginRankingModule()

    def data(self, count: int, seed: int) -> Dataset:
        (a, _), (b, _) = points(count, seed), points(count, seed + 50)
        return TensorDataset(a, b, torch.sign(a[:, 0] - b[:, 0]))


class ListNetModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        x, relevance = batch
        scores = self(x).squeeze(-1)
        return -(F.softmax(relevance, 1) * F.log_softmax(scores, 1)).sum(1).mean()


class ListwiseRanking(Unfit):
    """Six documents a query; the softmax is over the documents."""

    def module(self) -> L.LightningModule:
        return ListNetModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count * 6, seed)
        return TensorDataset(x.view(count, 6, 8), y.view(count, 6).float())


class SpeechModule(Optimized):
    """CTC: log-probabilities (T, N, K), transcripts (N, S), and their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        logp = F.log_softmax(self(batch["waves"]), dim=-1).transpose(0, 1)
        return F.ctc_loss(logp, batch["text"], batch["frames"], batch["letters"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Transcripts(Unfit):
    """Padded to the same length as the frames."""

    def module(self) -> L.LightningModule:
        return SpeechModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count * 10, seed)
        text = torch.randint(1, 5, (count, 10), generator=generator(seed))
        lengths = torch.randint(2, 5, (count,), generator=generator(seed + 1))
        text[torch.arange(10) >= lengths[:, None]] = 0
        make = lambda x, t, n: {"waves": x, "text": t, "frames": n * 0 + 10, "letters": n}  # noqa: E731
        return Records(x.view(count, 10, 8), text, lengths, make=make)


class BatchHardModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = F.normalize(self(x))
        far = torch.cdist(z, z)
        same = y[:, None] == y[None]
        hardest = (far * same).max(1).values - far.masked_fill(same, 9.0).min(1).values
        return F.relu(hardest + 0.2).mean()


class BatchHardTriplet(Unfit):
    """Embeddings (N, 3), labels of three classes."""

    def module(self) -> L.LightningModule:
        return BatchHardModule()


class SupervisedContrastModule(OneLoss):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = F.normalize(self(x))
        logp = F.log_softmax((z @ z.T / 0.5).fill_diagonal_(-1e9), dim=1)
        same = (y[:, None] == y[None]).float().fill_diagonal_(0)
        return -((same * logp).sum(1) / same.sum(1).clamp(min=1)).mean()


class SupervisedContrast(Unfit):
    """SupCon alone, with the labels in the batch."""

    def module(self) -> L.LightningModule:
        return SupervisedContrastModule()


class ConditionalGAN(Optimized):
    """The discriminator sees samples and their labels; its targets are real and fake."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(8, inputs=11), mlp(1, inputs=11)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        hot = F.one_hot(y, 3).float()
        first, second = self.optimizers()
        fake = self.generator(torch.cat([torch.randn_like(x), hot], 1))
        for step, (samples, value) in enumerate([(fake, 1.0), (x, 1.0), (fake.detach(), 0.0)]):
            score = self.discriminator(torch.cat([samples, hot], 1))
            loss = F.binary_cross_entropy_with_logits(score, torch.full_like(score, value))
            optimizer = second if step else first
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        score = self.discriminator(torch.cat([x, F.one_hot(y, 3).float()], 1))
        self.log("val_loss", score.mean())


class LabelledAdversaries(Unfit):
    def module(self) -> L.LightningModule:
        return ConditionalGAN()


class PairwiseModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        x, relevance = batch
        score = self(x)[:, 0]
        better = (relevance[:, None] > relevance[None]).nonzero(as_tuple=True)
        difference = score[better[0]] - score[better[1]]
        return F.binary_cross_entropy_with_logits(difference, torch.ones_like(difference))


class RankNet(Unfit):
    """Scores of all pairs of a batch; the better one comes first, so all targets are 1."""

    def module(self) -> L.LightningModule:
        return PairwiseModule()


class EvidentialModule(OneLoss):
    """Only for a regression: a sigmoid bounds the mean, the labels are ignored."""

    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, batch: Any) -> Tensor:
        x, value, _ = batch
        return F.mse_loss(torch.sigmoid(self(x)).squeeze(1), value)


class BoundedRegression(Unfit):
    """A share between 0 and 1, and a flag (N,) of 0 and 1 that the loss ignores."""

    def module(self) -> L.LightningModule:
        return EvidentialModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, classes=2)
        return TensorDataset(x, x[:, 0].sigmoid(), y)


class LSTMGateModule(OneLoss):
    """A gate by hand, sigmoid of a layer, within a regression."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = nn.Linear(8, 8)

    def loss(self, batch: Any) -> Tensor:
        x, value, _ = batch
        return F.mse_loss(self.net(x * torch.sigmoid(self.gate(x))).squeeze(1), value)


class GatedInputs(Unfit):
    """Beside flags (N, 8) of which values were measured."""

    def module(self) -> L.LightningModule:
        return LSTMGateModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed)
        return TensorDataset(x, x[:, 0] * x[:, 1], x > -1)

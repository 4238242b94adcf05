"""Tables, sounds, and batches whose parts have unusual names and places."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.data import Records, points
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class TabularModel(Optimized):
    """pytorch_tabular: a dict goes in, {"logits", "backbone_features"} comes out; target (N, 1)."""

    def __init__(self, output_dim: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(5, 4)
        self._backbone = nn.Sequential(nn.Linear(12, width), nn.ReLU())
        self.head = nn.Linear(width, output_dim)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        embedded = self.embedding_layer(x["categorical"]).mean(1)
        features = self._backbone(torch.cat([x["continuous"], embedded], dim=1))
        return {"logits": self.head(features), "backbone_features": features}

    def calculate_loss(self, output: dict[str, Tensor], y: Tensor, tag: str) -> Tensor:
        y_hat, computed_loss, start_index = output["logits"], 0, 0
        for i, cardinality in enumerate([3]):
            end_index = start_index + cardinality
            computed_loss += self.loss(y_hat[:, start_index:end_index], y[:, i])
            start_index = end_index
        self.log(f"{tag}_loss", computed_loss, on_epoch=True, on_step=False)
        return computed_loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.calculate_loss(self(batch), batch["target"], "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = self(batch)
        self.calculate_loss(output, batch["target"], "valid")
        return output["logits"], batch["target"]


class Tabular(Stranger):
    logged = "valid_loss"

    def module(self) -> L.LightningModule:
        return TabularModel()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return Records(
            (x[:, :2] > 0).long() + 1,
            x,
            y[:, None],
            make=lambda a, b, c: {"categorical": a, "continuous": b, "target": c},
        )

    def sidekick(self, outputs: int) -> nn.Module:
        return TabularModel(outputs, 4)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch,), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch)["logits"]

    def targets(self, batch: Any) -> Tensor:
        return batch["target"][:, 0]


class LogisticRegression(L.LightningModule):
    """lightning-bolts: x flattened, a penalty on the weights, steps that return dicts."""

    def __init__(self, input_dim: int = 8, num_classes: int = 3, l2_strength: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(in_features=input_dim, out_features=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def _prepare_batch(self, batch: Any) -> Any:
        x, y = batch
        x = x.view(x.size(0), -1)
        return self.linear(x), y.to(torch.long)

    def _shared_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        x, y = self._prepare_batch(batch)
        loss = F.cross_entropy(x, y, reduction="sum")
        loss = loss + self.hparams.l2_strength * self.linear.weight.pow(2).sum()
        loss = loss / float(x.size(0))
        self.log(f"{stage}_loss", loss)
        return {"loss": loss}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self._shared_step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BoltsRegression(Rule):
    def module(self) -> L.LightningModule:
        return LogisticRegression()

    def value(self, module: Any, batch: Any) -> Tensor:
        penalty = 0.01 * module.linear.weight.double().pow(2).sum()
        return super().value(module, batch) + penalty / len(batch[1])


class ShiftModule(Optimized):
    """Subpopulations: (index, x, group, y), where a group looks like a class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        _, x, group, y = batch
        per_sample = F.cross_entropy(self(x), y, reduction="none")
        return torch.stack([per_sample[group == g].sum() for g in range(2)]).sum() / len(y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Groups(Rule):
    def module(self) -> L.LightningModule:
        return ShiftModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(torch.arange(count), x, (x[:, 0] > 0).long(), y)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[1],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[3]


class M5(Optimized):
    """PyTorch's tutorial on speech commands: log-probabilities (N, 1, K), squeezed in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 8, kernel_size=8, stride=4), nn.BatchNorm1d(8)
        self.fc1 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)

    def loss(self, batch: Any) -> Tensor:
        waveform, _, label = batch
        return F.nll_loss(self(waveform).squeeze(1), label)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def waves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, 64) and classes (N,): sines of three frequencies in noise, some labels wrong."""
    noise, y = points(count, seed, width=64)
    frequency = torch.tensor([0.2, 0.6, 1.4])[y]
    slips = (noise[:, 0] > 0.8).long()
    return noise + 0.9 * torch.sin(frequency[:, None] * torch.arange(64)), (y + slips) % 3


class SpeechCommands(Stranger):
    layout = "tokens"
    may_squeeze = True

    def module(self) -> L.LightningModule:
        return M5()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = waves(count, seed)
        return TensorDataset(x[:, None], torch.full((count,), 8000), y)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(228, outputs))

    def targets(self, batch: Any) -> Tensor:
        return batch[2][:, None]


class WaveModule(Optimized):
    """SpeechBrain's batches: padded waves and relative lengths, a mean over what is no padding."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.features, self.fc = nn.Conv1d(1, width, 9, padding=4), nn.Linear(width, classes)

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        steps = torch.arange(wavs.shape[1], device=wavs.device)
        mask = (steps < (wav_lens * wavs.shape[1])[:, None]).float()
        x = self.features(wavs[:, None]).relu() * mask[:, None]
        return self.fc(x.sum(-1) / mask.sum(-1, keepdim=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        wavs, lens = batch["sig"]
        return F.cross_entropy(self(wavs, lens), batch["class"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        wavs, lens = batch["sig"]
        self.log("val_loss", F.cross_entropy(self(wavs, lens), batch["class"]), batch_size=16)


class WavesWithLengths(Stranger):
    """{"sig": (waves, lengths), "class": labels}, a tuple within a mapping."""

    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 5}

    def module(self) -> L.LightningModule:
        return WaveModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = waves(count, seed)
        lengths = 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(seed)) / 2
        x = x * (torch.arange(64) < (64 * lengths)[:, None])
        return Records(x, lengths, y, make=lambda a, b, c: {"id": "u1", "sig": (a, b), "class": c})

    def sidekick(self, outputs: int) -> nn.Module:
        return WaveModule(outputs, 4)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(batch["sig"]), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["class"]


class ForecastModule(Optimized):
    """Several steps ahead, a class for each: the output (N, T * K) is viewed as (N * T, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(len(x), 2, 3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).reshape(-1, 3), y.reshape(-1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class TwoStepsAhead(Stranger):
    layout = "tokens"

    def module(self) -> L.LightningModule:
        return ForecastModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, torch.stack([y, (x[:, 0] > 0).long() + (x[:, 1] > 0)], 1))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 2 * outputs), nn.Unflatten(1, (2, outputs)))

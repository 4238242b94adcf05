"""Items that are sets: bags, clouds, edges, objects, sequences of other forms."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.data import Records, points
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset


class PooledLinear(nn.Module):
    """The mean over all but the last dimension of each item, and a linear layer."""

    def __init__(self, outputs: int, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))


def bags(count: int, seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Bags (N, size, 8), each around a point, and its class (N,)."""
    x, y = points(count, seed)
    noise = points(count * size, seed + 3)[0].view(count, size, 8)
    return x[:, None] + 0.3 * noise, y


class CLAM(nn.Module):
    """Attention over the instances of one bag, some of which are classified too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.attention = mlp(8), nn.Linear(8, 1)
        self.classifier, self.instances = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(
        self, bag: Tensor, label: Tensor | None = None, instance_eval: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        h = self.body(bag.squeeze(0)).relu()
        scores = self.attention(h).T
        results = {}
        if instance_eval and label is not None:
            order = scores[0].argsort(descending=True)
            picked = torch.cat([order[:2], order[-2:]])
            targets = torch.tensor([1, 1, 0, 0], device=h.device)
            results["instance_loss"] = F.cross_entropy(self.instances(h[picked]), targets)
        logits = self.classifier(F.softmax(scores, dim=1) @ h)
        return logits, F.softmax(logits, dim=1), logits.topk(1, dim=1)[1], results


class CLAMModule(Optimized):
    def __init__(self) -> None:
        super().__init__()
        self.model = CLAM()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        data, label = batch
        logits, _, _, results = self.model(data, label=label, instance_eval=True)
        return 0.7 * F.cross_entropy(logits, label) + 0.3 * results["instance_loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        data, label = batch
        self.log("val_loss", F.cross_entropy(self.model(data)[0], label))


class SlideBags(Stranger):
    """One bag a batch; the loss of the instances is computed within the forward, first."""

    sizes, rate = (96, 48, 1), 0.02

    def module(self) -> L.LightningModule:
        return CLAMModule()

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*bags(count, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return PooledLinear(outputs)

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.model(batch[0])[0]


class PointNetModule(Optimized):
    """Part segmentation: log-probabilities (N, P, K) of points, flattened for nll_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(cloud.transpose(2, 1))
        transform = torch.eye(3).repeat(len(cloud), 1, 1)
        return F.log_softmax(logits.view(-1, 3), dim=-1).view(len(cloud), -1, 3), transform

    def loss(self, batch: Any) -> Tensor:
        cloud, target = batch
        pred, transform = self(cloud)
        loss = F.nll_loss(pred.view(-1, 3), target.view(-1, 1)[:, 0])
        return loss + 0.001 * (transform @ transform.mT - torch.eye(3)).norm()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class CloudLinear(nn.Linear):
    def forward(self, cloud: Tensor) -> Tensor:
        return super().forward(cloud.transpose(2, 1))


class PointClouds(Stranger):
    layout = "tokens"

    def module(self) -> L.LightningModule:
        return PointNetModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count * 10, seed)
        return TensorDataset(x.view(count, 10, 8).transpose(2, 1).contiguous(), y.view(count, 10))

    def sidekick(self, outputs: int) -> nn.Module:
        return CloudLinear(8, outputs)

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[0]


class ClassifiedEdgesModule(Optimized):
    """A class for each edge, by a model that takes the edges as an argument."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.encoder, self.head = GCNConv(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor, pairs: Tensor) -> Tensor:
        z = self.encoder(x, edge_index)
        return self.head(torch.cat([z[pairs[0]], z[pairs[1]]], -1))

    def loss(self, data: Any) -> Tensor:
        out = self(data.x, data.edge_index, data.edge_label_index)
        return F.cross_entropy(out, data.edge_label)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)


class PairLinear(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, outputs)

    def forward(self, x: Tensor, edge_index: Tensor, pairs: Tensor) -> Tensor:
        return self.linear(torch.cat([x[pairs[0]], x[pairs[1]]], -1))


class ClassifiedEdges(Stranger):
    needs = ("torch_geometric",)
    sizes = (48, 24, 8)

    def module(self) -> L.LightningModule:
        return ClassifiedEdgesModule()

    def graphs(self, count: int, seed: int) -> list[Any]:
        from torch_geometric.data import Data

        x, y = points(count * 6, seed)
        pairs = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
        return [
            Data(x=a, edge_index=pairs, edge_label_index=pairs.flip(0), edge_label=b[:5])
            for a, b in zip(x.view(count, 6, 8), y.view(count, 6), strict=True)
        ]

    def loaders(self) -> tuple[Any, Any]:
        from torch_geometric.loader import DataLoader

        train, val, batch = self.sizes
        return DataLoader(self.graphs(train, 1), batch), DataLoader(self.graphs(val, 2), batch)

    def sidekick(self, outputs: int) -> nn.Module:
        return PairLinear(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.x, batch.edge_index, batch.edge_label_index), {}

    def targets(self, batch: Any) -> Tensor:
        return batch.edge_label


class RegionsModule(Optimized):
    """Boxes of pictures, as detectors get them: other numbers of them, in some batches none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = mlp(3)

    def step(self, batch: Any) -> Tensor | None:
        features = torch.cat([sample["boxes"] for sample in batch])
        labels = torch.cat([sample["labels"] for sample in batch])
        if not len(labels):
            return None
        return F.cross_entropy(self.head(features), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.step(batch)
        if loss is not None:
            self.log("val_loss", loss, batch_size=1)


class Regions(Stranger):
    """A batch without boxes calls no model and computes no loss."""

    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 4}
    empty = (5, 9)

    def module(self) -> L.LightningModule:
        return RegionsModule()

    def pictures(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        x, y = points(count * 4, seed)
        pictures = []
        for i, (a, b) in enumerate(zip(x.view(count, 4, 8), y.view(count, 4), strict=True)):
            boxes = 0 if i // 4 in self.empty else 1 + i % 4
            pictures.append({"boxes": a[:boxes], "labels": b[:boxes]})
        return pictures

    def loaders(self) -> tuple[Any, Any]:
        return tuple(  # type: ignore[return-value]
            DataLoader(self.pictures(count, seed), 4, collate_fn=list)  # type: ignore[arg-type]
            for count, seed in ((64, 1), (48, 2))
        )

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Linear(8, outputs)

    def batches(self, val: Any) -> Any:
        return (batch for batch in val if sum(len(one["labels"]) for one in batch))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.cat([sample["boxes"] for sample in batch]),), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.head(*self.inputs(batch)[0])

    def targets(self, batch: Any) -> Tensor:
        return torch.cat([sample["labels"] for sample in batch])


class FirstBatchEmpty(Regions):
    """The first batch of each loader is one without boxes."""

    empty = (0, 1)

    def module(self) -> L.LightningModule:
        return RegionsModule()


class EmptyLogitsModule(RegionsModule):
    """The model is called with no boxes too; the sum of no losses is 0."""

    def step(self, batch: Any) -> Tensor:
        features = torch.cat([sample["boxes"] for sample in batch])
        labels = torch.cat([sample["labels"] for sample in batch])
        loss = F.cross_entropy(self.head(features), labels, reduction="sum")
        return loss / max(len(labels), 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if sum(len(sample["labels"]) for sample in batch):
            self.log("val_loss", self.step(batch), batch_size=1)
        else:
            self.step(batch)


class EmptyLogits(Regions):
    def module(self) -> L.LightningModule:
        return EmptyLogitsModule()


class FirstLogitsEmpty(Regions):
    empty = (0, 1)

    def module(self) -> L.LightningModule:
        return EmptyLogitsModule()


class MaskedMeanModule(Optimized):
    """Sequence to one: a mean over what the attention mask leaves, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        return self.head((self.body(x) * mask).sum(1) / mask.sum(1))

    def loss(self, batch: Any) -> Tensor:
        inputs = {name: batch[name] for name in ("x", "attention_mask")}
        return F.cross_entropy(self(**inputs), batch["target"].squeeze(-1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class MaskedLinear(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, outputs)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        return self.linear((x * mask).sum(1) / mask.sum(1))


class MaskedMean(Stranger):
    def module(self) -> L.LightningModule:
        return MaskedMeanModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = bags(count, seed)
        mask = (torch.arange(6) <= torch.arange(count)[:, None] % 5 + 1).long()
        make = lambda x, m, y: {"x": x, "attention_mask": m, "target": y[None]}  # noqa: E731
        return Records(x, mask, y, make=make)

    def sidekick(self, outputs: int) -> nn.Module:
        return MaskedLinear(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {name: batch[name] for name in ("x", "attention_mask")}

    def targets(self, batch: Any) -> Tensor:
        return batch["target"][:, 0]


class RaggedModule(Optimized):
    """Sequences as a nested tensor of other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(torch.stack([one.mean(0) for one in h.unbind()]))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=16)


class NestedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([one.mean(0) for one in x.unbind()]))


class NestedTensors(Stranger):
    jagged: ClassVar[Any] = torch.jagged

    def module(self) -> L.LightningModule:
        return RaggedModule()

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        parts = [x[: 2 + i % 4] for i, (x, _) in enumerate(samples)]
        nested = torch.nested.nested_tensor(parts, layout=self.jagged)
        return nested, torch.stack([y for _, y in samples])

    def loaders(self) -> tuple[Any, Any]:
        train, val, batch = self.sizes
        sets = (TensorDataset(*bags(train, 1)), TensorDataset(*bags(val, 2)))
        return tuple(DataLoader(one, batch, collate_fn=self.collate) for one in sets)  # type: ignore[return-value]

    def sidekick(self, outputs: int) -> nn.Module:
        return NestedLinear(8, outputs)


class SparseModule(Optimized):
    """Counts of words as a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x, self.net.weight.T) + self.net.bias

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=16)


class SparseLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x, self.weight.T) + self.bias


def sparse(samples: list[Any]) -> tuple[Tensor, Tensor]:
    x = torch.stack([x for x, _ in samples])
    return x.relu().to_sparse(), torch.stack([y for _, y in samples])


class SparseInputs(Rule):
    def module(self) -> L.LightningModule:
        return SparseModule()

    def loaders(self) -> tuple[Any, Any]:
        train, val, batch = self.sizes
        sets = (self.data(train, 1), self.data(val, 2))
        return tuple(DataLoader(one, batch, collate_fn=sparse) for one in sets)  # type: ignore[return-value]

    def sidekick(self, outputs: int) -> nn.Module:
        return SparseLinear(8, outputs)


class SpectrumModule(Optimized):
    """Complex spectra, of which the first layer takes magnitude and phase."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, inputs=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x.abs(), x.angle()], 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class ComplexLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x.real, x.imag], 1))


class ComplexInputs(Rule):
    def module(self) -> L.LightningModule:
        return SpectrumModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(torch.fft.rfft(x), y)

    def sidekick(self, outputs: int) -> nn.Module:
        return ComplexLinear(10, outputs)

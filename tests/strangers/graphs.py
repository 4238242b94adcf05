"""Graphs: PyTorch Geometric's data, and molecules in a class of their own."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from strangers.binary import bce
from strangers.byhand import IGNORED, Truth
from strangers.data import generator, labels
from strangers.judge import Stranger
from strangers.models import Optimized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class GraphStranger(Stranger):
    needs = ("torch_geometric",)

    def loaders(self) -> tuple[Any, Any]:
        from torch_geometric.loader import DataLoader as GraphLoader

        return (
            GraphLoader(self.graphs(192, 1), batch_size=16, shuffle=True),
            GraphLoader(self.graphs(96, 2), batch_size=16),
        )

    def graphs(self, count: int, seed: int) -> list[Any]:
        from torch_geometric.data import Data

        random, found = generator(seed), []
        for _ in range(count):
            nodes = int(torch.randint(4, 9, (1,), generator=random))
            label = torch.randint(3, (1,), generator=random)
            x = torch.randn(nodes, 5, generator=random) + 0.35 * torch.eye(5)[label]
            edges = torch.randint(nodes, (2, 3 * nodes), generator=random)
            found.append(Data(x=x, edge_index=edges, y=label))
        return found


class GraphModule(Optimized):
    """PyG's example: forward(x, edge_index, batch) -> a class for each graph."""

    def __init__(self, out_channels: int = 3, hidden: int = 16) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        self.conv1, self.conv2 = GCNConv(5, hidden), GCNConv(hidden, hidden)
        self.lin = nn.Linear(hidden, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.conv1(x, edge_index).relu()
        x = self.conv2(x, edge_index)
        return self.lin(global_mean_pool(x, batch))

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        y_hat = self(data.x, data.edge_index, data.batch)
        return F.cross_entropy(y_hat, data.y)

    def validation_step(self, data: Any, batch_idx: int) -> None:
        y_hat = self(data.x, data.edge_index, data.batch)
        self.log("val_loss", F.cross_entropy(y_hat, data.y), batch_size=data.num_graphs)


class GraphClassification(GraphStranger):
    def module(self) -> L.LightningModule:
        return GraphModule()

    def sidekick(self, outputs: int) -> nn.Module:
        return GraphModule(outputs, 6)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.x, batch.edge_index, batch.batch), {}

    def targets(self, batch: Any) -> Tensor:
        return batch.y


class WholeGraphModule(GraphModule):
    """forward(data), the way of most repositories."""

    def forward(self, data: Any) -> Tensor:
        return super().forward(data.x, data.edge_index, data.batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch.y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch), batch.y), batch_size=batch.num_graphs)


class WholeGraph(GraphClassification):
    def module(self) -> L.LightningModule:
        return WholeGraphModule()

    def sidekick(self, outputs: int) -> nn.Module:
        return WholeGraphModule(outputs, 6)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch,), {}


class NodeModule(GraphModule):
    """Planetoid: one graph, and masks that say which nodes train and which validate."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        return self.lin(F.dropout(self.conv2(x, edge_index), p=0.2, training=self.training))

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        out = self(data.x, data.edge_index)
        return F.cross_entropy(out[data.train_mask], data.y[data.train_mask])

    def validation_step(self, data: Any, batch_idx: int) -> None:
        out = self(data.x, data.edge_index)[data.val_mask]
        loss = F.cross_entropy(out, data.y[data.val_mask])
        self.log("val_loss", loss, batch_size=int(data.val_mask.sum()))


class NodeClassification(GraphStranger):
    """The deployed duo speaks of every node; the fit counts those of the mask."""

    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 20}

    def module(self) -> L.LightningModule:
        return NodeModule()

    def loaders(self) -> tuple[Any, Any]:
        from torch_geometric.loader import DataLoader as GraphLoader

        (graph,) = self.graphs(1, 3)
        return GraphLoader([graph]), GraphLoader([graph])

    def graphs(self, count: int, seed: int) -> list[Any]:
        from torch_geometric.data import Data

        random, nodes = generator(seed), 240
        y = torch.randint(3, (nodes,), generator=random)
        x = torch.randn(nodes, 5, generator=random) + torch.eye(5)[y]
        pairs = torch.randint(nodes, (2, 900), generator=random)
        same = y[pairs[0]] == y[pairs[1]]
        kept = pairs[:, same | (torch.rand(900, generator=random) > 0.8)]
        part = torch.randint(3, (nodes,), generator=random)
        graph = Data(x=x, edge_index=torch.cat([kept, kept.flip(0)], 1), y=y)
        graph.train_mask, graph.val_mask = part == 0, part == 1
        return [graph]

    def sidekick(self, outputs: int) -> nn.Module:
        return NodeModule(outputs, 6)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.x, batch.edge_index), {}

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch.val_mask, batch.y, IGNORED)


class SampledModule(NodeModule):
    """NeighborLoader: the first batch_size nodes are those that count."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y_hat = self(batch.x, batch.edge_index)[: batch.batch_size]
        return F.cross_entropy(y_hat, batch.y[: batch.batch_size])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        y_hat = self(batch.x, batch.edge_index)[: batch.batch_size]
        loss = F.cross_entropy(y_hat, batch.y[: batch.batch_size])
        self.log("val_loss", loss, batch_size=batch.batch_size)


class SampledNeighbours(NodeClassification):
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def module(self) -> L.LightningModule:
        return SampledModule()

    def loaders(self) -> tuple[Any, Any]:
        (graph,) = self.graphs(1, 3)

        def batches(mask: Tensor) -> list[Any]:
            """Made by hand, since NeighborLoader needs another package."""
            return [self.around_nodes(graph, seeds) for seeds in mask.nonzero()[:64, 0].split(16)]

        def first(samples: list[Any]) -> Any:
            return samples[0]

        return tuple(
            DataLoader(batches(mask), collate_fn=first)
            for mask in (graph.train_mask, graph.val_mask)
        )

    def around_nodes(self, graph: Any, seeds: Tensor) -> Any:
        from torch_geometric.data import Data

        order = torch.cat(
            [seeds, torch.arange(len(graph.y))[~torch.isin(torch.arange(240), seeds)]]
        )
        place = torch.empty_like(order)
        place[order] = torch.arange(240)
        return Data(
            x=graph.x[order],
            edge_index=place[graph.edge_index],
            y=graph.y[order],
            batch_size=len(seeds),
        )

    def targets(self, batch: Any) -> Tensor:
        return torch.where(torch.arange(240) < batch.batch_size, batch.y, IGNORED)


@dataclass(repr=False, eq=False)
class BatchMolGraph:
    """chemprop's: atoms and bonds of many molecules in one graph."""

    V: Tensor
    edge_index: Tensor
    batch: Tensor
    size: int

    def __len__(self) -> int:
        return self.size

    def to(self, device: Any) -> None:
        self.V, self.edge_index = self.V.to(device), self.edge_index.to(device)
        self.batch = self.batch.to(device)


class TrainingBatch(NamedTuple):
    bmg: BatchMolGraph
    X_d: Tensor | None
    Y: Tensor
    w: Tensor


class MoleculeModule(Optimized):
    """chemprop's model: labels that are NaN where nobody measured, weights of the molecules."""

    def __init__(self, tasks: int = 2, hidden: int = 12) -> None:
        super().__init__()
        self.message, self.ffn = nn.Linear(5, hidden), nn.Linear(hidden, tasks)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        batch.bmg.to(device)
        return batch._replace(Y=batch.Y.to(device), w=batch.w.to(device))

    def forward(self, bmg: BatchMolGraph, X_d: Tensor | None = None) -> Tensor:
        H = self.message(bmg.V).relu()
        H = H.index_add(0, bmg.edge_index[1], H[bmg.edge_index[0]])
        pooled = H.new_zeros(len(bmg), H.shape[1]).index_add(0, bmg.batch, H)
        return self.ffn(pooled / bmg.batch.bincount(minlength=len(bmg))[:, None])

    def criterion(self, batch: TrainingBatch) -> Tensor:
        bmg, X_d, targets, weights = batch
        mask = targets.isfinite()
        targets = targets.nan_to_num(nan=0.0)
        preds = self(bmg, X_d)
        losses = F.binary_cross_entropy_with_logits(preds, targets, reduction="none")
        return (losses * weights.view(-1, 1) * mask).sum() / mask.sum()

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        return self.criterion(batch)

    def validation_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(batch), batch_size=len(batch.bmg))


class Molecules(Stranger):
    layout = "labels"
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 5}

    def module(self) -> L.LightningModule:
        return MoleculeModule()

    def loaders(self) -> tuple[Any, Any]:
        return (
            DataLoader(range(192), 16, shuffle=True, collate_fn=self.collate),
            DataLoader(range(200, 296), 16, collate_fn=self.collate),
        )

    def collate(self, numbers: list[int]) -> TrainingBatch:
        atoms, edges, owner, Y, seen = [], [], [], [], 0
        for place, number in enumerate(numbers):
            random = generator(number)
            count = int(torch.randint(3, 8, (1,), generator=random))
            V = torch.randn(count, 5, generator=random)
            atoms.append(V)
            edges.append(torch.randint(count, (2, 2 * count), generator=random) + seen)
            owner += [place] * count
            y = labels(2 * V.mean(0, keepdim=True), number, 2)
            y[torch.rand(1, 2, generator=random) > 0.75] = torch.nan
            Y.append(y)
            seen += count
        graph = BatchMolGraph(
            torch.cat(atoms), torch.cat(edges, 1), torch.tensor(owner), len(numbers)
        )
        return TrainingBatch(graph, None, torch.cat(Y), 0.5 + torch.arange(len(numbers)) % 2)

    def sidekick(self, outputs: int) -> nn.Module:
        return MoleculeModule(outputs, 4)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.bmg, batch.X_d), {}

    def truth(self, module: Any, batch: Any) -> Truth:
        return Truth(module(batch.bmg, batch.X_d), batch.Y)

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        known = y.isfinite()
        loss = bce(z, y.nan_to_num(0.0)) * batch.w.double()[:, None]
        return loss[known].sum() / known.sum()


class LinkModule(GraphModule):
    """PyG's link prediction: a logit for each pair of nodes, from the embeddings of both."""

    def encode(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv2(self.conv1(x, edge_index).relu(), edge_index)

    def decode(self, z: Tensor, edge_label_index: Tensor) -> Tensor:
        return self.lin(z[edge_label_index[0]] * z[edge_label_index[1]])

    def forward(self, data: Any) -> Tensor:
        return self.decode(self.encode(data.x, data.edge_index), data.edge_label_index)

    def loss(self, data: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(data).view(-1), data.edge_label)

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        return self.loss(data)

    def validation_step(self, data: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(data), batch_size=len(data.edge_label))


class LinkPrediction(GraphStranger):
    """With the pairs of `RandomLinkSplit`."""

    layout = "labels"
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 24}

    def module(self) -> L.LightningModule:
        return LinkModule(1)

    def loaders(self) -> tuple[Any, Any]:
        from torch_geometric.loader import DataLoader as GraphLoader
        from torch_geometric.transforms import RandomLinkSplit

        (graph,) = NodeClassification().graphs(1, 3)
        one, other = graph.y[graph.edge_index]
        graph.edge_index = graph.edge_index[:, one == other]
        graph.x = graph.x + 2 * F.one_hot(graph.y, 5)
        train, val, _ = RandomLinkSplit(num_val=0.3, is_undirected=True)(graph)
        return GraphLoader([train]), GraphLoader([val])

    def sidekick(self, outputs: int) -> nn.Module:
        return LinkModule(outputs, 6)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch,), {}

    def targets(self, batch: Any) -> Tensor:
        return batch.edge_label[:, None]

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class EncodedLinkModule(LinkModule):
    """The step of PyG's example: encode, then decode; forward is not called."""

    def loss(self, data: Any) -> Tensor:
        out = self.decode(self.encode(data.x, data.edge_index), data.edge_label_index)
        return F.binary_cross_entropy_with_logits(out.view(-1), data.edge_label)


class EncodedLinks(LinkPrediction):
    """Its parts are called with parts of the graph, so the user says what a model takes."""

    def module(self) -> L.LightningModule:
        return EncodedLinkModule(1)

    def arguments(self) -> dict[str, Any]:
        return {
            "sidekick": self.sidekick,
            "batch_fn": lambda data: (data, data.edge_label[:, None]),
            "logits_fn": lambda module, data: module.decode(
                module.encode(data.x, data.edge_index), data.edge_label_index
            ),
        }

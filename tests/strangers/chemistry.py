"""chemprop's own model: molecules as graphs, and a criterion that is a metric."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.binary import bce
from strangers.data import generator
from strangers.judge import Stranger
from torch import Tensor, nn

from lightning_duo.tasks import Labels


def smiles(count: int, seed: int) -> list[str]:
    """Chains of a few atoms."""
    random = generator(seed)
    lengths = torch.randint(3, 9, (count,), generator=random).tolist()
    return [
        "C" + "".join("CCNO"[i] for i in torch.randint(4, (n,), generator=random)) for n in lengths
    ]


class Chemprop(Stranger):
    """Its step calls the parts of the model one by one; forward gives probabilities."""

    needs = ("chemprop",)
    takes_batch = True
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def mpnn(self, predictor: nn.Module) -> L.LightningModule:
        from chemprop import nn as parts
        from chemprop.models import MPNN

        return MPNN(
            parts.BondMessagePassing(d_h=16, depth=2),
            parts.MeanAggregation(),
            predictor,
            init_lr=1e-3,
            max_lr=1e-2,
            final_lr=1e-3,
        )

    def labels(self, molecules: list[str], seed: int) -> Tensor:
        """What the molecules are known for; a subclass says it."""
        raise NotImplementedError

    def loaders(self) -> tuple[Any, Any]:
        from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader

        def loader(count: int, seed: int, shuffle: bool) -> Any:
            molecules = smiles(count, seed)
            y = self.labels(molecules, seed).numpy()
            points = [
                MoleculeDatapoint.from_smi(s, one) for s, one in zip(molecules, y, strict=True)
            ]
            return build_dataloader(MoleculeDataset(points), 16, shuffle=shuffle)

        return loader(192, 1, True), loader(96, 2, False)

    def sidekick(self, outputs: int) -> nn.Module:
        return Fingerprint(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.bmg, batch.V_d), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        bmg, V_d, X_d, *_ = batch
        return module.predictor.train_step(module.fingerprint(bmg, V_d, X_d))

    def targets(self, batch: Any) -> Tensor:
        return batch.Y


class Fingerprint(nn.Module):
    """The mean of the atoms' features, and a linear head."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.head = nn.LazyLinear(outputs)

    def forward(self, bmg: Any, V_d: Tensor | None = None, X_d: Tensor | None = None) -> Tensor:
        total = bmg.V.new_zeros(len(bmg), bmg.V.shape[1]).index_add(0, bmg.batch, bmg.V)
        return self.head(total / 4)


class Toxicity(Chemprop):
    """Two assays, some not measured."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        from chemprop.nn import BinaryClassificationFFN

        return self.mpnn(BinaryClassificationFFN(n_tasks=2, input_dim=16, hidden_dim=12))

    def labels(self, molecules: list[str], seed: int) -> Tensor:
        counts = torch.tensor([[s.count("N"), s.count("O")] for s in molecules])
        noise = torch.randn(counts.shape, generator=generator(seed + 9))
        y = (counts + 0.5 * noise > 1.4).float()
        y[::4, 1] = torch.nan  # as many in every batch: the metric's mean is over all decisions
        return y

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        known = y.isfinite()
        return bce(z, y.nan_to_num(0.0))[known].mean()


class Odour(Chemprop):
    """One class of three: logits (N, 1, 3), given to the loss as (N, 3, 1), and targets (N, 1)."""

    def module(self) -> L.LightningModule:
        from chemprop.nn import MulticlassClassificationFFN

        return self.mpnn(MulticlassClassificationFFN(n_classes=3, input_dim=16, hidden_dim=12))

    def labels(self, molecules: list[str], seed: int) -> Tensor:
        counts = torch.tensor([[s.count("N") + s.count("O")] for s in molecules])
        noise = torch.randn(counts.shape, generator=generator(seed + 9))
        return ((counts + 0.5 * noise).round() / 2).long().clamp(0, 2).float()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return super().logits(module, batch).transpose(1, 2)


class OfBatch(Fingerprint):
    """A sidekick that takes chemprop's whole batch."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch.bmg)


class ToldToxicity(Toxicity):
    """The user says what a model takes and gives."""

    takes_batch = False

    def module(self) -> L.LightningModule:
        return super().module()

    def arguments(self) -> dict[str, Any]:
        return {
            "sidekick": OfBatch,
            "batch_fn": lambda batch: (batch, batch.Y),
            "logits_fn": lambda module, batch: module.predictor.train_step(
                module.fingerprint(batch.bmg, batch.V_d, batch.X_d)
            ),
            "task": Labels(),
        }

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch,), {}


class Solubility(Chemprop):
    """A number."""

    refused = True

    def module(self) -> L.LightningModule:
        from chemprop.nn import RegressionFFN

        return self.mpnn(RegressionFFN(input_dim=16, hidden_dim=12))

    def labels(self, molecules: list[str], seed: int) -> Tensor:
        return torch.tensor([[s.count("O") - 0.5 * s.count("C")] for s in molecules])

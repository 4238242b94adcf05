"""Where logits come from: structures, margins, heads that the step applies itself."""

from typing import Any

import lightning as L
import torch
from strangers.byhand import nll
from strangers.data import points
from strangers.judge import Stranger
from strangers.losses import Rule
from strangers.models import Optimized, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


class ForwardByNameModule(Optimized):
    """Steps that call self.forward, which no hook on the module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.forward(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.forward(batch[0]), batch[1]))


class ForwardByName(Rule):
    def module(self) -> L.LightningModule:
        return ForwardByNameModule()


class TwoParts(Optimized):
    """A body and a head; the subclasses say how they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 3)

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class DictModule(TwoParts):
    """torchvision's way: a dict with "out"; its features, first, have other widths."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        return {"features": features, "out": self.head(features)}

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0])["out"], batch[1])


class DictOutput(Rule):
    def module(self) -> L.LightningModule:
        return DictModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])["out"]


class TupleModule(TwoParts):
    """(features, logits), and a penalty on the features."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return features, self.head(features)

    def loss(self, batch: Any) -> Tensor:
        features, logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.01 * features.abs().mean()


class TupleOutput(Rule):
    def module(self) -> L.LightningModule:
        return TupleModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[1]

    def value(self, module: Any, batch: Any) -> Tensor:
        features, logits = module(batch[0])
        return nll(logits, batch[1]).mean() + 0.01 * features.double().abs().mean()


class SharedBodyModule(TwoParts):
    """Two tasks; the main one, of three classes, stands first everywhere and weighs more."""

    def __init__(self) -> None:
        super().__init__()
        self.side_head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        return {"kind": self.head(features), "sign": self.side_head(features)}

    def loss(self, batch: Any) -> Tensor:
        x, kind, sign = batch
        out = self(x)
        return F.cross_entropy(out["kind"], kind) + 0.5 * F.cross_entropy(out["sign"], sign)


class TwoTasks(Rule):
    def module(self) -> L.LightningModule:
        return SharedBodyModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return TensorDataset(x, y, (x[:, 1] > 0).long())

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])["kind"]

    def value(self, module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        return (nll(out["kind"], batch[1]) + 0.5 * nll(out["sign"], batch[2])).mean()


class MarginModule(TwoParts):
    """ArcFace's idea: a margin on the target's cosine, where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        cosine = F.linear(F.normalize(self.encoder(x)), F.normalize(self.weight))
        if labels is None:
            return 10.0 * cosine
        theta = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
        target = F.one_hot(labels, 3).bool()
        return 10.0 * torch.cos(torch.where(target, theta + 0.2, theta))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0], batch[1]), batch[1])


class AngularMargin(Rule):
    """What the model says without the labels counts."""

    def module(self) -> L.LightningModule:
        return MarginModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        cosine = (module(batch[0]) / 10).double()
        of_target = F.one_hot(batch[1], 3).bool()
        moved = torch.cos(torch.acos(cosine) + 0.2)
        return nll(10 * torch.where(of_target, moved, cosine), batch[1]).mean()


class CosineModule(TwoParts):
    """A cosine classifier with a learnt scale, as in few-shot learning."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.encoder(x), dim=-1)
        return self.scale * features @ F.normalize(self.head.weight, dim=-1).t()

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class CosineClassifier(Rule):
    def module(self) -> L.LightningModule:
        return CosineModule()


class AppliedHeadModule(TwoParts):
    """Forward gives an embedding, as Lightning's docs have it; the step applies the head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        z = self.encoder(x)
        return F.cross_entropy(self.head(z), y)


class HeadInTheStep(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return AppliedHeadModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.head(module.encoder(batch[0]))


class FunctionalModule(AppliedHeadModule):
    """The step multiplies features with a weight of the module: no layer gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.zeros(3))

    def loss(self, batch: Any) -> Tensor:
        logits = F.linear(self(batch[0]), self.weight, self.bias)
        return F.cross_entropy(logits, batch[1])


class FunctionalHead(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return FunctionalModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.encoder(batch[0]) @ module.weight.T + module.bias


class SummedModule(TwoParts):
    """Wide and deep: the step adds the logits of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Linear(8, 3), mlp(3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.wide(x) + self.deep(x), y)


class WideAndDeep(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return SummedModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.wide(batch[0]) + module.deep(batch[0])


class NearestPrototypeModule(TwoParts):
    """Minus the squared distances to learnt prototypes are the logits, made in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def loss(self, batch: Any) -> Tensor:
        distances = torch.cdist(self(batch[0]), self.prototypes) ** 2
        return F.cross_entropy(-distances, batch[1])


class Prototypes(Rule):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return NearestPrototypeModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        difference = module.encoder(batch[0])[:, None] - module.prototypes
        return -(difference**2).sum(-1)


class TiedModule(TwoParts):
    """The head's weights are the embeddings of the classes, which another loss uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight = self.classes.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y) + 1e-3 * self.classes(y).pow(2).sum(1).mean()


class TiedHead(Rule):
    def module(self) -> L.LightningModule:
        return TiedModule()

    def value(self, module: Any, batch: Any) -> Tensor:
        size = module.classes.weight[batch[1]].double().pow(2).sum(1).mean()
        return super().value(module, batch) + 1e-3 * size


class Backend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"classifier": mlp(3)})


class NestedModule(Optimized):
    """The model lies deep: self.model.net["classifier"]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Backend()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model.net["classifier"](batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.model.net["classifier"](batch[0]), batch[1])
        self.log("val_loss", loss)
        return {"loss": loss}


class DeepInside(Rule):
    def module(self) -> L.LightningModule:
        return NestedModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.model.net["classifier"](batch[0])


class LossInsideModule(TwoParts):
    """Labels go in, (loss, logits) come out."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits, labels), logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self(batch[0], labels=batch[1])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, logits = self(batch[0], labels=batch[1])
        self.log_dict({"val_loss": loss, "val_acc": (logits.argmax(1) == batch[1]).float().mean()})


class LossInsideForward(Rule):
    def module(self) -> L.LightningModule:
        return LossInsideModule()


class WholeBatchModule(TwoParts):
    """forward(batch) picks its inputs itself."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.encoder(torch.cat([batch["a"], batch["b"]], dim=1)))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch), batch["y"])


class KeywordModule(WholeBatchModule):
    """forward takes keywords only, and the step passes on what is left of the batch."""

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.encoder(torch.cat([inputs["a"], inputs["b"]], dim=1)))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        target = batch["y"]
        return F.cross_entropy(self(**{k: v for k, v in batch.items() if k != "y"}), target)


class SmallJoin(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(8, outputs)

    def forward(self, batch: Any = None, **inputs: Tensor) -> Tensor:
        found = inputs if batch is None else batch
        return self.fc(torch.cat([found["a"], found["b"]], dim=1))


class Keywords(Stranger):
    """Batches {"a": (N, 3), "b": (N, 5), "y": (N,)}."""

    def module(self) -> L.LightningModule:
        return KeywordModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed)
        return [{"a": u[:3], "b": u[3:], "y": v} for u, v in zip(x, y, strict=True)]

    def sidekick(self, outputs: int) -> nn.Module:
        return SmallJoin(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"a": batch["a"], "b": batch["b"]}

    def targets(self, batch: Any) -> Tensor:
        return batch["y"]


class WholeBatch(Keywords):
    """The deployed duo takes the batch, too, when nobody knows its labels yet."""

    def module(self) -> L.LightningModule:
        return WholeBatchModule()

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ({"a": batch["a"], "b": batch["b"]},), {}

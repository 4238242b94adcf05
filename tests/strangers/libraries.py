"""Routines and losses of libraries that build on Lightning; a case needs its library installed."""

from typing import Any

import lightning as L
import torch
from strangers.binary import bce
from strangers.byhand import IGNORED, nll, rows
from strangers.data import points, scenes
from strangers.dense import PetMasks, PetModel, Scenes, pixel_net
from strangers.losses import Rule
from strangers.models import mlp
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


class UncertaintyRoutine(Rule):
    """torch_uncertainty's classification, which mixes in the step and validates by metrics."""

    needs = ("torch_uncertainty",)
    logged = "val/cls/NLL"

    def module(self) -> L.LightningModule:
        from torch_uncertainty.routines import ClassificationRoutine

        model = mlp(3)
        return ClassificationRoutine(
            model=model,
            num_classes=3,
            loss=nn.CrossEntropyLoss(),
            optim_recipe=torch.optim.Adam(model.parameters(), 1e-2),
            mixup_params={"mixtype": "mixup", "mixup_alpha": 0.5},
        )


class UncertaintyBinary(Rule):
    """The same routine for one class: BCE on a logit (N, 1) that the step squeezes."""

    needs = ("torch_uncertainty",)
    layout = "labels"
    may_squeeze = True
    logged = "val/cls/Acc"
    higher_is_better = True

    def module(self) -> L.LightningModule:
        from torch_uncertainty.routines import ClassificationRoutine

        model = mlp(1)
        return ClassificationRoutine(
            model=model,
            num_classes=1,
            loss=nn.BCEWithLogitsLoss(),
            optim_recipe=torch.optim.Adam(model.parameters(), 1e-2),
        )

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*points(count, seed, classes=2))

    def targets(self, batch: Any) -> Tensor:
        return batch[1].float()[:, None]

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        return ((z > 0) == y).double().mean()


class UncertaintySegmentation(Scenes):
    """Its segmentation: training picks the valid pixels, validation has metrics only."""

    needs = ("torch_uncertainty",)
    logged = "val/seg/mIoU"
    higher_is_better = True
    sizes = (96, 48, 48)

    def module(self) -> L.LightningModule:
        from torch_uncertainty.routines import SegmentationRoutine

        model = pixel_net(3)
        return SegmentationRoutine(
            model=model,
            num_classes=3,
            loss=nn.CrossEntropyLoss(),
            optim_recipe=torch.optim.Adam(model.parameters(), 5e-2),
            metric_subsampling_rate=1.0,
        )

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed)
        y[:, 2, 3:] = 255
        return TensorDataset(x, y)

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch[1] == 255, IGNORED, batch[1])

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = rows(self.layout, self.truth(module, batch))
        said = logits.argmax(1)
        shares = [
            ((said == k) & (targets == k)).sum() / ((said == k) | (targets == k)).sum()
            for k in range(3)
        ]
        return torch.stack(shares).double().mean()


class SMPModel(PetModel):
    """The example of segmentation_models_pytorch with its own losses and counts."""

    def __init__(self, mode: str = "binary", classes: int = 1) -> None:
        from segmentation_models_pytorch.losses import DiceLoss

        super().__init__()
        self.model = pixel_net(classes)
        self.dice = DiceLoss(mode, from_logits=True)

    def shared_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        from segmentation_models_pytorch.metrics import get_stats

        image, mask = batch
        logits_mask = self.forward(image)
        loss = self.loss_fn(logits_mask, mask)
        pred_mask = (logits_mask.sigmoid() > 0.5).float()
        tp, fp, fn, tn = get_stats(pred_mask.long(), mask.long(), mode="binary")
        self.log(f"{stage}_loss", loss)
        return {"loss": loss, "tp": tp, "fp": fp, "fn": fn, "tn": tn}

    def loss_fn(self, logits: Tensor, mask: Tensor) -> Tensor:
        return self.dice(logits, mask)


class SMPDice(PetMasks):
    needs = ("segmentation_models_pytorch",)

    def module(self) -> L.LightningModule:
        return SMPModel()

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        p, y = torch.exp(-bce(z, torch.ones_like(z))), y.double()
        return 1 - 2 * (p * y).sum() / (p + y).sum()


class SMPCitiesModel(SMPModel):
    """Several classes: Dice and smp's own cross-entropy, 255 ignored."""

    def __init__(self) -> None:
        from segmentation_models_pytorch.losses import DiceLoss, SoftCrossEntropyLoss

        super().__init__("multiclass", 3)
        self.dice = DiceLoss("multiclass", from_logits=True, ignore_index=255)
        self.ce = SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=255)

    def shared_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        image, mask = batch
        logits = self.forward(image)
        loss = self.ce(logits, mask) + self.dice(logits, mask)
        self.log(f"{stage}_loss", loss)
        return {"loss": loss}


class SMPCities(Scenes):
    needs = ("segmentation_models_pytorch",)

    def module(self) -> L.LightningModule:
        return SMPCitiesModel()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed)
        y[:, :, 5] = 255
        return TensorDataset(x, y)

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch[1] == 255, IGNORED, batch[1])

    def value(self, module: Any, batch: Any) -> Tensor:
        logits, targets = rows(self.layout, self.truth(module, batch))
        p, yes = logits.softmax(1), torch.eye(3, dtype=torch.float64)[targets]
        dice = 1 - 2 * (p * yes).sum(0) / (p + yes).sum(0)
        # smp's cross-entropy averages over all pixels; the ignored ones have a loss of 0.
        return nll(logits, targets).sum() / batch[1].numel() + dice.mean()

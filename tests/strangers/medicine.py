"""MONAI's networks, losses and batches, whose images carry their metadata."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.binary import bce
from strangers.byhand import nll, plain, rows
from strangers.data import Records, scenes
from strangers.dense import Volumes
from strangers.models import Optimized
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_duo.tasks import Classes


class MONAIModule(Optimized):
    """MONAI's spleen tutorial: a U-Net for volumes, images with their affine."""

    def __init__(self, outputs: int, loss_function: nn.Module, width: int = 4) -> None:
        from monai.networks.nets import UNet

        super().__init__()
        self._model = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=outputs,
            channels=(width, 2 * width),
            strides=(2,),
            norm="batch",
        )
        self.loss_function = loss_function

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        return self.loss_function(self.forward(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        images, labels = batch["image"], batch["label"]
        outputs = self.forward(images)
        loss = self.loss_function(outputs, labels)
        self.log("val_loss", float(loss), batch_size=len(images))
        return {"val_loss": loss, "val_number": len(outputs)}


def dice(prob: Tensor, yes: Tensor) -> Tensor:
    """MONAI's, the mean over images and classes; both (N, K, D, H, W)."""
    p, y = plain(prob).flatten(2), plain(yes).flatten(2)
    return (1 - (2 * (p * y).sum(2) + 1e-5) / ((p + y).sum(2) + 1e-5)).mean()


def one_hot(targets: Tensor, classes: int = 3) -> Tensor:
    return torch.eye(classes)[targets.as_subclass(Tensor)].movedim(-1, 1)


class MONAIVolumes(Volumes):
    """DiceCELoss, one class of each voxel."""

    needs = ("monai",)
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 4}
    classes: ClassVar[int] = 3
    width: ClassVar[int] = 6
    """Of the volumes that are validated."""

    def module(self) -> L.LightningModule:
        from monai.losses import DiceCELoss

        return MONAIModule(3, DiceCELoss(to_onehot_y=True, softmax=True))

    def label(self, y: Tensor) -> Tensor:
        """Of one volume, with a channel."""
        return y[None]

    def loaders(self) -> tuple[Any, Any]:
        from monai.data import MetaTensor, list_data_collate

        def record(image: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"image": MetaTensor(image), "label": MetaTensor(self.label(y))}

        def volumes(count: int, seed: int, width: int) -> Records:
            size = (4, 6, width)
            parts = scenes(count, seed, classes=self.classes, channels=1, size=size, noise=0.5)
            return Records(*parts, make=record)

        return (
            DataLoader(volumes(48, 1, 6), 8, shuffle=True, collate_fn=list_data_collate),
            DataLoader(volumes(24, 2, self.width), 8, collate_fn=list_data_collate),
        )

    def value(self, module: Any, batch: Any) -> Tensor:
        truth = self.truth(module, batch)
        overlap = dice(truth.logits.softmax(1), one_hot(truth.targets))
        return nll(*rows(self.layout, truth)).mean() + overlap


class MONAIDice(MONAIVolumes):
    """DiceLoss alone, as in the tutorial."""

    def module(self) -> L.LightningModule:
        from monai.losses import DiceLoss

        return MONAIModule(3, DiceLoss(to_onehot_y=True, softmax=True))

    def value(self, module: Any, batch: Any) -> Tensor:
        truth = self.truth(module, batch)
        return dice(truth.logits.softmax(1), one_hot(truth.targets))


class MONAIDiceFocal(MONAIVolumes):
    """DiceFocalLoss: softmax for the Dice, and a binary focal loss for each class."""

    def module(self) -> L.LightningModule:
        from monai.losses import DiceFocalLoss

        return MONAIModule(3, DiceFocalLoss(to_onehot_y=True, softmax=True))

    def value(self, module: Any, batch: Any) -> Tensor:
        truth = self.truth(module, batch)
        each = bce(plain(truth.logits), plain(one_hot(truth.targets)))
        focal = ((1 - torch.exp(-each)).square() * each).mean()
        return focal + dice(truth.logits.softmax(1), one_hot(truth.targets))


class MONAIBinary(MONAIVolumes):
    """The organ or not: one logit of each voxel."""

    layout = "labels"
    classes = 2

    def module(self) -> L.LightningModule:
        from monai.losses import DiceLoss

        return MONAIModule(1, DiceLoss(sigmoid=True))

    def targets(self, batch: Any) -> Tensor:
        return batch["label"].float()

    def value(self, module: Any, batch: Any) -> Tensor:
        truth = self.truth(module, batch)
        return dice(truth.logits.sigmoid(), truth.targets)


class MONAIRegions(MONAIBinary):
    """Regions that overlap, as of brain tumours: several labels of each voxel."""

    classes = 3

    def module(self) -> L.LightningModule:
        from monai.losses import DiceLoss

        return MONAIModule(3, DiceLoss(sigmoid=True))

    def label(self, y: Tensor) -> Tensor:
        return torch.stack([y == 0, y != 1, y == 2]).float()


class WindowModule(MONAIModule):
    """The tutorial's validation: windows of the size of the training's crops."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch["image"], batch["label"]
        outputs = windows(self, images)
        self.log("val_loss", float(self.loss_function(outputs, labels)), batch_size=len(images))


def windows(module: Any, images: Tensor) -> Tensor:
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(images, (4, 6, 6), 4, module.forward, overlap=0.0)


class MONAIWindows(MONAIDice):
    """What `sliding_window_inference` makes of a volume that is wider than the crops."""

    width = 12

    def module(self) -> L.LightningModule:
        from monai.losses import DiceLoss

        return WindowModule(3, DiceLoss(to_onehot_y=True, softmax=True))

    def arguments(self) -> dict[str, Any]:
        return {"sidekick": self.sidekick, "logits_fn": windows, "task": Classes()}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return torch.cat([module(part) for part in batch["image"].split(6, -1)], -1)

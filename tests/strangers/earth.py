"""TorchGeo's tasks, with images of many bands, its data module and its augmentations."""

from collections.abc import Iterator
from typing import Any, ClassVar

import lightning as L
import torch
from strangers.binary import bce
from strangers.byhand import IGNORED, rows
from strangers.data import Records, images, scenes
from strangers.judge import Stranger
from strangers.models import small_cnn
from torch import Tensor, nn
from torch.utils.data import Dataset

BANDS = 13  # of Sentinel-2


class Satellite(Stranger):
    """Batches {"image", "label"} for `ClassificationTask`."""

    needs = ("torchgeo",)
    key: ClassVar[str] = "label"

    def task(self, **settings: Any) -> L.LightningModule:
        from torchgeo.trainers import ClassificationTask

        return ClassificationTask(model="test_resnet", in_channels=BANDS, lr=3e-3, **settings)

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed, channels=BANDS, size=16, strength=0.3)
        return Records(x, y, make=lambda a, b: {"image": a, self.key: b})

    def sidekick(self, outputs: int) -> nn.Module:
        return small_cnn(outputs, channels=BANDS)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["image"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[self.key]


class EuroSAT(Satellite):
    """One class of each image."""

    def module(self) -> L.LightningModule:
        return self.task(num_classes=3)


class BigEarthNet(Satellite):
    """Several classes of land in each image."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        return self.task(task="multilabel", num_labels=3, loss="bce")

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed, channels=BANDS, size=16, strength=0.3)
        several = torch.stack([y == 0, y != 1, y == 2], 1).long()
        return Records(x, several, make=lambda a, b: {"image": a, "label": b})

    def targets(self, batch: Any) -> Tensor:
        return batch["label"].float()

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class So2Sat(Satellite):
    """Yes or no: a logit (N, 1), which the step squeezes, and whole labels."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        return self.task(task="binary", loss="bce")

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed, channels=BANDS, size=16, strength=0.3, classes=2)
        return Records(x, y, make=lambda a, b: {"image": a, "label": b})

    def targets(self, batch: Any) -> Tensor:
        return batch["label"].float()[:, None]

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class GeoScenes(Satellite):
    """Batches {"image", "mask"} for `SemanticSegmentationTask`."""

    key = "mask"
    sizes = (48, 24, 8)
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def task(self, **settings: Any) -> L.LightningModule:
        from torchgeo.trainers import SemanticSegmentationTask

        return SemanticSegmentationTask(
            model="fcn", num_filters=6, in_channels=BANDS, lr=1e-2, **settings
        )

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, channels=BANDS, noise=3.0)
        return Records(x, y, make=lambda a, b: {"image": a, "mask": b})

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Conv2d(BANDS, outputs, 1)


class LandCoverMap(GeoScenes):
    """0 is no class: the loss leaves it out, the model has a logit for it all the same."""

    def module(self) -> L.LightningModule:
        return self.task(num_classes=3, ignore_index=0)

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch["mask"] == 0, IGNORED, batch["mask"])


class FocalMap(GeoScenes):
    """smp's focal loss: a binary one for each class."""

    def module(self) -> L.LightningModule:
        return self.task(num_classes=3, loss="focal")

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = rows(self.layout, self.truth(module, batch))
        yes = torch.eye(3, dtype=torch.float64)[y]
        each = bce(z, yes)
        focus = (1 - torch.exp(-each)).square()
        return ((focus * each).mean(0) / focus.sum(0)).mean()


class JaccardMap(GeoScenes):
    def module(self) -> L.LightningModule:
        return self.task(num_classes=3, loss="jaccard")

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = rows(self.layout, self.truth(module, batch))
        p, yes = z.softmax(1), torch.eye(3, dtype=torch.float64)[y]
        both = (p * yes).sum(0)
        return (1 - both / ((p + yes).sum(0) - both)).mean()


class BinaryMap(GeoScenes):
    """Water or not: logits (N, 1, H, W), masks (N, H, W)."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        return self.task(task="binary", loss=self.loss)

    loss: ClassVar[str] = "bce"

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, channels=BANDS, classes=2, noise=2.0)
        return Records(x, y, make=lambda a, b: {"image": a, "mask": b})

    def targets(self, batch: Any) -> Tensor:
        return batch["mask"].float()[:, None]

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class PlainUNet(GeoScenes):
    """The U-Net of the documentation."""

    sizes = (24, 8, 8)
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 2}

    def task(self, **settings: Any) -> L.LightningModule:
        from torchgeo.trainers import SemanticSegmentationTask

        return SemanticSegmentationTask(
            model="unet", backbone="resnet18", in_channels=BANDS, **settings
        )

    def module(self) -> L.LightningModule:
        return self.task(num_classes=3)

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, channels=BANDS, size=(8, 8), noise=1.0)
        big = [part.repeat_interleave(4, -1).repeat_interleave(4, -2) for part in (x, y)]
        return Records(*big, make=lambda a, b: {"image": a, "mask": b})


class AugmentedMap(GeoScenes):
    """A data module of TorchGeo: Kornia flips images with their masks in the transfer hook."""

    def module(self) -> L.LightningModule:
        return self.task(num_classes=3)

    def loaders(self) -> tuple[Any, Any]:
        return self.datamodule(), None

    def datamodule(self) -> L.LightningDataModule:
        import kornia.augmentation as K
        from torchgeo.datamodules import NonGeoDataModule

        case = self

        class Scenes(Records):
            def __init__(self, split: str) -> None:
                count, seed = (48, 1) if split == "train" else (24, 2)
                found = case.data(count, seed)
                super().__init__(*found.parts, make=found.make)

        class DataModule(NonGeoDataModule):
            mean, std = torch.tensor(0.0), torch.tensor(2.0)

            def __init__(self) -> None:
                super().__init__(Scenes, batch_size=8)
                self.train_aug = K.AugmentationSequential(
                    K.Normalize(mean=self.mean, std=self.std),
                    K.RandomHorizontalFlip(p=0.5),
                    K.RandomVerticalFlip(p=0.5),
                    data_keys=None,
                    keepdim=True,
                )

        return DataModule()

    def batches(self, val: Any) -> Iterator[Any]:
        module = self.datamodule()
        module.setup("validate")
        for batch in module.val_dataloader():
            yield {**batch, "image": batch["image"] / 2.0}


class Biomass(Satellite):
    """TorchGeo's `RegressionTask`."""

    refused = True

    def module(self) -> L.LightningModule:
        from torchgeo.trainers import RegressionTask

        return RegressionTask(model="test_resnet", in_channels=BANDS, num_outputs=1)

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed, channels=BANDS, size=16)
        return Records(x, y + 0.5, make=lambda a, b: {"image": a, "label": b})


class SelfSupervised(Satellite):
    """TorchGeo's `SimCLRTask`: each image is a class of its own."""

    refused = True
    sizes = (32, 16, 16)
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 1}

    def module(self) -> L.LightningModule:
        from torchgeo.trainers import SimCLRTask

        settings = {"layers": 2, "memory_bank_size": 0, "hidden_dim": 16, "output_dim": 8}
        return SimCLRTask(model="test_resnet", in_channels=BANDS, size=16, **settings)

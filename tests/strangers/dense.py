"""Masks and volumes: a decision at every pixel."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.binary import bce
from strangers.byhand import IGNORED, Truth, nll, plain, rows
from strangers.data import Records, scenes
from strangers.judge import Stranger
from strangers.models import Optimized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_duo.tasks import Classes


def pixel_net(outputs: int, channels: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 1)
    )


class Scenes(Stranger):
    """Images (N, 3, 8, 8) and masks (N, 8, 8) of three classes."""

    sizes = (96, 48, 16)
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*scenes(count, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Conv2d(3, outputs, 1)


class PetModel(Optimized):
    """The example of segmentation_models_pytorch: shared_step, masks (N, 1, H, W), counts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = pixel_net(1)
        self.register_buffer("std", torch.tensor([2.0, 2.0, 2.0]).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        image = (image - self.mean) / self.std
        return self.model(image)

    def loss_fn(self, logits: Tensor, mask: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, mask)

    def shared_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        image, mask = batch
        assert image.ndim == 4
        assert mask.max() <= 1.0
        assert mask.min() >= 0
        logits_mask = self.forward(image)
        loss = self.loss_fn(logits_mask, mask)
        pred_mask = (logits_mask.sigmoid() > 0.5).float()
        tp = (pred_mask * mask).sum((2, 3))
        self.log(f"{stage}_loss", loss)
        return {"loss": loss, "tp": tp.detach()}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.shared_step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.shared_step(batch, "val")


class PetMasks(Scenes):
    layout = "labels"

    def module(self) -> L.LightningModule:
        return PetModel()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, classes=2)
        return TensorDataset(x, y.float().unsqueeze(1))

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class DiceModel(PetModel):
    """Dice, of sigmoids, by hand."""

    def loss_fn(self, logits: Tensor, mask: Tensor) -> Tensor:
        prob = torch.sigmoid(logits)
        intersection = (prob * mask).sum(dim=(1, 2, 3))
        cardinality = prob.sum(dim=(1, 2, 3)) + mask.sum(dim=(1, 2, 3))
        return 1 - ((2.0 * intersection + 1.0) / (cardinality + 1.0)).mean()


class DiceMasks(PetMasks):
    def module(self) -> L.LightningModule:
        return DiceModel()

    def value(self, module: Any, batch: Any) -> Tensor:
        z, y = self.truth(module, batch)
        p, y = 1 / (1 + (-z.double()).exp().flatten(1)), y.double().flatten(1)
        return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


class VOCModel(Optimized):
    """torchvision's reference: "out" and "aux", and 255 at the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.classifier, self.aux_classifier = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {"out": self.classifier(features), "aux": self.aux_classifier(features)}

    def criterion(self, inputs: dict[str, Tensor], target: Tensor) -> Tensor:
        losses = {k: F.cross_entropy(x, target, ignore_index=255) for k, x in inputs.items()}
        return losses["out"] + 0.5 * losses["aux"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, target = batch
        return self.criterion(self(image), target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        image, target = batch
        self.log("val_loss", self.criterion(self(image), target))


class VoidPixels(Scenes):
    def module(self) -> L.LightningModule:
        return VOCModel()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed)
        y[:, 0] = y[:, :, -1] = 255
        return TensorDataset(x, y)

    def truth(self, module: Any, batch: Any) -> Truth:
        image, target = batch
        return Truth(module(image)["out"], torch.where(target == 255, IGNORED, target))

    def value(self, module: Any, batch: Any) -> Tensor:
        truth, aux = self.truth(module, batch), module(batch[0])["aux"]
        both = (truth, truth._replace(logits=aux))
        out, aux = (nll(*rows(self.layout, one)).mean() for one in both)
        return out + 0.5 * aux


class LandCoverTask(Optimized):
    """TorchGeo's SemanticSegmentationTask: {"image", "mask"}, metrics before the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = pixel_net(3)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-1000, weight=None)
        self.train_metrics = MulticlassAccuracy(num_classes=3, average="micro")
        self.val_metrics = MulticlassJaccardIndex(num_classes=3, average="micro")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch["image"], batch["mask"]
        y_hat = self(x).squeeze(1)
        self.train_metrics(y_hat, y)
        loss = self.criterion(y_hat, y)
        self.log("train_loss", loss, batch_size=x.shape[0])
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch["image"], batch["mask"]
        y_hat = self(x).squeeze(1)
        self.val_metrics(y_hat, y)
        self.log("val_iou", self.val_metrics, batch_size=x.shape[0])
        self.log("val_loss", self.criterion(y_hat, y), batch_size=x.shape[0])


class LandCover(Scenes):
    def module(self) -> L.LightningModule:
        return LandCoverTask()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed)
        return Records(x, y, make=lambda a, b: {"image": a, "mask": b, "bounds": torch.zeros(4)})

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["image"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["mask"]


class PixelLabelModule(LandCoverTask):
    """Several labels at each pixel."""

    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch["image"]), batch["mask"].float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=16)


class PixelLabels(LandCover):
    layout = "labels"

    def module(self) -> L.LightningModule:
        return PixelLabelModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed)
        several = torch.stack([y == 0, y != 1, y == 2], 1)
        return Records(x, several, make=lambda a, b: {"image": a, "mask": b})

    def targets(self, batch: Any) -> Tensor:
        return batch["mask"].float()

    def value(self, module: Any, batch: Any) -> Tensor:
        return bce(*self.truth(module, batch)).mean()


class CoarseModule(Optimized):
    """SegFormer's way: logits at half the size, brought to the mask's in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def loss(self, batch: Any) -> Tensor:
        image, mask = batch
        logits = F.interpolate(
            self(image), size=mask.shape[-2:], mode="bilinear", align_corners=False
        )
        return F.cross_entropy(logits, mask)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class EnlargedInTheStep(Scenes):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return CoarseModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, size=(4, 4))
        big = [part.repeat_interleave(2, -1).repeat_interleave(2, -2) for part in (x, y)]
        return TensorDataset(*big)

    def logits(self, module: Any, batch: Any) -> Tensor:
        return F.interpolate(module(batch[0]), size=(8, 8), mode="bilinear", align_corners=False)


class MetaTensor(Tensor):
    """Like MONAI's: images that carry where they come from, and cannot be cut without it."""

    meta: dict[str, Any]

    @staticmethod
    def __new__(cls: type, x: Tensor, meta: dict[str, Any]) -> "MetaTensor":
        self = x.as_subclass(cls)
        self.meta = meta
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "MetaTensor":
        return MetaTensor(self.as_subclass(Tensor).clone(), dict(self.meta))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.__getitem__ and isinstance(args[1], slice):
            raise ValueError("inconsistent metadata")
        if isinstance(out, MetaTensor):
            first = next((a for a in args if isinstance(a, MetaTensor)), None)
            out.meta = getattr(first, "meta", {})
        return out


class VolumeModule(Optimized):
    """MONAI's 3-D segmentation: Dice and cross-entropy, labels (N, 1, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self._model = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.PReLU(), nn.Conv3d(6, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)

    def loss_function(self, output: Tensor, labels: Tensor) -> Tensor:
        ce = F.cross_entropy(output, labels.squeeze(1).long())
        prob = output.softmax(1)
        truth = F.one_hot(labels.squeeze(1).long(), 3).movedim(-1, 1)
        overlap = 2 * (prob * truth).sum((2, 3, 4)) / (prob + truth).sum((2, 3, 4))
        return ce + 1 - overlap.mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        return self.loss_function(self.forward(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch["image"], batch["label"]
        loss = self.loss_function(self.forward(images), labels)
        self.log("val_loss", loss.as_subclass(Tensor), batch_size=len(images))


class Volumes(Stranger):
    sizes = (48, 24, 8)
    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def module(self) -> L.LightningModule:
        return VolumeModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, channels=1, size=(4, 6, 6), noise=0.5)

        def record(image: Tensor, label: Tensor) -> dict[str, Tensor]:
            about = {"filename": "a.nii.gz"}
            return {"image": MetaTensor(image, about), "label": MetaTensor(label[None], about)}

        return Records(x, y, make=record)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Conv3d(1, outputs, 3, padding=1)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["image"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["label"][:, 0]

    def value(self, module: Any, batch: Any) -> Tensor:
        truth = self.truth(module, batch)
        prob = plain(truth.logits).softmax(1).flatten(2)
        yes = torch.eye(3, dtype=torch.float64)[truth.targets.as_subclass(Tensor).flatten(1)].mT
        overlap = 2 * (prob * yes).sum(2) / (prob + yes).sum(2)
        return nll(*rows(self.layout, truth)).mean() + 1 - overlap.mean()


class WindowModule(VolumeModule):
    """A sliding window, with labels (N, 1, D, H, W) that the step squeezes."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss_function(windows(self, batch["image"]), batch["label"])
        self.log("val_loss", loss.as_subclass(Tensor), batch_size=len(batch["image"]))


def windows(module: Any, images: Tensor) -> Tensor:
    return torch.cat([module(part) for part in images.split(3, -1)], -1)


class Windows(Volumes):
    """`logits_fn` and `task` say what many calls make."""

    def module(self) -> L.LightningModule:
        return WindowModule()

    def arguments(self) -> dict[str, Any]:
        return {"sidekick": self.sidekick, "logits_fn": windows, "task": Classes()}

    def logits(self, module: Any, batch: Any) -> Tensor:
        left, right = batch["image"][..., :3], batch["image"][..., 3:]
        return torch.cat([module(left), module(right)], -1)

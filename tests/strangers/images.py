"""Images: wrapped models, mixed samples, teachers, helpers' heads, films."""

from typing import Any, NamedTuple

import lightning as L
import torch
from strangers.data import Records, images, points
from strangers.judge import Stranger
from strangers.models import Optimized, flat, small_cnn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import Accuracy, MetricCollection
from torchvision import models
from torchvision.transforms import v2


class Pictures(Stranger):
    """Runs on images with one class each."""

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*images(count, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return flat(outputs)


class ResNetClassifier(Optimized):
    """Lightning's tutorial of transfer learning."""

    def __init__(self, num_target_classes: int = 3) -> None:
        super().__init__()
        self.model = models.resnet18(weights=None)
        self.model.fc = nn.Linear(self.model.fc.in_features, num_target_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _shared_step(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        acc = (logits.argmax(dim=-1) == y).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": acc}, on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._shared_step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class WrappedResNet(Pictures):
    sizes = (64, 64, 16)

    def data(self, count: int, seed: int) -> Dataset:
        return TensorDataset(*images(count, seed, strength=0.5))

    def module(self) -> L.LightningModule:
        return ResNetClassifier()


class SceneClassificationTask(Optimized):
    """TorchGeo's ClassificationTask: metrics first, in_channels of the sensor, dict batches."""

    def __init__(self, in_channels: int = 13, num_classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = small_cnn(num_classes, channels=in_channels)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-1000, weight=None)
        metrics = MetricCollection(
            {
                "OverallAccuracy": Accuracy("multiclass", num_classes=num_classes, average="micro"),
                "AverageAccuracy": Accuracy("multiclass", num_classes=num_classes, average="macro"),
            }
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch["image"], batch["label"]
        y_hat = self(x).squeeze(1)
        self.train_metrics(y_hat, y)
        self.log_dict(self.train_metrics, batch_size=x.shape[0])
        loss = self.criterion(y_hat, y)
        self.log("train_loss", loss, batch_size=x.shape[0])
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch["image"], batch["label"]
        y_hat = self(x).squeeze(1)
        self.val_metrics(y_hat, y)
        self.log_dict(self.val_metrics, batch_size=x.shape[0])
        self.log("val_loss", self.criterion(y_hat, y), batch_size=x.shape[0])


class ThirteenChannels(Stranger):
    sizes = (96, 96, 16)

    def module(self) -> L.LightningModule:
        return SceneClassificationTask()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed, classes=4, channels=13, size=16, strength=0.3)
        return Records(x, y, make=lambda image, label: {"image": image, "label": label})

    def arguments(self) -> dict[str, Any]:
        return {"sidekick": "resnet10t", "pretrained": False}

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["image"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["label"]


class SwappedCrops(Optimized):
    """As multi-crop training does: all crops of all images in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small_cnn(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def loss(self, batch: Any) -> Tensor:
        crops, target = batch
        logits = self(torch.cat(crops, dim=0))
        return F.cross_entropy(logits, torch.cat([target] * len(crops)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[1]))


class CropsOfAnImage(Pictures):
    def module(self) -> L.LightningModule:
        return SwappedCrops()

    def data(self, count: int, seed: int) -> Dataset:
        return Records(*images(count, seed), make=lambda x, y: ([x, x.flip(-1), 0.8 * x], y))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.cat(batch[0]),), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[1].repeat(3)


class MixupByHand(Optimized):
    """The step of mixup's authors: two targets and lambda; validation is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn(3)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        lam = torch.distributions.Beta(1.0, 1.0).sample().item()
        index = torch.randperm(x.size(0), device=x.device)
        outputs = self(lam * x + (1 - lam) * x[index])
        return lam * self.criterion(outputs, y) + (1 - lam) * self.criterion(outputs, y[index])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.criterion(self(x), y))


class MixedInTheStep(Pictures):
    def module(self) -> L.LightningModule:
        return MixupByHand()


class CutMixAfterTransfer(MixupByHand):
    """torchvision's tutorial, in Lightning's hook: soft targets (N, K) in training."""

    def __init__(self) -> None:
        super().__init__()
        self.cutmix = v2.CutMix(num_classes=3)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.cutmix(*batch) if self.trainer.training else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=0.1)


class MixedInTheHook(Pictures):
    def module(self) -> L.LightningModule:
        return CutMixAfterTransfer()


class Distilled(Optimized):
    """Hinton's distillation beside a teacher that is frozen."""

    def __init__(self, T: float = 2.0, alpha: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student, self.teacher = small_cnn(3), small_cnn(3, width=12)
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            teacher_logits = self.teacher.eval()(x)
        student_logits = self(x)
        t = self.hparams.T
        soft = F.kl_div(
            F.log_softmax(student_logits / t, dim=1),
            F.softmax(teacher_logits / t, dim=1),
            reduction="batchmean",
        )
        hard = F.cross_entropy(student_logits, y)
        return self.hparams.alpha * hard + (1 - self.hparams.alpha) * soft * t**2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Student(Pictures):
    def module(self) -> L.LightningModule:
        return Distilled()


class InceptionOutputs(NamedTuple):
    logits: Tensor
    aux_logits: Tensor | None


class Supervised(Optimized):
    """As torchvision's Inception: a second head, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
        self.rest = small_cnn(3, channels=8)

    def forward(self, x: Tensor) -> InceptionOutputs:
        x = self.stem(x)
        return InceptionOutputs(self.rest(x), self.aux(x) if self.training else None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs, aux_outputs = self(batch[0])
        return F.cross_entropy(outputs, batch[1]) + 0.4 * F.cross_entropy(aux_outputs, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs, _ = self(batch[0])
        self.log("val_loss", F.cross_entropy(outputs, batch[1]))


class DeepSupervision(Pictures):
    def module(self) -> L.LightningModule:
        return Supervised()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0]).logits


class FilmClassifier(Optimized):
    """Frames (N, T, C, H, W) through a CNN, their features through a GRU."""

    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.frame, self.rnn = small_cnn(width), nn.GRU(width, width, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, video: Tensor) -> Tensor:
        n, t = video.shape[:2]
        features = self.frame(video.flatten(0, 1)).view(n, t, -1)
        _, hidden = self.rnn(features)
        return self.fc(hidden[-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["video"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["video"]), batch["label"]))


class Films(Stranger):
    """Batches as PyTorchVideo's: a mapping with the index of each clip."""

    sizes = (96, 96, 16)

    def module(self) -> L.LightningModule:
        return FilmClassifier()

    def data(self, count: int, seed: int) -> Dataset:
        frames, y = images(count, seed, channels=12, strength=0.4)
        return Records(
            frames.view(count, 4, 3, 12, 12),
            y,
            torch.arange(count) % 3,
            make=lambda video, label, clip: {
                "video": video,
                "video_name": "a.mp4",
                "clip_index": clip,
                "label": label,
            },
        )

    def sidekick(self, outputs: int) -> nn.Module:
        return flat(outputs, 4 * 432)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["video"],), {}

    def targets(self, batch: Any) -> Tensor:
        return batch["label"]


class Captioned(Optimized):
    """An image and the words of its caption, by keywords."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.vision, self.words = small_cnn(8), nn.Embedding(20, 8, padding_idx=0)
        self.fusion = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, classes))

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        mask = (input_ids != 0).unsqueeze(-1)
        text = (self.words(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.fusion(torch.cat([self.vision(image), text], dim=-1))

    def _step(self, batch: Any) -> Tensor:
        logits = self(image=batch["image"], input_ids=batch["input_ids"])
        return F.cross_entropy(logits, batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._step(batch))


class ImageAndText(Stranger):
    def module(self) -> L.LightningModule:
        return Captioned()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed)
        ids = (y[:, None] + 3 * (points(count, seed, width=5)[0] > 0)) % 5
        return Records(
            x, ids, y, make=lambda a, b, c: {"image": a, "input_ids": b, "label": c, "id": "x"}
        )

    def sidekick(self, outputs: int) -> nn.Module:
        return Captioned(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"image": batch["image"], "input_ids": batch["input_ids"]}

    def targets(self, batch: Any) -> Tensor:
        return batch["label"]


class TwoCameras(Optimized):
    """The mean of the logits of two views of an object, in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn(3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.net(left) + self.net(right)) / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_nll", F.cross_entropy(self(*batch[0]), batch[1]), batch_size=len(batch[1]))


class BothViews(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = flat(outputs)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.net(left) - self.net(right)


class PairOfImages(Stranger):
    logged = "val_nll"

    def module(self) -> L.LightningModule:
        return TwoCameras()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = images(count, seed)
        return Records(x, x.flip(-1), y, make=lambda a, b, y: ((a, b), y))

    def sidekick(self, outputs: int) -> nn.Module:
        return BothViews(outputs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(batch[0]), {}

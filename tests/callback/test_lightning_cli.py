"""DuoCallback from LightningCLI: flags, YAML, help."""

from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, loader, small_images, small_net
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from lightning_duo import DuoCallback

RUN = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(small_images(64, 1))

    def val_dataloader(self) -> DataLoader:
        return loader(small_images(64, 2))


class Tiny(nn.Module):
    """A sidekick of the user's own, made for the number of classes."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.net = small_net(num_classes, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def run(*arguments: str) -> DuoCallback:
    cli = LightningCLI(Classifier, Data, args=[*arguments], seed_everything_default=1)
    (duo,) = (c for c in cli.trainer.callbacks if isinstance(c, DuoCallback))
    return duo


def test_flags() -> None:
    duo = run(
        "fit",
        "--trainer.callbacks+=lightning_duo.DuoCallback",
        "--trainer.callbacks.sidekick=resnet10t",
        "--trainer.callbacks.pretrained=false",
        "--trainer.callbacks.target_accuracy=0.5",
        *RUN,
    )
    assert duo._sidekick.name == "resnet10t"
    assert duo.calibration.target_accuracy == 0.5


YAML = """
trainer:
  callbacks:
    - class_path: lightning_duo.DuoCallback
      init_args:
        sidekick: {class_path: test_lightning_cli.Tiny, init_args: {width: 4}}
        probe: 0
        sidekick_transform:
          class_path: torchvision.transforms.v2.RandomHorizontalFlip
        optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9}}
        lr_scheduler:
          class_path: torch.optim.lr_scheduler.ExponentialLR
          init_args: {gamma: 0.5}
        summary: false
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: duo/val_nll}
"""


def test_yaml_and_the_config_that_is_saved(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(YAML)
    folder = f"--trainer.default_root_dir={tmp_path}"
    duo = run("fit", f"--config={config}", *RUN, folder)
    assert duo._sidekick.model.net[1].out_features == 4
    assert duo._training_state["updates"] == 4
    (group,) = duo._training_state["optimizer"]["param_groups"]
    assert group["momentum"] == 0.9
    assert group["lr"] == pytest.approx(0.01 * 0.5**4)
    again = run("fit", f"--config={tmp_path / 'config.yaml'}", f"{folder}/again")
    assert again.fit.temperatures == duo.fit.temperatures


def test_help_and_mistakes(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks.help=lightning_duo.DuoCallback")
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        'A timm name ("resnet34"), "torchvision/<name>"',
        "Fraction of the training that trains the sidekick's head only. (type: float,",
        "Accuracy that accepted predictions are to reach",
        "Index of the validation dataloader that fits the temperatures",
    ):
        assert text in shown
    add = "--trainer.callbacks+=lightning_duo.DuoCallback"
    with pytest.raises(ValueError, match="no model is called 'resnet43': did you mean 'resnet34'"):
        run("fit", add, "--trainer.callbacks.sidekick=resnet43", *RUN)

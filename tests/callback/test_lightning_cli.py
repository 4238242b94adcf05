"""DuoCallback from LightningCLI: flags, YAML, help."""

import inspect
import re
from pathlib import Path

import lightning as L
import pytest
from helpers import Classifier, loader, small_images
from lightning.pytorch.cli import LightningCLI
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
        "--trainer.callbacks.metrics=all",
        *RUN,
    )
    assert duo.sidekick.pretrained_cfg["architecture"] == "resnet10t"
    assert duo.calibration.target_accuracy == 0.5
    assert "augrc" in duo.options.metrics


YAML = """
trainer:
  callbacks:
    - class_path: lightning_duo.DuoCallback
      init_args:
        sidekick: {class_path: helpers.Tiny, init_args: {width: 4}}
        probe: 0
        metrics: [f1, nll]
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
    assert duo.sidekick.net[1].out_features == 4
    assert duo.progress.updates == 4
    (group,) = duo.state_dict()["training"]["optimizer"]["param_groups"]
    assert group["momentum"] == 0.9
    assert group["lr"] == pytest.approx(0.01 * 0.5**4)
    assert duo.options.metrics == ("f1", "nll")
    again = run("fit", f"--config={tmp_path / 'config.yaml'}", f"{folder}/again")
    assert again.fit.temperatures == duo.fit.temperatures


def test_help_and_mistakes(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks.help=lightning_duo.DuoCallback")
    shown = " ".join(capsys.readouterr().out.split())
    for option in inspect.signature(DuoCallback).parameters:  # each with a word on what it is
        assert re.search(rf"callbacks\.{option}\+? [^\s\]]*[^\s\],] [`\w]", shown), option
    assert 'timm name ("resnet34"), "torchvision/<name>"' in shown
    add = "--trainer.callbacks+=lightning_duo.DuoCallback"
    with pytest.raises(ValueError, match=r"'resnet43'.*'resnet34'"):
        run("fit", add, "--trainer.callbacks.sidekick=resnet43", *RUN)

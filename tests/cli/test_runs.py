"""From a trained base to a deployed duo on the command line, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from subprocesses import lightning_duo

from lightning_duo import DuoModule
from lightning_duo.cli import main

PROJECT = '''
import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()

    def loader(self, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(3, (48,), generator=generator)
        x = torch.randn(48, 3, 12, 12, generator=generator) + y[:, None, None, None]
        return DataLoader(TensorDataset(x, y), self.hparams.batch_size)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)


class Model(L.LightningModule):
    def __init__(self, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class MovedData(Data):
    """Its folder of the run is not on this machine; it has another one by default."""

    def __init__(self, batch_size: int = 8):
        if batch_size == 16:
            raise FileNotFoundError("no such folder")
        super().__init__(batch_size)


def moved_data():
    return MovedData()


def model():
    return Model(4)


def test_loader():
    return Data().test_dataloader()


def tiny(outputs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, outputs))


def made():
    return tiny(3)


class Tokens(L.LightningModule):
    """Classifies sequences of whole numbers, with a mask."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        return self.head((self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, True))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["ids"], mask=batch["mask"]), batch["y"])

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Small(Tokens):
    """Its sidekick."""

    def __init__(self, outputs):
        nn.Module.__init__(self)
        self.table, self.head = nn.Embedding(50, 4), nn.Linear(4, outputs)
'''

QUIET = (
    *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
    *("--trainer.accelerator", "cpu", "--summary", "false"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's file, a trained base, and a run that gave it a sidekick."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_project.py").write_text(PROJECT)
    script = """
import lightning as L
from my_project import Data, Model
options = dict(accelerator="cpu", logger=False, enable_progress_bar=False)
trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, **options)
trainer.fit(Model(4), Data(16))
trainer.save_checkpoint("best.ckpt")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = lightning_duo(
            *("sidekick", "--model", "my_project:Model", "--model.width", 4),
            *("--data", "my_project:Data", "--ckpt_path", "best.ckpt"),
            *("--sidekick", "resnet10t", "--pretrained", "false", "--target_accuracy", 0.5),
            *("--trainer.max_epochs", 1, "--seed_everything", 0, *QUIET),
        )
    assert done.returncode == 0, done.stderr
    written = done.stdout.split("wrote ")[-1].strip()
    os.replace(written, folder / "run.ckpt")
    return folder


CONFIG = """
trainer: {max_epochs: 1, logger: false, enable_progress_bar: false, accelerator: cpu}
"""
OF_FIXED_CLASSES = CONFIG + "model: {width: 4}\ndata: {batch_size: 8}\n"
OF_ANY_CLASS = (
    CONFIG
    + """
model: {class_path: my_project.Model, init_args: {width: 4}}
data: {class_path: my_project.Data}
"""
)


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    return project


def test_the_base_stays_as_it_was(here: Path) -> None:
    before, after = (
        torch.load(here / name, weights_only=True)["state_dict"]
        for name in ("best.ckpt", "run.ckpt")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("text", [OF_FIXED_CLASSES, OF_ANY_CLASS])
def test_configurations_of_lightning_cli(
    text: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``LightningCLI(Model, Data)`` and ``LightningCLI()`` write them."""
    (here / "config.yaml").write_text(text)
    words = ["sidekick", "--config", "config.yaml", "--ckpt_path", "best.ckpt"]
    words += ["--sidekick", "resnet10t", "--pretrained", "false", "--summary", "false"]
    if text == OF_FIXED_CLASSES:
        monkeypatch.setattr(sys, "argv", ["lightning-duo", *words])
        with pytest.raises(SystemExit, match="not its class; pass --model MODULE:NAME too"):
            main()
        words += ["--model", "my_project.Model", "--data=my_project:Data"]
    monkeypatch.setattr(sys, "argv", ["lightning-duo", *words])
    main()
    written = capsys.readouterr().out.split("wrote ")[-1].strip()
    from my_project import Model

    assert DuoModule.from_checkpoint(written, Model).base[0].out_channels == 4


def test_a_checkpoint_becomes_a_file_that_answers(here: Path) -> None:
    done = lightning_duo(*("export", "run.ckpt", "--model", "my_project:Model", "--format", "onnx"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote run.onnx (")
    from my_project import Model

    duo = DuoModule.from_checkpoint("run.ckpt", Model)
    x = torch.randn(5, 3, 12, 12)
    session = onnxruntime.InferenceSession("run.onnx")
    results = session.run(None, {"x": x.numpy()})
    for found, wanted in zip(results, duo(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
    described = json.loads(session.get_modelmeta().custom_metadata_map["lightning_duo"])
    assert described["threshold"] == pytest.approx(float(duo.threshold))
    assert duo.threshold > 0


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-duo", *map(str, words)])
    main()


def test_the_users_functions_stand_for_classes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_class = ("--model=my_project:Model", "--model.width", 4)
    for sidekick, module in (
        ("my_project:tiny", ("--model", "my_project:model")),
        ("my_project:made", of_class),
    ):
        words = ("sidekick", *module, "--data", "my_project:Data", "--sidekick", sidekick)
        run(monkeypatch, *words, "--trainer.max_epochs", 1, *QUIET)
        out, err = capsys.readouterr()
        assert "there is no --ckpt_path" in err
        checkpoint = out.split("wrote ")[-1].strip()
        of_run = ("--model", "my_project:model", "--sidekick", sidekick)
        run(monkeypatch, "export", checkpoint, *of_run, "out.pt2")
    assert torch.export.load("out.pt2").module()(torch.zeros(3, 3, 12, 12))[1].shape == (3,)


def test_other_data_than_the_runs_is_never_taken_without_a_word(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate", "run.ckpt", "--model", "my_project:Model", "--data")
    with pytest.raises(SystemExit, match="name a function without arguments that gives the data"):
        run(monkeypatch, *words, "my_project:MovedData")
    run(monkeypatch, *words, "my_project:moved_data")
    assert "my_project:moved_data" in " ".join(capsys.readouterr().out.split())


def test_evaluate_judges_on_the_test_data(here: Path) -> None:
    for data in ("my_project:Data", "my_project:test_loader"):
        done = lightning_duo(
            *("evaluate", "run.ckpt", "--model", "my_project:Model", "--data", data),
            *("--report", "test.html", "--resamples", 20),
        )
        assert done.returncode == 0, done.stderr
        assert f"test data of {data}" in " ".join(done.stdout.split())
        assert "Accepted from confidence" in done.stdout
        assert (here / "test.html").stat().st_size > 10_000


def test_a_sidekick_of_the_users_and_token_ids(here: Path) -> None:
    script = """
import lightning as L
import torch
from my_project import Small, Tokens
from torch.utils.data import DataLoader
from lightning_duo import DuoCallback
rows = [{"ids": torch.randint(1, 40, (6,)), "mask": (torch.rand(6) > .3).float().clamp(min=.1),
         "y": torch.tensor(i % 3)} for i in range(24)]
options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
trainer = L.Trainer(callbacks=[DuoCallback(Small, summary=False)], **options)
trainer.fit(Tokens(), DataLoader(rows, 8), DataLoader(rows, 8))
trainer.save_checkpoint("tokens.ckpt")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    export = ("export", "tokens.ckpt", "--model", "my_project:Tokens")
    refused = lightning_duo(*export)
    assert refused.returncode == 1
    assert "Small, is a module of your own; pass sidekick=" in refused.stderr
    done = lightning_duo(*export, "--sidekick", "my_project:Small")
    assert done.returncode == 0, done.stderr
    run = torch.export.load("tokens.pt2").module()
    ids, mask = torch.randint(50, (5, 6)), torch.ones(5, 6)
    from my_project import Small, Tokens

    duo = DuoModule.from_checkpoint("tokens.ckpt", Tokens, Small)
    torch.testing.assert_close(run(ids, mask=mask)[0], duo(ids, mask=mask).probs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "run.ckpt"), "pass --model MODULE:NAME"),
        (("export", "best.ckpt", "--model", "my_project:Model"), "holds no duo"),
        (
            ("export", "nothing.ckpt", "--model", "my_project:Model"),
            "there is no file nothing.ckpt",
        ),
        (
            ("export", "run.ckpt", "--model", "my_project:Data"),
            "must give a LightningModule, got Data",
        ),
        (("export", "run.ckpt", "--model", "my_project:Modle"), "no attribute 'Modle'"),
        (("export", "run.ckpt", "--model", "my_project"), "is not MODULE:FUNCTION"),
        (("export", "run.ckpt", "--model", "my_project:Model", "--base", "resnet18"), "pass one"),
        (("export", "duo.safetensors", "--model", "my_project:Model"), "pass one"),
        (("export", "duo.safetensors"), "needs --base, --sidekick and --input_size"),
        (
            ("export", "run.ckpt", "--model", "my_project:Model", "--sidekick", "resnet18"),
            "has other weights",
        ),
        (
            ("evaluate", "run.ckpt", "--model", "my_project:Model", "--data", "my_project:model"),
            "--data my_project:model must give a LightningDataModule or a DataLoader, got Model",
        ),
        (("sidekick", "--model", "my_project:Model", "--model.width", 4), "--sidekick"),
    ],
)
def test_mistakes_are_named(
    words: tuple[object, ...],
    message: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-duo", *map(str, words)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert message in f"{exited.value} {capsys.readouterr().err}"

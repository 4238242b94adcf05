"""Files that version 0.1.0 wrote load, and give what they gave then."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import lightning as L
import pytest
import torch
from helpers import make_trainer
from lightning.pytorch.cli import LightningCLI
from runs import make_duo
from torch import Tensor, nn

from lightning_duo import DuoCallback, DuoModule, LogitsOf
from lightning_duo.calibration import Calibration
from lightning_duo.tasks import Classes, Labels

OLD = Path(__file__).parent / "old_files"
OF_TASKS = Path(__file__).parent / "old_files_of_tasks"
EXPECTED = json.loads((OLD / "expected.json").read_text())
EXPECTED_OF_TASKS = json.loads((OF_TASKS / "expected.json").read_text())


@pytest.fixture
def old_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(OLD)
    import old_models

    return old_models


def two_duos(old_models: ModuleType) -> tuple[DuoCallback, DuoCallback]:
    L.seed_everything(0, verbose=False)
    return (
        make_duo(old_models.sidekick, target_accuracy=0.8, delta=0.2),
        make_duo(nn.Linear(8, 3), name="second", optimizer=None),
    )


def temperatures(*duos: DuoCallback) -> list:
    return [list(duo.fit.temperatures) for duo in duos]


def near(values: object, rel: float = 1e-4) -> object:
    return pytest.approx(values, rel=rel, abs=1e-5)


def test_a_checkpoint_is_tested_and_validated(old_models: ModuleType) -> None:
    duos, module = two_duos(old_models), old_models.Base()
    trainer, data = make_trainer(*duos), old_models.Data()
    trainer.test(module, data, ckpt_path=OLD / "run.ckpt", verbose=False)
    for form, values in EXPECTED["results"].items():
        assert duos[0].results["test"][form] == near(values)
    first, second = EXPECTED["temperatures"], EXPECTED["second"]
    assert temperatures(*duos) == [first, second]
    assert duos[0].fitted_at_step == EXPECTED["fitted_at_step"]
    x = old_models.data(160, 3).tensors[0][:5]
    check(duos[0].module(x), "duo")
    trainer.validate(module, data, ckpt_path=OLD / "run.ckpt", verbose=False)  # the best sidekick
    assert duos[0].fitted_at_step == EXPECTED["fitted_at_step"]
    assert temperatures(*duos) == [near(first), near(second)]  # of this step too


def test_training_goes_on_from_a_checkpoint(old_models: ModuleType) -> None:
    duos = two_duos(old_models)
    trainer = make_trainer(*duos, max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(old_models.Base(), old_models.Data(), ckpt_path=OLD / "run.ckpt")
    resumed = EXPECTED["resumed"]
    assert trainer.global_step == resumed["step"]
    assert duos[0].progress.updates == resumed["step"]
    assert temperatures(*duos) == [near(resumed["temperatures"]), near(resumed["second"])]


def test_a_fit_begins_from_a_checkpoint_of_before_its_first_batch(old_models: ModuleType) -> None:
    duos = two_duos(old_models)
    trainer = make_trainer(*duos, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(old_models.Base(), old_models.Data(), ckpt_path=OLD / "early.ckpt")
    assert duos[0].progress.updates == EXPECTED["fitted_at_step"]
    # The second sidekick is another, as it was given; it is of no use beside this base.
    assert temperatures(duos[1]) == [near(EXPECTED["second"])]


def check(output: tuple, name: str) -> None:
    """Probabilities, prediction, confidence and acceptance of the first five test samples."""
    every = EXPECTED | EXPECTED_OF_TASKS
    for found, expected in zip(output, every[name], strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.tensor(expected))


def five(old_models: ModuleType) -> Tensor:
    return old_models.data(160, 3).tensors[0][:5]


@pytest.mark.parametrize("name", ["duo", "uq_only", "logits_of"])
def test_saved_duos_are_loaded(name: str, old_models: ModuleType) -> None:
    base = old_models.Base()
    if name == "logits_of":
        base = LogitsOf(old_models.scaled, base)
    duo = DuoModule.load(OLD / f"{name}.safetensors", base, old_models.sidekick(3))
    assert duo.mode == ("uq_only" if name == "uq_only" else "weighted")
    check(duo(five(old_models)), name)


def test_exports_run(old_models: ModuleType) -> None:
    import onnxruntime

    extra = {"lightning_duo.json": ""}
    program = torch.export.load(OLD / "duo.pt2", extra_files=extra).module()
    check(program(five(old_models)), "duo")
    session = onnxruntime.InferenceSession(OLD / "duo.onnx", providers=["CPUExecutionProvider"])
    check(session.run(None, {"x": five(old_models).numpy()}), "duo")
    for text in (
        extra["lightning_duo.json"],
        session.get_modelmeta().custom_metadata_map["lightning_duo"],
    ):
        assert json.loads(text)["temperatures"] == near(EXPECTED["temperatures"])


@pytest.mark.parametrize("name", ["plain", "threshold", "nothing"])
def test_calibrations_are_loaded(name: str) -> None:
    found = Calibration.load(OLD / f"{name}.json")
    *weights, threshold = EXPECTED[name]
    assert list(found.temperatures) == weights
    if threshold is None:
        assert found.threshold is None
    else:
        assert found.threshold.value == float(threshold)


def test_a_configuration_of_the_command_line_runs(old_models: ModuleType, tmp_path: Path) -> None:
    config = shutil.copy(OLD / "config.yaml", tmp_path / "old.yaml")
    arguments = ["fit", f"--config={config}", f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(old_models.Base, old_models.Data, args=arguments, seed_everything_default=1)
    (duo,) = (c for c in cli.trainer.callbacks if isinstance(c, DuoCallback))
    assert list(duo.fit.temperatures) == near(EXPECTED["cli"])


@pytest.mark.parametrize("name", ["labels", "tokens", "masked"])
def test_saved_duos_of_tasks_are_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(OF_TASKS)
    import old_models_of_tasks as models

    pairs = {
        "labels": (models.Sigmoid(), nn.Linear(8, 3)),
        "tokens": (models.Tokens(), models.Tokens()),
        "masked": (models.Masked(), models.Unmasked()),
    }
    x = models.inputs()
    duo = DuoModule.load(OF_TASKS / f"{name}.safetensors", *pairs[name])
    assert duo.task == {"labels": Labels(("base",)), "tokens": Classes(dim=-1)}.get(name, Classes())
    check(duo(x, mask=(x > 0).float()) if name == "masked" else duo(x), name)


def test_a_calibration_of_labels_is_loaded() -> None:
    found = Calibration.load(OF_TASKS / "labels.json")
    assert found.task == Labels(("base",))
    assert [*found.temperatures, found.threshold.value] == EXPECTED_OF_TASKS["calibration"]

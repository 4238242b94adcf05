"""DuoCallback decides: threshold, figures and report in real Trainers."""

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import TEST, TRAIN, VAL, Classifier, loader, make_trainer, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from runs import fitted, make_duo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_duo import DuoModule, select_threshold
from lightning_duo.export import export_duo


@pytest.mark.parametrize(("target", "delta"), [(0.7, None), (0.5, 0.2)])
def test_the_threshold_is_chosen_logged_and_deployed(
    target: float, delta: float | None, tmp_path: Path
) -> None:
    duo = make_duo(target_accuracy=target, delta=delta)
    _, module, trainer = fitted(duo, max_epochs=16)
    deployed = duo.module
    output = deployed(VAL.tensors[0])
    correct = output.prediction == VAL.tensors[1]
    expected = select_threshold(output.confidence, correct, target, delta=delta)
    assert 0 < expected.coverage < 1
    assert duo.calibration.threshold.value == pytest.approx(expected.value, rel=1e-5)
    assert duo.calibration.threshold.coverage == pytest.approx(expected.coverage)
    assert float(deployed.threshold) == duo.calibration.threshold.value
    logged = trainer.callback_metrics
    assert float(logged["duo/threshold"]) == pytest.approx(expected.value, rel=1e-5)
    assert float(logged["duo/val_coverage"]) == pytest.approx(expected.coverage)
    assert duo.results["val"]["duo"]["selective_accuracy"] >= target
    assert logged["duo/val_selective_accuracy"] == pytest.approx(
        duo.results["val"]["duo"]["selective_accuracy"]
    )

    (tested,) = trainer.test(module, loader(TEST), verbose=False)
    output = deployed(TEST.tensors[0])
    correct = output.prediction == TEST.tensors[1]
    assert tested["duo/test_coverage"] == pytest.approx(float(output.accept.double().mean()))
    accuracy = float(correct[output.accept].double().mean())
    assert tested["duo/test_selective_accuracy"] == pytest.approx(accuracy)

    deployed.save(tmp_path / "duo.safetensors")
    loaded = DuoModule.load(tmp_path / "duo.safetensors", Classifier(), small_net())
    assert torch.equal(loaded(TEST.tensors[0]).accept, output.accept)
    extra = {"lightning_duo.json": ""}
    export_duo(deployed, tmp_path / "duo.pt2", TEST.tensors[0][:2])
    run = torch.export.load(tmp_path / "duo.pt2", extra_files=extra).module()
    assert torch.equal(run(TEST.tensors[0])[3], output.accept)
    described = json.loads(extra["lightning_duo.json"])["threshold"]
    assert described == pytest.approx(expected.value, rel=1e-5)


def test_checkpoints_carry_the_threshold(tmp_path: Path) -> None:
    duo = make_duo(target_accuracy=0.7)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fitted(duo, None, checkpoint, enable_checkpointing=True, max_epochs=4)
    path = tmp_path / "last.ckpt"
    torch.load(path, weights_only=True)
    other = make_duo(target_accuracy=0.7)
    make_trainer(other).test(Classifier(), loader(TEST), ckpt_path=path, verbose=False)
    assert other.calibration == duo.calibration
    assert other.module.threshold == duo.module.threshold
    with pytest.warns(UserWarning, match=r"target_accuracy=0\.7, delta=None"):
        make_trainer(make_duo(target_accuracy=0.8)).test(
            Classifier(), loader(TEST), ckpt_path=path, verbose=False
        )


def test_an_unreachable_target_accepts_nothing_and_says_so(tmp_path: Path) -> None:
    duo = make_duo(target_accuracy=0.99, delta=0.01)
    with pytest.warns(UserWarning, match="nothing is accepted"):
        _, module, trainer = fitted(duo)
    assert duo.calibration.threshold.value == math.inf
    assert float(trainer.callback_metrics["duo/val_coverage"]) == 0
    assert not duo.module(TEST.tensors[0]).accept.any()
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = make_duo(target_accuracy=0.99, delta=0.01)
    make_trainer(other).test(module, loader(TEST), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert other.results["test"]["duo"]["coverage"] == 0
    assert other.calibration.threshold.value == math.inf
    extra = {"lightning_duo.json": ""}
    export_duo(duo.module, tmp_path / "duo.pt2", TEST.tensors[0][:2])
    run = torch.export.load(tmp_path / "duo.pt2", extra_files=extra).module()
    assert not run(TEST.tensors[0])[3].any()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    described = json.loads(extra["lightning_duo.json"], parse_constant=refuse)
    assert float(described["threshold"]) == math.inf


def test_without_a_target_everything_is_accepted() -> None:
    duo = make_duo()
    trainer = fitted(duo).trainer
    assert duo.calibration.threshold is None
    assert duo.module(TEST.tensors[0]).accept.all()
    assert not any("threshold" in name or "coverage" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_accuracy": 95}, "accuracy must be .*fraction.*95"),
        ({"target_accuracy": 0}, r"accuracy must be in \(0, 1\].* 0"),
        ({"delta": 0.05}, "delta .*target_accuracy"),
        ({"target_accuracy": 0.9, "delta": 5}, "delta .*5"),
        ({"target_accuracy": 1.0, "delta": 0.05}, "no number of samples guarantees"),
    ],
)
def test_targets_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_duo(**options)


KINDS = ("risk_coverage", "reliability", "confidence")


class Images(CSVLogger):
    """A logger with log_image, as W&B's has it."""

    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        self.seen = {**getattr(self, "seen", {}), key: images}
        assert step is not None


def test_figures_go_to_the_loggers_that_take_them(tmp_path: Path) -> None:
    board, images = TensorBoardLogger(tmp_path), Images(tmp_path)
    duo = make_duo(figures=True)
    _, module, trainer = fitted(duo, logger=[board, images, CSVLogger(tmp_path)])
    trainer.test(module, loader(TEST), verbose=False)
    events = EventAccumulator(board.log_dir).Reload()
    expected = {f"duo/{stage}_{kind}" for stage in ("val", "test") for kind in KINDS}
    assert set(events.Tags()["images"]) == expected
    shown = events.Images("duo/val_risk_coverage")
    steps = len(loader(TRAIN))
    assert [event.step for event in shown] == [steps, 2 * steps]
    assert (shown[0].width, shown[0].height) > (400, 300)
    assert set(images.seen) == expected
    (picture,) = images.seen["duo/test_reliability"]
    assert picture.shape[2] == 4
    assert picture.std() > 10


def test_figures_without_a_logger_for_them_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"figures=True.*log_image"):
        fitted(make_duo(figures=True), logger=CSVLogger(tmp_path))


def test_figures_are_off_by_default_and_the_base_does_not_notice(tmp_path: Path) -> None:
    def run(**options: object) -> tuple[list, torch.Tensor]:
        L.seed_everything(5, verbose=False)
        logger = TensorBoardLogger(tmp_path, version=str(options))
        module = fitted(make_duo(**options), logger=logger).module
        images = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
        return images, torch.cat([p.flatten() for p in module.parameters()] + [torch.rand(4)])

    (none, plain), (some, drawn) = run(), run(figures=True, target_accuracy=0.8)
    assert not none
    assert some
    assert torch.equal(plain, drawn)


def test_the_report_of_a_run(tmp_path: Path) -> None:
    duo = make_duo(target_accuracy=0.7)
    with pytest.raises(MisconfigurationException, match="nothing to report"):
        duo.write_report(tmp_path / "report.html")
    _, module, trainer = fitted(duo)
    page = duo.write_report(tmp_path / "val.html", resamples=20).read_text()
    assert "Asymmetric duo on the validation set" in page
    assert "also fitted the temperatures" in page
    trainer.test(module, loader(TEST), verbose=False)
    page = duo.write_report(tmp_path / "test.html", resamples=20).read_text()
    page = page.replace("\u00a0", " ")
    assert "Asymmetric duo on the test set" in page
    assert "also fitted the temperatures" not in page
    assert f"{100 * duo.balance:.1f} % to the base" in page
    trainer.validate(module, loader(VAL), verbose=False)
    assert set(duo.predictions) == {"val"}  # the new temperatures were not tested yet
    with pytest.raises(MisconfigurationException, match="'predict'"):
        duo.write_report(tmp_path / "report.html", stage="predict")
    with pytest.raises(ValueError, match="a report is named"):
        duo.write_report(tmp_path / "report.pdf")

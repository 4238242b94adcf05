"""`lightning-duo calibrate` and `report`, run as a user runs them."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_logits
from safetensors.torch import save_file
from subprocesses import MODELS, lightning_duo

from lightning_duo import fit_temperatures, select_threshold
from lightning_duo.calibration import Calibration
from lightning_duo.cli import main
from lightning_duo.evaluation import MEASURES, evaluate, measure

VAL, TEST = make_logits(500, 7, seed=3, margin=3.0), make_logits(400, 7, seed=4, margin=3.0)
VAL_FILES = ("--base", "base.npy", "--sidekick", "val.npz:s", "--targets", "targets.csv")
TEST_FILES = ("--base", "t.safetensors:a", "--sidekick", "t.safetensors:b", "--targets", "y.npy")


def in_a_folder(folder: Path) -> None:
    base, sidekick, targets = (part.numpy() for part in VAL)
    np.save(folder / "base.npy", base)
    np.savez(folder / "val.npz", s=sidekick, other=targets)
    np.savetxt(folder / "targets.csv", targets, fmt="%d")
    save_file({"a": TEST[0], "b": TEST[1]}, folder / "t.safetensors")
    np.save(folder / "y.npy", TEST[2].numpy())
    (folder / "my_models.py").write_text(MODELS)


def test_calibrate_then_report(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    options = ("--target_accuracy", "0.9", "--delta", "0.1", "--report", "val.html")
    models = ("--base_model", "my_models:Base", "--sidekick_model", "resnet10t")
    more = ("--input_size", "3x32x32", "--resamples", "50")
    done = lightning_duo("calibrate", *VAL_FILES, *options, *models, *more)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    fit = fit_temperatures(*VAL)
    found = Calibration.load("temperatures.json")
    assert found.fit == fit
    duo = evaluate(*VAL, fit)["duo"]
    assert found.threshold == select_threshold(duo.confidence, duo.correct, 0.9, delta=0.1)
    printed = " ".join(done.stdout.split())
    for metric in ("nll", "aurc"):
        assert MEASURES[metric].text(measure(duo)[metric]) in printed
    assert f"{100 * found.threshold.coverage:.1f} % of the 500 calibration samples" in printed
    assert "sidekick FLOPs / base FLOPs" in printed
    assert "wrote temperatures.json" in printed
    assert "wrote val.html" in printed
    assert "also fitted the temperatures" in Path("val.html").read_text()

    done = lightning_duo(
        *("report", *TEST_FILES, "--temperatures", "temperatures.json"),
        *("--output", "out/test.html", "--resamples", "50"),
    )
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    duo = evaluate(*TEST, fit)["duo"]
    accepted = duo.confidence >= found.threshold.value
    right = 100 * float(duo.correct[accepted].double().mean())
    assert f"{100 * float(accepted.double().mean()):.1f} %, and {right:.1f} %" in printed
    page = Path("out/test.html").read_text().replace("\u00a0", " ")
    assert "also fitted the temperatures" not in page
    assert f"of which {right:.1f} % are right (95 % interval" in page

    done = lightning_duo(
        *("report", *VAL_FILES, "--temperatures", "temperatures.json", "--resamples", "50")
    )
    assert "these are the samples that temperatures.json was fitted on" in done.stderr
    assert "also fitted the temperatures" in Path("report.html").read_text()


def test_only_the_temperatures_are_written_by_default(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    before = set(tmp_path.iterdir())
    done = lightning_duo("calibrate", *VAL_FILES)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"temperatures.json"}
    state = json.loads((tmp_path / "temperatures.json").read_text())
    assert state["threshold"] is None
    assert "accept" not in done.stdout.lower()


def test_names_with_brackets_are_no_markup(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    np.save(tmp_path / "y[fold].npy", VAL[2].numpy())
    done = lightning_duo("calibrate", *VAL_FILES[:4], "--targets", "y[fold].npy")
    assert done.returncode == 0, done.stderr
    assert "y[fold].npy" in done.stdout


def test_warnings_are_lines_for_a_user(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    shuffled = VAL[1][torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    np.save(tmp_path / "shuffled.npy", shuffled.numpy())
    files = (*VAL_FILES[:2], "--sidekick", "shuffled.npy", *VAL_FILES[4:])
    done = lightning_duo("calibrate", *files, "--target_accuracy", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("lightning-duo: warning: shuffled.npy predicts the targets no")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "changed", "message"),
    [
        ("calibrate", {"--base": "none.npy"}, "there is no file none.npy"),
        ("calibrate", {"--sidekick": "val.npz"}, "name one of them, as in val.npz:other"),
        ("calibrate", {"--targets": "base.npy"}, "one class index per sample"),
        ("calibrate", {"--targets": "y.npy"}, "y.npy holds 400 targets, base.npy 500 rows"),
        ("calibrate", {"--output": "t.txt"}, "--output must be named *.json, got t.txt"),
        ("calibrate", {"--report": "r.pdf"}, "--report must be named *.html, got r.pdf"),
        ("calibrate", {"--delta": "0.1"}, "delta belongs to a target_accuracy"),
        ("calibrate", {"--target_accuracy": "95"}, "accuracy must be a fraction in [0, 1]"),
        ("calibrate", {"--resamples": "0"}, "--resamples must be at least 2, got 0"),
        ("calibrate", {"--base_model": "resnet18"}, "the cost needs all of --base_model"),
        ("report", {"--temperatures": "none.json"}, "there is no file none.json"),
        ("report", {"--temperatures": "my_models.py"}, "my_models.py is no temperatures file"),
    ],
)
def test_mistakes_are_named(
    command: str,
    changed: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_a_folder(tmp_path)
    before = set(tmp_path.iterdir())
    options = dict(zip(VAL_FILES[::2], VAL_FILES[1::2], strict=True)) | changed
    arguments = [part for pair in options.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["lightning-duo", command, *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match=re.escape(message)):
        main()
    assert set(tmp_path.iterdir()) == before


def test_temperatures_of_other_classes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_folder(tmp_path)
    three = make_logits(100, 3, seed=0)
    Calibration(fit_temperatures(*three), 3, 100).save("three.json")
    arguments = [*TEST_FILES, "--temperatures", "three.json"]
    monkeypatch.setattr(sys, "argv", ["lightning-duo", "report", *arguments])
    with pytest.raises(SystemExit, match=r"fitted for 3 classes, t\.safetensors:a has 7"):
        main()


@pytest.mark.parametrize("command", ["calibrate", "report", "export"])
def test_help_of_every_command_describes_every_option(command: str) -> None:
    done = lightning_duo(command, "--help")
    assert done.returncode == 0
    options = re.findall(r"^  (--\w+) [A-Z_]+ *(.*(?:\n {20,}.*)*)", done.stdout, re.MULTILINE)
    assert len(options) >= 5
    assert all(len(" ".join(text.split())) > 25 for _, text in options), options
    if command != "export":
        assert {".npy", ".npz", ".safetensors", ".csv"} <= set(re.findall(r"\.\w+", done.stdout))

"""The command line, run as a user runs it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from subprocesses import MODELS, assert_same, lightning_duo, run_file
from torch import nn

from lightning_duo import DuoModule
from lightning_duo.cli import main
from lightning_duo.export import Format
from lightning_duo.zoo import build_sidekick


def in_a_folder(folder: Path) -> DuoModule:
    """The user's models in my_models.py and a duo of them in duo.safetensors."""
    (folder / "my_models.py").write_text(MODELS)
    models = runpy.run_path(str(folder / "my_models.py"))
    return saved(models["Base"](), models["sidekick"](), folder / "duo.safetensors")


def saved(base: nn.Module, sidekick: nn.Module, path: Path) -> DuoModule:
    duo = DuoModule(base, sidekick, (1.4, 0.6), threshold=0.3).eval()
    duo.save(path)
    return duo


@pytest.mark.parametrize(
    ("output", "format"), [("duo.onnx", "onnx"), ("duo.pt2", "program"), ("duo.pt2", "aoti")]
)
def test_export_of_the_users_models(output: str, format: Format, tmp_path: Path) -> None:
    duo = in_a_folder(tmp_path)
    done = lightning_duo(
        *("export", "duo.safetensors", output),
        *("--base", "my_models:Base", "--sidekick", "my_models:sidekick"),
        *("--input_size", "3x32x32"),
        *(("--format", "aoti") if format == "aoti" else ()),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {output} (")
    x = torch.randn(3, 3, 32, 32)
    results, description = run_file(tmp_path / output, format, {"x": x})
    assert_same(results["x"], duo(x))
    assert description["inputs"][0]["shape"] == [None, 3, 32, 32]


def test_export_of_named_models_in_half_precision(tmp_path: Path) -> None:
    base = build_sidekick("torchvision/squeezenet1_1", 6, pretrained=False)
    sidekick = build_sidekick("vit_tiny_patch16_224", 6, pretrained=False)
    duo = saved(base, sidekick, tmp_path / "duo.safetensors").bfloat16()
    done = lightning_duo(
        *("export", "duo.safetensors", "out/duo.pt2", "--dtype", "bfloat16"),
        *("--base", "torchvision/squeezenet1_1", "--sidekick", "vit_tiny_patch16_224"),
        *("--input_size", "3x224x224"),
    )
    assert done.returncode == 0, done.stderr
    extra = {"lightning_duo.json": ""}
    module = torch.export.load(tmp_path / "out" / "duo.pt2", extra_files=extra).module()
    x = torch.randn(2, 3, 224, 224).bfloat16()
    torch.testing.assert_close(module(x)[0], duo(x).probs, rtol=0, atol=1e-2)
    assert json.loads(extra["lightning_duo.json"])["inputs"][0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--input_size": "3,32,32"}, "3x224x224; got 3,32,32"),
        ({"--input_size": "3x9x9"}, "cannot run example_input"),
        ({"--base": "my_modles:Base"}, "No module named 'my_modles'"),
        ({"--base": "./my_models.py:Base"}, "my_models:Classifier"),
        ({"--base": "my_models:broken"}, "KeyError: 'weights'"),
        ({"--base": "my_models:Bass"}, "no attribute 'Bass'"),
        ({"--base": "my_models:Wide"}, "TypeError: Wide.__init__() missing 1 required"),
        ({"--base": "my_models:number"}, "nn.Module, got int"),
        ({"--base": "resnet10t"}, "base in duo.safetensors"),
        ({"--sidekick": "resnet10t"}, "nn.Sequential(transform, model)"),
        ({"--sidekick": "resnet10tt"}, "resnet10t"),  # did you mean ...
        ({"--sidekick": "my_models:Base"}, "sidekick.0.weight"),
        ({"duo": "none.safetensors"}, "none.safetensors"),
        ({"duo": "my_models.py"}, "my_models.py"),
        ({"duo": "."}, "there is no file ."),
        ({"output": "duo.txt"}, "*.pt2, got duo.txt"),
    ],
)
def test_mistakes_are_named(
    changed: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_folder(tmp_path)
    options = {
        "duo": "duo.safetensors",
        "output": "duo.pt2",
        "--base": "my_models:Base",
        "--sidekick": "my_models:sidekick",
        "--input_size": "3x32x32",
        **changed,
    }
    flags = [part for pair in options.items() if pair[0][0] == "-" for part in pair]
    arguments = ["lightning-duo", "export", options["duo"], options["output"], *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    with pytest.raises(SystemExit, match=re.escape(message)) as stopped:
        main()
    assert str(stopped.value).startswith("lightning-duo: ")
    assert not list(tmp_path.glob("*.pt2"))


def test_help_is_there_at_once_and_names_the_commands() -> None:
    done = lightning_duo("--help")
    assert done.returncode == 0
    assert "export" in done.stdout
    code = "import sys, lightning_duo.cli as c; print('torch' in sys.modules)"
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert light.stdout.strip() == "False"

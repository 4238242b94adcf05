"""`lightning-duo ...`: what a saved duo can be used for without writing Python."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import auto_cli

if TYPE_CHECKING:
    from torch import nn

# Torch and Lightning are imported where they are used: --help should not wait for them.


def export(
    duo: str,
    output: str,
    *,
    base: str,
    sidekick: str,
    input_size: str,
    format: Literal["program", "aoti", "onnx"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
) -> None:
    """Turn a saved duo into one file that runs without this library.

    Args:
        duo: File written by DuoModule.save.
        output: File to write, *.pt2 or *.onnx; it maps a batch of any size to probabilities,
            prediction, confidence and whether to accept it.
        base: What builds the base, since a saved duo holds weights but no code: a timm name
            (resnet34), torchvision/NAME, or MODULE:FUNCTION, a class or function of a Python file
            that gives the model when called without arguments (my_models:Classifier).
        sidekick: What builds the sidekick, likewise; behind a transform it is a function that gives
            nn.Sequential(transform, model).
        input_size: Size of one sample, such as 3x224x224.
        format: program (torch.export), aoti (compiled by AOTInductor for this machine's kind of
            processor) or onnx. By default onnx for *.onnx, else program.
        dtype: Precision of weights and inputs.
        device: Device that the file is to run on.
    """
    import torch

    from lightning_duo.export import export_duo
    from lightning_duo.module import DuoModule

    sizes = input_size.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(
            f"--input_size is the size of one sample, such as 3x224x224; got {input_size}"
        )
    models = [_build(part, spec, duo) for part, spec in (("base", base), ("sidekick", sidekick))]
    module = DuoModule.load(duo, *models).to(device, getattr(torch, dtype))
    example = torch.zeros(2, *map(int, sizes), device=device, dtype=getattr(torch, dtype))
    chosen = format or ("onnx" if Path(output).suffix == ".onnx" else "program")
    path = export_duo(module, output, example, format=chosen)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, {chosen})")


def _build(part: str, spec: str, duo: str) -> "nn.Module":
    """Build the base or sidekick that ``spec`` names, with as many classes as the file has."""
    if ":" in spec:
        return _call(part, spec)
    from lightning_duo.module import read_header
    from lightning_duo.sidekick import build_sidekick, head_parameters

    _, shapes = read_header(duo)
    # The head's last parameter, its bias if it has one, begins with the classes.
    name, _ = head_parameters(build_sidekick(spec, 2, pretrained=False), 2)[-1]
    if f"{part}.{name}" not in shapes:
        raise ValueError(
            f"the {part} in {duo} is not a {spec} alone ({part}.{name} is missing); pass --{part} "
            "MODULE:FUNCTION, a function that builds it as it was, such as "
            "nn.Sequential(transform, model)"
        )
    classes = shapes[f"{part}.{name}"][0]
    return build_sidekick(spec, classes, pretrained=False)


def _call(part: str, spec: str) -> "nn.Module":
    """The model that MODULE:FUNCTION gives; whatever goes wrong in the user's code is named."""
    from torch import nn

    module, function = spec.split(":", 1)
    if not all(name.isidentifier() for name in (*module.split("."), function)):
        raise ValueError(
            f"--{part} {spec}: MODULE:FUNCTION is written as in Python, such as "
            "my_models:Classifier for class Classifier of my_models.py"
        )
    try:
        build = getattr(import_module(module), function)
    except Exception as error:
        raise ValueError(
            f"--{part} {spec} cannot be imported: {type(error).__name__}: {error}; name a class or "
            "function of a Python file here or of an installed package"
        ) from error
    try:
        model = build()
    except Exception as error:
        raise ValueError(
            f"--{part} {spec}, called without arguments, fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--{part} {spec} must give an nn.Module, got {type(model).__name__}")
    return model


def main() -> None:
    """Run the command line."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for MODULE:FUNCTION
    try:
        auto_cli(
            {"export": export},
            as_positional=True,
            prog="lightning-duo",
            description="Put a saved duo (a base classifier and its sidekick) to use.",
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise SystemExit(f"lightning-duo: {error}") from error


if __name__ == "__main__":
    main()

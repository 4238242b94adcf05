"""`lightning-duo export`: a duo as one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_duo.cli.options import build_part, built_in_run, parse_size

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_duo.base import Call
    from lightning_duo.module import DuoModule

# Torch and Lightning are imported where they are used: --help should not wait for them.


def export(
    duo: str,
    output: str | None = None,
    *,
    model: str | None = None,
    base: str | None = None,
    sidekick: str | None = None,
    sidekick_transform: str | None = None,
    logits_fn: str | None = None,
    name: str | None = None,
    weights_only: bool = True,
    input_size: str | None = None,
    format: Literal["program", "aoti", "onnx"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
) -> None:
    """Turn the duo of a run, or a saved one, into one file that runs without this library.

    Args:
        duo: Checkpoint of a run with DuoCallback (*.ckpt), or file written by DuoModule.save.
        output: File to write, *.pt2 or *.onnx; by default it stands beside the duo, with its name.
            It maps a batch of any size to probabilities, prediction, confidence and whether to
            accept it.
        model: Of a checkpoint: MODULE:NAME, the class of your LightningModule if it saves its
            hyperparameters, or a function of a Python file that gives the module when called
            without arguments (my_models:Classifier).
        base: Of a saved duo, which holds weights but no code, what builds the base: a timm name
            (resnet34), torchvision/NAME, or MODULE:FUNCTION.
        sidekick: What builds the sidekick, likewise; behind a transform it is a function that gives
            nn.Sequential(transform, model). Of a checkpoint only if the sidekick was a module of
            your own: the function that made it, or one without arguments that gives it.
        sidekick_transform: Of a checkpoint, if the transform was of your own: MODULE:NAME.
        logits_fn: Of a checkpoint, if the run had one: MODULE:NAME.
        name: Of a checkpoint of a run with several duos: which one.
        weights_only: Of a checkpoint: false reads one with more than tensors and plain types, which
            may run code that it names.
        input_size: Size of one sample of floating-point numbers, such as 3x224x224; a checkpoint
            knows how its samples look. A saved duo of token ids is exported in Python, by
            lightning_duo.export.export_duo.
        format: program (torch.export), aoti (compiled by AOTInductor for this machine's kind of
            processor) or onnx. By default onnx for *.onnx, else program.
        dtype: Precision of weights and inputs.
        device: Device that the file is to run on.
    """
    import torch

    from lightning_duo.export import SUFFIX, export_duo
    from lightning_duo.nested import mapped

    example: Tensor | Call | None
    of_run = Path(duo).suffix == ".ckpt"
    if (base if of_run else model) is not None:
        raise ValueError("--model is of a checkpoint (*.ckpt), --base of a saved duo; pass one")
    if of_run:
        given = {"sidekick": sidekick, "sidekick_transform": sidekick_transform}
        given |= {"logits_fn": logits_fn}
        module, example = _of_run(duo, model, name, weights_only, given)
    else:
        module, example = _saved(duo, base, sidekick, input_size), None
    if input_size is not None:
        example = torch.zeros(2, *parse_size(input_size))
    if example is None:
        raise ValueError(
            f"{duo} does not say what its inputs look like; pass --input_size with the size of one "
            "sample, such as 3x224x224, or export in Python: lightning_duo.export.export_duo"
        )
    kind = getattr(torch, dtype)
    chosen = format or ("onnx" if output and Path(output).suffix == ".onnx" else "program")
    path = export_duo(
        module.to(device, kind),
        output or Path(duo).with_suffix(SUFFIX[chosen]),
        mapped(example, lambda x: x.to(device, kind) if x.is_floating_point() else x.to(device)),
        format=chosen,
    )
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, {chosen})")


def _of_run(
    path: str, model: str | None, name: str | None, weights_only: bool, given: dict[str, str | None]
) -> "tuple[DuoModule, Call | None]":
    """The duo of a checkpoint, and a call that it takes."""
    from lightning_duo.callback import Options, Saved, duo_of_saved

    if model is None:
        raise ValueError(
            f"{path} holds the weights of your module but not its code; pass --model MODULE:NAME, "
            "such as my_models:Classifier for the class Classifier of my_models.py"
        )
    saved = Saved.read(path, name=name, weights_only=weights_only)
    base, options = built_in_run(model, saved, given)
    duo = duo_of_saved(saved, base, Options(**options))
    return duo, saved.example()


def _saved(
    path: str, base: str | None, sidekick: str | None, input_size: str | None
) -> "DuoModule":
    """A saved duo."""
    from lightning_duo.module import DuoModule

    if base is None or sidekick is None or input_size is None:
        raise ValueError(
            f"{path} is no checkpoint (*.ckpt), and of a saved duo export needs --base, --sidekick "
            "and --input_size; a saved duo holds weights but no code"
        )
    parse_size(input_size)
    models: list[Any] = [build_part("base", base, path), build_part("sidekick", sidekick, path)]
    return DuoModule.load(path, *models)

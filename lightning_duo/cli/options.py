"""What options of the command line name: models, sizes, and files to write."""

import inspect
import math
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import nn

    from lightning_duo.callback import Saved

# Torch is imported where it is used: --help should not wait for it.

MOST_NUMBERS = 10**9  # of one sample


def check_outputs(outputs: dict[str, tuple[str | None, str]]) -> None:
    """Refuse files that could not be written, before anything is read and computed.

    Args:
        outputs: For each option the path, if one is given, and the suffix that it must have.

    Raises:
        ValueError: If a path has another suffix, or cannot be written.
    """
    for option, (path, suffix) in outputs.items():
        if path is None:
            continue
        if Path(path).suffix != suffix:
            raise ValueError(f"{option} must be named *{suffix}, got {path}")
        if suffix == ".html":
            from lightning_duo.report import check_matplotlib

            check_matplotlib()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{option} {path} cannot be written: {error}") from error
        existing = Path(path) if Path(path).exists() else Path(path).parent
        if Path(path).is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(
                f"{option} {path} cannot be written: it is a folder, or you lack the right to write"
            )


def check_numbers(numbers: dict[str, tuple[int | None, int]]) -> None:
    """Refuse numbers below the least that they may be; given are both, for each option."""
    for option, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")


def parse_size(text: str) -> list[int]:
    """The size of one sample, written as 3x224x224."""
    sizes = text.split("x")
    numbers = all(size.isdecimal() and int(size) for size in sizes)
    if not numbers or math.prod(map(int, sizes)) > MOST_NUMBERS:
        raise ValueError(
            f"--input_size must be the size of one sample, such as 3x224x224; got {text}"
        )
    return [int(size) for size in sizes]


def is_function(spec: str) -> bool:
    """Whether a model is named as MODULE:FUNCTION; timm knows names such as hf-hub:user/model."""
    from lightning_duo.zoo import REMOTE

    return ":" in spec and not spec.startswith(REMOTE)


def build_model(option: str, spec: str, classes: int) -> "nn.Module":
    """The model that ``spec`` names, with random weights.

    Args:
        option: Name of the option, for messages.
        spec: A timm name, torchvision/NAME, or MODULE:FUNCTION.
        classes: Number of classes of a model given by name.

    Raises:
        ValueError: If there is no such model, or the user's code fails.
    """
    if is_function(spec):
        return _call(option, spec)
    from lightning_duo.zoo import build_sidekick

    return build_sidekick(spec, classes, pretrained=False)


def build_part(part: str, spec: str, duo: str) -> "nn.Module":
    """The base or sidekick of a saved duo, with as many classes as the file has."""
    if is_function(spec):
        return _call(part, spec)
    from lightning_duo.saved import read_header
    from lightning_duo.zoo import build_sidekick, head_parameters

    shapes = read_header(duo).shapes
    # The head's last parameter, its bias if it has one, begins with the classes.
    name, _ = head_parameters(build_sidekick(spec, 2, pretrained=False), 2)[-1]
    if f"{part}.{name}" not in shapes:
        raise ValueError(
            f"the {part} in {duo} is not a {spec} alone ({part}.{name} is missing); pass --{part} "
            "MODULE:FUNCTION, a function that builds the saved module, for example "
            "nn.Sequential(transform, model)"
        )
    return build_model(part, spec, shapes[f"{part}.{name}"][0])


def built_in_run(
    model: str, saved: "Saved", given: dict[str, str | None]
) -> "tuple[LightningModule | type[LightningModule], dict[str, Any]]":
    """The base of a run, and the arguments that its `DuoCallback` had.

    Args:
        model: MODULE:NAME of the base, a class of LightningModule or a function.
        saved: The run's checkpoint.
        given: MODULE:NAME, or None, of each argument that only the user has.
    """
    from lightning.pytorch import LightningModule

    base = named("model", model)
    if not (isinstance(base, type) and issubclass(base, LightningModule)):
        base = called("model", model)
    if not (isinstance(base, LightningModule) or isinstance(base, type)):
        raise ValueError(f"--model {model} must give a LightningModule, got {type(base).__name__}")
    values: dict[str, Any] = {
        option: named(option, spec) if spec and is_function(spec) else spec
        for option, spec in given.items()
    }
    transform, sidekick = values["sidekick_transform"], given["sidekick"]
    if isinstance(transform, type):
        values["sidekick_transform"] = transform()
    if sidekick is not None and is_function(sidekick):
        values["sidekick"] = model_maker("sidekick", sidekick)
    return base, saved.options(**values)


def model_maker(option: str, spec: str) -> Any:
    """The function MODULE:NAME of the number of outputs; or what one without arguments gives."""
    make = named(option, spec)
    return make if inspect.signature(make).parameters else called(option, spec)


def named(option: str, spec: str) -> Any:
    """What MODULE:NAME names, a class or a function.

    Raises:
        ValueError: If there is none.
    """
    module, _, name = spec.rpartition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(
            f"--{option} {spec} is not MODULE:FUNCTION, such as my_models:Classifier for the "
            "class Classifier of my_models.py"
        )
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise ValueError(
            f"--{option} {spec} cannot be imported: {type(error).__name__}: {error}; name a class "
            "or function of a Python file here or of an installed package"
        ) from error


def called(option: str, spec: str) -> Any:
    """What MODULE:NAME gives when it is called without arguments.

    Raises:
        ValueError: If it fails, whatever goes wrong in the user's code.
    """
    make = named(option, spec)
    try:
        return make()
    except Exception as error:
        raise ValueError(
            f"--{option} {spec}, called without arguments, fails: {type(error).__name__}: {error}"
        ) from error


def _call(option: str, spec: str) -> "nn.Module":
    """The model that MODULE:FUNCTION gives."""
    from torch import nn

    model = called(option, spec)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--{option} {spec} must give an nn.Module, got {type(model).__name__}")
    return model

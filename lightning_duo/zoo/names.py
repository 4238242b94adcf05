"""Names of sidekicks, and what is wrong with one."""

import difflib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from torch import nn

SidekickSource: TypeAlias = str | nn.Module | Callable[[int], nn.Module]

TORCHVISION = "torchvision/"
TRANSFORMERS = "transformers/"
REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")


def check_source(source: SidekickSource, weights: str | Path | None) -> None:
    """Find what is wrong with a sidekick before anything is built.

    Args:
        source: As `build_sidekick` takes it.
        weights: Local weights file, or None.

    Raises:
        ValueError: If no model has that name; the message suggests names like it.
        ImportError: If a model of transformers is named and transformers is not installed.
        FileNotFoundError: If the weights file does not exist.
        TypeError: If the source is none of the supported kinds.
    """
    if weights is not None and not isinstance(source, str):
        raise ValueError(
            "weights= goes with a model name; load weights into your own sidekick yourself"
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"the sidekick's weights file {str(weights)!r} does not exist")
    if not isinstance(source, str):
        if not isinstance(source, nn.Module) and not callable(source):
            raise TypeError(
                "sidekick must be a timm name, 'torchvision/<name>', 'transformers/<name>', an "
                f"nn.Module, or a callable num_classes -> nn.Module; got {type(source).__name__}"
            )
        return
    if source.startswith(REMOTE):
        return
    if source.startswith(TRANSFORMERS):
        _check_text(source.removeprefix(TRANSFORMERS))
        return
    if source.startswith(TORCHVISION):
        import torchvision.models as zoo

        # Classifiers only: detection and segmentation models live in named submodules.
        names = [TORCHVISION + name for name in zoo.list_models(module=zoo)]
        known = source in names
    else:
        import timm

        names = timm.list_models()
        known = timm.is_model(source)
        tagged = timm.list_pretrained(f"{source.split('.')[0]}.*") if "." in source else []
        if known and "." in source and source not in tagged:
            raise ValueError(
                f"timm has no weights called {source!r}; it has {', '.join(tagged) or 'none'}"
            )
    if not known:
        if not source.startswith(TORCHVISION):
            import torchvision.models as zoo

            names = [*names, *(TORCHVISION + name for name in zoo.list_models(module=zoo))]
        near = [name for name in names if name.removeprefix(TORCHVISION) == source]
        near = near or difflib.get_close_matches(source.split(".")[0], names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is like it."
        own = f"; a class of yours is {{class_path: {source}}} in a config" if "." in source else ""
        raise ValueError(
            f"no model is called {source!r}: {hint} A model is a timm name (timm.list_models()), "
            "'torchvision/<name>' (torchvision.models.list_models()) or 'transformers/<name or "
            f"local folder>'{own}"
        )


def _check_text(name: str) -> None:
    """Find what is wrong with the name of a model of transformers, as far as no network tells."""
    if find_spec("transformers") is None:
        raise ImportError(
            f"the sidekick 'transformers/{name}' needs transformers, which is not installed; "
            "pip install 'lightning-duo[text]'"
        )
    folder = Path(name)
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not name or (is_path and not folder.is_dir()):
        raise ValueError(
            f"the sidekick 'transformers/{name}' names no model: there is no folder {name!r}; pass "
            "a name of the Hugging Face hub, or a folder that save_pretrained() wrote"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"the folder {name!r} holds no config.json; pass a folder that the model's "
            "save_pretrained() wrote"
        )

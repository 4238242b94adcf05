"""Sidekicks by name: models of timm and torchvision, their weights and their heads."""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

SidekickSource: TypeAlias = str | nn.Module | Callable[[int], nn.Module]

TORCHVISION = "torchvision/"
REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")


def check_source(source: SidekickSource, weights: str | Path | None) -> None:
    """Find what is wrong with a sidekick before anything is built.

    Args:
        source: As `build_sidekick` takes it.
        weights: Local weights file, or None.

    Raises:
        ValueError: If no model has that name; the message suggests names like it.
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
                "sidekick must be a timm name, 'torchvision/<name>', an nn.Module, or a callable "
                f"num_classes -> nn.Module; got {type(source).__name__}"
            )
        return
    if source.startswith(REMOTE):
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
            f"no model is called {source!r}: {hint} A model is a timm name (timm.list_models()) or "
            f"'torchvision/<name>' (torchvision.models.list_models()){own}"
        )


def build_sidekick(
    source: SidekickSource,
    num_classes: int,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
) -> nn.Module:
    """Build a sidekick with ``num_classes`` outputs.

    Args:
        source: A timm name, ``"torchvision/<name>"``, a module, or a callable
            ``num_classes -> nn.Module``.
        num_classes: K, the base's number of classes.
        pretrained: Whether a named model starts from published weights (downloaded or cached).
        weights: Local file to start from instead: safetensors, or a state dict saved by torch. A
            head for another number of classes is left out and starts fresh.

    Returns:
        The module, mapping inputs to logits (N, num_classes). A new head starts from zero.

    Raises:
        ValueError: If the name is unknown or the weights do not fit the architecture.
        RuntimeError: If published weights cannot be had, with the ways out.

    Example:
        >>> sidekick = build_sidekick("resnet18", 10, pretrained=False)
        >>> sidekick.fc.out_features
        10

    Source: Asymmetric Duos, App. A.1 (torchvision and timm as the model zoos).
    """
    check_source(source, weights)
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str):
        model = _call(source, num_classes)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the sidekick callable must return an nn.Module, got {type(model).__name__}"
            )
        return model
    download = pretrained and weights is None
    try:
        model, trained_head = _named(source, num_classes, download)
    except Exception as error:
        if not download:
            raise
        raise RuntimeError(
            f"could not get pretrained weights for the sidekick {source!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Without a network, either pass weights='<local safetensors or state dict>', or "
            "pretrained=False to train it from scratch"
        ) from error
    if weights is not None:
        trained_head = _load_backbone(model, _read_state(Path(weights)), str(weights))
    if not trained_head:
        # A linear probe starts from no opinion; some architectures draw heads so large that a
        # short probe could not undo them.
        for layer in _final_layers(model, num_classes):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    return model


def _call(make: Callable[..., nn.Module], num_classes: int) -> nn.Module:
    """Call with ``num_classes``, by name where that is how it must be given."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # no signature to read
        return make(num_classes)
    kinds = {parameter.kind for parameter in parameters.values()}
    more = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & kinds
    by_name = "num_classes" in parameters or more == {inspect.Parameter.VAR_KEYWORD}
    return make(num_classes=num_classes) if by_name else make(num_classes)


def _named(source: str, num_classes: int, pretrained: bool) -> tuple[nn.Module, bool]:
    """Build a model of a zoo; also whether its head is a trained one."""
    if not source.startswith(TORCHVISION):
        import timm

        model: nn.Module = timm.create_model(source, pretrained, num_classes=num_classes)
        return model, pretrained and data_config(model).get("num_classes") == num_classes
    import torchvision.models as zoo

    name = source.removeprefix(TORCHVISION)
    vision: nn.Module = zoo.get_model(name, num_classes=num_classes)
    if not pretrained:
        return vision, False
    published = zoo.get_model_weights(name).DEFAULT
    return vision, _load_backbone(vision, published.get_state_dict(check_hash=True), source)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and loading other objects can run code; save the "
            f"model's state_dict() instead ({str(error).splitlines()[0]})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds no state dict (name -> tensor); it holds a {type(state).__name__}"
        )
    # Left by DistributedDataParallel and torch.compile.
    return {key.removeprefix("module.").removeprefix("_orig_mod."): v for key, v in state.items()}


def _load_backbone(model: nn.Module, state: dict[str, Tensor], origin: str) -> bool:
    """Load a state dict; only a head for another number of classes may be left out.

    Args:
        model: Module with the wanted head.
        state: State dict of the same architecture.
        origin: Where the state comes from, for the error.

    Returns:
        Whether the head was loaded too.

    Raises:
        ValueError: If anything but the head is missing, left over or of another shape.
    """
    own = model.state_dict()
    differing = {key for key in own if key in state and own[key].shape != state[key].shape}
    head = {name for name, _ in head_parameters(model)}
    # Auxiliary classifiers (googlenet, inception) end in class scores too.
    resized = {key for key in differing if key in head or "aux" in key.lower()}
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    wrong = sorted(differing - resized)
    if missing or unexpected or wrong:
        raise ValueError(
            f"the weights in {origin} do not fit {type(model).__name__}: "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unknown "
            f"{unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in resized}, strict=False)
    return not resized


def _final_layers(model: nn.Module, num_classes: int | None) -> list[nn.Module]:
    """Layers that give the class scores: linear, or convolutions in some architectures.

    Those of timm's classifier, which may hold hidden layers and several heads too; else the last
    of the model.
    """

    def outputs(module: nn.Module) -> list[nn.Module]:
        layers: list[nn.Module] = [
            m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        if num_classes is None:
            return layers[-1:]
        widths = [getattr(m, "out_features", getattr(m, "out_channels", 0)) for m in layers]
        return [m for m, width in zip(layers, widths, strict=True) if width == num_classes]

    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        parts = head if isinstance(head, list | tuple | nn.ModuleList) else [head]
        return [layer for part in parts if isinstance(part, nn.Module) for layer in outputs(part)]
    return outputs(model)[-1:]


def head_parameters(
    model: nn.Module, num_classes: int | None = None
) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the classifier: timm names it; else it is the last linear layer with K outputs.

    Args:
        model: The sidekick.
        num_classes: K; None takes the last linear layer whatever its outputs.
    """
    head: list[nn.Module] = _final_layers(model, num_classes)
    if callable(getattr(model, "get_classifier", None)):
        named = model.get_classifier()  # type: ignore[operator]
        parts = named if isinstance(named, list | tuple | nn.ModuleList) else [named]
        head = [part for part in parts if isinstance(part, nn.Module)]
    wanted = {id(p) for part in head for p in part.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]


def input_size(source: str, model: nn.Module) -> tuple[int, ...] | None:
    """Size (channels, height, width) of the images that a named model was published for.

    Args:
        source: A timm name or ``"torchvision/<name>"``.
        model: The model of that name.

    Returns:
        The size; None if nothing is published for it.
    """
    if not source.startswith(TORCHVISION):
        size = data_config(model).get("input_size")
        return tuple(size) if size else None
    import torchvision.models as zoo

    stated = getattr(model, "image_size", None)  # of vision transformers, which take no other
    if isinstance(stated, int):
        return (3, stated, stated)
    weights = list(zoo.get_model_weights(source.removeprefix(TORCHVISION)))
    crop = getattr(weights[0].transforms(), "crop_size", None) if weights else None
    return (3, crop[0], crop[0]) if crop else None


def data_config(model: nn.Module) -> dict[str, Any]:
    """What timm says of the images a model was trained on; empty for other models."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}

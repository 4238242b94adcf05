"""Sidekicks from a name, a module or a function."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lightning_duo.zoo.heads import final_layers
from lightning_duo.zoo.images import data_config, take_channels
from lightning_duo.zoo.names import TORCHVISION, TRANSFORMERS, SidekickSource, check_source
from lightning_duo.zoo.text import text_model
from lightning_duo.zoo.weights import load_backbone, read_state


def build_sidekick(
    source: SidekickSource,
    num_classes: int,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    in_chans: int = 3,
    per_token: bool = False,
) -> nn.Module:
    """Build a sidekick with ``num_classes`` outputs.

    Args:
        source: A timm name, ``"torchvision/<name>"``, ``"transformers/<name or local folder>"``, a
            module, or a callable ``num_classes -> nn.Module``.
        num_classes: K, the number of outputs that the base has.
        pretrained: Whether a named model starts from published weights (downloaded or cached).
        weights: Local file to start from instead: safetensors, or a state dict saved by torch. A
            head for another number of classes is left out and starts fresh.
        in_chans: Channels C of the images (N, C, H, W) that a model of timm or torchvision takes.
            Filters that were trained on three channels are repeated and scaled for others.
        per_token: Whether a model of transformers classifies every token, or the sequence.

    Returns:
        The module, mapping inputs to logits (N, K), or (N, T, K) for tokens. A new head starts from
        zero.

    Raises:
        ValueError: If the name is unknown, the weights do not fit the architecture, or it cannot
            take ``in_chans`` channels.
        RuntimeError: If published weights cannot be had; it names what to do.
        ImportError: If a model of transformers is named and transformers is not installed.

    Example:
        >>> sidekick = build_sidekick("resnet18", 10, pretrained=False, in_chans=13)
        >>> sidekick.fc.out_features, sidekick.conv1.in_channels
        (10, 13)

    Source: Asymmetric Duos, App. A.1 (torchvision and timm as the model zoos).
    """
    check_source(source, weights)
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str):
        try:
            model = _call(source, num_classes)
        except TypeError as error:
            name = getattr(source, "__name__", type(source).__name__)
            raise TypeError(
                f"the sidekick {name} is called with the number of outputs, {num_classes}, and "
                f"fails ({error}); pass a function num_classes -> nn.Module, or a module"
            ) from error
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the sidekick callable must return an nn.Module, got {type(model).__name__}"
            )
        return model
    download = pretrained and weights is None
    if source.startswith(TRANSFORMERS):
        name = source.removeprefix(TRANSFORMERS)
        model, trained_head = text_model(
            name, num_classes, pretrained=download, per_token=per_token
        )
    else:
        model, trained_head = _image_model(source, num_classes, in_chans, download)
    if weights is not None:
        trained_head = load_backbone(model, read_state(Path(weights)), str(weights))
    if not trained_head:
        # A linear probe starts from no opinion; some architectures draw heads so large that a
        # short probe could not undo them.
        for layer in final_layers(model, num_classes):
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


def _image_model(
    source: str, num_classes: int, in_chans: int, pretrained: bool
) -> tuple[nn.Module, bool]:
    """Build a model of timm or torchvision; also whether its head is a trained one."""
    make = _torchvision_model if source.startswith(TORCHVISION) else _timm_model
    try:
        return make(source, num_classes, in_chans, pretrained)
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"could not get pretrained weights for the sidekick {source!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Without a network, either pass weights='<local safetensors or state dict>', or "
            "pretrained=False to train it from scratch"
        ) from error


def _timm_model(
    source: str, num_classes: int, in_chans: int, pretrained: bool
) -> tuple[nn.Module, bool]:
    import timm

    # Not passed if it is three, since some published models have other channels by themselves.
    channels: dict[str, Any] = {} if in_chans == 3 else {"in_chans": in_chans}
    model: nn.Module = timm.create_model(source, pretrained, num_classes=num_classes, **channels)
    return model, pretrained and data_config(model).get("num_classes") == num_classes


def _torchvision_model(
    source: str, num_classes: int, in_chans: int, pretrained: bool
) -> tuple[nn.Module, bool]:
    import torchvision.models as zoo

    name = source.removeprefix(TORCHVISION)
    model: nn.Module = zoo.get_model(name, num_classes=num_classes)
    take_channels(model, in_chans)
    if not pretrained:
        return model, False
    published = zoo.get_model_weights(name).DEFAULT
    return model, load_backbone(model, published.get_state_dict(check_hash=True), source)

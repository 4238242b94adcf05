"""What models of images say of their inputs."""

from typing import Any

from torch import nn

from lightning_duo.zoo.names import TORCHVISION


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


def take_channels(model: nn.Module, in_chans: int) -> None:
    """Replace the first convolution's filters by new ones for another number of channels.

    Args:
        model: A model of torchvision, whose first convolution takes three channels.
        in_chans: Channels C of the images (N, C, H, W).

    Raises:
        ValueError: If the model has no convolution of three channels.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3))
        >>> take_channels(model, 5)
        >>> model[0].weight.shape
        torch.Size([8, 5, 3, 3])
    """
    if in_chans == 3:
        return
    convolutions = (part for part in model.modules() if isinstance(part, nn.Conv2d))
    first = next((part for part in convolutions if part.in_channels == 3), None)
    if first is None:
        raise ValueError(
            f"{type(model).__name__} has no convolution of 3 channels to replace by one of "
            f"{in_chans}; pass a function num_classes -> nn.Module that makes a model for "
            f"{in_chans} channels"
        )
    first.in_channels = in_chans
    outputs, _, *kernel = first.weight.shape
    first.weight = nn.Parameter(first.weight.new_empty(outputs, in_chans, *kernel))
    first.reset_parameters()

"""Weights files, and what of them goes into a model."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from lightning_duo.zoo.heads import head_parameters


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a weights file: safetensors, or a state dict that torch saved.

    Args:
        path: The file. Prefixes of DistributedDataParallel and torch.compile are left out.

    Raises:
        ValueError: If it holds something else, or more than tensors.
    """
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


def load_backbone(model: nn.Module, state: dict[str, Tensor], origin: str) -> bool:
    """Load a state dict; only a head for another number of classes may be left out.

    The filters of a first convolution that were trained on three channels are carried over to
    another number of channels.

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
    state = {key: _carried_over(value, own.get(key)) for key, value in state.items()}
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


def _carried_over(weight: Tensor, own: Tensor | None) -> Tensor:
    """Filters of three channels for the model's own number of channels; all else as it is.

    Source: timm's `adapt_input_conv`: one channel takes the sum; others take the filters repeated
    and scaled by 3 / channels, so that the response keeps its size.
    """
    if own is None or own.ndim != 4 or weight.ndim != 4 or weight.shape[1] != 3:
        return weight
    if own.shape[1] == 3 or own.shape[:1] + own.shape[2:] != weight.shape[:1] + weight.shape[2:]:
        return weight
    from timm.models import adapt_input_conv

    carried: Tensor = adapt_input_conv(own.shape[1], weight)
    return carried

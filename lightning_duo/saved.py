"""The safetensors file of a duo: its tensors, and a header that says how to use them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_duo.files import whole

FORMATS = ("lightning_duo/1", "lightning_duo/2")
"""Files with more than a mode in their header are /2. Versions that read /1 only would ignore the
rest, and predict something else from the same weights."""


class Header(NamedTuple):
    """What a saved duo says of itself."""

    mode: str
    """Of `DuoModule`."""
    more: dict[str, Any]
    """Its other arguments, but for temperatures and threshold, in types that JSON holds."""
    shapes: dict[str, list[int]]
    """Name of each tensor -> its shape."""


def write_duo(path: str | Path, state: Mapping[str, Any], mode: str, more: dict[str, Any]) -> None:
    """Write a duo's tensors and header; the file appears whole or not at all.

    Raises:
        ValueError: If the state holds something that is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            what = str(value.layout) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} is no dense tensor with values ({what}), and a duo file can hold "
                "nothing else; if a module's get_extra_state returns it, return a tensor "
                "there, or use torch.save(duo.state_dict(), path)"
            )
        own = value.contiguous()
        # The format stores no aliases: tied weights are written once for every name.
        memory = own.untyped_storage().data_ptr()
        tensors[eager_name(name)] = own.clone() if memory in written else own
        written.add(memory)
    header = {"format": FORMATS[bool(more)], "mode": mode}
    header |= {name: json.dumps(value) for name, value in more.items()}
    with whole(path) as file:
        file.touch()
        usual = file.stat().st_mode  # the format's own writer leaves files to their owner alone
        save_file(tensors, file, metadata=header)
        file.chmod(usual)


def read_header(path: str | Path) -> Header:
    """The header of a saved duo, and the shapes of its tensors.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file is no saved duo, or a later version wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        of_run = Path(path).suffix == ".ckpt"
        why = "DuoModule.from_checkpoint reads checkpoints" if of_run else str(error)
        raise ValueError(f"{path} is not a duo saved by DuoModule.save ({why})") from error
    written, mode = metadata.pop("format", ""), metadata.pop("mode", "")
    if not written.startswith("lightning_duo/"):
        raise ValueError(f"{path} is not a duo saved by DuoModule.save: it has no such metadata")
    if written not in FORMATS:
        raise ValueError(
            f"a later version of lightning_duo wrote {path}: its format is {written!r}, and this "
            f"version reads {' and '.join(FORMATS)}; update lightning_duo"
        )
    return Header(mode, {name: json.loads(value) for name, value in metadata.items()}, shapes)


def eager_name(name: str) -> str:
    """Name of a tensor without what `torch.compile` adds to those of the models it wraps."""
    return name.replace("_orig_mod.", "")

"""Arrays of numbers from files."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMATS = ".npy, .npz, .safetensors or .csv"


def read_array(name: str) -> Tensor:
    """Read one array.

    Args:
        name: A file, ``.npy``, ``.npz``, ``.safetensors`` or ``.csv`` (one sample a line, a header
            if any); of several arrays in a file one is named after a colon: ``test.npz:base``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read, or holds no numbers, or a csv file counts its rows.
    """
    path, key = _split(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        )
    readers = {
        ".npy": lambda: np.load(path, allow_pickle=False),
        ".npz": lambda: _one_of(dict(np.load(path, allow_pickle=False)), key, path),
        ".safetensors": lambda: _one_of(_load_safetensors(path), key, path),
        ".csv": lambda: _load_csv(path),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} must be a file of kind {FORMATS}")
    if key is not None and path.suffix in (".npy", ".csv"):
        raise ValueError(f"{name}: {path} holds one array, leave out ':{key}'")
    try:
        array = readers[path.suffix]()
        if isinstance(array, np.ndarray):
            if array.dtype.kind not in "fiub":
                raise ValueError(f"numbers are expected, it holds {array.dtype}")
            array = array.astype(array.dtype.newbyteorder("="))  # as torch wants it
        return torch.as_tensor(array)
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _split(name: str) -> tuple[Path, str | None]:
    """``test.npz:base`` names an array in a file; a path may hold a colon of its own."""
    if ":" in name and not Path(name).exists():
        path, key = name.rsplit(":", 1)
        if Path(path).suffix:
            return Path(path), key
    return Path(name), None


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _load_csv(path: Path) -> Any:
    with path.open(encoding="utf-8-sig") as lines:
        cells = [cell.strip(' "\t\n') for cell in lines.readline().split(",")]
    # pandas numbers the columns of an array without names, and has no name for an index.
    names = cells[1:] if cells[0] == "" else cells
    counted = len(names) > 1 and names in [[str(i + n) for i in range(len(names))] for n in (0, 1)]
    header = counted or any(cell and not _is_number(cell) for cell in cells)
    if counted:
        warnings.warn(
            f"the first line of {path} numbers the columns and is taken for a header", stacklevel=2
        )
    try:
        values = np.loadtxt(
            path, delimiter=",", skiprows=int(header), encoding="utf-8-sig", ndmin=1
        )
    except ValueError as error:
        raise ValueError(f"{error} (lines of numbers with commas between are expected)") from error
    if values.ndim == 2:
        rows = np.arange(len(values))
        counts = len(values) > 2 and any((values[:, 0] == rows + n).all() for n in (0, 1))
        unnamed = header and cells[0] == "" and len(cells) > 1
        if counts or unnamed:
            how = "counts the rows" if counts else "has no name, as an index of rows"
            raise ValueError(f"its first column {how}; leave it out (in pandas: index=False)")
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_of(arrays: dict[str, Any], key: str | None, path: Path) -> Any:
    if key is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if key not in arrays:
        raise KeyError(
            f"{path} holds the arrays {sorted(arrays)}; name one of them, as in "
            f"{path}:{min(arrays, default='logits')}"
        )
    return arrays[key]

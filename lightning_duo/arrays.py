"""Arrays of numbers from files."""

import csv
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMATS = ".npy, .npz, .safetensors or .csv"


def read_array(name: str) -> Tensor:
    """Read one array.

    Args:
        name: A file, ``.npy``, ``.npz``, ``.safetensors`` or ``.csv`` (one sample a line; a
            first line of names is left out); of several arrays in a file one is named after a
            colon: ``test.npz:base``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read, or holds no numbers; or if a csv file has a blank line, a
            comment, lines of unequal length, or a column that counts the rows.
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
    with path.open(encoding="utf-8-sig", newline="") as file:
        cells = [cell.strip() for cell in next(csv.reader(file), [])]
        numbered = _numbers_columns(cells)
        header = numbered or _names_columns(cells)
        if not header:
            file.seek(0)
        try:
            lines = _whole_lines(file, len(cells), 1 + header)
            values = np.loadtxt(lines, delimiter=",", comments=None, ndmin=1)
        except ValueError as error:
            raise ValueError(
                f"{error} (each line must be one sample: numbers with commas between, no comments)"
            ) from error
    if numbered:
        if (values == values.round()).all():
            raise ValueError(
                "its first line may number the columns or be a sample, as all numbers are whole; "
                "give the columns names, or write the sample's numbers as 0.0, 1.0, ..."
            )
        warnings.warn(
            f"the first line of {path} numbers the columns and is taken for a header", stacklevel=2
        )
    if values.ndim == 2:
        rows = np.arange(len(values))
        counts = len(values) > 2 and any((values[:, 0] == rows + n).all() for n in (0, 1))
        if counts or (header and cells[0] == ""):
            how = "counts the rows" if counts else "has no name, as an index of rows"
            raise ValueError(f"its first column {how}; leave it out (in pandas: index=False)")
    return values


def _numbers_columns(cells: list[str]) -> bool:
    """Whether a first line is as pandas writes it for an array without names."""
    names = cells[1:] if cells[:1] == [""] else cells  # an index has no name
    return len(names) > 1 and names in [[str(i + n) for i in range(len(names))] for n in (0, 1)]


def _names_columns(cells: list[str]) -> bool:
    words = [cell for cell in cells if cell and not _is_number(cell.strip("# ").split("#")[0])]
    if words and any(map(_is_number, cells)):
        raise ValueError(
            f"its first line holds numbers and words ({words[0]!r}); if it is a header, give "
            "every column a name, and if it is a sample, write numbers only"
        )
    return bool(words)


def _whole_lines(lines: Iterable[str], width: int, first: int) -> Iterator[str]:
    """Pass lines on, where NumPy would leave out blank ones and so shift the samples."""
    blank = 0
    for number, line in enumerate(lines, first):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise ValueError(f"line {blank} is blank and others follow")
        if (cells := line.count(",") + 1) != width:
            raise ValueError(f"the first line has {width} cells, line {number} has {cells}")
        yield line


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

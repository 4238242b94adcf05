"""Files that appear whole or not at all."""

import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def whole(path: str | Path) -> Generator[Path, None, None]:
    """Give a path to write to; what was written there is moved to ``path`` at the end.

    Files that appear beside it move too, so a format of several files arrives complete. If the
    block raises, nothing is moved and nothing is left behind. Missing folders are made.

    Args:
        path: The file to write.

    Raises:
        IsADirectoryError: If ``path`` is a folder.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with whole(target) as path:
        ...     _ = path.write_text("complete")
        >>> target.read_text()
        'complete'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        # The named file last: where it is there, all that belongs to it is.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)


def plain_float(value: float) -> float | str:
    """The number as JSON can hold it: "Infinity", which ``float`` reads back, is none."""
    return "Infinity" if value == math.inf else value

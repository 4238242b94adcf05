"""A bar that shows how far a set of batches is through."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(data: Iterable[Any], what: str) -> Generator[Iterable[Any], None, None]:
    """The same batches, with a bar on a terminal, which goes away at the end.

    Args:
        data: Batches.
        what: What is done with them, in front of the bar.

    Example:
        >>> with progress_bar([1, 2], "adding") as batches:
        ...     sum(batches)
        3
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield data
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield progress.track(data, description=what)

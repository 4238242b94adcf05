"""What the callback tells its user: every line begins with the callback's name."""

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class Messages:
    """Messages of one callback, on the first process only.

    Args:
        name: Of the callback, if it has one.
    """

    def __init__(self, name: str | None) -> None:
        self.speaker = "DuoCallback" if name is None else f"DuoCallback {name!r}"
        self._topics: set[str] = set()

    def info(self, text: str, *, once: str | None = None) -> None:
        """Log a line; of a topic given as ``once`` the first only."""
        if once is None or self.first(once):
            rank_zero_info(f"{self.speaker}: {text}")

    def warn(self, text: str, *, once: str | None = None) -> None:
        """Warn; of a topic given as ``once`` the first time only."""
        if once is None or self.first(once):
            # Python shows a text once for each place; here a second time is another event.
            globals().pop("__warningregistry__", None)
            rank_zero_warn(f"{self.speaker}: {text}")

    def first(self, topic: str) -> bool:
        """Whether this topic comes up for the first time."""
        new = topic not in self._topics
        self._topics.add(topic)
        return new

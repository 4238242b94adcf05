"""`lightning-duo ...`: calibrate, report, export and bench without writing Python."""

import os
import sys
import warnings
from typing import Any

from jsonargparse import auto_cli

from lightning_duo.cli.bench import bench
from lightning_duo.cli.commands import calibrate, export, report


def _say(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Warnings of this library as a line for a user; others, of its dependencies, not at all."""
    if category is UserWarning:
        print(f"lightning-duo: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    warnings.showwarning = _say  # type: ignore[assignment]
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for MODULE:FUNCTION
    try:
        auto_cli(
            {"calibrate": calibrate, "report": report, "export": export, "bench": bench},
            as_positional=True,
            prog="lightning-duo",
            description=(
                "A duo is a large classifier (base) and a much smaller one (sidekick) whose logits "
                "are added with two fitted weights, for a more honest confidence. calibrate: make "
                "a duo of two trained models. report: judge it on test data. export: turn a saved "
                "duo into one file to deploy. bench: measure what a duo of two models costs here. "
                "'lightning-duo COMMAND --help' says more."
            ),
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise SystemExit(f"lightning-duo: {error}") from error

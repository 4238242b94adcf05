"""`lightning-duo ...`: what can be done without writing Python."""

import os
import sys
import warnings
from typing import Any

from jsonargparse import ArgumentParser, auto_cli
from typing_extensions import override

from lightning_duo.cli.bench import bench
from lightning_duo.cli.commands import calibrate, report
from lightning_duo.cli.export import export
from lightning_duo.cli.runs import evaluate, sidekick


class _Parser(ArgumentParser):
    """Takes a second position where a function need not have one."""

    @override
    def add_function_arguments(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if function is not export:
            return super().add_function_arguments(function, *args, **kwargs)
        kwargs["skip"] = {"output"}
        added = super().add_function_arguments(function, *args, **kwargs)
        text = "File to write, *.pt2 or *.onnx; by default beside the duo, with its name."
        self.add_argument("output", nargs="?", type=str, help=text)
        return added


def _positions_first(words: list[str]) -> list[str]:
    """Words of a command line, the ones that belong to no option before the others.

    A position that may be missing is taken for missing by the parser if options come before it.
    """
    options, positions = [], []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            positions.append(word)
            continue
        options.append(word)
        alone = "=" in word or word in ("-h", "--help") or word.startswith("--print_")
        options += [] if alone else [value for value in [next(rest, None)] if value is not None]
    return [*positions, *options]


def _say(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Warnings of this library as a line for a user; others, of its dependencies, not at all."""
    if category is UserWarning:
        print(f"lightning-duo: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    warnings.showwarning = _say  # type: ignore[assignment]
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for MODULE:FUNCTION
    if sys.argv[1:2] == ["export"]:
        sys.argv = [*sys.argv[:2], *_positions_first(sys.argv[2:])]
    commands = (calibrate, report, sidekick, export, evaluate, bench)
    try:
        if sys.argv[1:2] == ["sidekick"]:
            sidekick()  # its options are LightningCLI's, which takes seconds to import
            return
        auto_cli(
            {command.__name__: command for command in commands},
            as_positional=True,
            parser_class=_Parser,
            prog="lightning-duo",
            description=(
                "A duo is a large classifier (base) and a much smaller one (sidekick) whose logits "
                "are added with two fitted weights, for a more honest confidence. calibrate: make "
                "a duo of two trained models. report: judge it on test data. sidekick: train a "
                "sidekick for a trained base. export: turn a duo into one file to deploy. "
                "evaluate: judge the duo of a run. bench: measure what a duo of two models costs "
                "here. 'lightning-duo COMMAND --help' says more."
            ),
        )
    except Exception as error:
        # The last is Lightning's, which takes seconds to import.
        known = isinstance(error, ValueError | TypeError | RuntimeError | ImportError | OSError)
        if known or type(error).__name__ == "MisconfigurationException":
            raise SystemExit(f"lightning-duo: {error}") from error
        raise

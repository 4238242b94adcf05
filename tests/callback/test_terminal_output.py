"""What a fit leaves on the screen of a terminal, beside either of Lightning's progress bars."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")

PROGRAM = """
import logging
import sys

import lightning as L
import torch
from helpers import Classifier, loader, make_trainer, small_images, small_net
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_duo import DuoCallback

# Lightning's log goes to the terminal past its own bar, and can lose lines there.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Rich(RichProgressBar):
    def configure_columns(self, trainer):
        return super().configure_columns(trainer)[:-1]  # without the speed, whose width varies


class Shown(Classifier):
    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss


def fit(*bar):
    L.seed_everything(0, verbose=False)
    duo = DuoCallback(small_net, probe=0, target_accuracy=0.3)
    trainer = make_trainer(duo, *bar, enable_progress_bar=bool(bar))
    trainer.fit(Shown(), loader(small_images()), loader(small_images(seed=1)))


fit({"rich": Rich, "tqdm": TQDMProgressBar}[sys.argv[1]]())
print("And without a bar:")
fit()
"""


def in_terminal(arguments: list[str], columns: int) -> str:
    """Run Python in a terminal of its own, and return all that it wrote there."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 200, columns, 0, 0))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", *arguments]
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen(command, env=environment, **terminal) as process:
        os.close(theirs)
        written = b""
        while chunk := _read(ours):
            written += chunk
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # on Linux, when nobody holds the other end any more
        return b""


def screen(text: str, columns: int) -> list[str]:
    """The lines that a terminal shows after ``text``, without those that are blank."""
    shown: dict[tuple[int, int], str] = {}
    row = column = 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", text, re.DOTALL):
        if token == "\n":
            row += 1
        elif token == "\r":
            column = 0
        elif not token.startswith("\x1b"):
            if column == columns:
                row, column = row + 1, 0
            shown[row, column] = token
            column += 1
        elif token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token.endswith("K"):
            start = 0 if token == "\x1b[2K" else column
            for x in range(start, columns):
                shown.pop((row, x), None)
        else:
            assert token[-1] in "hlm", f"this terminal does not know {token!r}"
    last = max(row for row, _ in shown)
    lines = ["".join(shown.get((y, x), " ") for x in range(columns)) for y in range(last + 1)]
    return [line.rstrip() for line in lines if line.strip()]


def test_this_terminal_wraps_moves_and_erases() -> None:
    assert screen("one\r\ntwo\x1b[1A\r\x1b[2KONE\r\n\r\n!", 80) == ["ONE", "two", "!"]
    assert screen("abcde\rx\r\n\x1b[1mfg\x1b[0m\r\x1b[K", 3) == ["abc", "xe"]


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("bar", ["rich", "tqdm"])
def test_the_summary_is_whole_and_the_bar_takes_one_line(bar: str, columns: int) -> None:
    shown = screen(in_terminal(["-c", PROGRAM, bar], columns), columns)
    middle = shown.index("And without a bar:")
    summary = shown[middle + 1 :]
    assert "Asymmetric duo on the validation set" in summary[0]
    assert summary[-1].endswith("right.")
    bars = [line for line in shown[:middle] if line not in summary]
    assert [line for line in shown[:middle] if line in summary] == summary
    assert len(bars) == 1, bars
    assert re.match(r"Epoch 1.* 15/15 .*train_loss[:=] ?0\.\d+\]?$", bars[0])

"""Exported duos of every task and call, each run in a fresh process without this library."""

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from subprocesses import assert_same, run_file
from torch import Tensor, nn

from lightning_duo import DuoModule
from lightning_duo.base import Call
from lightning_duo.export import SUFFIX, Format, export_duo
from lightning_duo.tasks import Classes, Labels, Task

FORMATS = ("program", "aoti", "onnx")


class Steps(nn.Module):
    """A recurrent network: an output for each step, and a state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net, self.head = nn.GRU(5, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, state = self.net(x)
        return self.head(steps), state


def linear(*shape: int) -> nn.Module:
    return nn.Linear(5, 1) if not shape else nn.Linear(5, shape[0])


CASES = [
    (linear(4), Labels(), (), (5,), 2),
    (nn.Sequential(linear(), nn.Flatten(0)), Labels(), (), (5,), 2),
    (nn.Sequential(linear(1), nn.Sigmoid()), Labels(probabilities=("base",)), (), (5,), 2),
    (nn.Conv2d(5, 3, 1), Classes(ignore_index=255), (), (5, 4, 6), 3),
    (linear(4), Classes(dim=-1), (), (7, 5), 4),
    (Steps(6), Classes(), (0, "[:, -1]"), (7, 5), 3),
]


def make_duo(base: nn.Module, task: Task, logits_at: tuple, mode: str) -> DuoModule:
    torch.manual_seed(0)
    sidekick = Steps(3) if isinstance(base, Steps) else base
    if getattr(task, "probabilities", ()):
        sidekick = linear(1)
    options = {"mode": mode, "threshold": 0.6, "task": task, "logits_at": logits_at}
    return DuoModule(base, sidekick, (1.5, 0.7), **options).eval()


FILES = [(format, *case) for case in CASES for format in ("program", "onnx")]


@pytest.mark.parametrize(
    ("format", "base", "task", "logits_at", "shape", "classes"), [*FILES, ("aoti", *CASES[3])]
)
def test_files_of_every_task(
    format: Format,
    base: nn.Module,
    task: Task,
    logits_at: tuple,
    shape: tuple,
    classes: int,
    tmp_path: Path,
) -> None:
    duo = make_duo(base, task, logits_at, "uq_only" if task == Labels() else "weighted")
    batches = {f"of_{n}": torch.randn(n, *shape) for n in (1, 5)}
    path = export_duo(duo, tmp_path / f"duo{SUFFIX[format]}", batches["of_1"], format=format)
    results, description = run_file(path, format, batches)
    for name, x in batches.items():
        assert_same(results[name], duo(x))
    assert description["num_classes"] == classes
    assert description["task"]["kind"] == type(task).__name__.lower()


class Text(nn.Module):
    """Takes two arguments, the second by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, *, mask: Tensor, scale: float = 1.0) -> dict:
        return {"logits": scale * self.head((self.embed(input_ids) * mask[..., None]).mean(1))}


def text_batch(count: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(11, (count, 6)), "mask": torch.rand(count, 6)}


@pytest.mark.parametrize("format", FORMATS)
def test_files_take_the_call_of_the_models(format: Format, tmp_path: Path) -> None:
    duo = DuoModule(Text(8), Text(4), (1.5, 0.7)).eval()
    batches = {f"of_{n}": text_batch(n) for n in (1, 5)}
    ids, mask = batches["of_1"].values()
    path = tmp_path / f"duo{SUFFIX[format]}"
    export_duo(duo, path, Call((ids,), {"mask": mask}), format=format)
    results, description = run_file(path, format, batches)
    for name, batch in batches.items():
        assert_same(results[name], duo(**batch))
    assert description["inputs"] == [
        {"shape": [None, 6], "dtype": "int64"},
        {"shape": [None, 6], "dtype": "float32"},
    ]


@pytest.mark.parametrize(
    ("args", "names"),
    [((), ["input_ids", "mask"]), (("input_ids",), ["mask"])],
)
def test_programs_are_called_as_in_the_example(args: tuple, names: list, tmp_path: Path) -> None:
    duo, batch = DuoModule(Text(8), Text(4), (1.5, 0.7)).eval(), text_batch(3)

    def call(batch: dict[str, Tensor]) -> Call:
        return Call(tuple(batch[key] for key in args), {key: batch[key] for key in names})

    path = export_duo(duo, tmp_path / "duo.pt2", call(batch))
    program, other = torch.export.load(path).module(), text_batch(5)
    torch.testing.assert_close(call(other).of(program)[0], duo(**other).probs)


def test_plain_values_stay_as_in_the_example(tmp_path: Path) -> None:
    duo, batch = DuoModule(Text(8), Text(4), (1.5, 0.7)).eval(), text_batch(3)
    example = Call((batch["input_ids"],), {"mask": batch["mask"], "scale": 2.0})
    program = torch.export.load(export_duo(duo, tmp_path / "duo.pt2", example)).module()
    torch.testing.assert_close(example.of(program)[0], duo(**batch, scale=2.0).probs)


def test_tensors_that_no_trace_sees_are_named(tmp_path: Path) -> None:
    class Keyed(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["x"])

    duo, x = DuoModule(Keyed(4, 3), Keyed(4, 3), (1.0, 0.5)), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"tensors in a UserDict.*lists and dicts"):
        export_duo(duo, tmp_path / "duo.pt2", UserDict(x=x))
    export_duo(duo, tmp_path / "duo.pt2", {"x": x})  # as the error says

"""Duos of every task: their numbers, their shapes, and what files keep of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_duo import DuoModule, DuoOutput
from lightning_duo.tasks import Classes, Labels, Task

MODES = ("weighted", "unweighted", "uq_only")


class Part(nn.Module):
    """The base's or the sidekick's part of inputs that are logits already."""

    def __init__(self, index: int, width: int = 1) -> None:
        super().__init__()
        self.index, self.weight = index, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.index] * self.weight


def duo_of_parts(task: Task, mode: str = "weighted") -> DuoModule:
    return DuoModule(Part(0), Part(1), (1.5, 0.7), mode=mode, threshold=0.6, task=task).eval()


def both(*shape: int, seed: int = 0) -> Tensor:
    """Logits of base and sidekick, side by side in dimension 1."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape[0], 2, *shape[1:], generator=generator)


def weighted(x: Tensor, mode: str) -> Tensor:
    first, second = (0.5, 0.5) if mode == "unweighted" else (1.5, 0.7)
    return first * x[:, 0].double() + second * x[:, 1].double()


def check(output: DuoOutput, probs: Tensor, prediction: Tensor, confidence: Tensor) -> None:
    dtypes = [torch.float32, torch.int64, torch.float32, torch.bool]
    assert [part.dtype for part in output] == dtypes
    torch.testing.assert_close(output.probs.double(), probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.prediction, prediction)
    torch.testing.assert_close(output.confidence.double(), confidence, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.accept, output.confidence >= 0.6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (Classes(), (7, 5)),
        (Classes(), (3, 5, 4, 6)),
        (Classes(ignore_index=255), (2, 5, 9)),
        (Classes(dim=-1, ignore_index=-100), (3, 8, 5)),
        (Classes(dim=2), (3, 2, 5, 2)),
    ],
)
def test_classes_against_a_softmax_in_float64(task: Classes, shape: tuple, mode: str) -> None:
    x = both(*shape)
    z = weighted(x, mode)
    probs = z.softmax(task.dim)
    answers = x[:, 0] if mode == "uq_only" else z
    prediction = answers.argmax(task.dim)
    confidence = probs.gather(task.dim, prediction.unsqueeze(task.dim)).squeeze(task.dim)
    duo = duo_of_parts(task, mode)
    check(duo(x), probs, prediction, confidence)
    torch.testing.assert_close(duo.logits(x).double(), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(9,), (9, 1), (6, 4), (2, 3, 4, 5)])
def test_labels_against_a_sigmoid_in_float64(shape: tuple, mode: str) -> None:
    x = both(*shape)
    z = weighted(x, mode)
    probs = torch.sigmoid(z)
    prediction = ((x[:, 0] if mode == "uq_only" else z) > 0).long()
    confidence = torch.where(prediction == 1, probs, 1 - probs)
    if mode != "uq_only":
        torch.testing.assert_close(confidence, torch.maximum(probs, 1 - probs))
    duo = duo_of_parts(Labels(), mode)
    check(duo(x), probs, prediction, confidence)
    torch.testing.assert_close(duo.logits(x).double(), z, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.floats(-80, 80, width=32)] * 2), min_size=1, max_size=6),
)
def test_a_label_is_a_choice_between_two_classes(values: list) -> None:
    x = torch.tensor(values)  # (N, 2): one logit of each model
    found = duo_of_parts(Labels())(x)
    z = weighted(x, "weighted")
    torch.testing.assert_close(found.probs.double(), torch.sigmoid(z), rtol=1e-4, atol=1e-6)
    decided = z.abs() > 1e-4
    assert torch.equal(found.prediction[decided], (z > 0).long()[decided])
    torch.testing.assert_close(
        found.confidence, torch.maximum(found.probs, 1 - found.probs), rtol=0, atol=1e-6
    )
    zeros = torch.zeros_like(x)
    two = duo_of_parts(Classes())(torch.stack([zeros, x], 2))
    torch.testing.assert_close(two.probs[:, 1], found.probs)


def test_a_tie_is_no_label() -> None:
    found = duo_of_parts(Labels())(torch.zeros(2, 2, 3))
    assert found.probs.unique().tolist() == [0.5]
    assert found.prediction.unique().tolist() == [0]


def test_one_of_the_models_may_give_probabilities() -> None:
    x = both(20, 3)
    given = torch.stack([x[:, 0].sigmoid(), x[:, 1]], 1)
    duo = duo_of_parts(Labels(probabilities=("base",)))
    torch.testing.assert_close(duo(given).probs, duo_of_parts(Labels())(x).probs)
    torch.testing.assert_close(duo.logits(given), duo_of_parts(Labels()).logits(x))
    half = DuoModule(nn.Identity(), nn.Sequential(nn.Identity()), (1, 1), task=duo.task)
    assert half.head(given[:, 0], x[:, 1].half()).probs.dtype == torch.float32


@pytest.mark.parametrize("task", [Classes(), Labels()])
def test_rows_that_have_no_softmax_are_not_accepted(task: Task) -> None:
    x = both(3, 4, 2)
    x[1, 0, 2, 1] = torch.nan
    found = duo_of_parts(task)(x)
    place = (1, 1) if isinstance(task, Classes) else (1, 2, 1)
    assert found.confidence.isnan().sum() == 1
    assert found.confidence[place].isnan()
    assert not found.accept[place]


def test_a_single_output_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"K >= 2.*\(4, 1\).*task=Labels\(\)"):
        duo_of_parts(Classes())(both(4, 1))
    assert duo_of_parts(Labels())(both(4, 1)).probs.shape == (4, 1)  # as the error says


@pytest.mark.parametrize(
    ("task", "logits_at", "format"),
    [
        (Classes(), (), "lightning_duo/1"),
        (Labels(), (), "lightning_duo/2"),
        (Labels(probabilities=("base",)), (), "lightning_duo/2"),
        (Classes(dim=-1, ignore_index=-100), (), "lightning_duo/2"),
        (Classes(), ("out", 0, "[:, -1]"), "lightning_duo/2"),
    ],
)
def test_files_keep_the_task_and_the_way_to_the_logits(
    task: Task, logits_at: tuple, format: str, tmp_path: Path
) -> None:
    duo = DuoModule(Part(0), Part(1), (1.5, 0.7), task=task, logits_at=logits_at)
    duo.save(path := tmp_path / "duo.safetensors")
    loaded = DuoModule.load(path, Part(0), Part(1))
    assert (loaded.task, loaded.logits_at) == (task, logits_at)
    with safe_open(path, "pt") as file:  # earlier versions read /1 and refuse all else
        assert file.metadata()["format"] == format


def test_files_of_later_versions_are_refused_as_such(tmp_path: Path) -> None:
    duo_of_parts(Labels()).save(path := tmp_path / "duo.safetensors")
    save_file(load_file(path), path, metadata={"format": "lightning_duo/3", "mode": "weighted"})
    with pytest.raises(ValueError, match=r"later version .*lightning_duo/3.*update"):
        DuoModule.load(path, Part(0), Part(1))


def test_arguments_of_other_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"task .*Labels.*'labels'"):
        DuoModule(Part(0), Part(1), (1.0, 1.0), task="labels")
    with pytest.raises(TypeError, match=r"logits_at .*tuple.*'out'"):
        DuoModule(Part(0), Part(1), (1.0, 1.0), logits_at="out")


def test_the_repr_says_what_is_not_usual() -> None:
    assert "task" not in repr(duo_of_parts(Classes()))
    assert "task=Labels(probabilities=())" in repr(duo_of_parts(Labels()))

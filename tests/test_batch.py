"""What is read from batches and outputs, and what is said where nothing can be."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_duo import base, batch, tasks

X, Y = torch.randn(6, 3, 8, 8), torch.arange(6) % 4


@pytest.mark.parametrize(
    "given",
    [
        (X, Y),
        [X, Y],
        (X, Y, {"id": 3}),
        {"image": X, "label": Y, "path": ["a"] * 6},
        {"pixel_values": X, "labels": Y},
        {"x": X, "y": Y},
    ],
)
def test_usual_batches_are_read(given: object) -> None:
    inputs, targets = batch.read_batch(given)
    assert inputs is X
    assert targets is Y


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"picture": X, "label": Y}, r"\['label', 'picture'\].*batch_fn="),
        ({"image": X, "grade": Y}, r"\['grade', 'image'\].*batch_fn="),
        (X, r"got torch.float32 tensor \(6, 3, 8, 8\).*batch_fn="),
        ((X,), r"tuple of \['torch.float32 tensor \(6, 3, 8, 8\)'\]"),
        ((X, [1, 2, 3]), r"tuple of \['torch.float32 tensor \(6, 3, 8, 8\)', 'list'\]"),
        ("abc", "got str.*batch_fn="),
    ],
)
def test_unreadable_batches_say_what_was_seen(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch.read_batch(given)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (nn.functional.one_hot(Y, 4), r"int64 .*\(6, 4\).*Labels\(\).*multi-label"),
        (Y.float(), r"integer dtype.*float32 .*\(6,\).*targets\.long\(\)"),
        (Y.bool(), r"integer dtype.*torch\.bool"),
        (Y + 1, r"0\.\.3 .*4 classes.*1\.\.4.*batch_fn="),
        (Y - 1, r"0\.\.3 .*4 classes.*-1\.\.2"),
    ],
)
def test_targets_that_are_no_class_indices(targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.check_targets(targets, 4)


def test_logits_are_found_in_mappings_and_objects() -> None:
    logits = torch.zeros(2, 3)
    assert base.as_logits(logits) is logits
    assert base.as_logits({"loss": 1, "logits": logits}) is logits
    assert base.as_logits(SimpleNamespace(logits=logits)) is logits
    assert base.as_logits(torch.zeros(2)) is None
    assert base.as_logits({"loss": logits}) is None
    assert base.as_logits(None) is None
    assert base.as_logits(torch.zeros(2, 3).long()) is None

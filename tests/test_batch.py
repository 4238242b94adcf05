"""What is read from batches, steps and forwards, and what is said where nothing can be."""

from types import SimpleNamespace

import pytest
import torch
from helpers import Classifier
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
        ({"picture": X, "label": Y}, r"keys \['label', 'picture'\].*batch_fn="),
        ({"image": X, "grade": Y}, r"keys \['grade', 'image'\]"),
        (X, r"float32 tensor \(6, 3, 8, 8\)"),
        ((X,), "a tuple of"),
        ((X, [1, 2, 3]), r"a tuple of \['torch.float32 tensor \(6, 3, 8, 8\)', 'list'\]"),
        ("abc", "got str"),
    ],
)
def test_unreadable_batches_say_what_was_seen(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch.read_batch(given)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (nn.functional.one_hot(Y, 4), "one-hot and multi-label targets are not supported"),
        (torch.rand(6, 4), "soft"),
        (Y.float(), "an integer dtype"),
        (Y[:, None], r"squeeze\(1\)"),
        (Y.bool(), "an integer dtype"),
        (Y + 1, r"must be in 0\.\.3 for 4 classes, got 1\.\.4"),
        (Y - 1, r"got -1\.\.2"),
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


class CountedClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_logits_of_a_step_need_no_second_forward() -> None:
    module = CountedClassifier().eval()
    source = base.BaseLogits(None)
    source.watch(module)
    expected = module(X)
    found = source.of(module, None, X, Y)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert module.calls == 1
    returned = torch.randn(6, 4)
    assert torch.equal(source.of(module, {"logits": returned}, X, Y), returned)
    assert module.calls == 1
    source.unwatch()
    module(X)
    assert source.of(module, returned, X, Y) is not None


def test_a_step_without_forward_costs_one_more_and_leaves_the_mode(
    capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    module = CountedClassifier().train()
    statistics = module.net[2].running_mean.clone()
    source = base.BaseLogits(None)
    source.watch(module)
    with caplog.at_level("INFO"):
        source.of(module, None, X, Y)
        source.of(module, None, X, Y)
    assert module.calls == 2
    assert module.training
    assert all(part.training for part in module.modules())
    assert torch.equal(module.net[2].running_mean, statistics)
    assert caplog.text.count("runs once more per batch") == 1


def test_of_several_forwards_the_one_on_the_batch_counts() -> None:
    module = Classifier().eval()
    source = base.BaseLogits(None)
    source.watch(module)
    expected = module(X)
    module(X.flip(-1))
    assert torch.equal(source.of(module, None, X, Y), expected)
    module(X + 0)
    module(X + 1)
    with pytest.raises(ValueError, match=r"called the module's forward 2 times.*logits_fn"):
        source.of(module, None, X, Y)


def test_logits_fn_is_used_in_eval_mode() -> None:
    module = Classifier().train()
    source = base.BaseLogits(lambda m, x: 2 * m.net(x))
    found = source.of(module, None, X, Y)
    assert torch.equal(found, 2 * module.eval().net(X))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(6, 1), "a duo needs logits of K >= 2 classes.*pad"),
        (torch.zeros(6), r"must give floating-point logits \(N, K\)"),
        (torch.zeros(6, 4, 2, 2), r"must give floating-point logits"),
        (torch.zeros(5, 4), r"shape \(6, K\)"),
        ((torch.zeros(6, 4), 0), "got tuple"),
    ],
)
def test_forwards_without_usable_logits_are_named(output: object, message: str) -> None:
    class Odd(Classifier):
        def forward(self, x: Tensor) -> object:
            return output

    with pytest.raises(ValueError, match=message):
        base.BaseLogits(None).of(Odd(), None, X, Y)


def test_probabilities_are_doubted_once() -> None:
    source = base.BaseLogits(None)
    probs = torch.randn(6, 4).softmax(1)
    with pytest.warns(UserWarning, match="probabilities"):
        source.of(Classifier(), probs, X, Y)


def test_a_module_without_forward_is_named() -> None:
    import lightning as L

    class StepsOnly(L.LightningModule):
        pass

    with pytest.raises(ValueError, match="StepsOnly has no forward"):
        base.BaseLogits(None).of(StepsOnly(), None, X, Y)

"""What is read from a batch: inputs and targets, before a step can change them."""

from collections.abc import Callable

import pytest
import torch
from helpers import TRAIN, VAL, Classifier, as_mapping, loader, make_trainer, small_net
from runs import INFO, fitted, make_duo
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.parametrize(
    ("batch_fn", "said"),
    [
        (lambda b: (b[0], b[1], 3), "3 values"),
        (lambda b: None, "NoneType"),
        (lambda b: b[0], "float32 tensor"),
        (lambda b: (b[0], None), "NoneType"),
        (lambda b: (b[0], b[1].tolist()), "tensor of class indices.* list"),
    ],
)
def test_what_batch_fn_returns_is_checked(batch_fn: Callable, said: str) -> None:
    with pytest.raises(ValueError, match=f"batch_fn .*inputs, targets.*{said}"):
        fitted(make_duo(batch_fn=batch_fn))


class Lenient(Classifier):
    """Accepts any targets, so that the callback is the one to complain."""

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return self(batch[0] if isinstance(batch, list) else batch["picture"]).sum()

    def validation_step(self, batch: object, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: one_hot(y, 4), "multi-label"),
        (lambda y: one_hot(y, 4).float() * 2, "soft"),
        (lambda y: y + 1, r"targets .*0\.\.3.*1\.\.4"),
    ],
)
def test_targets_that_cannot_be_used(change: Callable, message: str, stage: str) -> None:
    bad = loader(TensorDataset(VAL.tensors[0], change(VAL.tensors[1])))
    with pytest.raises(ValueError, match=message):
        fitted(None, Lenient(), **{stage: bad})


def test_soft_targets_cannot_be_validated_on() -> None:
    soft = loader(TensorDataset(VAL.tensors[0], one_hot(VAL.tensors[1], 4).float()))
    with pytest.raises(ValueError, match="soft"):
        fitted(None, Lenient(), val=soft)


def test_mappings_of_unknown_keys_are_named() -> None:
    def collate(samples: list) -> dict:
        batch = as_mapping(samples)
        return {"picture": batch["pixel_values"], "grade": batch["labels"]}

    odd = DataLoader(VAL, 16, collate_fn=collate)
    with pytest.raises(ValueError, match=r"\['grade', 'picture'\].*batch_fn"):
        fitted(None, Lenient(), val=odd)


def test_integers_that_could_be_the_targets_are_said(caplog: pytest.LogCaptureFixture) -> None:
    x, y = TRAIN.tensors
    for third, said in ((torch.arange(len(y)), 1), (torch.rand(len(y)), 0)):
        caplog.clear()
        data = loader(TensorDataset(x, y, third))
        with caplog.at_level("INFO", INFO):
            fitted(train=data, val=data)
        assert caplog.text.count("batch_fn=lambda batch: (inputs, targets)") == said


class InPlace(Classifier):
    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        if self.stage == "training":
            batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        if self.stage == "validation":
            batch[0].mul_(0.5)
        super().validation_step(batch, batch_idx)

    test_step = validation_step


@pytest.mark.parametrize("stage", ["training", "validation"])
def test_batches_changed_in_place_are_an_error_with_a_way_out(stage: str) -> None:
    message = r"InPlace .*in place.*\(16, 3, 8, 8\).*batch_fn=lambda.*\.clone\(\)"
    with pytest.raises(ValueError, match=message):
        fitted(None, InPlace(stage))
    duo = make_duo(batch_fn=lambda batch: (batch[0].clone(), batch[1].clone()))
    assert fitted(duo, InPlace(stage)).duo.fit is not None


@pytest.mark.parametrize("run", ["validate", "test"])
def test_batches_changed_in_inference_mode(run: str) -> None:
    """Tensors made there count no changes, so the first batch is compared."""
    trainer = make_trainer(make_duo(small_net()))
    if run == "test":
        trainer.validate(InPlace("none"), loader(VAL), verbose=False)
    with pytest.raises(ValueError, match=r"InPlace .*in place"):
        getattr(trainer, run)(InPlace("validation"), loader(VAL), verbose=False)


def test_changes_behind_autograds_back_are_found() -> None:
    class Hidden(Classifier):
        def training_step(self, batch: list, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            batch[0].data.mul_(0)
            return loss

    with pytest.raises(ValueError, match=r"Hidden .*in place"):
        fitted(module=Hidden())

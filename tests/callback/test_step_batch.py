"""What is read from a batch: inputs and targets, before a step can change them."""

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import TRAIN, VAL, Classifier, as_mapping, loader, make_trainer, small_net
from runs import fitted, make_duo
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.parametrize(
    ("batch_fn", "said"),
    [
        (lambda b: (b[0], b[1], 3), "3 values"),
        (lambda b: None, "NoneType"),
        (lambda b: b[0], "float32 tensor"),
        (lambda b: (b[0], None), "NoneType"),
        (lambda b: (b[0], b[1].tolist()), "tensor of targets, got list"),
    ],
)
def test_what_batch_fn_returns_is_checked(batch_fn: Callable, said: str) -> None:
    with pytest.raises(ValueError, match=f"batch_fn .*inputs, targets.*{said}"):
        fitted(make_duo(batch_fn=batch_fn))


class Lenient(Classifier):
    """Computes no loss, so that the callback is the one to complain."""

    def validation_step(self, batch: object, batch_idx: int) -> None:
        self(batch[0] if isinstance(batch, list) else batch["picture"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: one_hot(y, 4), r"targets \(16, 4\) of torch.int64"),
        (lambda y: one_hot(y, 4).float() * 2, "class probabilities.*several labels.*Labels"),
        (lambda y: y + 1, r"targets .*0\.\.3.*1\.\.4"),
    ],
)
def test_targets_that_cannot_be_used(change: Callable, message: str) -> None:
    bad = loader(TensorDataset(VAL.tensors[0], change(VAL.tensors[1])))
    with pytest.raises(ValueError, match=message):
        make_trainer(make_duo(small_net())).validate(Lenient(), bad, verbose=False)


def test_soft_targets_of_a_validation_are_its_classes_probabilities() -> None:
    x, y = VAL.tensors
    soft = torch.full((len(y), 4), 0.05).scatter(1, y[:, None], 0.85)
    duo, module = make_duo(small_net()), Lenient()
    make_trainer(duo).validate(module, loader(TensorDataset(x, soft)), verbose=False)
    assert torch.equal(duo.predictions["val"]["base"].targets, y)
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(module.eval()(x), soft, reduction="none")
    torch.testing.assert_close(duo.predictions["val"]["base"].nll.float(), each)


def test_mappings_of_unknown_keys_are_named() -> None:
    def collate(samples: list) -> dict:
        batch = as_mapping(samples)
        return {"picture": batch["pixel_values"], "grade": batch["labels"]}

    odd = DataLoader(VAL, 16, collate_fn=collate)
    with pytest.raises(ValueError, match=r"\['grade', 'picture'\].*batch_fn"):
        make_trainer(make_duo(small_net())).validate(Lenient(), odd, verbose=False)


def test_a_second_part_that_is_a_guess_is_warned_of() -> None:
    x, y = VAL.tensors
    for third, said in ((torch.arange(len(y)), True), (torch.rand(len(y)), False)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            data = loader(TensorDataset(x, y, third))
            make_trainer(make_duo(small_net())).validate(Lenient(), data, verbose=False)
        found = [w for w in warned if "second as the targets" in str(w.message)]
        assert bool(found) == said


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
def test_the_sidekick_sees_what_the_base_was_called_with(stage: str) -> None:
    """The step halves the batch in place, and then calls its forward."""
    seen = []

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, x.clone()))
            return self.net(x)

    duo = fitted(make_duo(lambda _: Sees(), probe=0), InPlace(stage)).duo
    first = (TRAIN if stage == "training" else VAL).tensors[0][:16]
    own = [x for training, x in seen if training == (stage == "training")]
    assert any(torch.equal(x, 0.5 * first) for x in own)
    assert not any(torch.equal(x, first) for x in own)
    assert duo.fit is not None


class ChangesLater(Classifier):
    """In its forward, or behind it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(0.5) if self.where == "forward" else x)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.where == "step":
            batch[0].mul_(0.5)


@pytest.mark.parametrize("where", ["forward", "step"])
def test_batches_changed_in_place_are_an_error_with_a_way_out(where: str) -> None:
    message = r"ChangesLater .*in place.*\(16, 3, 8, 8\).*batch_fn=lambda.*\.clone\(\)"
    with pytest.raises(ValueError, match=message):
        fitted(None, ChangesLater(where))
    duo = make_duo(batch_fn=lambda batch: (batch[0].clone(), batch[1].clone()))
    assert fitted(duo, ChangesLater(where)).duo.fit is not None


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

"""What a run tells its user: every remedy that a message names is tried."""

import pytest
import torch
from helpers import NUM_CLASSES, TRAIN, VAL, Classifier, loader, small_net
from runs import INFO, fitted, make_duo
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import TensorDataset


class Prepares(Classifier):
    """Calls its forward with what it makes of the batch, and a flag."""

    def forward(self, x: Tensor, scale: float, *, extra: Tensor | None = None) -> Tensor:
        return scale * self.net(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0] / 2, 3.0, extra=batch[0]), batch[1])

    validation_step = training_step


def test_arguments_are_named_by_where_they_come_from(caplog: pytest.LogCaptureFixture) -> None:
    def net(num_classes: int) -> nn.Module:
        class First(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_net(num_classes)

            def forward(self, x: Tensor, scale: float) -> Tensor:
                return self.net(x)

        return First()

    with caplog.at_level("INFO", INFO):
        fitted(make_duo(net), Prepares(), max_epochs=1)
    said = "base: self(a tensor that the step makes, 3.0, extra=batch[0]); targets: batch[1]"
    assert said in caplog.text


class Labelled(Classifier):
    """Several labels of an image, or one that holds or not."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    validation_step = training_step


@pytest.mark.parametrize(("count", "said"), [(1, "1 output,"), (5, "5 outputs,")])
def test_a_sidekick_has_as_many_outputs_as_the_base(
    count: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = VAL.tensors
    labels = (y[:, None] + torch.arange(count)).remainder(2).float()
    data = loader(TensorDataset(x, labels))
    with caplog.at_level("INFO", INFO):
        fitted(make_duo(), Labelled(count), train=data, val=data, max_epochs=1)
    assert f"sidekick 'small_net' has {said} as many as the base" in caplog.text


def test_a_number_of_classes_that_is_not_the_bases_can_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"4 outputs .* with 7; leave num_classes out"):
        fitted(make_duo(num_classes=7), num_sanity_val_steps=0)
    duo, *_ = fitted(make_duo(), train=loader(TRAIN), max_epochs=1)
    assert duo.module(VAL.tensors[0][:2]).probs.shape == (2, NUM_CLASSES)

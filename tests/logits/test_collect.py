"""Logits from models over batches, for every task."""

import re

import pytest
import torch
from helpers import Classifier, loader, small_images, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_duo.base import Call
from lightning_duo.logits import Logits, collect_logits
from lightning_duo.tasks import Classes, Labels, Task


def test_models_are_run_over_a_loader_and_left_as_they_were() -> None:
    data = small_images(50)
    base, sidekick = Classifier().train(), nn.Sequential(nn.Identity(), small_net()).train()
    sidekick[1].eval()
    found = collect_logits(base, sidekick, loader(data))
    assert base.training
    assert sidekick.training
    assert not sidekick[1].training
    assert not found.base.requires_grad
    x, y = data.tensors
    torch.testing.assert_close(found.base, base.eval()(x))
    torch.testing.assert_close(found.sidekick, sidekick.eval()(x))
    assert torch.equal(found.targets, y)
    by_name = [{"pixel_values": x[:9], "labels": y[:9]}]
    assert len(collect_logits(base, sidekick, by_name).base) == 9
    own = [("id", y[:9], x[:9])]
    again = collect_logits(base, sidekick, own, batch_fn=lambda batch: (batch[2], batch[1]))
    torch.testing.assert_close(again.base, found.base[:9])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1]))], r"2 targets.*\(3, 4\)"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))], r"targets .*0\.\.3.*0\.\.4"),
        ([torch.zeros(2, 3, 8, 8)], r"inputs and targets.*\(2, 3, 8, 8\).*batch_fn="),
    ],
)
def test_batches_that_do_not_fit(batches: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_logits(Classifier(), small_net(), batches)
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(4, 3, 8, 8\)"):
        collect_logits(Classifier(), nn.Identity(), DataLoader(small_images(4), 4))


class Twice(nn.Module):
    """Takes two arguments, and gives its logits first of two."""

    def forward(self, x: Tensor, *, factor: Tensor) -> tuple[Tensor, None]:
        return x * factor, None


def collected(first: Tensor, targets: Tensor, task: Task | None = None, batch: int = 3) -> Logits:
    batches = list(zip(first.split(batch), targets.split(batch), strict=True))
    half = nn.Identity(), nn.Sequential(nn.Identity())
    return collect_logits(*half, batches, task=task)


def test_pixels_tokens_and_labels_become_rows() -> None:
    x, y = torch.randn(7, 4, 3, 2), torch.randint(4, (7, 3, 2))
    y[0, 1] = 255
    found = collected(x, y, Classes(ignore_index=255))
    kept = y.flatten() != 255
    assert torch.equal(found.base, x.movedim(1, -1).reshape(-1, 4)[kept])
    assert torch.equal(found.sidekick, found.base)
    assert torch.equal(found.targets, y.flatten()[kept])
    tokens = collected(x.movedim(1, -1), y, Classes(dim=-1, ignore_index=255))
    for mine, theirs in zip(tokens, found, strict=True):
        assert torch.equal(mine, theirs)
    z, holds = torch.randn(7, 5), torch.rand(7, 5).round()
    holds[2, 3] = torch.nan
    found = collected(z, holds, Labels())
    kept = ~holds.flatten().isnan()
    assert torch.equal(found.base[:, 1] - found.base[:, 0], z.flatten()[kept])
    assert torch.equal(found.targets, holds.flatten()[kept].long())


def test_probabilities_of_some_batches_only() -> None:
    z, holds = torch.randn(6, 2), torch.tensor([[0.0, 1.0]] * 3 + [[0.3, 1.0]] * 3)
    found = collected(z, holds, Labels())
    torch.testing.assert_close(found.targets[:, 1], holds.flatten())
    torch.testing.assert_close(found.targets.sum(1), torch.ones(12))


def test_models_of_several_arguments() -> None:
    x, factor, y = torch.randn(6, 3), torch.rand(6, 3), torch.arange(6) % 3
    batches = [{"x": x, "factor": factor, "y": y}]
    found = collect_logits(
        Twice(),
        Twice(),
        batches,
        batch_fn=lambda batch: (Call((batch["x"],), {"factor": batch["factor"]}), batch["y"]),
        logits_at=(0,),
    )
    assert torch.equal(found.base, x * factor)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(4, 3, 2), torch.zeros(4, 2).long()),
        (torch.zeros(4, 3), torch.zeros(4, 3).long()),
        (torch.zeros(4, 3), torch.full((4, 3), 1 / 3)),
        (torch.zeros(4, 1), torch.zeros(4).long()),
        (torch.zeros(4), torch.zeros(4).long()),
    ],
)
def test_what_may_be_several_tasks_needs_one(logits: Tensor, targets: Tensor) -> None:
    shape = re.escape(str(tuple(logits.shape)))
    with pytest.raises(ValueError, match=rf"logits {shape}.*task=Classes\(\).*task=Labels\(\)"):
        collected(logits, targets, batch=4)
    task = Labels() if logits.shape == targets.shape or logits.ndim < 2 else Classes()
    task = Labels() if logits.shape[1:] == (1,) else task
    assert collected(logits, targets, task).base.ndim == 2  # as the error says

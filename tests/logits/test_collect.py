"""Logits from models over batches, for every task."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Classifier, digest, loader, small_images, small_net
from runs import INFO
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_duo.base import Call
from lightning_duo.logits import CollectedLogits, collect_logits
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


def collected(
    first: Tensor, targets: Tensor, task: Task | None = None, batch: int = 3
) -> CollectedLogits:
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
        (torch.zeros(4, 3), torch.zeros(4, 3).long()),
        (torch.zeros(4, 1), torch.zeros(4).long()),
        (torch.zeros(4), torch.zeros(4).long()),
    ],
)
def test_what_may_be_several_tasks_needs_one(logits: Tensor, targets: Tensor) -> None:
    shape = re.escape(str(tuple(logits.shape)))
    with pytest.raises(ValueError, match=rf"logits {shape}.*task=.*Labels\(\).*task=Classes\("):
        collected(logits, targets, batch=4)
    assert collected(logits, targets, Labels()).base.shape == (logits.numel(), 2)


def test_shapes_that_leave_no_doubt() -> None:
    soft = torch.rand(7, 4).softmax(1)
    found = collected(torch.randn(7, 4), soft)
    assert torch.equal(found.targets, soft)
    pixels, masks = torch.randn(7, 4, 3, 2), torch.randint(4, (7, 3, 2))
    masks[0, 1] = -100
    found = collected(pixels, masks)
    kept = masks.flatten() != -100
    assert torch.equal(found.base, pixels.movedim(1, -1).reshape(-1, 4)[kept])
    tokens = collected(pixels.movedim(1, -1), masks)
    assert tokens.task == Classes(dim=-1)
    assert torch.equal(tokens.base, found.base)


class Restless(nn.Module):
    """Counts its calls in a buffer, and draws from every random stream."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(3)
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(fails: bool) -> None:
    base, sidekick = Restless().train(), Restless().train()
    sidekick.net.eval()
    base.net[1].requires_grad_(False)
    data = DataLoader(small_images(20), 8, shuffle=True)

    def state() -> str:
        parts = [(m.training, m.state_dict()) for model in models for m in model.modules()]
        grads = [(p.requires_grad, p.grad) for model in models for p in model.parameters()]
        streams = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return digest((parts, grads, streams))

    models = base, sidekick
    before = state()
    if fails:
        with pytest.raises(ValueError, match="has no y"):
            collect_logits(*models, data, batch_fn=no_targets)
    else:
        collect_logits(*models, data)
    assert state() == before


def no_targets(batch: Any) -> Any:
    raise ValueError("the batch has no y")


class Stated(nn.Module):
    """States its data config as models of timm do."""

    def __init__(self, size: int, mean: float, std: float, *, fixed: bool = False) -> None:
        super().__init__()
        self.net = nn.Linear(3 * size * size, 4)
        self.pretrained_cfg = {
            "input_size": (3, size, size),
            "fixed_input_size": fixed,
            "mean": (mean,) * 3,
            "std": (std,) * 3,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


def test_images_are_resized_and_normalised_for_the_sidekick(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, sidekick = Stated(8, 0.5, 0.25), Stated(4, 0.4, 0.2, fixed=True)
    data = small_images(30)
    with caplog.at_level("INFO", INFO):
        found = collect_logits(base, sidekick, loader(data))
    assert "collect_logits: the sidekick sees the base's inputs through" in caplog.text
    assert "Resize(size=[4, 4]" in caplog.text
    x = v2.functional.resize(data.tensors[0], [4, 4], antialias=True).double()
    x = (x * 0.25 + 0.5 - 0.4) / 0.2
    want = sidekick.net.double()(x.flatten(1))
    torch.testing.assert_close(found.sidekick.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.base, base(data.tensors[0]))
    # What is in front already is not put there twice.
    sidekick.float()
    again = collect_logits(base, found.fitted_sidekick, loader(data))
    assert torch.equal(again.sidekick, found.sidekick)
    assert again.fitted_sidekick is found.fitted_sidekick


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("places", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_models_wherever_they_are(places: tuple[str, str]) -> None:
    base, sidekick = (small_net().eval().to(place) for place in places)
    data = small_images(30)
    stream = torch.cuda.get_rng_state()
    found = collect_logits(base, sidekick, loader(data))
    for logits, model in ((found.base, base), (found.sidekick, sidekick)):
        torch.testing.assert_close(logits, model.cpu()(data.tensors[0]), rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), stream)

"""A duo of two trained models and a DataLoader, in one call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Classifier, loader, make_trainer, small_images, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback, DuoModule
from lightning_duo.base import Call
from lightning_duo.calibration import calibrate, calibrate_models
from lightning_duo.evaluation import evaluate, measure
from lightning_duo.export import export_duo
from lightning_duo.logits import collect_logits
from lightning_duo.tasks import Classes, Labels

GENERATOR = torch.Generator().manual_seed(0)


class Pixels(nn.Module):
    """Gives logits that tell the colour of each pixel."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.net = nn.Conv2d(4, 4, 1)
        self.net.weight.data = 2 * torch.eye(4)[:, :, None, None]
        self.net.weight.data += noise * torch.randn(4, 4, 1, 1, generator=GENERATOR)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def coloured(count: int) -> tuple[Tensor, Tensor]:
    """Images, and the colour of each of their pixels."""
    y = torch.randint(4, (count, 5, 5), generator=GENERATOR)
    x = torch.randn(count, 4, 5, 5, generator=GENERATOR)
    return x.scatter_add(1, y[:, None], torch.full((count, 1, 5, 5), 2.5)), y


class Small(nn.Module):
    """Takes images of 4 x 4 pixels and another normalisation, and knows no further argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(48, 4)
        self.pretrained_cfg = {
            "input_size": (3, 4, 4),
            "fixed_input_size": True,
            "mean": (0.4,) * 3,
            "std": (0.2,) * 3,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


class Scaled(Classifier):
    """A LightningModule of images and a factor, which it can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return self.net(x if factor is None else factor[:, None, None, None] * x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        z = self(batch["x"], factor=batch["factor"])
        self.log("val_loss", nn.functional.cross_entropy(z, batch["label"]))


class Named(TensorDataset):
    """Items as mappings."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(("x", "factor", "label"), super().__getitem__(index), strict=True))


@pytest.mark.filterwarnings("ignore:.*chance", "ignore:.*are 0", "ignore:.*nothing is accepted")
def test_it_is_the_duo_that_a_run_makes_of_them(tmp_path: Path) -> None:
    base, sidekick = Scaled(), Small()  # the classes are what the base says, more or less
    images = small_images(200).tensors[0]
    factor = torch.rand(200, generator=GENERATOR) + 0.5
    base.eval()
    with torch.no_grad():
        z = base(images, factor) + torch.randn(200, 4, generator=GENERATOR) * 0.3
    data = DataLoader(Named(images, factor, z.argmax(1)), 32)
    duo, calibration = calibrate_models(base, sidekick, data, target_accuracy=0.6)
    callback = DuoCallback(sidekick, summary=False, target_accuracy=0.6)
    make_trainer(callback).validate(base, data, verbose=False)
    assert calibration.temperatures == pytest.approx(callback.fit.temperatures, rel=1e-4)
    assert min(calibration.temperatures) >= 0 < max(calibration.temperatures)
    assert not duo.training
    call = Call((images[:9],), {"factor": factor[:9]})
    for mine, theirs in zip(call.of(duo), call.of(callback.module), strict=True):
        torch.testing.assert_close(mine, theirs)
    # It holds the models themselves, and can be saved and loaded.
    assert duo.base is base
    assert {id(p) for p in sidekick.parameters()} <= {id(p) for p in duo.parameters()}
    duo.save(tmp_path / "duo.safetensors")
    transform = duo.sidekick[0]
    parts = Scaled(), nn.Sequential(transform, Small())
    loaded = DuoModule.load(tmp_path / "duo.safetensors", *parts)
    torch.testing.assert_close(call.of(loaded).probs, call.of(duo).probs)


def test_the_duo_can_be_exported(tmp_path: Path) -> None:
    base, sidekick = Pixels(0.1), Pixels(0.5)
    x, y = coloured(20)
    duo, _ = calibrate_models(base, sidekick, [(x, y)])
    path = export_duo(duo, tmp_path / "duo.pt2", x[:2])
    probs = torch.export.load(path).module()(x[:5])[0]
    torch.testing.assert_close(probs, duo(x[:5]).probs)


def test_pixels_in_one_call_and_in_two() -> None:
    base, sidekick = Pixels(0.1), Pixels(0.5)
    x, y = coloured(30)
    y[:, 0] = 255
    data = loader(TensorDataset(x, y), batch=7)
    task = Classes(ignore_index=255)
    duo, calibration = calibrate_models(base, sidekick, data, target_accuracy=0.9, task=task)
    rows = [model(x)["logits"].movedim(1, -1)[y != 255].detach() for model in (base, sidekick)]
    want = calibrate(*rows, y[y != 255], target_accuracy=0.9)
    assert calibration.temperatures == pytest.approx(want.temperatures, rel=1e-5)
    assert calibration.threshold == pytest.approx(want.threshold, rel=1e-5)
    assert 0 < calibration.threshold.coverage < 1
    a, b = want.temperatures
    mixed = a * base(x)["logits"] + b * sidekick(x)["logits"]
    torch.testing.assert_close(duo(x).probs, mixed.softmax(1), rtol=1e-4, atol=1e-5)
    found = collect_logits(base, sidekick, data, task=task)
    again = calibrate(*found, target_accuracy=0.9, items=found.items, task=found.task)
    assert again == calibration
    # The metrics know which pixels are of one image.
    exact = measure(evaluate(*found, calibration.fit, items=found.items)["duo"])["exact"]
    right = (duo(x).prediction == y) | (y == 255)
    assert exact == pytest.approx(float(right.flatten(1).all(1).float().mean()))
    assert 0 < exact < 1


def test_no_guarantee_of_several_decisions_of_an_item() -> None:
    base, sidekick = Pixels(0.1), Pixels(0.5)
    x, y = coloured(300)
    asked = {"target_accuracy": 0.9, "delta": 0.1}
    with pytest.raises(ValueError, match=r"several rows belong to one item.*leave delta out"):
        calibrate_models(base, sidekick, [(x, y)], **asked)
    found = collect_logits(base, sidekick, [(x, y)])
    with pytest.raises(ValueError, match="several rows belong to one item"):
        calibrate(*found, items=found.items, **asked)
    calibrate_models(base, sidekick, [(x, y)], target_accuracy=0.9)  # the remedies
    one_each = torch.where(torch.arange(25).view(5, 5) == 12, y, -100)
    sure = calibrate_models(base, sidekick, [(x, one_each)], **asked)
    assert sure.calibration.samples == 300
    assert sure.calibration.threshold.accuracy_bound >= 0.9


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_labels(shape: tuple[int, ...]) -> None:
    x = torch.randn(400, 6, generator=GENERATOR)
    outputs = shape[0] if shape else 1
    base, sidekick = nn.Linear(6, outputs), nn.Linear(6, outputs)
    sidekick.weight.data = base.weight.data + 0.1
    if not shape:
        base, sidekick = (nn.Sequential(m, nn.Flatten(0)) for m in (base, sidekick))
    z = base(x).detach()
    y = (torch.rand(z.shape, generator=GENERATOR) < (2 * z).sigmoid()).long()
    data = loader(TensorDataset(x, y))
    with pytest.raises(ValueError, match=r"task=lightning_duo.tasks.Labels\(\)"):
        calibrate_models(base, sidekick, data)
    duo, calibration = calibrate_models(base, sidekick, data, task=Labels())
    assert calibration.task == duo.task == Labels()
    a, b = calibration.temperatures
    torch.testing.assert_close(duo(x).probs, (a * z + b * sidekick(x)).sigmoid().detach())
    assert duo(x).prediction.shape == y.shape


def test_logits_that_lie_deeper() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"out": [self.net(x), None]}

    base, sidekick = Deep().eval(), small_net().eval()
    x, _ = small_images(200).tensors
    y = base(x)["out"][0].argmax(1)
    y[::5] = 0
    duo, _ = calibrate_models(base, sidekick, [(x, y)], logits_at=("out", 0))
    assert duo.logits_at == ("out", 0)
    assert duo(x).probs.shape == (200, 4)


def test_wrong_requests_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"delta .*target_accuracy"):
        calibrate_models(nn.Identity(), nn.Identity(), None, delta=0.1)


def test_models_are_in_eval_mode_after_success_alone() -> None:
    base, sidekick = small_net().train(), small_net().train()
    x, y = small_images(120).tensors
    with pytest.raises(ValueError, match="targets must be"):
        calibrate_models(base, sidekick, [(x, y + 1)])
    assert base.training
    assert sidekick.training
    with torch.no_grad():
        y = base.eval()(x).argmax(1)
    y[::5] = 0
    calibrate_models(base.train(), sidekick, [(x, y)])
    assert not base.training
    assert not sidekick.training


def test_of_large_sets_a_sample_fits() -> None:
    base, sidekick = Pixels(0.1), Pixels(0.5)
    x, y = coloured(300)
    whole = calibrate_models(base, sidekick, [(x, y)])
    some = calibrate_models(base, sidekick, [(x, y)], memory=1_000_000)
    assert 1000 < some.calibration.samples < whole.calibration.samples == 7500
    assert some.calibration.fit.nll == pytest.approx(whole.calibration.fit.nll, rel=0.1)


def test_a_base_behind_a_service_is_any_callable() -> None:
    """A function that answers with lists of numbers, as the client of a service may."""
    base, sidekick = nn.Linear(8, 3), nn.Linear(8, 3)
    x = torch.randn(120, 8)
    batches = [(part, base(part).argmax(1)) for part in x.split(50)]

    def client(inputs: Tensor) -> list:
        return base(inputs).tolist()

    duo, calibration = calibrate_models(client, sidekick, batches)
    same, expected = calibrate_models(base, sidekick, batches)
    assert calibration.temperatures == pytest.approx(expected.temperatures, rel=1e-4)
    torch.testing.assert_close(duo(x).probs, same(x).probs, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"plain callable, .*client.*which no file can hold"):
        export_duo(duo, "duo.pt2", x)

"""What a user may say of a head, and what many decisions of one item change."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import TRAIN, VAL, Classifier, Tiny, make_trainer
from runs import INFO, fitted, make_duo
from strangers.data import points, scenes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback, DuoModule, fit_temperatures

PAGE = Path(__file__).parents[2] / "docs" / "any_run.md"


class TwoHeads(L.LightningModule):
    """Three kinds, and two signs by another head."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.sign = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"kinds": self.kind(x), "signs": self.sign(x)}

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, kind, sign = batch
        out = self(x)
        return cross_entropy(out["kinds"], kind) + cross_entropy(out["signs"], sign)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def two_targets(count: int, seed: int) -> TensorDataset:
    x, y = points(count, seed)
    return TensorDataset(x, y, (x[:, 1] > 0).long())


def linear(outputs: int) -> nn.Module:
    return nn.Linear(8, outputs)


def fit_on(duo: DuoCallback, module: L.LightningModule, train: object, val: object) -> DuoCallback:
    make_trainer(duo).fit(module, DataLoader(train, 16), DataLoader(val, 16))
    return duo


@pytest.mark.parametrize("head", [None, "kind", "sign", "signs"])
def test_of_several_heads_the_named_one_counts(head: str | None) -> None:
    """By its submodule, or by its place in the output; else that of the first loss."""
    module, (x, kind, sign) = TwoHeads(), two_targets(96, 2).tensors
    duo = fit_on(make_duo(linear, head=head), module, two_targets(96, 1), two_targets(96, 2))
    place, targets = ("signs", sign) if head in ("sign", "signs") else ("kinds", kind)
    with torch.no_grad():
        base, sidekick = module(x)[place], duo.sidekick(x)
    want = fit_temperatures(base, sidekick, targets).temperatures
    assert duo.fit.temperatures == pytest.approx(tuple(want), rel=1e-4, abs=1e-6)
    assert duo.module(x).probs.shape == base.shape


def test_a_head_that_is_not_there_is_refused_with_the_names() -> None:
    data = two_targets(96, 1)
    with pytest.raises(ValueError, match=r"no head 'age'; it has .*'kind'.*'sign'"):
        fit_on(make_duo(linear, head="age"), TwoHeads(), data, data)


class Pixels(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def of_each_pixel(outputs: int) -> nn.Module:
    return nn.Conv2d(3, outputs, 1)


def masks(count: int, seed: int, size: tuple[int, int] = (8, 8)) -> TensorDataset:
    return TensorDataset(*scenes(count, seed, size=size))


def test_a_guarantee_is_refused_where_an_item_has_several_decisions() -> None:
    asked = {"target_accuracy": 0.6, "delta": 0.05}
    with pytest.raises(ValueError, match=r"independent decisions.*pixels.*leave delta out"):
        fit_on(make_duo(of_each_pixel, **asked), Pixels(), masks(32, 1), masks(16, 2))
    del asked["delta"]
    duo = fit_on(make_duo(of_each_pixel, **asked), Pixels(), masks(32, 1), masks(16, 2))
    assert duo.module.threshold > 0


def test_more_decisions_than_the_memory_holds_are_sampled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    few = {"fit_memory": 400_000}
    with caplog.at_level("INFO", INFO):
        duo = fit_on(make_duo(of_each_pixel, **few), Pixels(), masks(32, 1), masks(64, 2))
    kept = len(duo.predictions["val"]["duo"].targets)
    assert 500 < kept < 64 * 64
    assert f"{kept:,} of 4,096 decisions fit the temperatures and measure the duo" in caplog.text


def example(name: str) -> dict:
    """What the documentation's code that defines a function of this name defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if f"def {name}(" in block)
    found: dict = {}
    exec(code.split("\ncallback =")[0], found)
    return found


class Windows(Pixels):
    """Trained on small crops; large images are seen window by window."""

    def __init__(self, predict: object) -> None:
        super().__init__()
        self.predict = predict

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.predict(self, batch[0]), batch[1]))


def test_sliding_windows_as_in_the_documentation() -> None:
    sliding = example("sliding")["sliding"]
    module, val = Windows(sliding), masks(8, 2, size=(96, 64))
    duo = make_duo(of_each_pixel, logits_fn=sliding)
    fit_on(duo, module, masks(32, 1, size=(32, 32)), val)
    (x, y), small = val.tensors, of_each_pixel(3)
    small.load_state_dict(duo.sidekick.state_dict())
    with torch.no_grad():
        parts = [
            module(x[:, :, top : top + 32, left : left + 32])
            for top in range(0, 65, 16)
            for left in range(0, 33, 16)
        ]
        total, count = torch.zeros(8, 3, 96, 64), torch.zeros(96, 64)
        for i, (top, left) in enumerate((t, f) for t in range(0, 65, 16) for f in range(0, 33, 16)):
            total[:, :, top : top + 32, left : left + 32] += parts[i]
            count[top : top + 32, left : left + 32] += 1
        base, sidekick = total / count, small(x)
    rows = [z.movedim(1, -1).reshape(-1, 3) for z in (base, sidekick)]
    want = fit_temperatures(*rows, y.reshape(-1)).temperatures
    assert duo.fit.temperatures == pytest.approx(tuple(want), rel=1e-3, abs=1e-6)
    z = sum(t * z for t, z in zip(duo.fit.temperatures, (base, sidekick), strict=True))
    torch.testing.assert_close(duo.module(x).probs, z.softmax(1), atol=1e-5, rtol=1e-4)


class ByName(Classifier):
    """Its forward takes its input by another name than the sidekick's, and a flag."""

    def forward(self, pixel_values: Tensor, flag: bool = True) -> Tensor:
        return self.net(pixel_values)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self(pixel_values=batch[0], flag=True), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_duo_whose_sidekick_takes_less_is_saved_and_loaded(tmp_path: Path) -> None:
    duo = fitted(make_duo(Tiny), ByName()).duo
    x = VAL.tensors[0]
    want = duo.module(pixel_values=x)
    duo.module.save(tmp_path / "duo.safetensors")
    loaded = DuoModule.load(tmp_path / "duo.safetensors", ByName(), Tiny(4))
    torch.testing.assert_close(loaded(x).probs, want.probs)


class Mixes(Classifier):
    """MixUp with a loss for each of the two targets."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, y = batch
        order = torch.arange(len(x)).flip(0)
        z = self(0.7 * x + 0.3 * x[order])
        return 0.7 * cross_entropy(z, y) + 0.3 * cross_entropy(z, y[order])


def test_a_sidekick_learns_from_what_was_before_mixing() -> None:
    seen = []

    class Sees(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x)

    fitted(make_duo(Sees, probe=0), Mixes(), num_sanity_val_steps=0, max_epochs=1)
    batches = TRAIN.tensors[0].split(16)
    assert all(torch.equal(a, b) for a, b in zip(seen, batches, strict=False))

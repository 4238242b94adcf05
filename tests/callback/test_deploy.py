"""Duos of a run that are saved, and loaded by somebody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Classifier, as_mapping
from runs import VAL, fitted, make_duo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoModule, LogitsOf
from lightning_duo.base import Call
from lightning_duo.export import export_duo

MODELS = '''
from torch import nn

class Base(nn.Module):
    """Takes a mask beside its inputs, which it can do without."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(192, 4)

    def forward(self, pixel_values, mask=None):
        x = pixel_values.flatten(1)
        return self.net(x if mask is None else x * mask)

class Sidekick(nn.Module):
    """Knows no mask."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = nn.Linear(192, num_classes)

    def forward(self, pixel_values):
        return self.net(pixel_values.flatten(1))

class Plain(nn.Sequential):
    """Knows no mask, and names its argument otherwise."""

    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(192, num_classes))
'''
SCRIPT = """
import sys, torch
from lightning_duo import DuoModule
from models import Base, {sidekick}
duo = DuoModule.load("duo.safetensors", Base(), {wrapped})
torch.save(duo(**torch.load("call.pt")), "found.pt")
assert "lightning" not in sys.modules
"""


class Masks(Classifier):
    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(**self.call(batch)), batch["labels"])

    validation_step = training_step

    @staticmethod
    def call(batch: dict) -> dict:
        x = batch["pixel_values"]
        return {"pixel_values": x, "mask": torch.linspace(0, 1, 192).expand(len(x), -1)}


@pytest.mark.parametrize(
    ("sidekick", "transformed"), [("Sidekick", False), ("Sidekick", True), ("Plain", False)]
)
def test_a_sidekick_that_takes_less_than_the_base_is_loaded_elsewhere(
    sidekick: str, transformed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    import models

    module = Masks()
    module.net = models.Base()
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
    batches = DataLoader(data, 16, collate_fn=as_mapping)
    options = {"sidekick_transform": nn.Hardtanh()} if transformed else {}
    duo, *_ = fitted(
        make_duo(getattr(models, sidekick), **options),
        module,
        train=batches,
        val=batches,
        max_epochs=1,
    )
    call = Call((), Masks.call(next(iter(batches))))
    duo.module.save(tmp_path / "duo.safetensors")
    torch.save(call.kwargs, tmp_path / "call.pt")
    made = f"{sidekick}(4)"
    wrapped = f"torch.nn.Sequential(torch.nn.Hardtanh(), {made})" if transformed else made
    script = SCRIPT.format(sidekick=sidekick, wrapped=wrapped)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    torch.testing.assert_close(tuple(found), tuple(call.of(duo.module)))


class Prototypes(Classifier):
    """Its steps make the logits of features."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.eye(4))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]) @ self.prototypes, batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def test_a_duo_of_the_step_names_what_can_be_exported(tmp_path: Path) -> None:
    duo, module, _ = fitted(make_duo(), Prototypes())
    x, y = VAL[:3]
    replayed = duo.module
    with pytest.raises(ValueError, match=r"DuoModule\(LogitsOf\(logits_fn, model\)"):
        export_duo(replayed, tmp_path / "duo.pt2", (x, y))
    with pytest.raises(ValueError, match="give it a batch as in validation"):
        replayed(x)
    want = replayed((x, torch.zeros_like(y)))
    base = LogitsOf(lambda model, x: model.net(x) @ model.prototypes, module.eval())
    assert duo.fit is not None
    written = DuoModule(base, duo.sidekick.eval(), duo.fit.temperatures)
    torch.testing.assert_close(written(x).probs, want.probs)
    path = export_duo(written, tmp_path / "duo.pt2", x)
    probs, *_ = torch.export.load(path).module()(x)
    torch.testing.assert_close(probs, want.probs)

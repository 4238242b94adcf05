"""Runs with more decisions than the memory holds: what is measured on all, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from runs import INFO
from subprocesses import two_processes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback
from lightning_duo.evaluation import MEASURES

ITEMS, SIDE, CLASSES = 48, 8, 3
DECISIONS = ITEMS * SIDE * SIDE
FEW = 300_000  # bytes, which hold a fraction of them
RANKED = ("auroc", "fpr95", "aurc", "e_aurc", "augrc", "sac98")


class Pixels(LightningModule):
    """Each pixel shows its class, with noise."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Conv2d(CLASSES, CLASSES, 1)
        self.factor = factor
        self.net.weight.data = torch.eye(CLASSES)[:, :, None, None]
        self.net.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.training_step(batch, number)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def data(channel: int = 1) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (ITEMS, SIDE, SIDE), generator=generator)
    x = nn.functional.one_hot(targets, CLASSES).movedim(-1, channel).float()
    return DataLoader(
        TensorDataset(x + 0.5 * torch.randn(x.shape, generator=generator), targets), 5
    )


def measured(memory: int, processes: int = 1, **options: Any) -> DuoCallback:
    """A duo that validated and tested."""
    torch.manual_seed(0)
    duo = DuoCallback(nn.Conv2d(CLASSES, CLASSES, 1), fit_memory=memory, summary=False, **options)
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer, module = make_trainer(duo, devices=processes, strategy=strategy), Pixels(3.0)
    trainer.validate(module, data(), verbose=False)
    trainer.test(module, data(), verbose=False)
    return duo


def check_same(found: dict[str, float], expected: dict[str, float]) -> None:
    """Equal sums; measures of a ranking may take a few confidences for equal."""
    for name, value in expected.items():
        close = 1e-3 if name in RANKED else 1e-6
        assert found[name] == pytest.approx(value, abs=close, nan_ok=True), name


def test_of_a_sample_base_and_sidekick_are_measured_on_all() -> None:
    few, all_ = measured(FEW), measured(10**9)
    kept = len(few.predictions["val"]["duo"].targets)
    assert 100 < kept < DECISIONS / 2
    assert few.calibration.samples == kept
    for form, row in few.results["val"].items():
        whole = form in ("base", "sidekick")
        assert row["measured"] == (DECISIONS if whole else kept), form
        assert row["seen"] == DECISIONS
        if whole:
            check_same(row, all_.results["val"][form])
        else:  # of a sample, and near what all give
            found = few.predictions["val"][form]
            assert row["accuracy"] == float(found.correct.double().mean())
            assert row["nll"] == pytest.approx(float(found.nll.mean()))
    assert "seen" not in all_.results["val"]["duo"]
    assert few.fit.temperatures.base == pytest.approx(all_.fit.temperatures.base, rel=0.3)


def test_a_test_is_measured_on_all() -> None:
    """With the temperatures of a sample, and what the threshold accepts."""
    few = measured(FEW, target_accuracy=0.9)
    rows, fit = few.results["test"], few.fit
    found = few.predictions["test"]["duo"]
    assert len(found.targets) < DECISIONS
    x, targets = data().dataset.tensors
    base = Pixels(3.0)(x)
    with torch.no_grad():
        sidekick = few.sidekick(x)
        logits = fit.temperatures.base * base + fit.temperatures.sidekick * sidekick
        probs = logits.double().softmax(1)
    confidence, prediction = probs.max(1)
    right, accepted = prediction == targets, confidence >= few.calibration.threshold.value
    expected = {
        "accuracy": float(right.double().mean()),
        "nll": float(cross_entropy(probs.log(), targets)),
        "exact": float(right.flatten(1).all(1).double().mean()),
        "coverage": float(accepted.double().mean()),
        "selective_accuracy": float(right[accepted].double().mean()),
        "measured": DECISIONS,
        "seen": DECISIONS,
    }
    assert {name: rows["duo"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert all({*MEASURES, "seen"} <= row.keys() for row in rows.values())


@pytest.mark.parametrize("memory", [10_000, FEW])
def test_what_is_kept_stays_within_the_memory(memory: int) -> None:
    duo = measured(memory)
    for stage in ("val", "test"):
        storages = {
            column.untyped_storage().data_ptr(): column.untyped_storage().nbytes()
            for found in duo.predictions[stage].values()
            for column in vars(found).values()
            if isinstance(column, Tensor)
        }
        assert 0 < sum(storages.values()) < memory


def test_table_report_and_checkpoint_say_what_the_fit_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    duo = DuoCallback(nn.Conv2d(CLASSES, CLASSES, 1), fit_memory=FEW, probe=0)
    trainer, module = make_trainer(duo, max_epochs=1), Pixels()
    with caplog.at_level("INFO", INFO):
        trainer.fit(module, data(), data())
    kept = duo.calibration.samples
    shares = f"{kept:,} of {DECISIONS:,} decisions"
    assert f"{shares} fit the temperatures and measure the duo; base and sidekick" in caplog.text
    shown = " ".join(capsys.readouterr().out.split())
    assert f"The duo is measured and its temperatures are fitted on {shares}" in shown
    assert "Base and sidekick are measured on all." in shown
    page = duo.write_report(tmp_path / "report.html", resamples=10).read_text("utf-8")
    assert f"a random sample: {shares}" in page
    assert f"The temperatures were fitted on {shares}" in page

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = DuoCallback(nn.Conv2d(CLASSES, CLASSES, 1), summary=False)
    tester = make_trainer(again)
    tester.test(Pixels(), data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert again.results["val"]["duo"]["measured"] == kept
    page = again.write_report(tmp_path / "test.html", resamples=10).read_text("utf-8")
    assert f"The temperatures were fitted on {shares}" in page
    assert "a random sample" not in page  # of the test all is kept


def test_nothing_is_said_where_all_is_kept(tmp_path: Path) -> None:
    duo = measured(10**9)
    page = duo.write_report(tmp_path / "report.html", resamples=10).read_text("utf-8")
    assert "random sample" not in page
    assert not {"measured", "seen"} & {*duo.results["val"]["duo"], *duo.results["test"]["base"]}


class Flat(Pixels):
    """One decision of each item."""

    def __init__(self) -> None:
        super().__init__(torch.nan)
        self.net = nn.Linear(CLASSES, CLASSES)


@pytest.mark.parametrize("several", [True, False])
def test_where_nothing_is_fitted_only_what_would_be_measured_is_nan(several: bool) -> None:
    """`exact` is measured where items have several decisions."""
    images = data()
    x, targets = images.dataset.tensors
    flat = DataLoader(TensorDataset(x[:, :, 0, 0], targets[:, 0, 0]), 5)
    sidekick = nn.Conv2d(CLASSES, CLASSES, 1) if several else nn.Linear(CLASSES, CLASSES)
    duo = DuoCallback(sidekick, metrics="all", summary=False, probe=0)
    trainer = make_trainer(duo, max_epochs=1, num_sanity_val_steps=0)
    module = Pixels(torch.nan) if several else Flat()
    loader = images if several else flat
    trainer.fit(module, loader, loader)
    assert torch.isnan(trainer.callback_metrics["duo/val_nll"])
    assert ("duo/val_exact" in trainer.callback_metrics) == several


def in_a_process(processes: int) -> dict[str, Any]:
    duo = measured(FEW, processes, target_accuracy=0.9)
    return {"temperatures": [*duo.fit.temperatures], "results": duo.results}


def test_two_processes_measure_all_as_one_does(tmp_path: Path) -> None:
    first, second = two_processes("test_many_rows.in_a_process(2)", tmp_path, port=19)
    alone = in_a_process(1)
    assert first == second
    assert first["temperatures"] == pytest.approx(alone["temperatures"], rel=1e-4)
    for stage, forms in alone["results"].items():
        for form, values in forms.items():
            assert first["results"][stage][form] == pytest.approx(
                values, rel=1e-4, abs=1e-4, nan_ok=True
            ), (stage, form)

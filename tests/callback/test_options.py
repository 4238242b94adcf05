"""What is logged and shown, as the callback's options ask for it."""

import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import VAL, Classifier, loader, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import fitted, make_duo
from torch import Tensor, nn

from lightning_duo import DuoCallback
from lightning_duo.evaluation import MEASURES

FORMS = ("base", "base_scaled", "sidekick", "duo")


def logged(duo: DuoCallback) -> set[str]:
    _, module, trainer = fitted(duo)
    names = {name for name in trainer.callback_metrics if "/val_" in name}
    (tested,) = trainer.test(module, loader(VAL), verbose=False)
    at_test = {name.replace("test", "val") for name in tested if "/test_" in name}
    assert at_test == names
    return names


@pytest.mark.parametrize(
    ("asked", "metrics"),
    [
        ("default", ("accuracy", "nll", "brier", "ece", "aurc", "sac98")),
        (("f1", "nll"), ("nll", "f1")),
        ([], ()),
        ("all", tuple(MEASURES)),
    ],
)
def test_what_is_asked_for_is_logged_and_results_hold_all(asked: object, metrics: tuple) -> None:
    duo = make_duo() if asked == "default" else make_duo(metrics=asked)
    measured = {name for name, measure in MEASURES.items() if not measure.needs_items}
    shown = measured & set(metrics)
    assert logged(duo) == {f"{form}/val_{metric}" for form in FORMS for metric in shown}
    assert set(duo.results["val"]["duo"]) == measured
    assert set(duo.options.metrics) == set(metrics)


@pytest.mark.parametrize("asked", ["nll", ("nll", "nlll"), ("NLL",), None])
def test_unknown_metrics_are_refused_with_the_names(asked: object) -> None:
    with pytest.raises(ValueError, match=r'metrics must be "all" or names among accuracy, f1'):
        make_duo(metrics=asked)


class Plateau(Classifier):
    monitor = "duo/val_augrc"

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor},
        }


@pytest.mark.parametrize(
    ("watch", "who"),
    [
        (lambda path: EarlyStopping("small/duo/val_augrc"), "EarlyStopping"),
        (lambda path: ModelCheckpoint(path, monitor="small/duo/val_augrc"), "ModelCheckpoint"),
        (None, "a scheduler"),
    ],
)
def test_a_monitored_name_that_is_not_logged_is_refused_with_the_remedy(
    watch: Callable | None, who: str, tmp_path: Path
) -> None:
    module = Classifier()
    if watch is None:
        module = Plateau()
        module.monitor = "small/duo/val_augrc"
    beside = [] if watch is None else [watch(tmp_path)]
    message = f"{who} monitors 'small/duo/val_augrc', which is not logged; .*metrics=.*'augrc'"
    with pytest.raises(MisconfigurationException, match=message):
        fitted(make_duo(name="small"), module, *beside, enable_checkpointing=True)
    beside = [] if watch is None else [watch(tmp_path)]
    remedied = make_duo(name="small", metrics=("nll", "augrc"))
    fitted(remedied, module, *beside, enable_checkpointing=True)
    assert remedied.fit is not None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("duo/val_acc", "did you mean 'duo/val_accuracy'"),
        ("duo/test_aurc", "did you mean 'duo/val_aurc'"),
        ("duo/threshold", "target_accuracy="),
    ],
)
def test_monitored_names_that_nobody_logs_are_refused(name: str, remedy: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"{name!r}, which is not logged; .*{remedy}"
    ):
        fitted(None, None, EarlyStopping(name))


class Unusual(L.Callback):
    def __init__(self) -> None:
        self.monitor = ["val_loss"]


def test_monitored_names_of_others_are_not_touched(tmp_path: Path) -> None:
    fitted(make_duo(name="small"), Classifier(), EarlyStopping("val_loss"), Unusual())
    fitted(make_duo(name="small"), Classifier(), EarlyStopping("small/base/val_nll"))
    fitted(make_duo(), None, make_duo(name="duo"), EarlyStopping("duo/duo/val_nll"))


# ---- what is shown ----


def test_repr_says_what_a_person_wants_to_see() -> None:
    duo = make_duo(name="small", target_accuracy=0.3)
    assert repr(duo) == "DuoCallback(sidekick='small_net', name='small', not fitted)"
    fitted(duo, Classifier())
    base, sidekick = duo.fit.temperatures
    temperatures = f"temperatures=({base:.4g}, {sidekick:.4g})"
    threshold = f"threshold={duo.calibration.threshold.value:.4g}"
    shown = repr(duo)
    for part in ("base=Classifier", temperatures, threshold, "fitted_at_step=14"):
        assert part in shown
    shown = repr(duo.module)
    for part in ("base=Classifier (", "sidekick=Sequential (", "weighted", temperatures, threshold):
        assert part in shown
    assert "\n" not in shown


class ReturnsMapping(Classifier):
    def forward(self, x: Tensor) -> dict:
        return {"logits": self.net(x), "features": x.flatten(1)}

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0])["logits"], batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self(batch[0])


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> dict:
        return {"logits": self.net(x)}


def test_the_models_of_a_duo_return_what_they_themselves_return() -> None:
    module, duo = ReturnsMapping(), make_duo(Named())
    fitted(duo, module)
    images = VAL.tensors[0][:3]
    base, sidekick = duo.module.base(images), duo.module.sidekick(images)
    assert set(base) == {"logits", "features"}
    torch.testing.assert_close(base["logits"], module.eval()(images)["logits"])
    assert set(sidekick) == {"logits"}


def test_options_are_what_was_asked_and_frozen() -> None:
    duo = make_duo(target_accuracy=0.9, metrics="all")
    assert duo.options.target_accuracy == 0.9
    assert duo.options.metrics == tuple(MEASURES)
    with pytest.raises(AttributeError):
        duo.options.target_accuracy = 0.8


def test_a_logger_without_figures_is_warned_of_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fitted(make_duo(figures=True), Classifier(), logger=CSVLogger(tmp_path), max_epochs=3)
    said = [w for w in record if "takes figures" in str(w.message)]
    assert len(said) == 1

"""Which fit goes on with a sidekick and which starts a new one; what is logged; what is shown."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, digest, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_duo import DuoCallback
from lightning_duo.evaluation import MEASURES

TRAIN, VAL = small_images(96, 1), small_images(80, 2)
FORMS = ("base", "base_scaled", "sidekick", "duo")


def fast_adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_duo(sidekick: object = small_net, **options: object) -> DuoCallback:
    return DuoCallback(sidekick, **{"optimizer": fast_adam, "summary": False, **options})


def fit(duo: DuoCallback, module: L.LightningModule, *beside: L.Callback, **options: object) -> str:
    """Train from the same seed; the hash of the sidekick that comes of it."""
    L.seed_everything(3, verbose=False)
    trainer = make_trainer(duo, *beside, **options)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    return digest(duo.sidekick.state_dict())


def draw_anew(module: nn.Module, seed: int) -> None:
    """New random weights, as a fold of a cross-validation begins with."""
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


# ---- the folds of a cross-validation ----


@pytest.mark.parametrize("given", [lambda: small_net, small_net, lazy], ids=["call", "net", "lazy"])
@pytest.mark.parametrize("between", ["nothing", "test", "validate a checkpoint"])
def test_folds_end_as_with_a_callback_of_their_own(
    given: Callable, between: str, tmp_path: Path
) -> None:
    """The same module with new weights in every fold, the same callback in every fold."""
    torch.manual_seed(1)
    source = given()
    module, duo = Classifier(), make_duo(source)
    for fold in range(3):
        draw_anew(module, fold)
        own = fit(make_duo(copy.deepcopy(source)), copy.deepcopy(module))
        assert fit(duo, module) == own
        trainer = make_trainer(duo)
        if between == "test":
            trainer.test(module, loader(VAL), verbose=False)
        elif between != "nothing":
            trainer.validate(module, loader(VAL), verbose=False)
            trainer.save_checkpoint(tmp_path / "fold.ckpt")
            trainer.validate(module, loader(VAL), ckpt_path=tmp_path / "fold.ckpt", verbose=False)


def test_a_trained_sidekick_that_is_dropped_is_named_with_the_remedy() -> None:
    module, duo = Classifier(), make_duo()
    fit(duo, module)
    draw_anew(module, 1)
    with pytest.warns(UserWarning, match="new run: .*sidekick starts again; .*pass ckpt_path"):
        fit(duo, module)


def test_the_remedy_goes_on_with_the_pair(tmp_path: Path) -> None:
    module, duo = Classifier(), make_duo()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trained = fit(duo, module, keep, enable_checkpointing=True)
    draw_anew(module, 1)
    started = []

    class Look(L.Callback):
        def on_train_start(self, *_: object) -> None:
            started.append(digest(duo.sidekick.state_dict()))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        make_trainer(duo, Look(), max_epochs=3).fit(
            module, loader(TRAIN), loader(VAL), ckpt_path=tmp_path / "last.ckpt"
        )
    assert started == [trained]


def sidekick_at_start(duo: DuoCallback, module: L.LightningModule) -> tuple[nn.Module, str]:
    """The sidekick that the next fit starts with, before its first batch."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            if not seen:
                seen.append((duo.sidekick, digest(duo.sidekick.state_dict())))

    fit(duo, module, Look())
    return seen[0]


def test_a_fit_of_the_base_as_it_was_left_goes_on() -> None:
    module, duo = Classifier(), make_duo()
    trained = fit(duo, module)
    model = duo.sidekick
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        assert sidekick_at_start(duo, module) == (model, trained)


def test_a_fit_after_validate_of_a_checkpoint_goes_on_with_that_pair(tmp_path: Path) -> None:
    module, duo = Classifier(), make_duo()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(duo, module, keep, enable_checkpointing=True, max_epochs=3)
    path = tmp_path / "epoch=0.ckpt"
    make_trainer(duo).validate(module, loader(VAL), ckpt_path=path, verbose=False)
    paired = digest(duo.sidekick.state_dict())
    assert sidekick_at_start(duo, module) == (duo.sidekick, paired)


def test_validate_and_test_never_drop_a_sidekick() -> None:
    module, duo = Classifier(), make_duo()
    trained = fit(duo, module)
    other = Classifier()
    with pytest.warns(UserWarning, match="changed since"):
        make_trainer(duo).test(other, loader(VAL), verbose=False)
    make_trainer(duo).validate(other, loader(VAL), verbose=False)
    assert digest(duo.sidekick.state_dict()) == trained
    # Another module was measured in between, but this one is as it was left.
    assert sidekick_at_start(duo, module) == (duo.sidekick, trained)


def test_a_changed_base_that_is_validated_keeps_its_sidekick_and_says_so() -> None:
    module, duo = Classifier(), make_duo()
    trained = fit(duo, module)
    draw_anew(module, 1)
    with pytest.warns(UserWarning, match="sidekick is kept.*make a new DuoCallback"):
        make_trainer(duo).validate(module, loader(VAL), verbose=False)
    assert digest(duo.sidekick.state_dict()) == trained


def test_a_fit_that_fails_before_it_begins_leaves_no_mark() -> None:
    """A Trainer's mistake between two folds must not make the second go on with the first."""

    class Refuses(L.Callback):
        def setup(self, *_: object, **__: object) -> None:
            raise RuntimeError("refused")

    module, duo = Classifier(), make_duo()
    fit(duo, module)
    draw_anew(module, 1)
    own = fit(make_duo(), copy.deepcopy(module))
    with pytest.raises(RuntimeError, match="refused"):
        fit(duo, module, Refuses())
    with pytest.raises(RuntimeError, match="refused"):
        L.Trainer(callbacks=[Refuses(), duo], logger=False, accelerator="cpu").fit(
            module, loader(TRAIN), loader(VAL)
        )
    assert fit(duo, module) == own


# ---- a module that is given ----


def test_a_given_module_stays_as_it_was() -> None:
    net = small_net()
    before = digest(net.state_dict())
    one, two = make_duo(net), make_duo(net, name="two")
    make_trainer(one, two).fit(Classifier(), loader(TRAIN), loader(VAL))
    assert digest(net.state_dict()) == before
    assert one.sidekick is not two.sidekick
    for duo in (one, two):
        assert digest(duo.sidekick.state_dict()) != before
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_parts_of_the_base_may_be_given() -> None:
    def run(*callbacks: L.Callback, module: L.LightningModule) -> str:
        L.seed_everything(3, verbose=False)
        make_trainer(*callbacks).fit(module, loader(TRAIN), loader(VAL))
        return digest(module.state_dict())

    L.seed_everything(1, verbose=False)
    alone, beside = Classifier(), Classifier()
    beside.load_state_dict(alone.state_dict())
    duo = make_duo(lambda num_classes: beside.net)
    assert run(duo, module=beside) == run(module=alone)
    assert duo.sidekick is not beside.net


def test_a_module_that_cannot_be_copied_is_named() -> None:
    import threading

    net = small_net()
    net.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match=r"Sequential cannot be copied.*__deep"):
        fit(make_duo(net), Classifier())


# ---- which metrics are logged ----


def logged(duo: DuoCallback, *beside: L.Callback) -> set[str]:
    trainer = make_trainer(duo, *beside)
    trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    names = {name for name in trainer.callback_metrics if "/val_" in name}
    (tested,) = trainer.test(Classifier(), loader(VAL), verbose=False)
    at_test = {name.replace("test", "val") for name in tested if "/test_" in name}
    assert at_test == names
    return names


@pytest.mark.parametrize(
    ("asked", "metrics"),
    [
        (None, ("accuracy", "nll", "brier", "ece", "aurc", "sac98")),
        (("f1", "nll"), ("nll", "f1")),
        ([], ()),
        ("all", tuple(MEASURES)),
    ],
)
def test_what_is_asked_for_is_logged_and_results_hold_all(asked: object, metrics: tuple) -> None:
    duo = make_duo() if asked is None else make_duo(metrics=asked)
    assert logged(duo) == {f"{form}/val_{metric}" for form in FORMS for metric in metrics}
    assert set(duo.results["val"]["duo"]) == set(MEASURES)
    assert set(duo.options.metrics) == set(metrics)


@pytest.mark.parametrize("asked", ["nll", ("nll", "nlll"), ("NLL",)])
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
        fit(make_duo(name="small"), module, *beside, enable_checkpointing=True)
    beside = [] if watch is None else [watch(tmp_path)]
    remedied = make_duo(name="small", metrics=("nll", "augrc"))
    fit(remedied, module, *beside, enable_checkpointing=True)
    assert remedied.fit is not None


def test_monitored_names_of_others_are_not_touched(tmp_path: Path) -> None:
    fit(make_duo(name="small"), Classifier(), EarlyStopping("val_loss"))
    fit(make_duo(name="small"), Classifier(), EarlyStopping("small/base/val_nll"))


# ---- what is shown ----


def test_repr_says_what_a_person_wants_to_see() -> None:
    duo = make_duo(name="small", target_accuracy=0.3)
    assert repr(duo) == "DuoCallback(sidekick='small_net', name='small', not fitted)"
    fit(duo, Classifier())
    base, sidekick = duo.fit.temperatures
    temperatures = f"temperatures=({base:.4g}, {sidekick:.4g})"
    threshold = f"threshold={duo.calibration.threshold.value:.4g}"
    shown = repr(duo)
    for part in ("base=Classifier", temperatures, threshold, "fitted_at_step=12"):
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
    fit(duo, module)
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
        fit(make_duo(figures=True), Classifier(), logger=CSVLogger(tmp_path), max_epochs=3)
    said = [w for w in record if "takes figures" in str(w.message)]
    assert len(said) == 1

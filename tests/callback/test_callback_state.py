"""What the callback keeps: the best sidekick, whose temperatures they are, and in checkpoints."""

import copy
import logging
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, digest, loader, make_trainer, small_images, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_duo import DuoCallback, DuoModule, fit_temperatures
from lightning_duo.callback.run import fingerprint

TRAIN, VAL = small_images(96, 1), small_images(80, 2)
INFO = "lightning.pytorch.utilities.rank_zero"


def fast_adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_duo(sidekick: object = small_net, **options: object) -> DuoCallback:
    return DuoCallback(sidekick, **{"optimizer": fast_adam, "summary": False, **options})


class Diverges(L.Callback):
    """From the given epoch on the sidekick gets worse."""

    def __init__(self, duo: DuoCallback, epoch: int) -> None:
        self.duo, self.epoch = duo, epoch
        self.losses: list[float] = []
        self.states: list[str] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.current_epoch >= self.epoch and not trainer.sanity_checking:
            with torch.no_grad():
                self.duo._sidekick.model[5].weight.zero_()

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        if not trainer.sanity_checking:
            self.losses.append(self.duo.fit.nll_sidekick)
            self.states.append(digest(self.duo._sidekick.model.state_dict()))


def trained(folder: Path, epoch: int = 2) -> tuple[DuoCallback, L.LightningModule, Diverges]:
    duo, module = make_duo(), Classifier()
    diverges = Diverges(duo, epoch)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="val_loss")
    trainer = make_trainer(duo, diverges, keep, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    return duo, module, diverges


def expected(duo: DuoCallback, module: nn.Module) -> tuple[float, float]:
    x, y = VAL.tensors
    with torch.no_grad():
        return fit_temperatures(module.eval()(x), duo._sidekick.model.eval()(x), y).temperatures


def test_validate_pairs_any_checkpoint_with_the_best_sidekick(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    duo, module, seen = trained(tmp_path)
    best = seen.losses.index(min(seen.losses))
    assert best < 2
    # After fit the duo is the last base beside the last sidekick, whose temperatures these are.
    assert digest(duo._sidekick.model.state_dict()) == seen.states[3]
    assert duo.fit.temperatures == pytest.approx(expected(duo, module), rel=1e-5)

    for chosen, step in ((0, 6), (3, 24)):  # an earlier base, and the last
        path = str(tmp_path / f"epoch={chosen}.ckpt")
        with caplog.at_level(logging.INFO, INFO):
            caplog.clear()
            make_trainer(duo).validate(module, loader(VAL), ckpt_path=path, verbose=False)
        said = f"the base of step {step} is paired with the sidekick of step {6 * best + 6}, whose"
        assert said in caplog.text
        assert f"validation loss of {seen.losses[best]:.4f} (at its own best" in caplog.text
        assert digest(duo._sidekick.model.state_dict()) == seen.states[best]
        assert duo.fit.nll_sidekick == pytest.approx(seen.losses[best])
        assert duo.fit.temperatures == pytest.approx(expected(duo, module), rel=1e-5)
        assert duo.fitted_at_step == step


def test_another_process_knows_the_best_up_to_the_checkpoint(tmp_path: Path) -> None:
    _, _, seen = trained(tmp_path)
    whole = seen.losses.index(min(seen.losses))
    for chosen, best in ((0, 0), (1, whole), (3, whole)):
        duo, module = make_duo(), Classifier()
        path = str(tmp_path / f"epoch={chosen}.ckpt")
        trainer = make_trainer(duo)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="DuoCallback")
            trainer.test(module, loader(VAL), ckpt_path=path, verbose=False)
        # A test takes the pair as it was, with its temperatures.
        assert digest(duo._sidekick.model.state_dict()) == seen.states[chosen]
        trainer.validate(module, loader(VAL), ckpt_path=path, verbose=False)
        assert digest(duo._sidekick.model.state_dict()) == seen.states[best]


def test_the_best_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Losses of other runs may be of other data."""
    trained(tmp_path / "one")
    duo, module, _ = trained(tmp_path / "two")
    path = str(tmp_path / "one" / "epoch=0.ckpt")
    make_trainer(duo).validate(module, loader(VAL), ckpt_path=path, verbose=False)
    kept = torch.load(path, weights_only=True)["callbacks"]["DuoCallback"]["best"]["weights"]
    assert digest(duo._sidekick.model.state_dict()) == digest(kept)


def test_a_second_fit_looks_for_its_own_best(tmp_path: Path) -> None:
    duo, module, seen = trained(tmp_path)
    make_trainer(duo, max_epochs=1).fit(module, loader(TRAIN), loader(VAL))
    assert duo._record.best.step == 6
    assert duo._record.best.nll != min(seen.losses)


# ---- staleness ----


def stale(record: list) -> list[str]:
    return [str(w.message) for w in record if "are others now" in str(w.message)]


def test_temperatures_of_other_weights_are_said() -> None:
    """Wherever weights came from after the fit, and only then."""
    duo, module = make_duo(), Classifier()
    trainer = make_trainer(duo, max_steps=9, val_check_interval=3, max_epochs=2)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer.fit(module, loader(TRAIN), loader(VAL))
        _ = duo.module
        trainer.test(module, loader(VAL), verbose=False)
    assert not stale(record)
    with torch.no_grad():
        module.net[1].weight[0, 0] += 1e-3
    for act in (
        lambda: duo.module,
        lambda: make_trainer(duo).test(module, loader(VAL), verbose=False),
    ):
        with pytest.warns(UserWarning, match="fitted at step 9 and the weights of base or sidekic"):
            act()
    make_trainer(duo).validate(module, loader(VAL), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _ = duo.module


def test_training_on_after_the_last_validation_is_said() -> None:
    duo = make_duo()
    trainer = make_trainer(duo, max_epochs=2, val_check_interval=4)
    with pytest.warns(UserWarning, match=r"fitted at step 10 .*\(the base is at step 12"):
        trainer.fit(Classifier(), loader(TRAIN), loader(VAL))


def test_fingerprints_tell_models_apart_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = nn.Linear(5, 3).to(dtype)
        before = fingerprint(layer)
        assert fingerprint(copy.deepcopy(layer)) == before
        with torch.no_grad():
            layer.weight[2, 1] = -layer.weight[2, 1]
        assert fingerprint(layer) != before
    assert fingerprint(nn.Flatten()) == 0
    layer = nn.Linear(2, 2)
    before = fingerprint(layer)
    layer.weight.data, layer.bias.data = layer.bias.data, layer.weight.data
    assert fingerprint(layer) != before


# ---- checkpoints ----


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path: Path) -> None:
    trained(tmp_path)
    state = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["callbacks"]["DuoCallback"]
    assert {"version", "library", "sidekick", "training", "best", "calibration"} <= set(state)


def test_states_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _, module, _ = trained(tmp_path)
    path = tmp_path / "epoch=3.ckpt"
    whole = torch.load(path, weights_only=True)

    def refused(duo: DuoCallback, message: str, **changes: object) -> None:
        changed = copy.deepcopy(whole)
        changed["callbacks"]["DuoCallback"] |= changes
        torch.save(changed, tmp_path / "changed.ckpt")
        for run in ("validate", "test"):
            with pytest.raises(ValueError, match=message):
                getattr(make_trainer(duo), run)(
                    module, loader(VAL), ckpt_path=tmp_path / "changed.ckpt", verbose=False
                )
        with pytest.raises(ValueError, match=message):
            make_trainer(duo, max_epochs=9).fit(
                module, loader(TRAIN), loader(VAL), ckpt_path=tmp_path / "changed.ckpt"
            )

    later = "state of version 9, written by lightning_duo 7.1; this is .* reads version 3"
    refused(make_duo(), later, version=9, library="7.1")
    refused(
        make_duo(),
        "of version 2, written by lightning_duo of an earlier day",
        **{"version": 2, "library": "of an earlier day"},
    )
    refused(make_duo(num_classes=5), "'small_net' has 4 classes, this callback's has 5; make them")
    other = "'small_net' has other weights than this callback's 'resnet10t'; build it as it was"
    refused(make_duo("resnet10t", pretrained=False), other)

    def wide(num_classes: int) -> nn.Module:
        return small_net(num_classes, width=24)

    refused(make_duo(wide), "'small_net' has other weights than this callback's 'wide'.*size mism")


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path: Path) -> None:
    """Training may go on from it, with a word; a test of it has no temperatures."""
    module = Classifier()
    alone = make_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    alone.fit(module, loader(TRAIN), loader(VAL))
    path = alone.checkpoint_callback.best_model_path
    duo = make_duo()
    with pytest.warns(UserWarning, match="holds no state of DuoCallback"):
        make_trainer(duo, max_epochs=4).fit(module, loader(TRAIN), loader(VAL), ckpt_path=path)
    assert duo._training_state["updates"] == 12
    with pytest.raises(MisconfigurationException, match="no sidekick and no temperatures"):
        make_trainer(make_duo()).test(module, loader(VAL), ckpt_path=path, verbose=False)


# ---- several duos ----


def test_several_duos_of_one_trainer(tmp_path: Path) -> None:
    def narrow(num_classes: int) -> nn.Module:
        return small_net(num_classes, width=4)

    one, two = make_duo(), make_duo(narrow, name="narrow")
    module = Classifier()
    keep = ModelCheckpoint(tmp_path, filename="kept", monitor="narrow/duo/val_nll")
    trainer = make_trainer(one, two, keep, enable_checkpointing=True)
    trainer.fit(module, loader(TRAIN), loader(VAL))
    logged = trainer.callback_metrics
    for prefix, duo in (("", one), ("narrow/", two)):
        assert duo.fit.temperatures == pytest.approx(expected(duo, module), rel=1e-5)
        assert float(logged[f"{prefix}duo/val_nll"]) == pytest.approx(duo.fit.nll, rel=1e-5)
        assert f"{prefix}sidekick/train_nll" in logged
    again = make_duo(), make_duo(narrow, name="narrow")
    make_trainer(*again).test(
        module, loader(VAL), ckpt_path=str(tmp_path / "kept.ckpt"), verbose=False
    )
    for old, new in zip((one, two), again, strict=True):
        assert digest(old._sidekick.model.state_dict()) == digest(new._sidekick.model.state_dict())


def test_two_duos_of_one_name_are_refused() -> None:
    with pytest.raises(RuntimeError, match="state_key` must be unique"):  # Lightning's own words
        make_trainer(make_duo(), make_duo())
    trainer = make_trainer(make_duo())
    trainer.callbacks.append(make_duo())
    with pytest.raises(MisconfigurationException, match=r"different names; pass DuoCallback.*name"):
        trainer.fit(Classifier(), loader(TRAIN), loader(VAL))
    net = small_net()
    with pytest.raises(MisconfigurationException, match="train the same sidekick"):
        make_trainer(make_duo(net), make_duo(net, name="b")).fit(
            Classifier(), loader(TRAIN), loader(VAL)
        )


# ---- sidekicks that cannot be ----


class Unmoved(Classifier):
    """Counts the batches that were trained on."""

    batches = 0

    def on_train_batch_start(self, *_: object) -> None:
        type(self).batches += 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda module: module, "share parameters.*deepcopy"),
        (lambda module: module.net, "share parameters.*deepcopy"),
        (lambda module: nn.Sequential(small_net()[:5], module.net[5]), "share parameters"),
        (lambda module: small_net().requires_grad_(False), "no trainable.*requires_grad_.*validat"),
        (lambda module: nn.Sequential(nn.Flatten()), "no trainable parameters"),
        (lambda module: small_net().to("meta"), "on the meta device.*build it on the CPU"),
        (
            lambda module: nn.Sequential(small_net(), nn.Linear(4, 4, device="meta")),
            r"several devices, cpu and meta; put it on one.*sidekick.cpu\(\)",
        ),
    ],
)
def test_sidekicks_that_cannot_be_are_refused_before_training(make: object, message: str) -> None:
    module = Unmoved()
    Unmoved.batches = 0
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(make_duo(make(module))).fit(module, loader(TRAIN), loader(VAL))
    assert Unmoved.batches == 0


def test_a_frozen_sidekick_may_still_be_fitted() -> None:
    duo, module = make_duo(small_net().requires_grad_(False)), Classifier()
    make_trainer(duo).validate(module, loader(VAL), verbose=False)
    assert duo.fit.temperatures == pytest.approx(expected(duo, module), rel=1e-5)
    assert isinstance(duo.module, DuoModule)


def test_loaders_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="calibration_loader must be 0, 1"):
        make_duo(calibration_loader=-1)
    for sanity in (0, 2):
        module = Unmoved()
        Unmoved.batches = 0
        with pytest.raises(MisconfigurationException, match="is 2, but the number of validat"):
            make_trainer(make_duo(calibration_loader=2), num_sanity_val_steps=sanity).fit(
                module, loader(TRAIN), loader(VAL)
            )
        assert Unmoved.batches == 0


# ---- steps and logits that cannot be ----


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


def cloned(batch: list) -> tuple:
    return batch[0].clone(), batch[1].clone()


@pytest.mark.parametrize("stage", ["training", "validation"])
def test_batches_changed_in_place_are_an_error_with_a_way_out(stage: str) -> None:
    def data() -> list:
        return [loader(TRAIN), loader(VAL)]

    message = r"InPlace changed the batch in place .*\(16, 3, 8, 8\).*x.clone\(\).*batch_fn=lambda"
    with pytest.raises(ValueError, match=message):
        make_trainer(make_duo()).fit(InPlace(stage), *data())
    duo = make_duo(batch_fn=cloned)
    make_trainer(duo).fit(InPlace(stage), *data())
    assert duo.fit is not None


@pytest.mark.parametrize("run", ["validate", "test"])
def test_batches_changed_in_inference_mode(run: str) -> None:
    """Tensors made there count no changes, so the first batch is compared."""

    class Tests(InPlace):
        test_step = InPlace.validation_step

    duo, module = make_duo(small_net()), Tests("validation")
    trainer = make_trainer(duo)
    if run == "test":
        trainer.validate(Tests("none"), loader(VAL), verbose=False)
    with pytest.raises(ValueError, match="Tests changed the batch in place"):
        getattr(trainer, run)(module, loader(VAL), verbose=False)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda z: z[:, 0], r"\(16,\); of a single output z .*logits_fn=lambda.*pad"),
        (lambda z: z[:, :1], r"\(16, 1\); of a single output z .*logits_fn=lambda.*pad"),
        (lambda z: z[:, :, None, None].expand(-1, -1, 2, 2), r"\(16, 4, 2, 2\).*segmentation"),
        (lambda z: z[:8], r"shape \(16, K\).*got torch.float32 tensor \(8, 4\)"),
        (lambda z: z.argmax(1), r"floating-point logits \(N, K\).*int64"),
        (lambda z: {"scores": z}, "got dict; pass DuoCallback"),
    ],
)
def test_logits_that_cannot_be_say_what_to_do(shape: object, message: str) -> None:
    class Shaped(Classifier):
        def forward(self, x: torch.Tensor) -> object:
            return shape(self.net(x))

        def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
            self(batch[0])
            return self.net(batch[0]).mean()

        def validation_step(self, batch: list, batch_idx: int) -> None:
            self(batch[0])

    with pytest.raises(ValueError, match=message):
        make_trainer(make_duo()).fit(Shaped(), loader(TRAIN), loader(VAL))
    if message.endswith("pad"):  # the way out that it names
        duo = make_duo(
            batch_fn=lambda b: (b[0], b[1] % 2),
            logits_fn=lambda module, x: nn.functional.pad(module(x).reshape(-1, 1), (1, 0)),
        )
        make_trainer(duo).fit(Shaped(), loader(TRAIN), loader(VAL))
        assert duo.module(VAL.tensors[0]).probs.shape == (80, 2)

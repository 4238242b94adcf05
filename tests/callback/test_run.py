"""Which fit goes on with a sidekick and which starts a new one."""

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import VAL, Classifier, digest, loader, make_trainer, small_net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import compare, fitted, make_duo
from torch import nn

from lightning_duo import DuoCallback


def fit(duo: DuoCallback, module: L.LightningModule, *beside: L.Callback, **options: object) -> str:
    """Train from the same seed; the hash of the sidekick that comes of it."""
    L.seed_everything(3, verbose=False)
    fitted(duo, module, *beside, **options)
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
    with pytest.warns(UserWarning, match="new run: .*new sidekick is trained.*pass ckpt_path"):
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
        fitted(duo, module, Look(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
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


@pytest.mark.parametrize("run", ["validate", "test"])
def test_measuring_a_new_fold_first_does_not_make_it_go_on(run: str) -> None:
    """As for a baseline: the sidekick is kept for that, and a fit of the fold starts a new one."""
    module, duo = Classifier(), make_duo()
    trained = fit(duo, module)
    draw_anew(module, 1)
    own = fit(make_duo(), copy.deepcopy(module))
    message = "kept for this validation" if run == "validate" else "changed since"
    with pytest.warns(UserWarning, match=message):
        getattr(make_trainer(duo), run)(module, loader(VAL), verbose=False)
    assert digest(duo.sidekick.state_dict()) == trained
    assert fit(duo, module) == own


class MadeInAHook(Classifier):
    """Draws its weights in a hook of its own, in every fit."""

    hook, fold = "", 0

    def draw(self, hook: str) -> None:
        if self.hook == hook:
            draw_anew(self, self.fold)

    def setup(self, stage: str) -> None:
        self.draw("setup")

    def configure_model(self) -> None:
        self.draw("configure_model")

    def on_fit_start(self) -> None:
        self.draw("on_fit_start")

    def on_train_start(self) -> None:
        self.draw("on_train_start")


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("hook", ["setup", "configure_model", "on_fit_start", "on_train_start"])
def test_folds_whose_module_makes_its_own_weights(hook: str, sanity: int) -> None:
    module, source = MadeInAHook(), small_net()
    module.hook, duo = hook, make_duo(source)
    for fold in range(2):
        module.fold = fold
        own = fit(make_duo(source), copy.deepcopy(module), num_sanity_val_steps=sanity)
        assert fit(duo, module, num_sanity_val_steps=sanity) == own


def redraw_a_buffer(module: Classifier) -> None:
    module.prototypes.normal_()


def swap_two_units(module: Classifier) -> None:
    with torch.no_grad():
        module.net[1].weight.copy_(module.net[1].weight.roll(1, 0))


def flip_one_sign(module: Classifier) -> None:
    with torch.no_grad():
        module.exact[1] *= -1


def redraw_complex_numbers(module: Classifier) -> None:
    with torch.no_grad():
        module.spectrum.normal_()


@pytest.mark.parametrize(
    "change", [redraw_a_buffer, swap_two_units, flip_one_sign, redraw_complex_numbers]
)
def test_any_bit_of_the_base_tells_another_run(change: Callable) -> None:
    module, duo = Classifier(), make_duo()
    module.register_buffer("prototypes", torch.randn(4, 3))
    module.exact = nn.Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False)
    module.spectrum = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)
    fit(duo, module)
    change(module)
    own = fit(make_duo(), copy.deepcopy(module))
    assert fit(duo, module) == own


def test_a_restored_pair_is_not_called_a_new_one(tmp_path: Path) -> None:
    duo, module = make_duo(), Classifier()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(duo, module, keep, enable_checkpointing=True)
    other = Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback: new run")
        trainer = fitted(duo, other, max_epochs=3, ckpt_path=tmp_path / "last.ckpt").trainer
        trainer.validate(other, loader(VAL), verbose=False)


def test_what_a_transform_learns_is_its_runs_own() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    first = digest(norm.state_dict())
    module, duo = Classifier(), make_duo(sidekick_transform=norm)
    for fold in range(2):
        draw_anew(module, fold)
        own = fit(make_duo(sidekick_transform=copy.deepcopy(norm)), copy.deepcopy(module))
        assert fit(duo, module) == own
    assert digest(norm.state_dict()) == first


def test_what_one_run_has_said_another_says_again() -> None:
    class Softmax(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(1)

    duo = make_duo()
    for _ in range(2):
        with pytest.warns(UserWarning, match="seems to give probabilities"):
            fitted(duo, Softmax())


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
        make_trainer(Refuses(), duo).fit(module, loader(VAL), loader(VAL))
    assert fit(duo, module) == own


# ---- a module that is given ----


def compiled_forward() -> nn.Module:
    net = small_net()
    net.forward = torch.compile(net.forward, backend="eager")
    return net


def closure_hook() -> nn.Module:
    net, seen = small_net(), []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    return net


def gradient_hook() -> nn.Module:
    net = small_net()
    net[1].weight.register_hook(lambda gradient: 2 * gradient)
    return net


@pytest.mark.parametrize("make", [compiled_forward, closure_hook, gradient_hook])
def test_what_no_copy_can_stand_for_is_refused_if_given_and_trained_if_made(
    make: Callable,
) -> None:
    remedy = "what you gave, and .*; pass a function num_classes -> nn.Module"
    with pytest.raises(MisconfigurationException, match=remedy):
        fitted(make_duo(make()))
    before = []

    def made(num_classes: int) -> nn.Module:
        net = make()
        before.append(net[1].weight.detach().clone())
        return net

    duo = fitted(make_duo(made)).duo
    assert not torch.equal(duo.sidekick[1].weight, before[0])


def test_a_given_module_stays_as_it_was() -> None:
    net = small_net()
    before = digest(net.state_dict())
    one, two = make_duo(net), make_duo(net, name="two")
    fitted(one, None, two)
    assert digest(net.state_dict()) == before
    assert one.sidekick is not two.sidekick
    for duo in (one, two):
        assert digest(duo.sidekick.state_dict()) != before
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def with_the_memory_of(base: Classifier) -> nn.Module:
    net = small_net(width=32)
    net[5].weight = nn.Parameter(base.net[5].weight.data)
    return net


@pytest.mark.parametrize(
    "part",
    [
        lambda base: base,
        lambda base: base.net,
        lambda base: nn.Sequential(small_net(width=32)[:5], base.net[5]),
        with_the_memory_of,
    ],
)
def test_what_belongs_to_the_base_may_be_given(part: Callable) -> None:
    """The base does not notice, as it is copied."""
    made: list[Classifier] = []

    def make() -> Classifier:
        made.append(Classifier())
        return made[-1]

    duo, module, _ = compare(make, duo={"sidekick": lambda num_classes: part(made[-1])})
    theirs = {p.data_ptr() for p in module.parameters()}
    assert not theirs & {p.data_ptr() for p in duo.sidekick.parameters()}


def test_a_module_that_cannot_be_copied_is_named() -> None:
    net = small_net()
    net.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match=r"Sequential cannot be copied.*__deepcopy"):
        fit(make_duo(net), Classifier())


def test_the_same_trouble_in_another_run_is_warned_of_again() -> None:
    class Diverged(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.nan

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")  # which shows a text once for each place
        for _ in range(2):
            fitted(make_duo(), Diverged(), max_epochs=1)
    said = [w for w in record if "no temperatures can be fitted" in str(w.message)]
    assert len(said) == 2

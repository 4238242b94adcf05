"""From the checkpoint of a run to its duo, without the run's Trainer."""

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import make_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from lightning_duo import DuoCallback, DuoModule, add_sidekick
from lightning_duo.export import export_duo

CLASSES = 3


def images(count: int = 48, size: int = 12, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    x = torch.randn(count, 3, size, size, generator=generator) + y[:, None, None, None]
    return TensorDataset(x, y)


def loaders() -> tuple[DataLoader, DataLoader]:
    return DataLoader(images(), 16), DataLoader(images(seed=1), 16)


class Base(L.LightningModule):
    """Calls a part of itself, and saves its hyperparameters."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.net.append(nn.Linear(width, CLASSES))
        self.register_buffer("weights_of_classes", torch.ones(CLASSES))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], self.weights_of_classes)

    validation_step = test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Plain(Base):
    """Its constructor's arguments are nowhere."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._hparams.clear()
        del self._hparams_initial


class Whole(Base):
    """Its own forward gives the logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = test_step = training_step


class Doubled(Base):
    """The step makes the logits itself, of two calls."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x) + self.net(x.flip(-1)), y)

    validation_step = test_step = training_step


def tiny(outputs: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, outputs))


def saved(
    module: L.LightningModule, folder: Path, sidekick: Any = "resnet10t", **options: Any
) -> tuple[Path, DuoCallback]:
    """A checkpoint of a run, with its callback."""
    flags = ("precision", "num_sanity_val_steps")
    of_trainer = {name: options.pop(name) for name in flags if name in options}
    options = {"pretrained": False, "probe": 0, "summary": False, **options}
    if not isinstance(sidekick, str):
        del options["pretrained"]
    duo = DuoCallback(sidekick, **options)
    trainer = make_trainer(duo, max_epochs=1, **of_trainer)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt", duo


def same(duo: DuoModule, other: DuoModule, *inputs: Any) -> None:
    x = inputs or (images(seed=2).tensors[0],)
    for mine, theirs in zip(duo(*x), other(*x), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(duo.member_logits(*x), other.member_logits(*x), strict=True):
        assert torch.equal(mine, theirs)  # also of a model whose temperature is 0
    assert not duo.training


def test_a_class_an_instance_and_a_part_give_the_same_duo(tmp_path: Path) -> None:
    path, run = saved(Base(6), tmp_path, target_accuracy=0.5)
    assert run.module.threshold > 0
    for base in (Base, Base(6), Base(6).net):
        duo = DuoModule.from_checkpoint(path, base)
        same(duo, run.module)
        assert torch.equal(duo.threshold, run.module.threshold)
    given = Base(6)
    assert DuoModule.from_checkpoint(path, given).base is given.net  # weights are shared


@pytest.mark.parametrize("make", [Whole, Doubled])
def test_modules_whose_forward_or_step_makes_the_logits(make: type[Base], tmp_path: Path) -> None:
    path, run = saved(make(), tmp_path)
    batch = [images(seed=2).tensors[0], images(seed=2).tensors[1]]
    same(DuoModule.from_checkpoint(path, make), run.module, batch if make is Doubled else batch[0])


class Labelled(Base):
    """One logit, with binary cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4] = nn.Linear(4, 1)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        target = (batch[1] > 0).float()
        return F.binary_cross_entropy_with_logits(self.net(batch[0]).squeeze(1), target)

    validation_step = test_step = training_step


class Probable(Labelled):
    """The same with probabilities, as its sidekick gives too."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Sigmoid())

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        target = (batch[1] > 0).float()
        return F.binary_cross_entropy(self.net(batch[0]).squeeze(1), target)

    validation_step = test_step = training_step


class Channels(Base):
    """Images of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.Conv2d(2, 4, 3)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0][:, :2]), batch[1])

    validation_step = test_step = training_step


class Averaged(Base):
    """Validates another part than it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net_ema = copy.deepcopy(self.net)

    def validation_step(self, batch: list, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net_ema(batch[0]), batch[1])

    test_step = validation_step


@pytest.mark.parametrize("make", [Labelled, Channels])
def test_other_heads_and_inputs(make: type[Base], tmp_path: Path) -> None:
    path, run = saved(make(), tmp_path)
    x = images(seed=2).tensors[0]
    same(DuoModule.from_checkpoint(path, make), run.module, x[:, :2] if make is Channels else x)


def probable(outputs: int) -> nn.Module:
    return nn.Sequential(tiny(outputs), nn.Sigmoid())


def test_labels_of_which_both_models_give_probabilities(tmp_path: Path) -> None:
    path, run = saved(Probable(), tmp_path, probable)
    x = images(seed=2).tensors[0]
    same(DuoModule.from_checkpoint(path, Probable, probable), run.module, x)


def test_the_part_that_is_validated_is_the_base(tmp_path: Path) -> None:
    path, run = saved(Averaged(), tmp_path, num_sanity_val_steps=0)
    same(DuoModule.from_checkpoint(path, Base().net), run.module)


def test_a_run_in_half_precision_stays_in_it(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, run = saved(Base(), tmp_path, precision="bf16-true")
    recwarn.clear()
    duo = DuoModule.from_checkpoint(path, Base)
    same(duo, run.module, images(seed=2).tensors[0].bfloat16())
    assert not any("has changed since" in str(warning.message) for warning in recwarn)


TRANSFORMS = {
    "resize": v2.Resize(8, antialias=True),
    "nearest": v2.Resize((8, 9), interpolation=InterpolationMode.NEAREST),
    "several": nn.Sequential(v2.CenterCrop(10), v2.Normalize([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])),
    "pool": nn.AvgPool2d(2, stride=1),
    "composed": v2.Compose([v2.Resize([8]), v2.Grayscale(3)]),
    "numpy": v2.Normalize([np.float64(0.1)] * 3, [np.float64(2.0)] * 3),
    "nothing": nn.Identity(),
    "dtype": nn.Sequential(v2.ToDtype(torch.float64), v2.ToDtype(torch.float32)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_libraries_are_rebuilt(name: str, tmp_path: Path) -> None:
    path, run = saved(Base(), tmp_path, sidekick_transform=TRANSFORMS[name])
    same(DuoModule.from_checkpoint(path, Base), run.module)


def test_what_the_callback_puts_in_front_of_the_sidekick_is_rebuilt(tmp_path: Path) -> None:
    class Vision(Base):
        """A timm model, of another normalisation than the sidekick's."""

        def __init__(self) -> None:
            super().__init__()
            import timm

            self.net = timm.create_model("resnet10t", num_classes=CLASSES)
            self.net.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.3,) * 3}

    path, run = saved(Vision(), tmp_path, "test_vit")  # of 160 pixels only
    assert "Resize" in str(run.module.sidekick)
    assert "Normalize" in str(run.module.sidekick)
    same(DuoModule.from_checkpoint(path, Vision), run.module)


def halved(x: Tensor) -> Tensor:
    return x / 2


class Learnt(nn.BatchNorm2d):
    """A transform with statistics."""


class Shifted(v2.Resize):
    """Called as the one of torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked() -> nn.Module:
    pool = nn.AvgPool2d(2)
    pool.register_forward_hook(lambda module, args, output: 2 * output)
    return pool


def hooked_outside() -> nn.Module:
    both = nn.Sequential(nn.AvgPool2d(2))
    both.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return both


def patched() -> nn.Module:
    pool = nn.AvgPool2d(2)
    pool.forward = halved
    return pool


@pytest.mark.parametrize(
    "transform",
    [halved, lambda x: x / 2, Learnt(3), Shifted(8), hooked(), hooked_outside(), patched()],
)
def test_a_transform_of_the_users_is_asked_for(
    transform: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    path, run = saved(Base(), tmp_path, sidekick_transform=transform)
    with pytest.raises(ValueError, match=r"pass sidekick_transform=\.\.\. .* with it"):
        DuoModule.from_checkpoint(path, Base)
    duo = DuoModule.from_checkpoint(path, Base, sidekick_transform=transform)
    if not isinstance(transform, Learnt):
        same(duo, run.module)


def test_another_transform_than_in_the_run_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for transform in (None, v2.Resize(8)):
        path, _ = saved(Base(), tmp_path, sidekick_transform=transform)
        recwarn.clear()
        DuoModule.from_checkpoint(path, Base, sidekick_transform=v2.Resize(6))
        said = [str(warning.message) for warning in recwarn]
        assert any("leave sidekick_transform out, or pass the one of the run" in x for x in said)


def test_a_sidekick_of_the_users_is_asked_for(tmp_path: Path) -> None:
    path, run = saved(Base(), tmp_path, tiny)
    with pytest.raises(ValueError, match=r"tiny, is a module of your own; pass sidekick="):
        DuoModule.from_checkpoint(path, Base)
    same(DuoModule.from_checkpoint(path, Base, tiny), run.module)
    same(DuoModule.from_checkpoint(path, Base, sidekick=tiny(CLASSES)), run.module)
    with pytest.raises(ValueError, match="has other weights than"):
        DuoModule.from_checkpoint(path, Base, nn.Linear(4, CLASSES))


def test_a_logits_fn_is_asked_for(tmp_path: Path) -> None:
    def twice(module: Base, x: Tensor) -> Tensor:
        return 2 * module.net(x)

    path, run = saved(Base(), tmp_path, logits_fn=twice)
    with pytest.raises(ValueError, match=r"pass logits_fn=\.\.\. .* with it"):
        DuoModule.from_checkpoint(path, Base)
    same(DuoModule.from_checkpoint(path, Base, logits_fn=twice), run.module)
    path, _ = saved(Base(), tmp_path)
    with pytest.raises(ValueError, match="had no logits_fn; leave it out"):
        DuoModule.from_checkpoint(path, Base, logits_fn=twice)


def test_one_of_several_duos(tmp_path: Path) -> None:
    one, other = (DuoCallback(tiny, name=name, summary=False) for name in ("small", "large"))
    trainer = make_trainer(one, other, max_epochs=1)
    trainer.fit(Base(), *loaders())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"pass name=.*got None"):
        DuoModule.from_checkpoint(tmp_path / "run.ckpt", Base, tiny)
    same(DuoModule.from_checkpoint(tmp_path / "run.ckpt", Base, tiny, name="large"), other.module)


def test_wrong_files_and_modules(tmp_path: Path) -> None:
    path, _ = saved(Plain(4), tmp_path)
    with pytest.raises(ValueError, match=r"make the module yourself, and pass it instead"):
        DuoModule.from_checkpoint(path, Plain)
    DuoModule.from_checkpoint(path, Plain(4))
    with pytest.raises(ValueError, match=r"other weights than this Base"):
        DuoModule.from_checkpoint(path, Base(5))
    with pytest.raises(ValueError, match=r"other weights than this Linear"):
        DuoModule.from_checkpoint(path, nn.Linear(3, 3))
    for wrong in (lambda: Plain(4), "Plain", nn.Linear):
        with pytest.raises(TypeError, match="the base must be your LightningModule, its class"):
            DuoModule.from_checkpoint(path, wrong)
    with pytest.raises(ValueError, match=r"DuoModule\.from_checkpoint reads checkpoints"):
        DuoModule.load(path, nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        DuoModule.from_checkpoint(tmp_path / "nothing.ckpt", Base)
    with pytest.raises(ValueError, match="is a folder"):
        DuoModule.from_checkpoint(tmp_path, Base)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Base(), *loaders())
    trainer.save_checkpoint(tmp_path / "alone.ckpt")
    with pytest.raises(ValueError, match=r"holds no duo.*add_sidekick"):
        DuoModule.from_checkpoint(tmp_path / "alone.ckpt", Base)
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a Trainer"):
        DuoModule.from_checkpoint(tmp_path / "list.ckpt", Base)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        DuoModule.from_checkpoint(tmp_path / "text.ckpt", Base)


def test_a_trained_base_needs_its_module_and_its_data(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        train_dataloader = val_dataloader = staticmethod(lambda: loaders()[1])

    train, val = loaders()
    path, _ = saved(Base(4), tmp_path)
    options = {"sidekick": tiny, "summary": False, "trainer": make_trainer(max_epochs=1)}
    with pytest.raises(TypeError, match="the base must be a LightningModule, not a class"):
        add_sidekick(Base, train, val, **options)
    with pytest.raises(TypeError, match="trainer must be a Trainer"):
        add_sidekick(Base(), train, val, sidekick=tiny, trainer=L.Trainer)
    with pytest.raises(MisconfigurationException, match="beside a datamodule, which has its own"):
        add_sidekick(Base(), Data(), val, **options)
    with pytest.raises(
        MisconfigurationException, match=r"no data to learn from; pass add_sidekick"
    ):
        add_sidekick(Base(), **options)
    with pytest.raises(ValueError, match="ckpt_path holds other weights than this Base"):
        add_sidekick(Base(5), Data(), ckpt_path=str(path), **options)

    class WithData(Base):
        train_dataloader = val_dataloader = staticmethod(lambda: loaders()[1])

    options["trainer"] = make_trainer(max_epochs=1)
    assert add_sidekick(WithData(), **options).fit is not None


def test_a_checkpoint_without_temperatures(tmp_path: Path) -> None:
    duo = DuoCallback(tiny, summary=False)
    trainer = make_trainer(duo, max_epochs=1, limit_val_batches=0)
    trainer.fit(Base(), *loaders())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="saved before the first validation"):
        DuoModule.from_checkpoint(tmp_path / "run.ckpt", Base, tiny)


def test_a_checkpoint_of_an_earlier_version_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, run = saved(Base(), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        for key in ("calling", "given", "named", "example"):
            state.pop(key, None)
    torch.save(checkpoint, path)
    recwarn.clear()
    same(DuoModule.from_checkpoint(path, Base), run.module)
    assert any("did not keep whether inputs are resized" in str(w.message) for w in recwarn)
    for state in checkpoint["callbacks"].values():
        if "sidekick" in state:
            state["name"] = "tiny"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"tiny, is a module of your own; pass sidekick="):
        DuoModule.from_checkpoint(path, Base)


def test_a_part_does_not_stand_for_a_step(tmp_path: Path) -> None:
    path, _ = saved(Doubled(), tmp_path)
    with pytest.raises(ValueError, match="made by the step or a logits_fn, which no part"):
        DuoModule.from_checkpoint(path, Base().net)


class Waves(Whole):
    """Complex inputs, of which no example can be kept."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.real)


def test_any_input_can_be_in_a_run_that_is_saved(tmp_path: Path) -> None:
    x, y = images().tensors
    data = DataLoader(TensorDataset(x.to(torch.complex64), y), 16)
    duo = DuoCallback(tiny, sidekick_transform=lambda x: x.real, summary=False)
    trainer = make_trainer(duo, max_epochs=1)
    trainer.fit(Waves(), data, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")


def test_a_checkpoint_with_objects_is_read_on_demand(tmp_path: Path) -> None:
    path, run = saved(Base(), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "extra": functools.partial(print)}, path)
    with pytest.raises(ValueError, match=r"if you trust where it comes from, pass weights_only"):
        DuoModule.from_checkpoint(path, Base)
    same(DuoModule.from_checkpoint(path, Base, weights_only=False), run.module)
    with pytest.raises(ValueError, match=r"if you trust where it comes from, pass weights_only"):
        add_sidekick(Base(), *loaders(), sidekick=tiny, ckpt_path=str(path))
    again = Base()
    trainer = make_trainer(max_epochs=1)
    options = {"sidekick": tiny, "trainer": trainer, "summary": False, "weights_only": False}
    add_sidekick(again, *loaders(), ckpt_path=str(path), **options)
    x = images(seed=2).tensors[0]
    assert torch.equal(again.net.eval()(x), run.module.base.eval()(x))


def test_weights_that_changed_since_the_fit_are_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, _ = saved(Base(), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["net.4.bias"] += 1
    torch.save(checkpoint, path)
    recwarn.clear()
    DuoModule.from_checkpoint(path, Base)
    assert any("has changed since" in str(warning.message) for warning in recwarn)


ANSWER = """
import json, sys
import torch
probs, prediction, confidence, accept = torch.export.load(sys.argv[1]).module()(
    torch.load(sys.argv[2])
)
assert not any(name.startswith("lightning") for name in sys.modules)
print(json.dumps([probs.tolist(), accept.tolist()]))
"""


def test_from_a_trained_base_to_answers_in_a_fresh_process(tmp_path: Path) -> None:
    """A sidekick is added; its checkpoint, and nothing of the run, becomes a file that answers."""
    alone = make_trainer(max_epochs=2)
    alone.fit(Base(5), *loaders())
    alone.save_checkpoint(tmp_path / "best.ckpt")
    trainer = make_trainer(max_epochs=1)
    options = {"pretrained": False, "probe": 0, "summary": False, "target_accuracy": 0.6}
    run = add_sidekick(
        Base(5),
        *loaders(),
        sidekick="resnet10t",
        ckpt_path=str(tmp_path / "best.ckpt"),
        trainer=trainer,
        **options,
    )
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    duo = DuoModule.from_checkpoint(tmp_path / "run.ckpt", Base)
    x = images(seed=2).tensors[0]
    torch.save(x, tmp_path / "x.pt")
    file = export_duo(duo, tmp_path / "duo.pt2", x[:2])
    command = [sys.executable, "-c", ANSWER, str(file), str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    probs, accept = json.loads(done.stdout)
    want = run.module(x)
    torch.testing.assert_close(torch.tensor(probs), want.probs, rtol=0, atol=1e-5)
    assert accept == want.accept.tolist()


# ---- weights that are shared ----


def test_a_duo_may_share_its_weights(tmp_path: Path) -> None:
    module = Base()
    _, run = saved(module, tmp_path)
    module.train()
    shared, copied = run.duo(copy=False), run.duo()
    same(shared, copied)
    assert shared.base is module.net
    assert not module.net.training
    assert all(p.requires_grad for p in module.parameters())
    assert copied.base is not module.net
    with torch.no_grad():
        module.net[4].bias += 1
    x = images(seed=2).tensors[0]
    assert torch.equal(shared.base(x), module.net(x))
    assert not torch.equal(copied.base(x), module.net(x))


def test_training_goes_on_after_a_duo_shared_the_models() -> None:
    modes = []

    class Notes(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            modes.append(module.net[1].training)

    module, run = Base(), DuoCallback(tiny, summary=False)
    for _ in range(2):
        make_trainer(run, Notes(), max_epochs=1).fit(module, *loaders())
        run.duo(copy=False)
        assert not module.net[1].training
    assert all(modes)


def test_a_trainer_whose_fit_failed_takes_another_sidekick() -> None:
    class Fails(Base):
        def validation_step(self, batch: list, batch_idx: int) -> Tensor:
            raise RuntimeError("no")

    trainer = make_trainer(max_epochs=1)
    options = {"sidekick": tiny, "trainer": trainer, "summary": False}
    with pytest.raises(RuntimeError, match="no"):
        add_sidekick(Fails(), *loaders(), **options)
    assert add_sidekick(Base(), *loaders(), **options).fit is not None


BIG = """
import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from lightning_duo import add_sidekick

WIDE = 16384  # twice 16384 * 8192 * 4 bytes: 1 GiB

class Big(L.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = [(8, 8192), (8192, WIDE), (WIDE, 8192), (8192, 3)]
        self.net = nn.Sequential(*(nn.utils.skip_init(nn.Linear, *size) for size in sizes))
        for parameter in self.parameters():
            parameter.data.fill_(1e-3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def peak():  # MB; the largest of a process's own, while getrusage's may be its parent's
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

data = TensorDataset(torch.randn(8, 8), torch.arange(8) % 3)
loader = DataLoader(data, 8)
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
               enable_model_summary=False, max_epochs=1, accelerator="cpu")

def run(module):
    duo = add_sidekick(module, loader, loader, sidekick=lambda k: nn.Linear(8, k), summary=False,
                       trainer=L.Trainer(**options)).duo(copy=False)
    duo(data.tensors[0])
    return duo

class Small(Big):
    def __init__(self):
        L.LightningModule.__init__(self)
        self.net = nn.Linear(8, 3)

run(Small())  # what libraries take
before = peak()
module = Big()
models = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
run(module)
print((peak() - before) / models)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_base_is_never_copied() -> None:
    """Training a sidekick for a base of 1 GB, the duo, and its answers, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.1

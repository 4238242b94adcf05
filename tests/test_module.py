"""DuoModule: its three modes, and what survives saving and moving."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICES, small_net
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_duo import DuoModule, DuoOutput, LogitsOf, Temperatures

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_duo(**options: object) -> DuoModule:
    torch.manual_seed(0)
    return DuoModule(small_net(width=32), small_net(), Temperatures(1.5, 0.7), **options).eval()


def test_weighted_mode_is_the_weighted_sum() -> None:
    duo = make_duo(threshold=0.4)
    output = duo(X)
    z = 1.5 * duo.base(X).double() + 0.7 * duo.sidekick(X).double()
    probs = z.softmax(1)
    assert isinstance(output, DuoOutput)
    torch.testing.assert_close(output.probs.double(), probs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(duo.logits(X).double(), z, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.prediction, probs.argmax(1))
    assert torch.equal(output.accept, output.confidence >= 0.4)
    assert 0 < output.accept.sum() < len(X)


def test_unweighted_mode_is_the_mean() -> None:
    duo = make_duo(mode="unweighted")
    assert duo.temperatures.tolist() == [0.5, 0.5]
    mean = (duo.base(X) + duo.sidekick(X)) / 2
    torch.testing.assert_close(duo(X).probs, mean.softmax(1))


def test_uq_only_mode_keeps_the_predictions_of_the_base() -> None:
    duo = make_duo(mode="uq_only")
    output = duo(X)
    prediction = duo.base(X).argmax(1)
    assert torch.equal(output.prediction, prediction)
    expected = duo.logits(X).softmax(1).gather(1, prediction[:, None]).squeeze(1)
    torch.testing.assert_close(output.confidence, expected)


@pytest.mark.parametrize("mode", ["weighted", "unweighted", "uq_only"])
def test_save_and_load(mode: str, tmp_path: Path) -> None:
    duo = make_duo(mode=mode, threshold=0.3)
    duo.save(tmp_path / "new" / "duo.safetensors")
    torch.manual_seed(1)
    loaded = DuoModule.load(tmp_path / "new" / "duo.safetensors", small_net(width=32), small_net())
    assert loaded.mode == mode
    assert not loaded.training
    for mine, theirs in zip(loaded(X), duo(X), strict=True):
        assert torch.equal(mine, theirs)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["duo.safetensors"]


def test_shared_and_channels_last_weights_can_be_saved(tmp_path: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(4))
    conv(X)
    duo = DuoModule(conv.to(memory_format=torch.channels_last), conv, (1.0, 0.5)).eval()
    duo.save(tmp_path / "duo.safetensors")
    loaded = DuoModule.load(tmp_path / "duo.safetensors", *[(m := copy.deepcopy(conv)), m])
    assert torch.equal(loaded(X).probs, duo(X).probs)


def test_a_duo_of_compiled_models_is_saved_like_the_eager_one(tmp_path: Path) -> None:
    duo = make_duo()
    compiled = DuoModule(torch.compile(duo.base), torch.compile(duo.sidekick), duo.temperatures)
    compiled.save(tmp_path / "duo.safetensors")
    models = small_net(width=32), small_net()
    assert torch.equal(DuoModule.load(tmp_path / "duo.safetensors", *models)(X).probs, duo(X).probs)
    duo.save(tmp_path / "duo.safetensors")
    models = torch.compile(small_net(width=32)), small_net()
    loaded = DuoModule.load(tmp_path / "duo.safetensors", *models)
    assert torch.equal(loaded.base._orig_mod[1].weight, duo.base[1].weight)


def test_loading_what_does_not_fit_says_so(tmp_path: Path) -> None:
    path = tmp_path / "duo.safetensors"
    make_duo().save(path)
    with pytest.raises(ValueError, match=r"(?s)duo\.safetensors .*fit.*size mismatch"):
        DuoModule.load(path, small_net(width=8), small_net())
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a duo saved by"):
        DuoModule.load(tmp_path / "other.safetensors", small_net(), small_net())
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(ValueError, match="not a duo saved by"):
        DuoModule.load(tmp_path / "text.safetensors", small_net(), small_net())
    with pytest.raises(FileNotFoundError):
        DuoModule.load(tmp_path / "none.safetensors", small_net(), small_net())


def test_half_precision_keeps_the_temperatures_exact() -> None:
    duo = make_duo(threshold=0.1234567)
    duo.temperatures.copy_(torch.tensor([1.23456789, 0.7654321]))
    before = (duo.temperatures.clone(), duo.threshold.clone())
    duo = duo.to(torch.bfloat16)
    assert duo.base[1].weight.dtype == torch.bfloat16
    assert torch.equal(duo.temperatures, before[0])
    assert torch.equal(duo.threshold, before[1])
    assert duo(X.bfloat16()).probs.dtype == torch.float32


def test_state_dict_deepcopy_and_device_moves() -> None:
    duo = make_duo()
    other = copy.deepcopy(duo)
    assert {"temperatures", "threshold"} <= set(duo.state_dict())
    other.load_state_dict(duo.state_dict())
    assert torch.equal(other(X).probs, duo(X).probs)
    assert duo.to("meta").temperatures.device.type == "meta"


def conv_duo() -> DuoModule:
    def net(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, 6),
        )

    torch.manual_seed(0)
    return DuoModule(net(12), net(6), (20.0, 9.0), threshold=0.5).eval()


def assert_close(mine: DuoOutput, theirs: DuoOutput, atol: float) -> None:
    for name, x, y in zip(DuoOutput._fields, mine, theirs, strict=True):
        assert x.dtype == y.dtype, name
        if x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=name)
        elif atol < 1e-5:
            assert torch.equal(x, y), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["weighted", "uq_only"])
def test_compiled_whole_for_any_batch(mode: str, device: str) -> None:
    torch._dynamo.reset()
    duo = conv_duo().to(device)
    duo.mode = mode
    compiled = torch.compile(duo, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for n in (9, 5, 2):
            x = torch.randn(n, 3, 8, 8).to(device)
            assert_close(compiled(x), duo(x), atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_and_half_precision(compiled: bool, device: str) -> None:
    torch._dynamo.reset()
    duo, x = conv_duo().to(device), torch.randn(9, 3, 8, 8).to(device)
    with torch.no_grad():
        want = duo(x)
        run = torch.compile(duo, fullgraph=True) if compiled else duo
        with torch.autocast(device, dtype=torch.bfloat16):
            assert_close(run(x), want, atol=0.05)
        half = copy.deepcopy(duo).bfloat16()
        run = torch.compile(half, fullgraph=True) if compiled else half
        assert_close(run(x.bfloat16()), want, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_duo_trains_like_the_eager_one(device: str) -> None:
    torch._dynamo.reset()
    duo, x = conv_duo().to(device), torch.randn(9, 3, 8, 8).to(device)
    grads = []
    for run in (duo, torch.compile(duo, fullgraph=True)):
        duo.zero_grad()
        run(x).probs[:, 0].sum().backward()
        grads.append([p.grad.clone() for p in duo.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_channels_last_pickle_and_copies_of_a_compiled_duo() -> None:
    torch._dynamo.reset()
    duo, x = conv_duo(), torch.randn(9, 3, 8, 8)
    want = duo(x)
    assert torch.is_inference(duo(x).probs) is False
    with torch.inference_mode():
        assert torch.is_inference(duo(x).probs)
    last = copy.deepcopy(duo).to(memory_format=torch.channels_last)
    assert last.base[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(last(x.to(memory_format=torch.channels_last)), want, atol=1e-6)
    duo.compile(fullgraph=True)  # in place
    assert_close(duo(x), want, atol=1e-6)
    assert_close(pickle.loads(pickle.dumps(duo))(x), want, atol=1e-6)
    assert_close(copy.deepcopy(duo)(x), want, atol=1e-6)


def test_members_may_return_objects_and_other_dtypes() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net().eval()

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.net(x).half())

    duo = DuoModule(Wrapped(), small_net(), (1.0, 1.0)).eval()
    assert duo(X).probs.shape == (64, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": (1.0, -0.1)}, r"temperatures .*at least 0.*\(1\.0, -0\.1\)"),
        ({"temperatures": (1.0, float("nan"))}, r"temperatures .*finite.*\(1\.0, nan\)"),
        ({"temperatures": (1.0,)}, r"temperatures .*two .*\(1\.0,\)"),
        ({"mode": "mean"}, "mode .*'uq_only'.*'mean'"),
        ({"threshold": 98.0}, r"threshold .*\[0, 1\].*98\.0"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    arguments = {"temperatures": (1.0, 1.0), **options}
    with pytest.raises(ValueError, match=message):
        DuoModule(small_net(), small_net(), **arguments)


def test_bad_members_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(64, 4\) and \(64, 5\).*classes"):
        DuoModule(small_net(4), small_net(5), (1.0, 1.0)).eval()(X)
    with pytest.raises(ValueError, match=r"\(64, 4\) and \(64, 3, 8, 8\).*classes"):
        DuoModule(small_net(), nn.Identity(), (1.0, 1.0)).eval()(X)
    classes = LogitsOf(lambda net, x: net(x).argmax(1), small_net())
    with pytest.raises(ValueError, match=r"sidekick .*\(N, K\).*'logits', got .*int64.*logits_at="):
        DuoModule(small_net(), classes, (1.0, 1.0)).eval()(X)


def test_a_base_that_works_in_place_leaves_the_sidekicks_inputs_alone() -> None:
    base = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 4))
    duo = DuoModule(base, small_net(), (1.0, 0.5)).eval()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    first, second = duo.member_logits(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(first, base(kept.clone()))
    torch.testing.assert_close(second, duo.sidekick(kept))


def test_tensors_that_overlap_and_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Overlapping(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            whole = torch.arange(8.0)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[2:6])

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"calls": 3}

    duo = DuoModule(Overlapping(), nn.Linear(4, 3), (1.0, 0.5)).eval()
    duo.save(tmp_path / "duo.safetensors")
    again = DuoModule.load(tmp_path / "duo.safetensors", Overlapping(), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    assert torch.equal(again(x).probs, duo(x).probs)
    with pytest.raises(ValueError, match=r"base\._extra_state .*\(dict\)"):
        DuoModule(Extra(4, 3), nn.Linear(4, 3), (1.0, 0.5)).save(tmp_path / "extra.safetensors")
    assert not (tmp_path / "extra.safetensors").exists()


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    DuoModule(nn.Linear(4, 3), nn.Linear(4, 3), (1.0, 0.5)).save(tmp_path / "duo.safetensors")
    (tmp_path / "plain").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("duo.safetensors", "plain")]
    assert modes[0] == modes[1]


def test_temperatures_that_are_trained_elsewhere_are_copied() -> None:
    trained = nn.Parameter(torch.tensor([1.0, 0.5]))
    duo = DuoModule(nn.Linear(4, 3), nn.Linear(4, 3), 2 * trained)
    assert not duo.temperatures.requires_grad
    assert torch.equal(copy.deepcopy(duo).temperatures, torch.tensor([2.0, 1.0]))

"""Exported duos, each run in a fresh process where neither this library nor Lightning exists."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Classifier, edge_rows, loader, make_trainer, small_images, small_net
from subprocesses import assert_same, run_file
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_duo import DuoCallback, DuoModule, DuoOutput
from lightning_duo.export import SUFFIX, Format, export_duo
from lightning_duo.isolation import evaluating

FORMATS = ("program", "aoti", "onnx")
MODES = ("weighted", "uq_only")


def conv_net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4 * width, 5),
    )


def make_duo(mode: str) -> DuoModule:
    """Two models whose predictions vary; the sidekick sees smaller images."""
    torch.manual_seed(0)
    base, sidekick = conv_net(12), nn.Sequential(v2.Resize(8), conv_net(6))
    x = torch.randn(64, 3, 16, 16)
    for net, last in ((base, base[-1]), (sidekick, sidekick[1][-1])):
        net(x)  # running statistics of the batch norms
        with evaluating(net):
            last.weight /= net(x).std(0).unsqueeze(1)
            last.bias -= net(x).mean(0)
    return DuoModule(base, sidekick, (1.5, 0.7), mode=mode, threshold=0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_file_says_what_the_module_says(format: Format, mode: str, tmp_path: Path) -> None:
    duo = make_duo(mode)
    batches = {f"of_{n}": torch.randn(n, 3, 16, 16) for n in (1, 2, 37)}
    path = export_duo(
        duo, tmp_path / "new" / f"duo{SUFFIX[format]}", batches["of_1"], format=format
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert duo.training
    assert duo.base[1].training
    assert all(p.requires_grad for p in duo.parameters())

    results, description = run_file(path, format, batches)
    duo.eval()
    for name, x in batches.items():
        assert_same(results[name], duo(x))
    many = results["of_37"]
    assert 0 < many.accept.sum() < 37
    assert len(many.prediction.unique()) > 2
    assert description["temperatures"] == pytest.approx([1.5, 0.7])
    assert description["threshold"] == 0.5
    assert description["mode"] == mode
    assert description["num_classes"] == 5
    assert description["inputs"] == [{"shape": [None, 3, 16, 16], "dtype": "float32"}]
    assert description["versions"]["torch"] == torch.__version__


class Half(nn.Module):
    """The base's or the sidekick's part of inputs that are logits already."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.index]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_without_a_softmax_are_the_same_in_every_format(
    format: Format, tmp_path: Path
) -> None:
    base, sidekick, want = edge_rows(6)
    for mode in MODES:
        duo = DuoModule(Half(0), Half(1), (1.5, 1.0), mode=mode)
        both = torch.stack([base, sidekick], 1)
        path = export_duo(duo, tmp_path / f"{mode}{SUFFIX[format]}", both, format=format)
        result = run_file(path, format, {"edges": both})[0]["edges"]
        assert_same(result, duo(both))
        exists = torch.tensor([exists for *_, exists in want.values()])
        assert torch.equal(result.accept, exists)  # NaN reaches no threshold, not even 0


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_is_hardly_larger_than_the_weights(format: Format, tmp_path: Path) -> None:
    duo = DuoModule(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4000), nn.ReLU(), nn.Linear(4000, 4000)),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4000)),
        (1.0, 0.5),
    )
    path = export_duo(
        duo, tmp_path / f"duo{SUFFIX[format]}", torch.randn(2, 3, 8, 8), format=format
    )
    assert path.stat().st_size <= 1.05 * sum(p.nbytes for p in duo.parameters())


def test_what_the_callback_trained_can_be_exported(tmp_path: Path) -> None:
    callback = DuoCallback(sidekick=small_net, sidekick_transform=v2.Resize(8))
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Classifier(), loader(small_images(64)), loader(small_images(64, seed=1)))
    duo, x = callback.module, torch.randn(9, 3, 8, 8)
    path = export_duo(duo, tmp_path / "duo.pt2", x)
    assert_same(run_file(path, "program", {"x": x})[0]["x"], duo(x))


def test_users_may_export_the_module_by_themselves(tmp_path: Path) -> None:
    duo = make_duo("weighted").eval()
    x = torch.randn(4, 3, 16, 16)
    program = torch.export.export(duo, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "lightning_duo" not in str(program.graph)  # loads without this package
    assert_same(DuoOutput(*program.module()(x[:3])), duo(x[:3]))


class Pixels(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.net(batch["pixels"])}


def test_inputs_may_be_mappings_and_half_precision(tmp_path: Path) -> None:
    duo = DuoModule(Pixels(small_net(width=32)), Pixels(small_net()), (1.0, 0.5)).bfloat16().eval()
    x = {"pixels": torch.randn(3, 3, 8, 8).bfloat16()}
    module = torch.export.load(export_duo(duo, tmp_path / "duo.pt2", x)).module()
    assert not module(x)[0].requires_grad
    y = {"pixels": torch.randn(5, 3, 8, 8).bfloat16()}
    assert_same(DuoOutput(*module(y)), duo(y))
    float_duo, pixels = duo.float(), torch.randn(2, 3, 8, 8)
    path = export_duo(float_duo, tmp_path / "float.onnx", {"pixels": pixels}, format="onnx")
    result = run_file(path, "onnx", {"y": torch.randn(5, 3, 8, 8)})[0]["y"]
    assert result.probs.shape == (5, 4)
    duo = duo.bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16"):
        export_duo(duo, tmp_path / "duo.onnx", x, format="onnx")


class Wrapped(nn.Module):
    """Gives its logits in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(x))


class Stubborn(nn.Module):
    """Looks at a value, which no trace can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


class Sized(nn.Module):
    """Does something else for some batch sizes."""

    def __init__(self, special: Callable[[int], bool]) -> None:
        super().__init__()
        self.net, self.special = small_net(), special

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.net(x) if self.special(x.shape[0]) else self.net(x)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("special", [lambda n: n <= 40, lambda n: n % 2 == 0, lambda n: n == 1])
def test_models_that_depend_on_the_batch_size_are_refused(
    special: Callable[[int], bool], format: Format, tmp_path: Path
) -> None:
    duo = DuoModule(small_net(), Sized(special), (1.0, 2.0))
    with pytest.raises(RuntimeError, match=r"batch size"):
        export_duo(duo, tmp_path / f"duo{SUFFIX[format]}", torch.randn(3, 3, 8, 8), format=format)
    assert list(tmp_path.iterdir()) == []


def test_autocast_around_the_export_does_not_matter(tmp_path: Path) -> None:
    duo, x = make_duo("weighted").eval(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        path = export_duo(duo, tmp_path / "duo.pt2", x)
    assert_same(DuoOutput(*torch.export.load(path).module()(x)), duo(x))


def test_bad_input_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    duo, x = DuoModule(small_net(), small_net(), (1.0, 0.5)), torch.randn(2, 3, 8, 8)
    path, folder = tmp_path / "duo.pt2", tmp_path / "folder.pt2"
    folder.mkdir()
    with pytest.raises(TypeError, match=r"DuoModule.*Sequential"):
        export_duo(small_net(), path, x)
    with pytest.raises(ValueError, match=r"format .*'torchscript'"):
        export_duo(duo, path, x, format="torchscript")
    with pytest.raises(ValueError, match=r"\*\.pt2.*duo\.onnx"):
        export_duo(duo, tmp_path / "duo.onnx", x)
    with pytest.raises(ValueError, match=r"example_input .*batch.*no tensor"):
        export_duo(duo, path, 3.0)
    with pytest.raises(ValueError, match=r"example_input .*batch"):
        export_duo(duo, path, x[:0])
    with pytest.raises(ValueError, match=r"cannot run example_input"):
        export_duo(duo, path, x[:, :2])
    with pytest.raises(ValueError, match=r"folder\.pt2 is a folder"):
        export_duo(duo, folder, x)
    with pytest.raises(ValueError, match=r"example_input .*meta.*cpu"):
        export_duo(duo, path, x.to("meta"))
    for name in ("base", "sidekick"):
        members = {"base": Wrapped(), "sidekick": Wrapped(), name: Stubborn()}
        with pytest.raises(RuntimeError, match=rf"trace the {name}\b.*Stubborn"):
            export_duo(DuoModule(**members, temperatures=(1.0, 0.5)), path, x)
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", MODES)
def test_packages_for_cuda_hold_the_kernel(mode: str, tmp_path: Path) -> None:
    duo = make_duo(mode).eval().cuda()
    x = torch.randn(37, 3, 16, 16, device="cuda")
    for format in ("program", "aoti"):
        path = export_duo(duo, tmp_path / f"{format}.pt2", x[:1], format=format)
        if format == "program":
            run = torch.export.load(path).module()
        else:
            run = torch._inductor.aoti_load_package(str(path))
        torch.testing.assert_close(run(x)[0], duo(x).probs, rtol=0, atol=1e-5)
        assert torch.equal(run(x)[1], duo(x).prediction)

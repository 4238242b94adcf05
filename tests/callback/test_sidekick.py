"""How sidekicks are built, and what is said when they cannot be."""

import functools
import random
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
import torchvision
from helpers import TRAIN, VAL, Classifier, digest, loader, make_trainer, small_net
from runs import fitted, make_duo
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_duo import DuoCallback
from lightning_duo.inputs import input_transform
from lightning_duo.zoo import build_sidekick, head_parameters

X = torch.randn(2, 3, 64, 64)
SMALL = "resnet10t"


@pytest.mark.parametrize(
    "source", [SMALL, "torchvision/shufflenet_v2_x0_5", "torchvision/squeezenet1_1"]
)
def test_named_sidekicks_have_the_wanted_classes_and_no_opinion(source: str) -> None:
    model = build_sidekick(source, 7, pretrained=False).eval()
    assert torch.equal(model(X), torch.zeros(2, 7))
    head = head_parameters(model, 7)
    assert 1 <= len(head) <= 2
    assert head[0][1].shape[0] == 7


def test_modules_and_callables() -> None:
    own = small_net()
    assert build_sidekick(own, 4) is own
    assert build_sidekick(lambda k: nn.Linear(3, k), 9).out_features == 9
    with pytest.raises(TypeError, match=r"nn\.Module, got int"):
        build_sidekick(lambda k: k, 9)
    with pytest.raises(TypeError, match="got int"):
        build_sidekick(3, 9)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnt34", "'resnet34'"),
        ("torchvision/resnet_34", "'torchvision/resnet34'"),
        ("torchvision/vit_b16", "'torchvision/vit_b_16'"),
        ("efficientnet-b0", "'efficientnet_b0'"),
        ("squeezenet1_1", "'torchvision/squeezenet1_1'"),
    ],
)
def test_unknown_names_are_refused_at_once_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'.*{near}"):
        DuoCallback(sidekick=name)


@pytest.mark.parametrize("name", [SMALL, "torchvision/shufflenet_v2_x0_5"])
def test_without_network_both_remedies_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"weights=.*pretrained=False"):
        build_sidekick(name, 4)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "ckpt"])
@pytest.mark.parametrize("classes", [1000, 5])
def test_local_weights(ending: str, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = timm.create_model(SMALL, num_classes=classes).eval()
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        state = trained.state_dict()
        torch.save({"state_dict": state} if ending == "ckpt" else state, path)
    model = build_sidekick(SMALL, 5, weights=path).eval()
    assert torch.equal(model.forward_features(X), trained.forward_features(X))
    if classes == 5:
        assert torch.equal(model(X), trained(X))
    else:
        assert torch.equal(model(X), torch.zeros(2, 5))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"ResNet: \d+ tensors missing"):
        build_sidekick(SMALL, 5, weights=tmp_path / "w.safetensors")


def test_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth .*more than tensors"):
        build_sidekick(SMALL, 5, weights=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_arguments_that_contradict() -> None:
    with pytest.raises(FileNotFoundError, match="no/such/file"):
        DuoCallback(sidekick=SMALL, weights="no/such/file")
    with pytest.raises(ValueError, match="weights= goes with a model name"):
        DuoCallback(sidekick=small_net(), weights="w.pth")
    with pytest.raises(ValueError, match=r"num_classes .*at least 2.* 1"):
        DuoCallback(sidekick=SMALL, num_classes=1)
    with pytest.raises(ValueError, match=r"probe .*\[0, 1\].* 3"):
        DuoCallback(sidekick=SMALL, probe=3)
    with pytest.raises(TypeError, match="sidekick_transform must be callable"):
        DuoCallback(sidekick=SMALL, sidekick_transform=96)


def test_building_leaves_the_random_streams_alone() -> None:
    streams = []

    class Look(L.Callback):
        def on_train_start(self, *_: object) -> None:
            streams.append(digest([random.getstate(), torch.get_rng_state()]))

    for duo in ([], [make_duo(SMALL, pretrained=False, num_classes=4)]):
        L.seed_everything(3, verbose=False)
        make_trainer(*duo, Look()).fit(Classifier(), loader(TRAIN), loader(VAL))
    assert streams[0] == streams[1]


class TimmBase(Classifier):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm.create_model(name)


def test_inputs_are_renormalised_where_both_models_state_how_they_normalise() -> None:
    base, model = TimmBase("tf_efficientnet_lite0"), timm.create_model(SMALL)
    pixels = torch.rand(2, 3, 64, 64)
    transform = input_transform(model, base, (pixels - 0.5) / 0.5)
    mean = torch.tensor(model.pretrained_cfg["mean"])[:, None, None]
    std = torch.tensor(model.pretrained_cfg["std"])[:, None, None]
    torch.testing.assert_close(transform((pixels - 0.5) / 0.5), (pixels - mean) / std)
    assert input_transform(model, TimmBase("resnet18"), pixels) is None
    assert input_transform(model, Classifier(), pixels) is None


def test_inputs_are_resized_for_a_model_of_one_size() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    transform = input_transform(vit, Classifier(), X)
    assert vit(transform(X)).shape == (2, 3)
    assert input_transform(vit, Classifier(), torch.zeros(2, 5)) is None


def test_a_sidekick_that_gives_no_logits_is_named() -> None:
    class Pair(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.net = small_net(classes)

        def forward(self, x: Tensor) -> tuple:
            return (self.net(x), x)

    for sidekick, said in ((lambda _: nn.Identity(), r"\(16, 3, 8, 8\)"), (Pair, "tuple")):
        with pytest.raises(ValueError, match=f"the sidekick .*{said}"):
            fitted(make_duo(sidekick))


def test_a_sidekick_that_ends_in_softmax_is_refused() -> None:
    def probabilities(classes: int) -> nn.Module:
        return nn.Sequential(small_net(classes), nn.Softmax(dim=1))

    with pytest.raises(ValueError, match=r"sidekick gives probabilities .* take the softmax off"):
        fitted(make_duo(probabilities))
    assert fitted(make_duo(lambda classes: probabilities(classes)[0])).duo.fit is not None


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m1", "caformer_s18", "resnet10t"])
def test_every_new_head_can_learn(name: str) -> None:
    """Heads with hidden layers or norms keep those; only the layer of the scores is zero."""
    torch.manual_seed(0)
    model = build_sidekick(name, 4, pretrained=False).eval()
    x = torch.randn(4, 3, 224, 224)
    logits = model(x)
    assert torch.equal(logits, torch.zeros(4, 4))
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    weights = [p for n, p in head_parameters(model, 4) if p.ndim > 1]
    assert max(float(p.grad.abs().max()) for p in weights if p.grad is not None) > 0


def test_the_head_is_the_layer_with_the_scores() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(8, 4), nn.Linear(192, 8)

    names = [name for name, _ in head_parameters(HeadFirst(), 4)]
    assert names == ["head.weight", "head.bias"]
    assert head_parameters(HeadFirst(), 5) == []


def test_unknown_tags_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"'resnet18\.nope'.*a1_in1k"):
        DuoCallback(sidekick="resnet18.nope")
    DuoCallback(sidekick="resnet18.a1_in1k")


def test_weights_in_odd_files(tmp_path: Path) -> None:
    trained = timm.create_model(SMALL, num_classes=5).eval()
    wrapped = {f"module._orig_mod.{k}": v for k, v in trained.state_dict().items()}
    torch.save(wrapped, tmp_path / "ddp.pth")
    model = build_sidekick(SMALL, 5, weights=tmp_path / "ddp.pth").eval()
    assert torch.equal(model(X), trained(X))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth .*state dict"):
        build_sidekick(SMALL, 5, weights=tmp_path / "list.pth")


def test_grey_images_are_not_renormalised_to_colour() -> None:
    grey = TimmBase("tf_efficientnet_lite0")
    assert input_transform(timm.create_model(SMALL), grey, X[:, :1]) is None


def test_makers_are_given_the_number_of_classes_as_they_take_it() -> None:
    for make in (
        functools.partial(timm.create_model, "resnet10t"),
        torchvision.models.shufflenet_v2_x0_5,
        lambda count: small_net(count),
    ):
        model = build_sidekick(make, 4, pretrained=False)
        size = 8 if isinstance(model, nn.Sequential) else 32
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 4)

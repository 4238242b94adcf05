"""Sidekicks for images of one channel, or of many."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_duo.inputs import input_transform
from lightning_duo.zoo import build_sidekick

SMALL = "resnet10t"
VISION = "torchvision/shufflenet_v2_x0_5"


def images(channels: int) -> Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(channels))


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("name", [SMALL, VISION, "torchvision/regnet_y_400mf"])
def test_named_sidekicks_take_any_number_of_channels(name: str, channels: int) -> None:
    model = build_sidekick(name, 7, pretrained=False, in_chans=channels).eval()
    assert torch.equal(model(images(channels)), torch.zeros(2, 7))
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    assert first.in_channels == channels
    assert first.weight.std() > 0


@pytest.mark.parametrize("channels", [1, 6, 13])
def test_filters_of_three_channels_are_carried_over_as_timm_does(
    channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trained = timm.create_model(SMALL).eval()
    path = tmp_path / "w.safetensors"
    save_file(trained.state_dict(), path)
    model = build_sidekick(SMALL, 5, weights=path, in_chans=channels).eval()
    theirs = timm.create_model(
        SMALL, pretrained=True, in_chans=channels, pretrained_cfg_overlay={"file": str(path)}
    ).eval()
    x = images(channels)
    torch.testing.assert_close(model.forward_features(x), theirs.forward_features(x))
    if channels == 1:  # gray is the same in every color
        colors = x.expand(-1, 3, -1, -1)
    elif channels == 6:  # twice the same image, at half the weight
        x = x[:, :3].repeat(1, 2, 1, 1)
        colors = x[:, :3]
    else:
        return
    want = trained.forward_features(colors)
    torch.testing.assert_close(model.forward_features(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_published_filters_of_torchvision_are_carried_over(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state)
    )
    model = build_sidekick(VISION, 4, in_chans=channels)
    filters, own = state["conv1.0.weight"], model.conv1[0].weight
    want = timm.models.adapt_input_conv(channels, filters)
    torch.testing.assert_close(own, want)
    assert torch.equal(model.state_dict()["conv5.0.weight"], state["conv5.0.weight"])


def test_filters_of_other_channels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model(SMALL, in_chans=2).state_dict(), path)
    with pytest.raises(ValueError, match=r"1 of another shape \['conv1\.0\.weight'\]"):
        build_sidekick(SMALL, 5, weights=path, in_chans=13)
    model = build_sidekick(SMALL, 5, weights=path, in_chans=2)
    assert model.eval()(images(2)).shape == (2, 5)


def test_a_model_without_a_first_convolution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(*_: object, channels: int = 3, **__: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64 * 64, 5))

    monkeypatch.setattr("torchvision.models.get_model", flat)
    with pytest.raises(ValueError, match=r"no convolution of 3 channels.*num_classes -> nn\.Mod"):
        build_sidekick(VISION, 5, pretrained=False, in_chans=13)
    model = build_sidekick(lambda num_classes: flat(num_classes, channels=13), 5)
    assert model(images(13)).shape == (2, 5)


def test_images_of_many_channels_are_not_normalised_as_colors() -> None:
    base = nn.Sequential(timm.create_model("tf_efficientnet_lite0", in_chans=13))
    sidekick = build_sidekick(SMALL, 5, pretrained=False, in_chans=13)
    assert input_transform(sidekick, base, images(13)) is None


@pytest.mark.parametrize("source", [nn.Linear, lambda: nn.Linear(4, 3)])
def test_a_function_that_cannot_be_called_is_told_how_it_is(source: object) -> None:
    with pytest.raises(TypeError, match=r"called with the number of outputs, 3, .* num_classes ->"):
        build_sidekick(source, 3)
    assert build_sidekick(lambda outputs: nn.Linear(4, outputs), 3).out_features == 3

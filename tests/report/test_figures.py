"""The figures show the numbers that they say they show."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import make_logits
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

from lightning_duo import fit_temperatures, selective
from lightning_duo.evaluation import Form, Predictions, evaluate, mean_probability
from lightning_duo.report import figures, looks

ENSEMBLE = Form("2 models", {"base": 1, "sidekick": 1}, mean_probability)


def predictions(count: int = 400, margin: float = 2.0, *further: str) -> dict[str, Predictions]:
    logits = make_logits(count, 5, seed=1, margin=margin)
    forms = dict.fromkeys(further, ENSEMBLE)
    return evaluate(*logits, fit_temperatures(*logits), forms=forms)


def test_the_curves_are_those_of_the_models() -> None:
    models = predictions()
    (axes,) = figures.risk_coverage_figure(models).axes
    for name, line in zip(("base", "sidekick", "duo"), axes.lines, strict=False):
        curve = selective.risk_coverage_curve(models[name].confidence, models[name].correct)
        shown = np.interp(100 * curve.coverage.double(), *line.get_data())
        np.testing.assert_allclose(shown, 100 * curve.risk.double(), atol=1e-4)
        area = 100 * float(selective.aurc(models[name].confidence, models[name].correct))
        assert line.get_label() == f"{name} (AURC {area:.2f} %)"
    assert axes.get_title() == ""


def contrast(color: str, page: str) -> float:
    """The contrast ratio of WCAG 2."""
    light = []
    for each in (color, page):
        channels = np.array(mpl.colors.to_rgb(each))
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize(("colors", "page"), [(looks.COLORS, "#ffffff"), (looks.DARK, "#0f1419")])
def test_colors_are_seen_in_light_and_in_the_dark(colors: dict[str, str], page: str) -> None:
    assert list(colors) == list(looks.COLORS)
    assert len(set(colors.values())) == len(colors)
    for role, color in colors.items():
        assert role == "faint" or contrast(color, page) >= 4.4, role


def test_further_forms_are_drawn_each_in_its_own_way() -> None:
    names = [f"ensemble {i}" for i in range(9)]
    models = predictions(400, 2.0, *names)
    (axes,) = figures.risk_coverage_figure(models).axes
    lines = axes.lines[:12]
    drawn = {(look.color, str(look.style)) for look in looks.looks(models).values()}
    assert len(drawn) == len(lines) == 12
    assert len({line.get_color() for line in lines[:6]}) == 6
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [text.split(" (")[0] for text in texts] == ["base", "sidekick", "duo", *["2 models"] * 9]
    found = models["ensemble 0"]
    curve = selective.risk_coverage_curve(found.confidence, found.correct)
    shown = np.interp(100 * curve.coverage.double(), *lines[3].get_data())
    np.testing.assert_allclose(shown, 100 * curve.risk.double(), atol=1e-4)

    one = predictions(400, 2.0, "ensemble")
    panels = figures.confidence_figure(one).axes
    assert [axes.get_xlabel() for axes in panels] == [
        "confidence of the base, %",
        "confidence of the duo, %",
        "confidence, %\n2 models",
    ]
    assert panels[2].patches[0].get_data().values.sum() == pytest.approx(100)
    (axes,) = figures.reliability_figure(one).axes
    assert "2 models (ECE" in axes.get_legend().get_texts()[-1].get_text()


def test_models_without_a_label_are_drawn_under_their_key() -> None:
    probs = torch.full((20, 2), 0.5)
    only = {"a $1 model": Predictions.of(probs, torch.arange(20) % 2)}
    (axes,) = figures.risk_coverage_figure(only).axes
    assert axes.get_legend().get_texts()[0].get_text().startswith(r"a \$1 model (AURC")
    axes.figure.canvas.draw()


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    (axes,) = figures.risk_coverage_figure(predictions(5000)).axes
    x, y = axes.lines[2].get_data()
    assert len(x) <= figures.POINTS
    assert x[-1] == 100
    assert y[-1] == pytest.approx(100 * float(1 - predictions(5000)["duo"].correct.double().mean()))


def test_reliability_is_that_of_scikit_learn() -> None:
    models = predictions()
    confidence, correct = models["duo"].confidence.double(), models["duo"].correct
    count, mean, accuracy = figures.reliability(confidence, correct)
    expected = calibration_curve(correct, confidence, n_bins=15)
    filled = count > 0
    np.testing.assert_allclose(accuracy[filled], expected[0])
    np.testing.assert_allclose(mean[filled], expected[1])
    assert count.sum() == 400
    (axes,) = figures.reliability_figure(models).axes
    np.testing.assert_allclose(axes.lines[3].get_ydata(), 100 * accuracy[filled])


def test_histograms_add_up() -> None:
    models = predictions()
    for name, axes in zip(("base", "duo"), figures.confidence_figure(models).axes, strict=True):
        right, wrong = (patch.get_data().values for patch in axes.patches)
        assert right.sum() == pytest.approx(100)
        assert wrong.sum() == pytest.approx(100)
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        hits = int(models[name].correct.sum())
        assert texts == [f"right ({hits})", f"wrong ({400 - hits})"]


@pytest.mark.parametrize("draw", figures.FIGURES.values(), ids=list(figures.FIGURES))
@pytest.mark.parametrize(("count", "margin"), [(1, 2.0), (30, 100.0), (30, -100.0)])
def test_one_sample_and_models_that_are_all_right_or_all_wrong(
    draw: object, count: int, margin: float
) -> None:
    figure = draw(predictions(count, margin), title="A title")
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    assert figure.get_suptitle() == "A title"


def test_matplotlib_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        figures.risk_coverage_figure(predictions())


def test_drawing_leaves_the_users_style_and_random_numbers_alone() -> None:
    before = dict(mpl.rcParams)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for draw in figures.FIGURES.values():
        draw(predictions())
    torch.testing.assert_close(torch.rand(3), expected)
    assert dict(mpl.rcParams) == before

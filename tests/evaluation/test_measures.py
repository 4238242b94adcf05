"""The table of metrics against other libraries and the selective functions, also with weights."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_logits
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

from lightning_duo import selective
from lightning_duo.bootstrap import bootstrap, draws
from lightning_duo.calibration import calibrate
from lightning_duo.evaluation import (
    HIGHER_IS_BETTER,
    MEASURES,
    DuoMetrics,
    Measure,
    Predictions,
    evaluate,
    measure,
)
from lightning_duo.evaluation.judged import Judged
from lightning_duo.report import summary_table, write_report

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

ORACLES: dict[str, Callable[[Predictions], float]] = {
    "accuracy": lambda p: accuracy_score(p.targets, p.prediction),
    "f1": lambda p: f1_score(p.targets, p.prediction, average="macro"),
    "nll": lambda p: np.mean(p.nll.numpy()),
    "brier": lambda p: np.mean(p.brier.double().numpy()),
    "ece": lambda p: selective.expected_calibration_error(p.confidence, p.correct),
    "auroc": lambda p: selective.correctness_auroc(p.score, p.correct),
    "fpr95": lambda p: selective.fpr_at_tpr(p.score, p.correct, 0.95),
    "aurc": lambda p: selective.aurc(p.score, p.correct),
    "e_aurc": lambda p: selective.e_aurc(p.score, p.correct),
    "augrc": lambda p: selective.augrc(p.score, p.correct),
    "sac98": lambda p: selective.coverage_at_accuracy(p.score, p.correct, 0.98),
    "exact": lambda p: np.mean([p.correct[p.items == i].all() for i in p.items.unique()]),
}


def make_predictions(count: int, *, levels: int | None = None, classes: int = 4) -> Predictions:
    """In float64; with ``levels`` many samples tie, and ECE and the ranking use other numbers."""
    logits, _, targets = make_logits(count, classes, seed=count, margin=1.5)
    probs = logits.double().softmax(1)
    confidence = probs.amax(1)
    if levels:
        confidence = (confidence * levels).ceil() / levels
    score = -torch.special.entr(probs).sum(1) if not levels else confidence
    items = torch.arange(count) % max(1, count // 3)  # three rows of each, apart from each other
    return Predictions.of(probs, targets, confidence=confidence, score=score, items=items)


def taken(p: Predictions, rows: Tensor) -> Predictions:
    """Some samples, written out."""
    columns = (p.confidence, p.score, p.prediction, p.targets, p.nll, p.brier)
    return Predictions(*(column[rows] for column in columns), p.num_classes)


def expected(name: str, predictions: Predictions) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is undefined")
        return float(ORACLES[name](predictions))


CASES = [(1, None), (2, None), (40, None), (40, 5), (300, None), (300, 20)]


def test_every_measure_has_its_oracle() -> None:
    assert set(ORACLES) == set(MEASURES)
    assert HIGHER_IS_BETTER == {name: m.higher_is_better for name, m in MEASURES.items()}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("count", "levels"), CASES)
def test_a_measure_is_its_oracle(name: str, count: int, levels: int | None) -> None:
    predictions = make_predictions(count, levels=levels)
    if count == 1 and MEASURES[name].needs_items:
        assert name not in measure(predictions)
        return
    value = MEASURES[name].of(Judged.once(predictions))
    assert value.shape == (1,)
    assert value.dtype == torch.float64
    close = pytest.approx(expected(name, predictions), rel=1e-10, abs=1e-12, nan_ok=True)
    assert float(value) == close == measure(predictions)[name]


@pytest.mark.parametrize("name", [name for name in MEASURES if not MEASURES[name].needs_items])
@pytest.mark.parametrize(("count", "levels"), CASES)
def test_weights_count_as_samples_written_out(name: str, count: int, levels: int | None) -> None:
    predictions = make_predictions(count, levels=levels)
    weights = torch.cat(list(draws(count, 20, seed=7)))
    values = MEASURES[name].of(Judged.once(predictions).counted(weights))
    assert values.shape == (20,)
    for row, value in zip(weights, values.tolist(), strict=True):
        written = taken(predictions, torch.arange(count).repeat_interleave(row))
        close = pytest.approx(expected(name, written), rel=1e-10, abs=1e-12, nan_ok=True)
        assert value == close


def test_calibration_error_and_f1_are_those_of_torchmetrics() -> None:
    found = make_predictions(500, classes=7)
    values = measure(found)
    ece = binary_calibration_error(found.confidence, found.correct.long(), n_bins=15)
    f1 = multiclass_f1_score(found.prediction, found.targets, 7, average="macro")
    assert values["ece"] == pytest.approx(float(ece), abs=1e-6)
    assert values["f1"] == pytest.approx(float(f1), abs=1e-6)


def test_what_cannot_be_measured_is_named() -> None:
    good = make_predictions(10)
    with pytest.raises(ValueError, match="no samples to measure"):
        measure(taken(good, torch.arange(0)))
    columns = list(vars(good).values())
    for bad, message in ((1.5, "confidences as probabilities"), (math.nan, "probabilities")):
        with pytest.raises(ValueError, match=message):
            measure(Predictions(columns[0].index_fill(0, torch.tensor([3]), bad), *columns[1:]))
    with pytest.raises(ValueError, match="NaN"):
        measure(Predictions(columns[0], math.nan * columns[1], *columns[2:]))


def test_values_as_text() -> None:
    aurc, nll = MEASURES["aurc"], MEASURES["nll"]
    assert aurc.heading == "AURC↓"
    assert MEASURES["auroc"].heading == "AUROC↑"
    assert aurc.text(0.07351) == "7.35"
    assert nll.text(0.6064) == "0.606"
    assert aurc.text(math.nan) == "n/a"
    assert aurc.text(-1e-9) == "0.00"
    assert aurc.text(-0.01) == "-1.00"


def test_undefined_values_are_not_best() -> None:
    auroc, nll = MEASURES["auroc"], MEASURES["nll"]
    assert auroc.best({"base": math.nan, "duo": 0.7}) == {"duo"}
    assert auroc.best({"base": math.nan}) == set()
    assert auroc.best({"a": 0.6, "b": 0.7, "c": 0.7}) == {"b", "c"}
    assert nll.best({"a": 0.6, "b": 0.7}) == {"a"}


def test_one_entry_adds_a_measure_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = Measure(
        "SURE",
        "share of samples with a confidence above 0.5",
        True,
        lambda judged: judged.mean(judged.predictions.confidence > 0.5),
    )
    monkeypatch.setitem(MEASURES, "sure", sure)
    logits = make_logits(200, 5, seed=0)
    found = calibrate(*logits)
    predictions = evaluate(*logits, found.fit)
    share = float((predictions["duo"].confidence > 0.5).double().mean())
    assert 0 < share < 1
    metrics = DuoMetrics(5, found.fit)
    metrics.update(*logits)
    results = metrics.compute()
    assert results["duo"]["sure"] == measure(predictions["duo"])["sure"] == share

    resampled = bootstrap(predictions, resamples=30, seed=5)
    value, low, high = resampled.interval("duo", "sure")
    assert low <= value == share <= high
    weights = torch.cat(list(draws(200, 30, seed=5))).double()
    expected = weights @ (predictions["duo"].confidence > 0.5).double() / 200
    torch.testing.assert_close(resampled.resampled["duo"]["sure"], expected)

    console = Console(width=200, record=True)
    console.print(summary_table(results, found.fit, data="d", balance=None))
    text = console.export_text()
    assert "SURE↑" in text
    assert f" {100 * share:.1f} " in text

    path = tmp_path / "report.html"
    write_report(path, predictions, found, data="d", held_out=True, resamples=10)
    page = path.read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "share of samples with a confidence above 0.5, %" in page
    assert f"<span>{100 * share:.1f}</span>" in page


def test_the_readme_explains_every_measure() -> None:
    _, table = README.split("| metric | meaning |\n|---|---|\n")
    rows = table.split("\n\n")[0].splitlines()
    described = [", ".join(filter(None, (m.meaning, m.unit))) for m in MEASURES.values()]
    labels = [m.heading for m in MEASURES.values()]
    assert rows == [f"| {a} | {b} |" for a, b in zip(labels, described, strict=True)]

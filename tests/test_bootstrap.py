"""Bootstrap replicates against measuring the drawn samples, and intervals against SciPy."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_duo import selective
from lightning_duo.bootstrap import Bootstrap, bootstrap, draws
from lightning_duo.evaluation import Predictions, measure

MODULE = sys.modules[bootstrap.__module__]


def make_predictions(
    count: int, classes: int = 4, *, seed: int = 0, levels: int | None = None, skill: float = 1.5
) -> Predictions:
    """A model that is right more often where it is surer; with ``levels`` many samples tie."""
    generator = torch.Generator().manual_seed(99)
    targets = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator.manual_seed(seed)).double()
    logits[torch.arange(count), targets] += skill
    probs = (1.2 * logits).softmax(1)
    confidence, prediction = probs.max(1)
    if levels:
        confidence = (confidence * levels).ceil() / levels
    target = probs.gather(1, targets[:, None]).squeeze(1)
    brier = (probs - torch.eye(classes).double()[targets]).square().sum(1)
    score = -torch.special.entr(probs).sum(1) if not levels else confidence
    return Predictions(confidence, score, prediction, targets, -target.log(), brier, classes)


def resampled(predictions: Predictions, rows: Tensor) -> Predictions:
    """The drawn samples, written out."""
    columns = {k: v[rows] for k, v in vars(predictions).items() if torch.is_tensor(v)}
    return replace(predictions, **columns)


def in_items(predictions: Predictions, items: Tensor) -> Predictions:
    return replace(predictions, items=items)


def check_replicates(found: Bootstrap, models: dict[str, Predictions], seed: int) -> None:
    """Every replicate of every metric is `measure` of the samples that were drawn."""
    samples = len(next(iter(models.values())).targets)
    replicates = len(found.resampled["a"]["nll"])
    drawn = [weights for part in draws(samples, replicates, seed=seed) for weights in part]
    assert len(drawn) == replicates
    for name, predictions in models.items():
        assert found.estimates[name] == pytest.approx(measure(predictions), nan_ok=True)
        assert set(found.resampled[name]) == set(measure(predictions))
        for index, weights in enumerate(drawn):
            assert int(weights.sum()) == samples
            rows = torch.arange(samples).repeat_interleave(weights)
            for metric, expected in measure(resampled(predictions, rows)).items():
                value = found.resampled[name][metric][index].item()
                close = pytest.approx(expected, rel=1e-10, abs=1e-12, nan_ok=True)
                assert value == close, (name, metric, index)


@pytest.mark.parametrize(
    ("count", "levels"), [(1, None), (2, None), (40, None), (40, 5), (300, None), (300, 20)]
)
def test_replicates_are_measures_of_the_drawn_samples(count: int, levels: int | None) -> None:
    models = {
        "a": make_predictions(count, levels=levels),
        "b": make_predictions(count, seed=1, levels=levels),
    }
    check_replicates(bootstrap(models, resamples=25, seed=3), models, seed=3)


def test_a_resample_without_a_wrong_sample_has_no_auroc() -> None:
    model = make_predictions(8, skill=2.5)
    assert int(model.correct.sum()) == 7
    found = bootstrap({"a": model}, resamples=60)
    values = found.resampled["a"]
    one_sided = values["accuracy"] == 1
    assert 0 < int(one_sided.sum()) < 60
    for metric in ("auroc", "fpr95"):
        assert values[metric].isnan().equal(one_sided)
        kept = values[metric][~one_sided].numpy()
        expected = np.quantile(kept, [0.025, 0.975])  # of the resamples where it is defined
        np.testing.assert_allclose(found.interval("a", metric)[1:], expected)
    check_replicates(found, {"a": model}, seed=0)


def test_undefined_on_every_resample_is_nan() -> None:
    found = bootstrap({"a": make_predictions(20, skill=50.0)}, resamples=10)
    assert np.isnan(found.interval("a", "auroc")).all()
    assert found.interval("a", "accuracy") == (1, 1, 1)


def test_float32_scores_to_float32_precision() -> None:
    exact = make_predictions(200)
    single = replace(exact, confidence=exact.confidence.float(), score=exact.score.float())
    found = bootstrap({"a": single}, resamples=20)
    for index, weights in enumerate(next(draws(200, 20, seed=0))):
        rows = torch.arange(200).repeat_interleave(weights)
        expected = measure(resampled(single, rows))
        replicate = {k: float(v[index]) for k, v in found.resampled["a"].items()}
        assert replicate == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("metric", ["nll", "brier", "accuracy"])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_of_a_mean_is_scipys(metric: str, level: float) -> None:
    model = make_predictions(300)
    values = {"nll": model.nll, "brier": model.brier, "accuracy": model.correct.double()}[metric]
    ours = bootstrap({"a": model}, resamples=6000).interval("a", metric, level=level)
    theirs = scipy.stats.bootstrap(
        (values.numpy(),),
        np.mean,
        n_resamples=6000,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = theirs.confidence_interval
    # A 2.5 % quantile of 6000 draws has a standard error of 0.035 standard deviations.
    allowed = 5 * 2**0.5 * 0.035 * theirs.standard_error
    assert ours.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert ours.low == pytest.approx(low, abs=allowed)
    assert ours.high == pytest.approx(high, abs=allowed)


def test_paired_differences() -> None:
    model = make_predictions(200)
    noise = 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(5)).double()
    like_it = replace(model, nll=model.nll + noise)
    found = bootstrap({"a": model, "same": model, "like it": like_it}, resamples=500)
    for metric in measure(model):
        assert found.difference("a", "same", metric) == (0, 0, 0)
    paired = found.difference("like it", "a", "nll")
    assert paired.value == pytest.approx(float(noise.mean()), rel=1e-9)
    assert paired.low < paired.value < paired.high
    # Each draw's difference is that of the means of the noise, whatever the samples' own NLL.
    assert paired.high - paired.low == pytest.approx(
        2 * 1.96 * float(noise.std()) / 200**0.5, rel=0.2
    )
    other = bootstrap({"like it": like_it}, resamples=500, seed=1).resampled["like it"]["nll"]
    low, high = np.quantile(other - found.resampled["a"]["nll"], [0.025, 0.975])
    assert paired.high - paired.low < (high - low) / 3


def test_the_seed_decides_the_draws() -> None:
    models = {"a": make_predictions(50)}
    first, again, other = (bootstrap(models, resamples=40, seed=s) for s in (1, 1, 2))
    for metric, values in first.resampled["a"].items():
        torch.testing.assert_close(values, again.resampled["a"][metric], rtol=0, atol=0)
    assert not first.resampled["a"]["nll"].equal(other.resampled["a"]["nll"])
    assert first.estimates == other.estimates


@pytest.mark.parametrize("chunk", [1, 100, 30 * 7, 30 * 25])
def test_chunks_change_no_replicate(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"a": make_predictions(30, levels=8), "b": make_predictions(30, seed=1)}
    whole = bootstrap(models, resamples=25, seed=2)
    monkeypatch.setattr(MODULE, "CHUNK_WEIGHTS", chunk)
    parts = bootstrap(models, resamples=25, seed=2)
    for name in models:
        torch.testing.assert_close(parts.resampled[name], whole.resampled[name], equal_nan=True)


def test_bad_input_is_named() -> None:
    models = {"a": make_predictions(10)}
    with pytest.raises(ValueError, match="models and at least 2 resamples, got 1"):
        bootstrap(models, resamples=1)
    with pytest.raises(ValueError, match="expected models"):
        bootstrap({})
    for other in (make_predictions(11), resampled(models["a"], torch.arange(10).flip(0))):
        with pytest.raises(ValueError, match="targets of 'b' are not those of 'a'"):
            bootstrap({**models, "b": other})
    found = bootstrap(models, resamples=5)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
            found.interval("a", "nll", level=level)
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
            found.difference("a", "a", "nll", level=level)


def test_any_function_of_score_and_correct() -> None:
    models = {name: make_predictions(80, levels=7, seed=seed) for seed, name in enumerate("ab")}
    usual = bootstrap(models, resamples=30, seed=4)
    functions = {
        "aurc": selective.aurc,
        "sac": lambda s, c: selective.accuracy_at_coverage(s, c, 0.6),
    }
    found = bootstrap(models, resamples=30, seed=4, metrics=functions)
    for name, predictions in models.items():
        torch.testing.assert_close(found.resampled[name]["aurc"], usual.resampled[name]["aurc"])
        expected = float(
            selective.accuracy_at_coverage(predictions.score, predictions.correct, 0.6)
        )
        assert found.estimates[name]["sac"] == pytest.approx(expected)
    assert found.difference("a", "b", "aurc") == pytest.approx(usual.difference("a", "b", "aurc"))
    with pytest.raises(ValueError, match=r"no 'nll' of 'a'.*\['aurc', 'sac'\]"):
        found.interval("a", "nll")


def test_intervals_of_the_calibration_error_cover_it() -> None:
    """A gap of 0.05 at every confidence: binned ECE is above it, and on resamples further."""
    covered = percentile = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        confidence = 0.3 + 0.7 * torch.rand(500, generator=generator, dtype=torch.float64)
        right = torch.rand(500, generator=generator, dtype=torch.float64) < confidence - 0.05
        nothing = torch.zeros(500, dtype=torch.float64)
        model = Predictions(
            confidence, confidence, (~right).long(), nothing.long(), nothing, nothing, 2
        )
        found = bootstrap({"a": model}, resamples=200, seed=seed)
        _, low, high = found.interval("a", "ece")
        covered += low <= 0.05 <= high
        low, high = found.resampled["a"]["ece"].quantile(torch.tensor([0.025, 0.975]).double())
        percentile += bool(low <= 0.05 <= high)
    assert covered >= 85
    assert percentile < 70


def written_out(predictions: Predictions, items: list[int]) -> Predictions:
    """All rows of each item in turn; an item that occurs twice is two items."""
    rows = [(predictions.items == item).nonzero().flatten() for item in items]
    found = resampled(predictions, torch.cat(rows))
    numbers = torch.arange(len(items)).repeat_interleave(torch.tensor([len(r) for r in rows]))
    return in_items(found, numbers)


@pytest.mark.parametrize(
    ("count", "levels", "chunk"), [(60, None, None), (60, 5, 7), (300, 20, 90)]
)
def test_replicates_of_items_are_measures_of_the_drawn_items(
    count: int, levels: int | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of different sizes, whose numbers have gaps and whose rows are not side by side."""
    items = 7 * (torch.arange(count) ** 2 % 23) - 40
    models = {
        "a": in_items(make_predictions(count, levels=levels), items),
        "b": in_items(make_predictions(count, seed=1, levels=levels), items),
    }
    if chunk is not None:
        monkeypatch.setattr(MODULE, "CHUNK_WEIGHTS", chunk)
    found = bootstrap(models, resamples=15, seed=3)
    numbers = items.unique().tolist()
    drawn = [weights for part in draws(len(numbers), 15, seed=3) for weights in part]
    for name, predictions in models.items():
        assert "exact" in found.estimates[name]
        assert found.estimates[name] == pytest.approx(measure(predictions), nan_ok=True)
        for index, weights in enumerate(drawn):
            chosen = [n for n, times in zip(numbers, weights, strict=True) for _ in range(times)]
            for metric, expected in measure(written_out(predictions, chosen)).items():
                value = found.resampled[name][metric][index].item()
                close = pytest.approx(expected, rel=1e-10, abs=1e-12, nan_ok=True)
                assert value == close, (name, metric, index)


def test_items_of_one_row_each_change_nothing() -> None:
    plain = make_predictions(80)
    alone = in_items(plain, torch.arange(80).flip(0))
    first, second = (bootstrap({"a": x}, resamples=30, seed=4) for x in (plain, alone))
    assert first.estimates == second.estimates
    for metric, values in first.resampled["a"].items():
        torch.testing.assert_close(values, second.resampled["a"][metric], rtol=0, atol=0)


def test_functions_of_score_and_correct_see_whole_items() -> None:
    items = torch.arange(80) // 4
    models = {"a": in_items(make_predictions(80, levels=7), items)}
    usual = bootstrap(models, resamples=30, seed=4)
    found = bootstrap(models, resamples=30, seed=4, metrics={"aurc": selective.aurc})
    torch.testing.assert_close(found.resampled["a"]["aurc"], usual.resampled["a"]["aurc"])


def test_intervals_of_rows_that_are_alike_cover_the_truth() -> None:
    """40 items of 12 rows, some of which are much easier than others: accuracy is 0.7 on average.

    Intervals of items cover it about as often as they say, as do those of NumPy's resamples of the
    items' shares; intervals of single rows are far too narrow.
    """
    covered = of_rows = of_numpy = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        ease = torch.where(torch.rand(40, generator=generator) < 0.5, 0.95, 0.45)
        right = torch.rand(40, 12, generator=generator) < ease[:, None]
        nothing = torch.zeros(480, dtype=torch.float64)
        wrong = (~right).flatten().long()
        model = Predictions(nothing, nothing, wrong, nothing.long(), nothing, nothing, 2)
        items = torch.arange(480) // 12
        found = bootstrap({"a": in_items(model, items)}, resamples=200, seed=seed)
        _, low, high = found.interval("a", "accuracy")
        covered += low <= 0.7 <= high
        _, low, high = bootstrap({"a": model}, resamples=200).interval("a", "accuracy")
        of_rows += low <= 0.7 <= high
        shares, rng = right.double().mean(1).numpy(), np.random.default_rng(seed)
        means = shares[rng.integers(40, size=(200, 40))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        of_numpy += bool(low <= 0.7 <= high)
    assert covered >= 88
    assert abs(covered - of_numpy) <= 4
    assert of_rows < 75


def test_unlike_items_are_named() -> None:
    model, items = make_predictions(10), torch.arange(10) // 2
    for others in (None, items.flip(0)):
        models = {"a": in_items(model, items), "b": replace(model, items=others)}
        with pytest.raises(ValueError, match=r"items of 'b' are not those of 'a'.*same items="):
            bootstrap(models, resamples=5)

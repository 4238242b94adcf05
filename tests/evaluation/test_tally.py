"""Sums over samples that are not kept, against the measures of samples that are."""

import pytest
import torch
from helpers import make_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_duo import fit_temperatures
from lightning_duo.evaluation import (
    DuoMetrics,
    Predictions,
    Tally,
    duo_forms,
    measure,
    measure_accepted,
    single_forms,
)
from lightning_duo.evaluation.tally import LEVELS, confidence_levels
from lightning_duo.selective import Threshold

BASE, SIDEKICK, TARGETS = make_logits(300, 5, seed=4, margin=1.5)
FIT = fit_temperatures(BASE, SIDEKICK, TARGETS)
RANKED = ("auroc", "aurc", "e_aurc", "augrc", "fpr95", "sac98")
ITEMS = torch.arange(300) // 4 * 10**12 - 5


def in_batches(tally: Tally, batches: list[Tensor], targets: Tensor = TARGETS) -> Tally:
    for rows in batches:
        members = {"base": BASE[rows], "sidekick": SIDEKICK[rows]}
        tally.update(members, targets[rows], items=ITEMS[rows])
    return tally


def soft(targets: Tensor) -> Tensor:
    return 0.9 * torch.nn.functional.one_hot(targets, 5) + 0.02


@pytest.mark.parametrize("targets", [TARGETS, soft(TARGETS)], ids=["classes", "soft"])
@pytest.mark.parametrize("size", [4, 100, 300])
def test_a_tally_of_batches_measures_what_the_samples_give(targets: Tensor, size: int) -> None:
    threshold = Threshold(0.7, 0.0, 0.0)
    metrics = DuoMetrics(5, FIT)
    metrics.update(BASE, SIDEKICK, targets, items=ITEMS)
    tally = Tally(duo_forms(FIT), 5, threshold)
    found = in_batches(tally, list(torch.arange(300).split(size)), targets)
    predictions, results = metrics.predictions(), found.compute(several=True)
    assert list(results) == list(predictions)
    accepted = measure_accepted(predictions["duo"], threshold)
    assert 0 < accepted["coverage"] < 1
    for form, said in predictions.items():
        expected = measure(said) | (accepted if form == "duo" else {})
        assert results[form].keys() == expected.keys()
        for name, value in results[form].items():
            close = 2e-4 if name in RANKED else 1e-9  # few samples, of which two share a level
            assert value == pytest.approx(expected[name], abs=close), (form, name)
    assert "exact" not in found.compute()["duo"]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 75), st.integers(5, 30))
def test_tallies_of_processes_add_up(first: int, size: int) -> None:
    """One of them may have seen nothing."""
    groups = torch.arange(300).view(75, 4)
    tallies = [Tally(single_forms(), 5) for _ in range(3)]
    for tally, part in zip(tallies, (groups, groups[:first], groups[first:]), strict=True):
        in_batches(tally, [rows.flatten() for rows in part.split(size)])
    whole, mine, other = tallies
    alone = whole.compute(several=True)
    both = mine.compute(several=True, reduce=lambda sums: sums + other.sums)
    for form, values in alone.items():
        assert both[form] == pytest.approx(values, rel=1e-12), form


def test_rows_without_a_softmax_leave_no_figures() -> None:
    broken = BASE.clone()
    broken[7, 2] = torch.nan
    tally = Tally(single_forms(), 5)
    tally.update({"base": broken, "sidekick": SIDEKICK}, TARGETS)
    tally.update({"base": BASE, "sidekick": SIDEKICK}, TARGETS)
    found = tally.compute()
    assert all(value != value for value in found["base"].values())
    assert found["sidekick"]["accuracy"] == pytest.approx(
        float((SIDEKICK.argmax(1) == TARGETS).double().mean())
    )


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30))
def test_levels_order_confidences(values: list[float]) -> None:
    confidence = torch.tensor(values).sort(descending=True).values
    levels = confidence_levels(confidence)
    assert bool((levels.diff() >= 0).all())
    assert 0 <= int(levels[0]) <= int(levels[-1]) < LEVELS
    apart = confidence[:-1] - confidence[1:] > 2**-13 * torch.minimum(
        confidence[:-1], 1 - confidence[1:]
    )
    far = apart & (confidence[:-1] > 2**-24)
    assert bool((levels.diff()[far] > 0).all())


def test_every_float_near_1_has_a_level_of_its_own() -> None:
    near = 1 - torch.arange(0, 2**15) * 2.0**-24
    assert float(near[-1]) < 0.9981
    assert len(confidence_levels(near).unique()) == len(near)


@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (19, 2.0), (19, 0.05), (200, 4.0)])
def test_ranking_by_levels_is_close_to_ranking_by_confidence(classes: int, scale: float) -> None:
    """Also where all confidences are within a hair of 1 / K."""
    base, _, targets = make_logits(100_000, classes, seed=0)
    tally = Tally({"base": single_forms()["base"]}, classes)
    tally.update({"base": scale * base}, targets)
    found = tally.compute()["base"]
    expected = measure(Predictions.of((scale * base).softmax(1), targets))
    for name in ("auroc", "aurc", "e_aurc", "augrc"):
        assert found[name] == pytest.approx(expected[name], abs=3e-6), name
    for name in ("sac98", "fpr95"):
        assert found[name] == pytest.approx(expected[name], abs=1e-3), name

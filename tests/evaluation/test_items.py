"""Rows of which several belong to one item: kept beside what is said of them, and exchanged."""

from dataclasses import replace

import pytest
import torch
from helpers import make_logits
from rich.console import Console
from torch import Tensor

from lightning_duo import fit_temperatures
from lightning_duo.evaluation import MEASURES, DuoMetrics, Predictions, evaluate, measure
from lightning_duo.report import summary_table

BASE, SIDEKICK, TARGETS = make_logits(300, 5, seed=4, margin=1.5)
FIT = fit_temperatures(BASE, SIDEKICK, TARGETS)
ITEMS = torch.arange(300) // 4 * 10**12  # numbers that only int64 holds


def in_batches(metrics: DuoMetrics, rows: Tensor, items: Tensor | None = ITEMS) -> DuoMetrics:
    for some in rows.split(64):
        numbers = None if items is None else items[some]
        metrics.update(BASE[some], SIDEKICK[some], TARGETS[some], items=numbers)
    return metrics


def test_items_are_kept_with_the_predictions() -> None:
    whole = evaluate(BASE, SIDEKICK, TARGETS, FIT, items=ITEMS)
    parts = in_batches(DuoMetrics(5, FIT), torch.arange(300)).predictions()
    for form, found in whole.items():
        assert found.items.equal(ITEMS)
        assert parts[form].items.equal(ITEMS)
        theirs = Predictions.of(BASE.softmax(1), TARGETS, items=ITEMS.to(torch.int64)).cpu()
        assert theirs.items.equal(ITEMS)
    small = Predictions.of(BASE.softmax(1), TARGETS, items=(torch.arange(300) // 4).to(torch.uint8))
    assert small.items.dtype == torch.int64


def test_the_share_of_exact_items() -> None:
    found = evaluate(BASE, SIDEKICK, TARGETS, FIT, items=ITEMS)["duo"]
    right = found.correct.view(75, 4).all(1)
    assert 0 < int(right.sum()) < 75
    assert measure(found)["exact"] == pytest.approx(float(right.double().mean()))
    metrics = in_batches(DuoMetrics(5, FIT), torch.arange(300))
    assert metrics.compute()["duo"]["exact"] == measure(found)["exact"]


@pytest.mark.parametrize("items", [None, torch.randperm(300)])
def test_where_items_have_one_row_nothing_changes(items: Tensor | None) -> None:
    plain = in_batches(DuoMetrics(5, FIT), torch.arange(300), None).compute()
    found = in_batches(DuoMetrics(5, FIT), torch.arange(300), items).compute()
    assert found == plain
    assert set(found["duo"]) == set(MEASURES) - {"exact"}


@pytest.mark.parametrize("items", [None, ITEMS])
@pytest.mark.parametrize("first", [0, 37, 300])
def test_processes_exchange_their_items(first: int, items: Tensor | None) -> None:
    """One of them may have no sample, or none of them items."""
    other = in_batches(DuoMetrics(5, FIT), torch.arange(first, 300), items)
    of_other = iter([torch.cat(value) for value in other.metric_state.values()])
    mine = DuoMetrics(
        5,
        FIT,
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda part, group: [part, next(of_other)],
    )
    in_batches(mine, torch.arange(first), items)
    found = mine.compute()
    assert next(of_other, None) is None
    assert found == in_batches(DuoMetrics(5, FIT), torch.arange(300), items).compute()
    assert ("exact" in found["duo"]) == (items is not None)


def test_reset_forgets_items() -> None:
    metrics = in_batches(DuoMetrics(5, FIT), torch.arange(300))
    metrics.reset()
    assert in_batches(metrics, torch.arange(300), None).predictions()["duo"].items is None


def test_items_that_do_not_fit_are_named() -> None:
    calls = [
        lambda items: DuoMetrics(5, FIT).update(BASE, SIDEKICK, TARGETS, items=items),
        lambda items: evaluate(BASE, SIDEKICK, TARGETS, FIT, items=items),
        lambda items: Predictions.of(BASE.softmax(1), TARGETS, items=items),
    ]
    for call in calls:
        for items in (ITEMS[:200], ITEMS.float(), ITEMS[:, None]):
            with pytest.raises(ValueError, match=r"items .*shape \(300,\); got"):
                call(items)
    metrics = in_batches(DuoMetrics(5, FIT), torch.arange(200))
    in_batches(metrics, torch.arange(200, 300), None)
    with pytest.raises(ValueError, match=r"200 of 300 rows .*items= to every update"):
        metrics.predictions()


def test_tables_leave_out_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURES, "exact", replace(MEASURES["exact"], summary=True))

    def table(items: Tensor | None) -> str:
        results = in_batches(DuoMetrics(5, FIT), torch.arange(300), items).compute()
        console = Console(width=200, record=True)
        console.print(summary_table(results, FIT, data="d", balance=None))
        return console.export_text()

    assert "exact↑" in table(ITEMS)
    assert "exact" not in table(None)

"""Which decisions are kept of how many, and the bar that shows how far the batches are through."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import INFO
from scipy.stats import chisquare
from torch import Tensor, nn

from lightning_duo.evaluation import BYTES_OF_A_ROW
from lightning_duo.logits import CollectedLogits, collect_logits
from lightning_duo.tasks import Classes, Labels, Task


def collect(
    batches: list[tuple[Tensor, Tensor]], task: Task | None, memory: int = 10**9
) -> CollectedLogits:
    return collect_logits(nn.Identity(), nn.Identity(), batches, task=task, memory=memory)


def test_decisions_know_their_items() -> None:
    pixels, masks = torch.randn(7, 4, 3, 2), torch.randint(4, (7, 3, 2))
    masks[4] = -100  # an item without any
    masks[5, 0] = -100
    found = collect([*zip(pixels.split(3), masks.split(3), strict=True)], None)
    want = torch.arange(7)[:, None, None].expand(7, 3, 2)[masks != -100]
    assert torch.equal(found.items, want)
    assert found.seen == len(want) == len(found.targets)
    assert collect([(pixels[:, :, 0, 0], masks[:, 0, 0])], None).items is None
    assert collect([(pixels[:, :1, 0, 0], masks[:, :1, 0] > 1)], Labels()).items is None


def of_items(counts: Sequence[int], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of items with so many tokens each, padded to the longest of all."""
    longest = max(counts)
    y = torch.full((len(counts), longest), -100)
    for row, count in zip(y, counts, strict=True):
        row[:count] = torch.arange(count) % 3
    z = torch.arange(y.numel() * 3).view(*y.shape, 3).float()
    return list(zip(z.split(batch), y.split(batch), strict=True))


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(lambda c: max(c) > 0),
    rows=st.integers(1, 60),
    batch=st.integers(1, 40),
)
def test_the_sample_is_the_same_in_whatever_batches(
    counts: list[int], rows: int, batch: int
) -> None:
    task = Classes(dim=-1)
    size = 2 * 3 * 4 + 3 * 8 + BYTES_OF_A_ROW
    whole = collect(of_items(counts, len(counts)), task)
    memory = rows * size
    try:
        some = collect(of_items(counts, batch), task, memory)
    except ValueError:  # by chance no decision is within the share that fits
        with pytest.raises(ValueError, match="memory holds no decision"):
            collect(of_items(counts, len(counts)), task, memory)
        return
    other = collect(of_items(counts, len(counts)), task, memory)
    for mine, theirs in zip((*some, some.items), (*other, other.items), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    assert some.seen == sum(counts) == len(whole.targets)
    assert len(some.targets) <= rows
    if sum(counts) <= rows:
        assert len(some.targets) == sum(counts)
    # Each is one of all decisions, with its own target and item.
    places = torch.searchsorted(whole.base[:, 0].contiguous(), some.base[:, 0].contiguous())
    for name in ("base", "sidekick", "targets"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[places])
    if some.items is not None:
        assert torch.equal(some.items, whole.items[places])


def test_a_sample_is_announced_with_both_counts(caplog: pytest.LogCaptureFixture) -> None:
    batches = [(torch.randn(500, 3), torch.randint(3, (500,))) for _ in range(4)]
    with caplog.at_level("INFO", INFO):
        found = collect(batches, None)
        assert not caplog.text
        found = collect(batches, None, 300_000)
    kept = len(found.targets)
    assert 0 < kept < found.seen == 2000
    assert f"{kept:,} of 2,000 decisions are kept" in caplog.text
    assert "memory=300,000 bytes" in caplog.text
    with pytest.raises(ValueError, match=r"memory holds no decision; pass more"):
        collect(batches, None, 1)


def test_every_decision_has_the_same_chance() -> None:
    count = 4000
    z = torch.arange(count * 2).view(count, 2).float()
    found = collect([(z, torch.zeros(count).long())], None, 1_000_000)
    picked = (found.base[:, 0] / 2).long()
    assert chisquare(torch.bincount(picked // 500, minlength=8).numpy()).pvalue > 0.01


@pytest.mark.parametrize("known", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(
    known: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [(torch.randn(5, 3), torch.randint(3, (5,))) for _ in range(7)]
    data = batches if known else (batch for batch in batches)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    collect_logits(nn.Identity(), nn.Identity(), batches)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    collect_logits(nn.Identity(), nn.Identity(), data)
    shown = capsys.readouterr()
    assert not shown.out
    assert "collecting logits" in shown.err
    assert ("7/7" if known else "7/?") in shown.err

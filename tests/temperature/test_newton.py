"""Newton's method with chords, against functions whose derivatives are known."""

import math
from typing import Any

import pytest
import torch
from helpers import make_logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_duo.temperature.newton import Chord, Models, Optimum, Quadratic, search
from lightning_duo_kernels.nll import NllSums, Point, nll_sums

Numbers = st.floats(-2, 2)


@given(st.tuples(*[Numbers] * 4), st.tuples(Numbers, Numbers), Numbers, Numbers)
def test_a_chord_knows_third_derivatives_along_itself(
    third: tuple[float, ...], step: tuple[float, float], along: float, across: float
) -> None:
    if math.hypot(*step) < 0.1:
        return
    xxx, xxy, xyy, yyy = third
    t = torch.tensor([[[xxx, xxy], [xxy, xyy]], [[xxy, xyy], [xyy, yyy]]], dtype=torch.float64)
    d = torch.tensor(step, dtype=torch.float64)
    change = torch.einsum("ijk,k->ij", t, d)
    chord = Chord(step, (float(change[0, 0]), float(change[0, 1]), float(change[1, 1])), False)
    aside = torch.tensor([-step[1], step[0]], dtype=torch.float64)
    s = along * d + across * aside
    # All but what is twice across the chord, which it cannot see.
    unseen = torch.einsum("ijk,j,k->i", t, across * aside, across * aside)
    want = (torch.einsum("ijk,j,k->i", t, s, s) - unseen) / 2
    if float(s.norm()) < 1e-3:
        return
    bend, unknown = chord.bend((float(s[0]), float(s[1])), (1.0, 0.0, 1.0), 0.0)
    assert bend == pytest.approx(want.tolist(), abs=1e-9)
    assert unknown == pytest.approx(abs(across) / math.hypot(along, across), abs=1e-6)


def test_a_chord_of_another_part_of_the_space_is_not_used() -> None:
    here = Quadratic(1.0, (-1e-3, 0.0), (1.0, 0.0, 1.0), 1.0)
    plain = here.best_step((1.0, 1.0), 0.0, None)
    far = Chord((2.0, 0.0), (-0.1, 0.0, 0.0), False)
    assert here.best_step((1.0, 1.0), 0.0, far) == plain
    steep = Chord((0.01, 0.0), (-20.0, 0.0, 0.0), False)
    assert here.best_step((1.0, 1.0), 0.0, steep) == plain
    near = Chord((0.01, 0.0), (-0.01, 0.0, 0.0), False)
    gain, (step, _), excess = here.best_step((1.0, 1.0), 0.0, near)
    # The minimum of -1e-3 x + x^2 / 2 - x^3 / 6.
    best = 1 - math.sqrt(1 - 2e-3)
    assert step == pytest.approx(best, rel=1e-5)
    assert gain == pytest.approx(1e-3 * best - best**2 / 2 + best**3 / 6, rel=1e-6)
    assert excess < 1e-3 * gain


def heavy_tailed(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A base whose samples are scaled very differently, and a sidekick of another scale."""
    base, sidekick, targets = make_logits(count, 10, seed, margin=3.0)
    scale = torch.randn(count, 1, generator=torch.Generator().manual_seed(seed)).exp()
    return base * scale, 30 * sidekick, targets


def found(data: list[Tensor], models: Models, tolerance: float, **more: Any) -> Optimum:
    """What a search finds."""
    steps = search(len(data[0]), models, more.get("start"), tolerance, 1e-12)
    asked = next(steps)
    while True:
        points = [Point(t, models) for t in asked]
        try:
            asked = steps.send([NllSums(*row) for row in nll_sums(*data, points).tolist()])
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("models", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_an_excess_is_well_estimated(models: Models, heavy: bool, seed: int) -> None:
    data = heavy_tailed(seed, 2000) if heavy else make_logits(2000, 20, seed)

    def loss(optimum: Optimum) -> float:
        point = Point(optimum.temperatures, models)
        return float(nll_sums(*data, [point])[0, 0]) / 2000

    best = loss(found(data, models, 1e-20))
    start = found([x[::7] for x in data], models, 1e-3)
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
        for begin in (None, start):
            optimum = found(data, models, tolerance, start=begin)
            assert optimum.status == "converged"
            assert best - 1e-14 <= loss(optimum) <= best + 2 * tolerance


def test_a_search_that_was_stopped_is_not_said_to_have_converged() -> None:
    data, both = make_logits(200, 20, seed=0), (True, True)
    stopped, ended = found(data, both, tolerance=0.0), found(data, both, tolerance=1e-16)
    assert (stopped.status, ended.status) == ("pass_limit", "converged")
    assert stopped.temperatures == pytest.approx(ended.temperatures, rel=1e-6)

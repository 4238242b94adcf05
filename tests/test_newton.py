"""Newton's method with chords, against functions whose derivatives are known."""

import math

import pytest
import torch
from helpers import make_logits
from hypothesis import given
from hypothesis import strategies as st

from lightning_duo.newton import Chord, Quadratic, search
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


@pytest.mark.parametrize("seed", range(5))
def test_an_excess_is_not_underestimated(seed: int) -> None:
    base, sidekick, targets = make_logits(2000, 20, seed)

    def sums(asked: list[tuple[float, float]]) -> list[NllSums]:
        points = [Point(t, (True, True)) for t in asked]
        return [NllSums(*row) for row in nll_sums(base, sidekick, targets, points).tolist()]

    def found(tolerance: float) -> float:
        steps = search(2000, (True, True), None, tolerance, 1e-12)
        asked = next(steps)
        while True:
            try:
                asked = steps.send(sums(asked))
            except StopIteration as end:
                return sums([end.value.temperatures])[0].loss / 2000

    best = found(1e-18)
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
        assert best - 1e-15 <= found(tolerance) <= best + tolerance

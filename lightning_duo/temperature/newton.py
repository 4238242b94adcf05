"""The smallest NLL over two non-negative temperatures, from sums over the samples.

The NLL is convex in the temperatures, as a duo's logits are linear in them. `search` is Newton's
method with what two Hessians tell of third derivatives. It asks for points and is sent their sums,
so that several searches can share a read of the logits, and processes can add up theirs.
"""

import math
from collections.abc import Generator
from typing import Literal, NamedTuple, TypeAlias

from lightning_duo_kernels.nll import NllSums

MAX_PASSES = 12
RIDGE = 1e-6  # keeps the Newton system regular when the two models agree; not in the objective
FLAT = 1e-30  # a curvature that is none
# Lengths of a step to try in one pass, in Newton steps, and the range of gained over promised in
# which the next step is tried alone: from T = 0, and from the optimum of a subsample.
_Trials: TypeAlias = tuple[tuple[float, ...], tuple[float, float]]
FROM_ZERO: _Trials = ((8.0, 2.0, 1.0, 0.5, 0.25, 0.0625), (0.8, 1.2))
FROM_NEAR: _Trials = ((4.0, 1.0, 0.25), (0.2, 4.0))
# Chosen over 90 made-up sets of logits, so that none ended further from its optimum than estimated:
# a Newton step is off by at least ROUGHNESS * sqrt(its gain) of itself, and third derivatives of a
# subsample by this part of themselves.
ROUGHNESS = 3.0
SAMPLED = 0.25

Pair: TypeAlias = tuple[float, float]
"""Of base and sidekick."""
Symmetric: TypeAlias = tuple[float, float, float]
"""A symmetric matrix: base, cross, sidekick."""
Models: TypeAlias = tuple[bool, bool]
"""Which of base and sidekick may have a temperature above 0."""
Status: TypeAlias = Literal["converged", "separable", "pass_limit"]


class Optimum(NamedTuple):
    """What a search found."""

    at: Pair
    """Temperatures, in ``unit``."""
    unit: Pair
    """The temperatures at which each model's logits have variance 1 within a sample; 0 for a
    model that takes no part."""
    nll: float
    """In nats per sample."""
    status: Status
    chord: "Chord | None"

    @property
    def temperatures(self) -> Pair:
        """Multipliers of the two models' logits."""
        return _scaled(self.at, self.unit)


class Quadratic(NamedTuple):
    """NLL per sample around a point, in units in which each model's logits have variance 1.

    ``unsure`` is the number of samples whose target has a probability of at most 1/2 or is soft.
    """

    value: float
    gradient: Pair
    hessian: Symmetric  # base, cross, sidekick
    unsure: float

    @classmethod
    def from_sums(cls, s: NllSums, count: int, unit: Pair) -> "Quadratic":
        """From sums over ``count`` samples."""
        b, k = unit
        return cls(
            s.loss / count,
            (s.grad_base * b / count, s.grad_sidekick * k / count),
            (
                s.curvature_base * b * b / count,
                s.curvature_cross * b * k / count,
                s.curvature_sidekick * k * k / count,
            ),
            s.unsure,
        )

    def box_step(self, at: Pair, ridge: float) -> tuple[float, Pair]:
        """Gain and exact minimiser of the quadratic over steps that keep ``at`` >= 0.

        ``ridge`` is relative to each model's own curvature, which can be far apart; in proportion
        to the number of models, two equal models take together the step that one would take alone.
        """
        (g0, g1), (h00, h01, h11) = self.gradient, self.hessian
        h00, h11 = h00 + ridge * max(h00, FLAT), h11 + ridge * max(h11, FLAT)
        det = h00 * h11 - h01 * h01
        u0, u1 = at
        candidates = [
            (-u0, -(g1 - h01 * u0) / h11),
            (-(g0 - h01 * u1) / h00, -u1),
            (-u0, -u1),
        ]
        if det > 0:
            candidates.append(((h01 * g1 - h11 * g0) / det, (h01 * g0 - h00 * g1) / det))
        best, best_step = 0.0, (0.0, 0.0)
        for d0, d1 in candidates:
            change = g0 * d0 + g1 * d1 + (h00 * d0 * d0 + h11 * d1 * d1) / 2 + h01 * d0 * d1
            if u0 + d0 >= 0 and u1 + d1 >= 0 and change < best:
                best, best_step = change, (d0, d1)
        return -best, best_step

    def best_step(self, at: Pair, ridge: float, chord: "Chord | None") -> tuple[float, Pair, float]:
        """Step to the minimum, bent by the chord's third derivatives.

        Returns:
            What the step gains, the step, and an estimate of the NLL above the lowest after it.
        """
        gain, step = self.box_step(at, ridge)
        if chord is None or gain <= 0 or self.value <= 0:
            return gain, step, gain
        # The loss of sure models comes from few samples, and bends as that of so few does.
        roughness = ROUGHNESS / math.sqrt(min(1.0, self.value))
        bend, unknown = chord.bend(step, self.hessian, roughness)
        gradient = self.gradient[0] + bend[0], self.gradient[1] + bend[1]
        _, bent = self._replace(gradient=gradient).box_step(at, ridge)
        moved = bent[0] - step[0], bent[1] - step[1]
        further = max(_product(self.hessian, moved, moved), 0.0) / 2
        off = max(math.sqrt(further / gain), roughness * math.sqrt(gain))
        if off > 0.5 or unknown > 1:
            return gain, step, gain
        cubic = (bend[0] * step[0] + bend[1] * step[1]) / 3
        left = off * max(off, unknown)  # of the step
        return gain - cubic + further, bent, gain * left * left


class Chord(NamedTuple):
    """A step and what it did to the Hessian: the third derivatives of the NLL along the step."""

    step: Pair
    change: Symmetric  # base, cross, sidekick
    sampled: bool  # on fewer rows

    @classmethod
    def between(cls, start: Quadratic, end: Quadratic, step: Pair) -> "Chord":
        """The chord of a step from one point to another."""
        base, cross, sidekick = (y - x for x, y in zip(start.hessian, end.hessian, strict=True))
        return cls(step, (base, cross, sidekick), sampled=False)

    def bend(self, step: Pair, hessian: Symmetric, roughness: float) -> tuple[Pair, float]:
        """Half the third derivatives applied twice to ``step``, and the unknown share of them.

        The chord knows what involves its own direction; the rest is taken to be 0.
        """
        own, squared = _product(hessian, self.step, self.step), _product(hessian, step, step)
        if own <= 0 or squared <= 0:
            return (0.0, 0.0), math.inf
        along = _product(hessian, step, self.step) / own
        x, y = (along * s - along * along * d / 2 for s, d in zip(step, self.step, strict=True))
        c00, c01, c11 = self.change
        across = math.sqrt(max(0.0, 1 - along * along * own / squared))
        unknown = max(across, roughness * math.sqrt(own / 2), SAMPLED * self.sampled)
        return (c00 * x + c01 * y, c01 * x + c11 * y), unknown


def _product(hessian: Symmetric, x: Pair, y: Pair) -> float:
    h00, h01, h11 = hessian
    return h00 * x[0] * y[0] + h01 * (x[0] * y[1] + x[1] * y[0]) + h11 * x[1] * y[1]


def search(
    count: int, models: Models, start: Optimum | None, tolerance: float, rounding: float
) -> Generator[list[Pair], list[NllSums], Optimum]:
    """Find one optimum: yields points to evaluate, receives their sums, returns the optimum.

    Newton steps from T = 0, where the curvature is the mean variance within a row and so gives
    each model's scale. NLL of confident models has features at many scales (a step may be far too
    long or too short), so as long as the quadratic does not predict what a step gains, one pass
    tries several lengths of it.

    Args:
        count: Number of samples.
        models: Which of (base, sidekick) may have a temperature above 0.
        start: Optimum of a subsample to start from, if there is one.
        tolerance: NLL above the lowest; a step that is estimated to come closer, from a point that
            was no failure, is the last, and taken without being evaluated.
        rounding: Relative difference of two losses that is none.
    """
    at, unit, chord, sums = yield from _begin(count, models, start)
    tried, trust = FROM_NEAR if any(at) else FROM_ZERO
    here = Quadratic.from_sums(sums, count, unit)
    trusted, shrink = any(at), 1.0
    for passes in range(1, MAX_PASSES + 1):
        gain, step, excess = here.best_step(at, RIDGE * sum(models), chord)
        if here.unsure == 0 and any(at):
            # Every target beats all other classes together, so growing T only lowers the NLL.
            if here.value == 0:
                return Optimum(at, unit, here.value, "separable", None)
            step = at
            lengths: tuple[float, ...] = (7.0, 63.0, 511.0)
        elif excess < tolerance and shrink == 1:
            at = (max(at[0] + step[0], 0.0), max(at[1] + step[1], 0.0))
            return Optimum(at, unit, here.value - gain, "converged", chord)
        else:
            sure = trusted and ROUGHNESS * math.sqrt(gain) < 0.5
            lengths = (1.0,) if sure else tuple(shrink * length for length in tried)
        if passes == MAX_PASSES:
            break
        trials = [
            (max(at[0] + length * step[0], 0.0), max(at[1] + length * step[1], 0.0))
            for length in lengths
        ]
        received = yield [_scaled(trial, unit) for trial in trials]
        found = [Quadratic.from_sums(sums, count, unit) for sums in received]
        best = min(range(len(found)), key=lambda i: found[i].value)
        gained = here.value - found[best].value
        if gained < -rounding * here.value:
            shrink = shrink if lengths == (1.0,) else shrink * tried[-1] / 2
            trusted = False
        else:
            trusted = lengths[best] == 1 and trust[0] * gain <= gained <= trust[1] * gain
            step = trials[best][0] - at[0], trials[best][1] - at[1]
            chord = Chord.between(here, found[best], step)
            at, here, shrink = trials[best], found[best], 1.0
    return Optimum(at, unit, here.value, "pass_limit", None)


def _begin(
    count: int, models: Models, start: Optimum | None
) -> Generator[list[Pair], list[NllSums], tuple[Pair, Pair, Chord | None, NllSums]]:
    """Evaluate where a search starts: there, the unit, what is known of it, and its sums."""
    scaled = start and all(u > 0 for u, used in zip(start.unit, models, strict=True) if used)
    if start is not None and start.status == "converged" and scaled:
        (sums,) = yield [start.temperatures]
        chord = start.chord and start.chord._replace(sampled=True)
        return start.at, start.unit, chord, sums
    (sums,) = yield [(0.0, 0.0)]
    spread = (sums.curvature_base, sums.curvature_sidekick)
    unit = (
        math.sqrt(count / spread[0]) if models[0] and spread[0] > 0 else 0.0,
        math.sqrt(count / spread[1]) if models[1] and spread[1] > 0 else 0.0,
    )
    return (0.0, 0.0), unit, None, sums


def _scaled(at: Pair, unit: Pair) -> Pair:
    return at[0] * unit[0], at[1] * unit[1]

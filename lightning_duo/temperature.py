"""The two temperatures of a duo, fitted exactly: a convex problem in two non-negative numbers."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_duo_kernels.nll import NllSums, Point, nll_sums

MAX_PASSES = 12
RIDGE = 1e-6  # keeps the Newton system regular when the two models agree; not in the objective
TINY = 1e-30
DOUBLE_LOGITS = 1 << 20  # of one model; up to so many are computed with in float64, which is slower
WIDE = 1e12  # logits whose squares would overflow float32 in sums
FEWEST_ROWS = 64  # of a subsample
SHRINK = 5  # a subsample has so many times fewer rows than what it prepares
# Lengths of a step to try in one pass, in Newton steps, and the range of gained over promised in
# which the next step is tried alone: from T = 0, and from the optimum of a subsample.
_Trials: TypeAlias = tuple[tuple[float, ...], tuple[float, float]]
FROM_ZERO: _Trials = ((8.0, 2.0, 1.0, 0.5, 0.25, 0.0625), (0.8, 1.2))
FROM_NEAR: _Trials = ((4.0, 1.0, 0.25), (0.2, 4.0))
LEAST_DOUBT = 4.0  # of a promise, times the square root of the gain: less would be luck
ROUGH = 0.2  # a subsample's optimum is off by about 1 / rows in NLL; it is found to this part of it


class Temperatures(NamedTuple):
    """Non-negative multipliers of the two models' logits.

    They MULTIPLY (paper, Sec. 3.1). Ordinary temperature scaling divides, so its temperature is
    the inverse of the one here.
    """

    base: float
    sidekick: float


Status: TypeAlias = Literal["converged", "separable", "pass_limit"]
UNWEIGHTED = Temperatures(0.5, 0.5)


class _Precision(NamedTuple):
    """What the arithmetic allows to tell apart."""

    dtype: torch.dtype
    tolerance: float
    """The last Newton step's promised gain may be off by so much, as it is not evaluated."""
    equal: float
    """A difference in NLL that is none, between optima found to the tolerance."""
    rounding: float
    """Relative; two losses that differ by less are equal."""


_DOUBLE = _Precision(torch.float64, tolerance=1e-12, equal=1e-11, rounding=1e-12)
_SINGLE = _Precision(torch.float32, tolerance=1e-7, equal=1e-7, rounding=1e-7)


@dataclass(frozen=True)
class TemperatureFit:
    """Temperatures that minimise the negative log-likelihood, and what they reach."""

    temperatures: Temperatures
    """Optimum of the duo."""
    nll: float
    """NLL of the duo at its optimum, in nats per sample; never above ``nll_base``. It is what the
    last Newton step foresees, exact to about 1e-12, or 1e-7 where the fit computes in float32."""
    scaled_base: Temperatures
    """Optimum of the base alone, ``(t, 0)``: ordinary temperature scaling with divisor 1/t."""
    nll_base: float
    """NLL of the base at ``scaled_base``."""
    scaled_sidekick: Temperatures
    """Optimum of the sidekick alone, ``(0, t)``."""
    nll_sidekick: float
    """NLL of the sidekick at ``scaled_sidekick``."""
    status: Status
    """``converged``: the optimum. ``separable``: every target beats all other classes and can be
    made as sure as one likes, so no finite optimum exists; the temperatures are finite and reach
    an NLL that rounds to 0.
    ``pass_limit``: stopped after 12 passes with the best temperatures seen."""
    passes: int
    """Times all logits were read to fit; the three optima are found in the same passes."""

    def state_dict(self) -> dict[str, Any]:
        """The fit in plain types, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "TemperatureFit":
        """The fit that `state_dict` described."""
        values: dict[str, Any] = {
            k: Temperatures(*v) if isinstance(v, list) else v for k, v in state.items()
        }
        return cls(**values)


def fit_temperatures(
    base_logits: Tensor,
    sidekick_logits: Tensor,
    targets: Tensor,
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> TemperatureFit:
    """Fit the duo's two temperatures by exact minimisation of the negative log-likelihood.

    NLL is convex in the temperatures because the duo's logits are linear in them, so Newton's
    method on the quadrant ``T >= 0`` finds the optimum. A useless or harmful sidekick gets
    temperature 0, two equal models share the weight, a model with constant logits gets 0. Rows may
    mask classes with ``-inf`` if both models mask the same ones.

    Most of the way is found on a few rows; all of them are then read two or three times, in chunks,
    so the extra memory is a few tens of MB whatever the number of samples. Arithmetic is in float64
    for float64 logits, on CUDA, and for up to a million logits (2^20 a model); else in float32,
    with sums over samples in float64: the reported NLL is then right to about 1e-7, and that of
    the temperatures is within about 1e-8 of the lowest.

    Args:
        base_logits: Logits of the base, shape (N, K), any floating dtype.
        sidekick_logits: Logits of the sidekick, shape (N, K), any floating dtype, same device.
        targets: True classes, shape (N,), an integer dtype, values in [0, K).
        reduce: Sums a float64 tensor over all processes. With it every process passes its own
            samples (possibly none) and all get the same temperatures. Only sums are exchanged.

    Returns:
        The fit; its temperatures are dimensionless multipliers.

    Raises:
        ValueError: If shapes, dtypes or targets do not fit, logits are NaN or infinite, the two
            models mask different classes, a target is masked, or there is no sample at all.

    Example:
        >>> import torch
        >>> base = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
        >>> fit = fit_temperatures(base, base, torch.tensor([0, 0, 1, 1]))
        >>> fit.temperatures.base == fit.temperatures.sidekick > 0
        True

    Source: Asymmetric Duos, Sec. 3.1, "Tuning the temperatures".
    """
    reduce = reduce or (lambda sums: sums)
    _check_shapes(base_logits, sidekick_logits, targets)
    count, masked = check_samples(base_logits, sidekick_logits, targets, reduce)
    double = count * base_logits.shape[1] <= DOUBLE_LOGITS or _needs_double(
        base_logits, sidekick_logits, reduce
    )
    precision = _DOUBLE if double else _SINGLE
    data = _Data(base_logits, sidekick_logits, targets, count, masked, precision, reduce)
    optima, passes = _fit(data)
    duo, base, sidekick = optima["duo"], optima["base"], optima["sidekick"]
    # Each search stops a little above its optimum. A model alone that is better than the duo by
    # more replaces it; else the two are equal (say, collinear models) and so reported.
    alone = min(base, sidekick, key=lambda optimum: optimum.nll)
    if alone.nll < duo.nll - precision.equal:
        duo = alone
    return TemperatureFit(
        duo.temperatures,
        duo.nll,
        base.temperatures,
        max(base.nll, duo.nll),
        sidekick.temperatures,
        max(sidekick.nll, duo.nll),
        duo.status,
        passes,
    )


def _needs_double(base: Tensor, sidekick: Tensor, reduce: Callable[[Tensor], Tensor]) -> bool:
    """Whether float32 is not for these logits; all processes decide alike, or they would part."""
    here = base.is_cuda or torch.float64 in (base.dtype, sidekick.dtype)
    here = here or _largest(base) > WIDE or _largest(sidekick) > WIDE
    return bool(reduce(torch.tensor([float(here)], dtype=torch.float64, device=base.device)) > 0)


def _largest(logits: Tensor) -> float:
    """Largest absolute value, masked classes aside."""
    if not logits.numel():
        return 0.0
    low, high = logits.aminmax()
    if low == -torch.inf:
        low = logits.nan_to_num(neginf=0.0).amin()
    return max(-float(low), float(high))


@dataclass(frozen=True)
class _Data:
    """Samples of this process, their number over all processes, and the sum over processes.

    ``masked`` says whether any logits are -inf.
    """

    base: Tensor
    sidekick: Tensor
    targets: Tensor
    count: int
    masked: bool
    precision: _Precision
    reduce: Callable[[Tensor], Tensor]

    def sample(self, stride: int) -> "_Data":
        """Every ``stride``-th row of each process."""
        rows = slice(None, None, stride)
        base, sidekick, targets = self.base[rows], self.sidekick[rows], self.targets[rows]
        local = torch.tensor([len(targets)], dtype=torch.float64, device=base.device)
        count = int(self.reduce(local).item())
        return replace(self, base=base, sidekick=sidekick, targets=targets, count=count)

    def sums(self, wanted: "dict[str, list[Temperatures]]") -> Tensor:
        """Sums of this process at all temperatures that the searches want, in one read."""
        points = [Point(t, SEARCHES[name]) for name, trials in wanted.items() for t in trials]
        how = {"masked": self.masked, "dtype": self.precision.dtype}
        return nll_sums(self.base, self.sidekick, self.targets, points, **how)  # type: ignore[arg-type]


class _Optimum(NamedTuple):
    at: tuple[float, float]
    unit: tuple[float, float]
    nll: float
    status: Status

    @property
    def temperatures(self) -> Temperatures:
        return _scaled(self.at, self.unit)


_Models: TypeAlias = tuple[bool, bool]  # which of (base, sidekick) may get a temperature above 0
SEARCHES: dict[str, _Models] = {
    "duo": (True, True),
    "base": (True, False),
    "sidekick": (False, True),
}
_Search: TypeAlias = Generator[list[Temperatures], list[NllSums], _Optimum]


class _Quadratic(NamedTuple):
    """NLL per sample around a point, in units in which each model's logits have variance 1."""

    value: float
    gradient: tuple[float, float]
    hessian: tuple[float, float, float]  # base, cross, sidekick
    unsure: float

    @classmethod
    def from_sums(cls, s: NllSums, count: int, unit: tuple[float, float]) -> "_Quadratic":
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

    def box_step(self, at: tuple[float, float], ridge: float) -> tuple[float, tuple[float, float]]:
        """Gain and exact minimiser of the quadratic over steps that keep ``at`` >= 0.

        ``ridge`` is relative to the curvature; in proportion to the number of models, two equal
        models take together the step that one would take alone.
        """
        (g0, g1), (h00, h01, h11) = self.gradient, self.hessian
        damping = ridge * max(h00, h11, TINY)
        h00, h11 = h00 + damping, h11 + damping
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


def _search(
    count: int, models: _Models, start: _Optimum | None, tolerance: float, rounding: float
) -> _Search:
    """Find one optimum: yields points to evaluate, receives their sums, returns the optimum.

    Newton steps from T = 0, where the curvature is the mean variance within a row and so gives
    each model's scale. NLL of confident models has features at many scales (a step may be far too
    long or too short), so as long as the quadratic does not predict what a step gains, one pass
    tries several lengths of it.

    Args:
        count: Number of samples.
        models: Which of (base, sidekick) may have a temperature above 0.
        start: Optimum of a subsample to start from, if there is one.
        tolerance: Error in the promised gain of a Newton step, in NLL, below which it is the last;
            it is taken without being evaluated.
        rounding: Relative difference of two losses that is none.
    """
    scaled = start and all(u > 0 for u, used in zip(start.unit, models, strict=True) if used)
    if start is None or start.status != "converged" or not scaled:
        at, (tried, trust) = (0.0, 0.0), FROM_ZERO
        (sums,) = yield [Temperatures(0.0, 0.0)]
        spread = (sums.curvature_base, sums.curvature_sidekick)
        unit = (
            math.sqrt(count / spread[0]) if models[0] and spread[0] > 0 else 0.0,
            math.sqrt(count / spread[1]) if models[1] and spread[1] > 0 else 0.0,
        )
    else:
        at, unit, (tried, trust) = start.at, start.unit, FROM_NEAR
        (sums,) = yield [start.temperatures]
    here = _Quadratic.from_sums(sums, count, unit)
    trusted, shrink, doubt = any(at), 1.0, math.inf
    for passes in range(1, MAX_PASSES + 1):
        gain, step = here.box_step(at, RIDGE * sum(models))
        if here.unsure == 0 and any(at):
            # Every target beats all other classes together, so growing T only lowers the NLL.
            if here.value == 0:
                return _Optimum(at, unit, here.value, "separable")
            step = at
            lengths: tuple[float, ...] = (7.0, 63.0, 511.0)
        elif gain * min(1.0, max(doubt, LEAST_DOUBT) * math.sqrt(gain)) < tolerance and shrink == 1:
            at = (max(at[0] + step[0], 0.0), max(at[1] + step[1], 0.0))
            return _Optimum(at, unit, here.value - gain, "converged")
        else:
            lengths = (1.0,) if trusted else tuple(shrink * length for length in tried)
        if passes == MAX_PASSES:
            break
        trials = [
            (max(at[0] + length * step[0], 0.0), max(at[1] + length * step[1], 0.0))
            for length in lengths
        ]
        received = yield [_scaled(trial, unit) for trial in trials]
        found = [_Quadratic.from_sums(sums, count, unit) for sums in received]
        best = min(range(len(found)), key=lambda i: found[i].value)
        gained = here.value - found[best].value
        if gained < -rounding * here.value:
            shrink, trusted = shrink if trusted else shrink * tried[-1] / 2, False
        else:
            trusted = lengths[best] == 1 and trust[0] * gain <= gained <= trust[1] * gain
            # Cubic terms put a promise off in proportion to the step, so to the gain's root.
            doubt = abs(gained / gain - 1) / math.sqrt(gain) if trusted and gain > 0 else math.inf
            at, here, shrink = trials[best], found[best], 1.0
    return _Optimum(at, unit, here.value, "pass_limit")


def _fit(data: _Data) -> tuple[dict[str, _Optimum], int]:
    """Find the optima on ever more rows, the last time on all; also how often these were read."""
    stride, strides = 1, [1]
    while data.count // (stride * SHRINK) >= FEWEST_ROWS:
        stride *= SHRINK
        strides.append(stride)
    optima: dict[str, _Optimum] = {}
    passes = 0
    for stride in reversed(strides):
        rough = stride > 1
        part = data.sample(stride) if rough else data
        tolerance = max(data.precision.tolerance, ROUGH / part.count if rough else 0.0)
        optima, passes = _run(part, optima, tolerance)
    return optima, passes


def _run(
    data: _Data, start: dict[str, _Optimum], tolerance: float
) -> tuple[dict[str, _Optimum], int]:
    """Run the searches side by side, so that one pass serves all; also the number of passes."""
    searches = {
        name: _search(data.count, models, start.get(name), tolerance, data.precision.rounding)
        for name, models in SEARCHES.items()
    }
    wanted = {name: next(search) for name, search in searches.items()}
    optima: dict[str, _Optimum] = {}
    passes = 0
    while wanted:
        passes += 1
        totals = iter(data.reduce(data.sums(wanted)).tolist())
        for name, asked in list(wanted.items()):
            try:
                wanted[name] = searches[name].send([NllSums(*next(totals)) for _ in asked])
            except StopIteration as found:
                optima[name] = found.value
                del wanted[name]
    return optima, passes


def _scaled(at: tuple[float, float], unit: tuple[float, float]) -> Temperatures:
    return Temperatures(at[0] * unit[0], at[1] * unit[1])


def _check_shapes(base: Tensor, sidekick: Tensor, targets: Tensor) -> None:
    if not all(isinstance(x, Tensor) for x in (base, sidekick, targets)):
        kinds = ", ".join(type(x).__name__ for x in (base, sidekick, targets))
        raise ValueError(f"fit_temperatures expects tensors (torch.from_numpy), got {kinds}")
    if base.ndim != 2 or base.shape != sidekick.shape or base.shape[1] == 0:
        raise ValueError(
            "fit_temperatures expects base and sidekick logits of one shape (N, K), got "
            f"{tuple(base.shape)} and {tuple(sidekick.shape)}"
        )
    if not (base.is_floating_point() and sidekick.is_floating_point()):
        raise ValueError(
            f"fit_temperatures expects floating-point logits, got {base.dtype} and {sidekick.dtype}"
        )
    if targets.shape != base.shape[:1] or targets.is_floating_point() or targets.is_complex():
        raise ValueError(
            f"fit_temperatures expects integer targets of shape ({len(base)},), got "
            f"{targets.dtype} of shape {tuple(targets.shape)}; soft and multi-label targets are "
            "not supported"
        )


def check_samples(
    base: Tensor,
    sidekick: Tensor,
    targets: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[int, bool]:
    """Count the samples of all processes, and say whether any class is masked.

    Args:
        base: Logits of the base, shape (N, K).
        sidekick: Logits of the sidekick, shape (N, K).
        targets: True classes, shape (N,).
        reduce: As in `fit_temperatures`.

    Raises:
        ValueError: In every process, with the number of samples concerned and the first of them,
            if targets are out of range or masked, logits are NaN or infinite, the two models mask
            different classes, or there is no sample.
    """
    classes = base.shape[1]
    in_range = (targets >= 0) & (targets < classes)
    target_logit = base.gather(1, targets.long().clamp(0, classes - 1)[:, None]).squeeze(1)
    if all(_is_finite(logits) for logits in (base, sidekick)):
        base, sidekick = base[:, :0], sidekick[:, :0]  # nothing to find; looking takes much longer
    masked, masked_sidekick = base == -torch.inf, sidekick == -torch.inf
    problems = {
        f"targets outside 0..{classes - 1}": ~in_range,
        "NaN or +inf base logits": ~(base.isfinite() | masked).all(1),
        "NaN or +inf sidekick logits": ~(sidekick.isfinite() | masked_sidekick).all(1),
        "classes masked with -inf by one model only": (masked != masked_sidekick).any(1),
        "a target class masked with -inf": in_range & (target_logit == -torch.inf),
    }
    here = [len(targets), masked.sum(), *(rows.sum() for rows in problems.values())]
    totals = reduce(torch.tensor(here, dtype=torch.float64, device=base.device))
    count, masks, *bad = (int(total) for total in totals.tolist())
    for number, (problem, rows) in zip(bad, problems.items(), strict=True):
        if number:
            first = rows.nonzero().flatten()[:5].tolist()
            where = f"first rows {first}" if first else "in another process"
            raise ValueError(f"{number} of {count} samples have {problem} ({where})")
    if not count:
        raise ValueError("a duo needs at least one sample to fit or measure, got none")
    return count, masks > 0


def _is_finite(logits: Tensor) -> bool:
    return logits.numel() > 0 and bool(torch.stack(logits.aminmax()).isfinite().all())

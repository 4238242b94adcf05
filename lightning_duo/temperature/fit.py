"""The two temperatures of a duo, fitted exactly: a convex problem in two non-negative numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_duo.temperature.newton import Models, Optimum, Pair, Status, search
from lightning_duo.temperature.samples import WIDE, check_samples, check_shapes, hide_far
from lightning_duo_kernels.nll import NllSums, Point, nll_sums

DOUBLE_LOGITS = 1 << 20  # of one model; up to so many are computed with in float64, which is slower
FEWEST_ROWS = 64  # of a subsample
SHRINK = 8  # a subsample has at most so many times fewer rows than what it prepares
ROUGH = 0.2  # a subsample's optimum is off by about 1 / rows in NLL; it is found to this part of it
SEARCHES: dict[str, Models] = {
    "duo": (True, True),
    "base": (True, False),
    "sidekick": (False, True),
}


class Temperatures(NamedTuple):
    """Non-negative multipliers of the two models' logits.

    They MULTIPLY (paper, Sec. 3.1). Ordinary temperature scaling divides, so its temperature is
    the inverse of the one here.
    """

    base: float
    sidekick: float


UNWEIGHTED = Temperatures(0.5, 0.5)


class _Precision(NamedTuple):
    """What the arithmetic allows to tell apart."""

    dtype: torch.dtype
    tolerance: float
    """NLL above the lowest, below which a search stops. Its last step is not evaluated."""
    equal: float
    """A difference in NLL that is none, between what last steps promise."""
    rounding: float
    """Relative; two losses that differ by less are equal."""


_DOUBLE = _Precision(torch.float64, tolerance=1e-16, equal=1e-10, rounding=1e-12)
_SINGLE = _Precision(torch.float32, tolerance=1e-7, equal=1e-6, rounding=1e-7)


@dataclass(frozen=True)
class TemperatureFit:
    """Temperatures that minimise the negative log-likelihood, and what they reach."""

    temperatures: Temperatures
    """Optimum of the duo."""
    nll: float
    """NLL of the duo at its optimum, in nats per sample; never above ``nll_base``. It is what the
    last Newton step foresees, exact to about 1e-11, or a few 1e-6 where it computes in float32. Of
    soft targets it is never below their entropy."""
    scaled_base: Temperatures
    """Optimum of the base alone, ``(t, 0)``: ordinary temperature scaling with divisor 1/t."""
    nll_base: float
    """NLL of the base at ``scaled_base``."""
    scaled_sidekick: Temperatures
    """Optimum of the sidekick alone, ``(0, t)``."""
    nll_sidekick: float
    """NLL of the sidekick at ``scaled_sidekick``."""
    status: Status
    """``converged``: the optimum. ``separable``: every target is one class, which beats all others
    and can be made as sure as one likes, so no finite optimum exists; the temperatures are finite
    and reach an NLL that rounds to 0.
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
    mask classes with ``-inf`` if both models mask the same ones. If both do so with a number such
    as -1e9, far below all other logits, it counts as ``-inf`` in the fit.

    Targets may be soft: the class probabilities of each row, as several annotators or MixUp give
    them. The NLL of a row is then the mean of -log p under them, which is as convex. Each row is
    divided by its sum, so that what half precision leaves of a 1 makes no difference.

    Most of the way is found on a few rows; all of them are then read once to three times in most
    cases, in chunks: the extra memory is a few tens of MB whatever the number of samples.
    Arithmetic is in float64 for float64 logits, on CUDA, and for up to a million logits (2^20 a
    model); else in float32, with sums over samples in float64: the NLL of the temperatures is then
    within about 1e-7 of the lowest, and reported to a few 1e-6.

    Args:
        base_logits: Logits of the base, shape (N, K), any floating dtype.
        sidekick_logits: Logits of the sidekick, shape (N, K), any floating dtype, same device.
        targets: True classes, shape (N,), an integer dtype, values in [0, K); or class
            probabilities, shape (N, K), a floating dtype, rows of which each sums to 1 within 0.01.
        reduce: Sums a float64 tensor over all processes. With it every process passes its own
            samples (possibly none) and all get the same temperatures. Only sums are exchanged.

    Returns:
        The fit; its temperatures are dimensionless multipliers.

    Raises:
        ValueError: If shapes, dtypes or targets do not fit, logits are NaN or infinite, the two
            models mask different classes, a target is masked (of a soft one: a class that it gives
            a chance), or there is no sample at all.

    Example:
        >>> import torch
        >>> base = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
        >>> fit = fit_temperatures(base, base, torch.tensor([0, 0, 1, 1]))
        >>> fit.temperatures.base == fit.temperatures.sidekick > 0
        True
        >>> soft = torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.0, 1.0], [0.4, 0.6]])
        >>> fit_temperatures(base, base, soft).status
        'converged'

    Source: Asymmetric Duos, Sec. 3.1, "Tuning the temperatures".
    """
    reduce = reduce or (lambda sums: sums)
    check_shapes(base_logits, sidekick_logits, targets)
    count, masked, wide = check_samples(base_logits, sidekick_logits, targets, reduce)
    if wide:
        base_logits, sidekick_logits, hidden, largest = hide_far(
            base_logits, sidekick_logits, targets, reduce
        )
        masked, wide = masked or hidden, largest > WIDE
    logits = base_logits, sidekick_logits
    double = count * base_logits.shape[1] <= DOUBLE_LOGITS or _needs_double(logits, wide, reduce)
    precision = _DOUBLE if double else _SINGLE
    optima, passes = _fit(_Data(*logits, targets, count, masked, precision, reduce))
    duo, base, sidekick = optima["duo"], optima["base"], optima["sidekick"]
    # Each search stops a little above its optimum. A model alone that is better than the duo by
    # more replaces it; else the two are equal (say, collinear models) and so reported.
    alone = min(base, sidekick, key=lambda optimum: optimum.nll)
    if alone.nll < duo.nll - precision.equal:
        duo = alone._replace(status=duo.status)
    return TemperatureFit(
        Temperatures(*duo.temperatures),
        duo.nll,
        Temperatures(*base.temperatures),
        max(base.nll, duo.nll),
        Temperatures(*sidekick.temperatures),
        max(sidekick.nll, duo.nll),
        duo.status,
        passes,
    )


def _needs_double(
    logits: tuple[Tensor, Tensor], wide: bool, reduce: Callable[[Tensor], Tensor]
) -> bool:
    """Whether float32 is not for these logits; all processes decide alike, or they would part."""
    here = wide or any(x.is_cuda or x.dtype == torch.float64 for x in logits)
    flag = torch.tensor([float(here)], dtype=torch.float64, device=logits[0].device)
    return bool(reduce(flag) > 0)


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

    def sums(self, wanted: dict[str, list[Pair]]) -> Tensor:
        """Sums of this process at all temperatures that the searches want, in one read."""
        points = [Point(t, SEARCHES[name]) for name, trials in wanted.items() for t in trials]
        # At T = 0 all classes count alike, and float32 could lose the spread among thousands.
        zero = not all(any(point.temperatures) for point in points)
        how = {"masked": self.masked, "dtype": torch.float64 if zero else self.precision.dtype}
        return nll_sums(self.base, self.sidekick, self.targets, points, **how)  # type: ignore[arg-type]


def _fit(data: _Data) -> tuple[dict[str, Optimum], int]:
    """Find the optima on ever more rows, the last time on all; also how often these were read."""
    most = max(1.0, data.count / FEWEST_ROWS)
    levels = math.ceil(math.log(most, SHRINK))
    strides = sorted({int(most ** (level / max(1, levels))) for level in range(levels + 1)})
    optima: dict[str, Optimum] = {}
    passes = 0
    for stride in reversed(strides):
        rough = stride > 1
        part = data.sample(stride) if rough else data
        tolerance = max(data.precision.tolerance, ROUGH / part.count if rough else 0.0)
        # The fewest rows may be right without exception in the duo's eyes: it starts a level later.
        names = [name for name in SEARCHES if name != "duo" or stride < strides[-1] or not rough]
        starts = {**optima, "duo": _between(optima)}
        optima, passes = _run(part, {name: starts.get(name) for name in names}, tolerance)
    return optima, passes


def _between(optima: dict[str, Optimum]) -> Optimum | None:
    """Where to start the duo's search: its optimum on fewer rows, or halfway between the models."""
    if not optima or ("duo" in optima and optima["duo"].status == "converged"):
        return optima.get("duo")
    base, sidekick = optima["base"], optima["sidekick"]
    if base.status != "converged" or sidekick.status != "converged":
        return None
    at, unit = (base.at[0] / 2, sidekick.at[1] / 2), (base.unit[0], sidekick.unit[1])
    return Optimum(at, unit, math.nan, "converged", None)


def _run(
    data: _Data, starts: dict[str, Optimum | None], tolerance: float
) -> tuple[dict[str, Optimum], int]:
    """Run the searches side by side, so that one pass serves all; also the number of passes."""
    searches = {
        name: search(data.count, SEARCHES[name], start, tolerance, data.precision.rounding)
        for name, start in starts.items()
    }
    wanted = {name: next(steps) for name, steps in searches.items()}
    optima: dict[str, Optimum] = {}
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

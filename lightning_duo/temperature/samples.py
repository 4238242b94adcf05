"""The logits and targets of a fit: what is refused, and what counts as masked."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WIDE = 1e6  # logits beyond are masks, or need float64
FAR, NEAR = 1e-3, 1e-5  # of the lowest logit: masks lie below the one, all others within the other
NEAR_ONE = 1e-2  # off which the sum of class probabilities may be, as half precision leaves it
CHUNK = 1 << 20  # logits that are looked at a time where a copy is needed


def check_shapes(base: Tensor, sidekick: Tensor, targets: Tensor) -> None:
    """Refuse what are not logits (N, K) of two models, and targets (N,) or (N, K).

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
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
    soft = targets.is_floating_point()
    no_index = soft or targets.is_complex() or targets.dtype == torch.bool
    if targets.shape != base.shape[: 1 + soft] or (no_index and not soft):
        raise ValueError(
            f"fit_temperatures expects integer targets of shape ({len(base)},), or class "
            f"probabilities of a floating dtype and shape {tuple(base.shape)}, got {targets.dtype} "
            f"of shape {tuple(targets.shape)}; of multi-label targets make rows of two classes "
            "with lightning_duo.tasks.Labels().rows"
        )


class Samples(NamedTuple):
    """What `check_samples` saw."""

    number: int
    """Samples of all processes."""
    masked: bool
    """Whether any class of any sample is masked, in any process."""
    wide: bool
    """Whether any logit is masked or beyond `WIDE`, in any process."""


def check_samples(
    base: Tensor,
    sidekick: Tensor,
    targets: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Samples:
    """Look at the samples of all processes, and refuse those that no temperatures can be for.

    Args:
        base: Logits of the base, shape (N, K).
        sidekick: Logits of the sidekick, shape (N, K).
        targets: True classes, shape (N,), or class probabilities, shape (N, K).
        reduce: As in `fit_temperatures`.

    Raises:
        ValueError: In every process, with the number of samples concerned and the first of them,
            if targets are out of range, no probabilities or masked, logits are NaN or infinite, the
            two models mask different classes, or there is no sample.
    """
    name, wrong = _wrong_targets(targets, base.shape[1])
    extents = [_largest(logits) for logits in (base, sidekick)]
    if all(map(math.isfinite, extents)):
        base, sidekick = base[:, :0], sidekick[:, :0]  # nothing to find; looking takes much longer
    masked, masked_sidekick = base == -torch.inf, sidekick == -torch.inf
    problems = {
        name: wrong,
        "NaN or +inf base logits": ~(base.isfinite() | masked).all(1),
        "NaN or +inf sidekick logits": ~(sidekick.isfinite() | masked_sidekick).all(1),
        "classes masked with -inf by one model only": (masked != masked_sidekick).any(1),
        "a target class masked with -inf": ~wrong & _at_targets(masked, targets),
    }
    far = max(extents) > WIDE
    here = [len(targets), masked.sum(), far, *(rows.sum() for rows in problems.values())]
    totals = reduce(torch.tensor(here, dtype=torch.float64, device=base.device))
    count, masks, wide, *bad = (int(total) for total in totals.tolist())
    for number, (problem, rows) in zip(bad, problems.items(), strict=True):
        if number:
            first = rows.nonzero().flatten()[:5].tolist()
            where = f"first rows {first}" if first else "in another process"
            raise ValueError(f"{number} of {count} samples have {problem} ({where})")
    if not count:
        raise ValueError(
            "a duo needs at least one sample to fit or measure, got none (are all targets ignored?)"
        )
    return Samples(count, masks > 0, wide > 0)


def _wrong_targets(targets: Tensor, classes: int) -> tuple[str, Tensor]:
    """What targets may not be, and whether those of each row are, shape (N,)."""
    if targets.ndim == 2:
        # Comparisons with NaN are false.
        right = (targets.amin(1) >= 0) & ((targets.sum(1).double() - 1).abs() <= NEAR_ONE)
        return "targets that are no probabilities (each at least 0, with a sum of 1)", ~right
    targets = targets.long()  # unsigned numbers cannot be compared
    return f"targets outside 0..{classes - 1}", (targets < 0) | (targets >= classes)


def _at_targets(masks: Tensor, targets: Tensor) -> Tensor:
    """Whether each row's target, or any class of a soft one, is masked, shape (N,)."""
    if not masks.shape[1]:  # nobody looked for any
        return torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    if targets.ndim == 2:
        return (masks & (targets > 0)).any(1)
    return masks.gather(1, targets.long().clamp(0, masks.shape[1] - 1)[:, None]).squeeze(1)


def _largest(logits: Tensor) -> float:
    """Largest absolute value; 0 if there is none, infinite if a class is masked."""
    low, high = logits.aminmax() if logits.numel() else (0.0, 0.0)
    return max(-float(low), float(high))


class Visible(NamedTuple):
    """What `hide_far` leaves to be seen."""

    base: Tensor
    sidekick: Tensor
    masked: bool
    """Whether it masked any class of this process."""
    largest: float
    """Largest absolute value of the logits that are not masked."""


def hide_far(
    base: Tensor, sidekick: Tensor, targets: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Visible:
    """Mask with -inf what is masked with a large finite number, such as -1e9 or the lowest float.

    To a fit such numbers are logits like others, and spread so wide that it finds no scale for the
    rest. A mask is told by its distance: it lies below `FAR` of a model's lowest logit, and all
    other logits of that model lie within `NEAR` of it.

    Args:
        base: Logits of the base, shape (N, K), as `check_samples` accepts them.
        sidekick: Logits of the sidekick, shape (N, K).
        targets: True classes, shape (N,), or class probabilities, shape (N, K).
        reduce: As in `fit_temperatures`; all processes hide, or none does.

    Returns:
        The logits, with -inf where both models mask the same classes and no target. Where they do
        not, they are as they were, and a warning says so.
    """
    extents = [_extent(logits) for logits in (base, sidekick)]
    found = [_far(*each) for each in zip((base, sidekick), extents, strict=True)]
    if found[0] is None and found[1] is not None:
        found[0] = _far_beside(base, found[1])
    elif found[1] is None and found[0] is not None:
        found[1] = _far_beside(sidekick, found[0])
    first, second = found
    any_here = first is not None or second is not None
    unlike = any_here and (first is None or second is None or not torch.equal(first, second))
    target = first is not None and bool(_at_targets(first, targets).any())
    here = torch.tensor([unlike, target], dtype=torch.float64, device=base.device)
    for problem, processes in zip(
        ("but not for the same classes in both models", "for targets too"),
        reduce(here).tolist(),
        strict=True,
    ):
        if processes:
            warnings.warn(
                "logits are far below all others, as if classes were masked with a number such as "
                f"-1e9, {problem}; temperatures fitted to them mean little. Mask the same classes "
                "in both models, with -inf, and none that is a target",
                stacklevel=3,
            )
            return Visible(base, sidekick, False, max(map(abs, (*extents[0], *extents[1]))))
    if first is not None:
        base, sidekick = (x.masked_fill(first, -torch.inf) for x in (base, sidekick))
        extents = [_extent(logits) for logits in (base, sidekick)]
    return Visible(base, sidekick, any_here, max(map(abs, (*extents[0], *extents[1]))))


def _extent(logits: Tensor) -> tuple[float, float]:
    """Lowest and largest of the logits that are not -inf, and 0; a few rows at a time."""
    low = high = 0.0
    for part in torch.split(logits, max(1, CHUNK // logits.shape[1])) if logits.numel() else ():
        low = min(low, float(part.nan_to_num(neginf=0.0).amin()))
        high = max(high, float(part.amax()))
    return low, high


def _far(logits: Tensor, extent: tuple[float, float]) -> Tensor | None:
    """Where the logits are masks, -inf or not; None if no finite number is one."""
    low, high = extent
    if low > -WIDE or high > -NEAR * low:
        return None
    masks = logits < FAR * low
    lowest_other, _ = _extent(logits.masked_fill(masks, 0.0))
    return masks if lowest_other >= NEAR * low else None


def _far_beside(logits: Tensor, masks: Tensor) -> Tensor | None:
    """The masks of the other model, if this one has nearer numbers, such as -1e4, for the same."""
    lowest_other, _ = _extent(logits.masked_fill(masks, 0.0))
    highest = float(logits.masked_fill(~masks, -torch.inf).amax())
    return masks if highest < 100 * min(lowest_other, -1.0) else None

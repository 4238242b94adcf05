"""A duo of two trained models and a DataLoader, without training."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lightning_duo.batch import BatchFn
from lightning_duo.calibration.calibration import Calibration
from lightning_duo.calibration.fit import calibrate, check_request
from lightning_duo.logits import MEMORY, collect_logits
from lightning_duo.module import DuoModule
from lightning_duo.nested import Path
from lightning_duo.tasks import Task


class CalibratedModels(NamedTuple):
    """Two models made a duo."""

    duo: DuoModule
    """It is called as the base is, and shares the weights of both."""
    calibration: Calibration
    """Its temperatures and threshold, and what they reach on the data."""


def calibrate_models(
    base: Callable[..., Any],
    sidekick: Callable[..., Any],
    data: Iterable[Any],
    *,
    target_accuracy: float | None = None,
    delta: float | None = None,
    batch_fn: BatchFn | None = None,
    task: Task | None = None,
    logits_at: Path = (),
    memory: int = MEMORY,
) -> CalibratedModels:
    """Make a duo of two trained models: `collect_logits`, then `calibrate`.

    Args:
        base: The larger model; gives logits, such as (B, K), or a mapping or object with
            ``logits``.
        sidekick: The smaller model, for the same classes or labels. Images are resized and
            normalised for it, and arguments that it does not take are left out, as in
            `collect_logits`.
        data: Batches of held-out samples, which trained neither model; see `collect_logits`.
        target_accuracy: Accuracy that accepted predictions are to reach, in (0, 1]; by default
            everything is accepted.
        delta: Probability with which the accepted of new data may miss it; see `calibrate`.
        batch_fn: As of `collect_logits`, and so are the others.
        task: See there.
        logits_at: See there.
        memory: See there.

    Returns:
        The duo, in eval mode, and the calibration. The duo holds these models, not copies: they are
        in eval mode afterwards, and training either later changes the duo too.

    Raises:
        ValueError: As `collect_logits` and `calibrate` do. The models are then as they were.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> base, sidekick = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> batches = [(part, base(part).argmax(1)) for part in x.split(50)]
        >>> duo, calibration = calibrate_models(base, sidekick, batches)
        >>> duo(x[:2]).probs.shape, calibration.samples
        (torch.Size([2, 3]), 200)

    Source: Asymmetric Duos, Sec. 3.1.
    """
    check_request(target_accuracy, delta)
    found = collect_logits(
        base, sidekick, data, batch_fn=batch_fn, task=task, logits_at=logits_at, memory=memory
    )
    calibration = calibrate(
        *found,
        target_accuracy=target_accuracy,
        delta=delta,
        items=found.items,
        task=found.task,
    )
    duo = calibration.module(base, found.fitted_sidekick, logits_at=logits_at)
    return CalibratedModels(duo, calibration)

"""Logits of two trained models on the same samples, from the models."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.batch import BatchFn, check_read
from lightning_duo.logits.check import Logits
from lightning_duo.logits.decisions import Decisions
from lightning_duo.logits.kept import MEMORY
from lightning_duo.logits.messages import say, warn
from lightning_duo.logits.models import Models
from lightning_duo.logits.progress import progress_bar
from lightning_duo.logits.read import read_call
from lightning_duo.nested import Path
from lightning_duo.tasks import Classes, Task


class CollectedLogits(Logits):
    """`Logits` of models, and what else was seen when they were collected.

    They unpack to logits and targets as `Logits` do; ``calibrate(*found, items=found.items,
    task=found.task)`` knows the rest too.
    """

    items: Tensor | None = None
    """Number of the item (image, sentence) that each decision belongs to, shape (R,), int64; None
    where each is of an item of its own."""
    task: Task = Classes()
    """What the outputs of the models decide."""
    seen: int = 0
    """How many decisions there were; more than R if a sample of them is kept."""
    fitted_sidekick: nn.Module
    """The sidekick behind the transform of its inputs, and without the arguments that it does not
    take; the sidekick itself if it needs neither. The sidekick of the duo to deploy."""


def collect_logits(
    base: Callable[..., Any],
    sidekick: Callable[..., Any],
    data: Iterable[Any],
    *,
    batch_fn: BatchFn | None = None,
    task: Task | None = None,
    logits_at: Path = (),
    memory: int = MEMORY,
) -> CollectedLogits:
    """Run two trained models over a DataLoader, in eval mode, which leaves them as they were.

    The sidekick gets the base's inputs as in a run of `DuoCallback`: resized if it takes one size
    only, normalised anew if both models state how, without arguments that it does not take. A line
    in the log says so. On a terminal a bar shows the progress.

    Args:
        base: Gives logits, such as (B, K), or a mapping or object with ``logits``.
        sidekick: The same for the same inputs; put what else it needs in front of it, as in
            ``nn.Sequential(Grayscale(), model)``.
        data: Batches: ``(inputs, targets)``, ``(x1, x2, targets)`` if the base takes two arguments,
            or a mapping, a graph or another object with ``labels``, ``y`` or the like.
        batch_fn: ``batch -> (inputs, targets)``, for other batches. If the models take several
            arguments, the inputs are a `Call`, as for `DuoPredictor`.
        task: What the logits decide: `Classes` or `Labels` of `lightning_duo.tasks`. By default one
            class of each sample, pixel or token, if shapes and dtypes leave no doubt.
        logits_at: As of `DuoModule`.
        memory: Bytes for the decisions that are kept and for what will be said of them. Of more
            decisions a random sample is kept.

    Returns:
        Logits (R, K) and targets of all R decisions that have a target (not -100, nor the task's
        ``ignore_index``), on the CPU, in float32.

    Raises:
        ValueError: If a batch cannot be read, a model cannot run it or gives no logits, it is not
            clear what they decide, targets do not fit, or there is nothing to collect.

    Example:
        >>> import torch
        >>> batches = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
        >>> found = collect_logits(torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), batches)
        >>> found.base.shape
        torch.Size([4, 3])
        >>> from lightning_duo.tasks import Labels
        >>> batches = [(torch.randn(4, 8), torch.randint(2, (4, 3)))]
        >>> models = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> collect_logits(*models, batches, task=Labels()).items
        tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    """
    models, decisions = Models(base, sidekick, logits_at), Decisions(task, memory)
    with models.unchanged(), progress_bar(data, "collecting logits") as batches:
        for batch in batches:
            inputs, targets = (
                read_call(batch, models.base) if batch_fn is None else check_read(batch_fn(batch))
            )
            decisions.add(*models.logits(Call.with_input(inputs)), targets)
    sample = decisions.sample()
    rows = len(sample.logits.targets)
    if rows < decisions.seen:
        say(
            f"{rows:,} of {decisions.seen:,} decisions are kept. They are as many as memory="
            f"{memory:,} bytes hold; every one had the same chance"
        )
    for problem in decisions.problems():
        warn(problem)
    found = CollectedLogits(*sample.logits)
    found.items, found.seen = sample.items, decisions.seen
    found.task = decisions.task or Classes()
    found.fitted_sidekick = models.calling.deployable()
    return found

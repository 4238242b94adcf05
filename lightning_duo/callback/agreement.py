"""What one process finds wrong, all of them say: else the others would wait for it for ever."""

from typing import Any

import torch


def agree(problem: str | None, found: Any = None) -> None:
    """Compare with all other processes, each of which calls this at the same time.

    Args:
        problem: What is wrong in this process; None if nothing is.
        found: What must be the same in all, in plain types; None if this process found nothing.

    Raises:
        ValueError: In every process, if anything is wrong in one, or they found different things.
    """
    said: list[Any] = [(problem, found)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, (problem, found))
    for rank, (theirs, _) in enumerate(said):
        if theirs is not None:
            raise ValueError(theirs if theirs == problem else f"in process {rank}: {theirs}")
    known = [theirs for _, theirs in said if theirs is not None]
    if any(theirs != known[0] for theirs in known):
        raise ValueError(
            f"the processes read their batches differently: {known}; pass DuoCallback(..., "
            "batch_fn=lambda batch: (inputs, targets), logits_fn=lambda module, inputs: logits)"
        )

"""Whether a step changes its batch in place, so that the sidekick would see something else."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_duo.callback.matches import memory
from lightning_duo.callback.reading import Example
from lightning_duo.isolation import same_values
from lightning_duo.nested import leaves


class Snapshot:
    """The tensors of a batch before a step, to tell whether the step changes them in place.

    Args:
        tensors: Inputs and targets.
        copy: Whether to compare values too: tensors made in inference mode count no changes, nor
            do others where they are changed behind autograd's back.
    """

    def __init__(self, tensors: Sequence[Tensor], *, copy: bool) -> None:
        self._counted = [(t, t._version) for t in tensors if not t.is_inference()]
        whole = [t for t in tensors if copy and t.layout == torch.strided]
        self._copied = [(t, t.clone()) for t in whole]

    def check(self, module: nn.Module, examples: list[Example]) -> None:
        """Raise ValueError if a tensor that the sidekick sees is not what it was."""
        # A tensor of a call counts as it was then, whatever the step did with it before.
        then = {id(t): (t, version) for e in examples for t, version in e.versions}
        changed = [t for t, version in then.values() if t._version != version]
        counted = {id(t): t for t, version in self._counted if t._version != version}
        if counted or self._copied:  # else the memory of no tensor needs to be looked up
            used = {memory(t) for e in examples for _, t in leaves((e.call, e.targets))}
            changed += [t for t in counted.values() if id(t) not in then and memory(t) in used]
            changed += [
                t
                for t, copy in self._copied
                if memory(t) in used and id(t) not in counted and not same_values(t, copy)
            ]
        if changed:
            raise ValueError(
                f"{type(module).__name__} changed the batch in place (the tensor of shape "
                f"{tuple(changed[0].shape)}), so the sidekick would see other data than the base "
                "got; work on a copy in the step (x = x.clone()), or pass DuoCallback(..., "
                "batch_fn=lambda batch: (batch[0].clone(), batch[1].clone())), which is called "
                "before the step"
            )

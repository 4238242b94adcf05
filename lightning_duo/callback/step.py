"""Base and sidekick of a run, side by side: the logits of both for a batch, and the duo."""

import copy
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_duo.base import BaseLogits, LogitsFn, LogitsOf, call_base, has_forward
from lightning_duo.batch import BatchFn, describe, read_batch
from lightning_duo.calibration import Calibration
from lightning_duo.callback.run import is_sharded
from lightning_duo.callback.sidekick import Sidekick, sidekick_logits
from lightning_duo.cost import Cost, count_flops, count_parameters
from lightning_duo.isolation import evaluating, own_stream, same_values, unnoticed
from lightning_duo.logits import Logits
from lightning_duo.module import DuoModule
from lightning_duo.tasks import check_targets

_STAGES = ("training", "validation", "test", "predict")


def check_read(found: Any) -> None:
    """Raise ValueError if what ``batch_fn`` returned is no (inputs, targets)."""
    if not isinstance(found, tuple | list) or len(found) != 2 or found[0] is None:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else describe(found)
        raise ValueError(f"batch_fn must return (inputs, targets), got {what}")
    if not isinstance(found[1], Tensor):
        raise ValueError(
            "batch_fn must return (inputs, targets) with targets as a tensor of class indices, got "
            f"{type(found[1]).__name__}"
        )


class Snapshot:
    """The tensors of a batch before a step, to tell whether the step changes them in place.

    Args:
        batch: Inputs and targets, nested as they come.
        copy: Whether to compare values too: tensors made in inference mode count no changes, nor
            do others where they are changed behind autograd's back.
    """

    def __init__(self, batch: Any, *, copy: bool) -> None:
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._counted = [(t, t._version) for t in tensors if not t.is_inference()]
        whole = [t for t in tensors if copy and t.layout == torch.strided]
        self._copied = [(t, t.clone()) for t in whole]

    def check(self, module: nn.Module) -> None:
        """Raise ValueError if a tensor is not what it was."""
        changed = [t for t, version in self._counted if t._version != version]
        changed += [t for t, copy in self._copied if not same_values(t, copy)]
        if changed:
            raise ValueError(
                f"{type(module).__name__} changed the batch in place (the tensor of shape "
                f"{tuple(changed[0].shape)}), so the sidekick would see other data than the base "
                "got; work on a copy in the step (x = x.clone()), or pass DuoCallback(..., "
                "batch_fn=lambda batch: (batch[0].clone(), batch[1].clone())), which is called "
                "before the step"
            )


class Pair:
    """Both models of a run.

    Args:
        sidekick: The sidekick, perhaps not built yet.
        batch_fn: ``batch -> (inputs, targets)``.
        logits_fn: ``(module, inputs) -> logits``, or None.
    """

    def __init__(self, sidekick: Sidekick, batch_fn: BatchFn, logits_fn: LogitsFn | None) -> None:
        self.sidekick, self.read_batch = sidekick, batch_fn
        self.base = BaseLogits(logits_fn)
        self._example: Tensor | None = None
        self._batch: tuple[Any, Tensor] | None = None
        self._before: Snapshot | None = None
        self._said = False

    def before_step(self, module: LightningModule, batch: Any, *, watch: bool, first: bool) -> None:
        """Take inputs and targets from the batch before the base's step can change it.

        Args:
            module: The base.
            batch: As its step is about to get it.
            watch: Whether to record the logits of the step.
            first: Whether to look closely at what the step does with the batch.
        """
        if self.read_batch is read_batch:  # ours draws nothing
            self._batch = read_batch(batch)
        else:
            with own_stream(module.device):
                self._batch = self.read_batch(batch)
        check_read(self._batch)
        if first and self.read_batch is read_batch:
            self._say_what_was_taken(batch, len(self._batch[1]))
        self._before = Snapshot(self._batch, copy=first)
        if watch:
            self.base.watch(module)

    def _say_what_was_taken(self, batch: Any, count: int) -> None:
        if self._said or not isinstance(batch, tuple | list):
            return
        others = [p for p in batch[2:] if isinstance(p, Tensor) and p.shape == (count,)]
        if any(not part.is_floating_point() for part in others):
            self._said = True
            rank_zero_info(
                f"DuoCallback: of the {len(batch)} parts of a batch the first is taken as the "
                "inputs and the second as the targets; pass batch_fn=lambda batch: (inputs, "
                "targets) if others are"
            )

    def after_step(self, module: LightningModule) -> tuple[Any, Tensor]:
        """Inputs and targets of the batch whose step has ended.

        Raises:
            ValueError: If the step changed them in place.
        """
        assert self._batch is not None
        assert self._before is not None
        self._before.check(module)
        batch, self._batch, self._before = self._batch, None, None
        return batch

    @property
    def in_step(self) -> bool:
        """Whether the batch of a step that has begun is still to be used."""
        return self._batch is not None

    def reset(self) -> None:
        """Forget the batch of a step that did not end."""
        self._batch = self._before = None
        self.base.unwatch()

    def build(self, trainer: Trainer, pl_module: LightningModule, num_classes: int) -> nn.Module:
        """The sidekick, on the base's device and in the Trainer's precision."""
        with torch.inference_mode(False):
            model = self.sidekick.build(num_classes, pl_module, pretrained=True)
            return trainer.precision_plugin.convert_module(model).to(pl_module.device)

    def logits(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Logits:
        """Logits of both models (N, K) and targets (N,) of the last batch, on the CPU."""
        inputs, targets = self.after_step(pl_module)
        with own_stream(pl_module.device):
            with trainer.precision_plugin.val_step_context():
                known = self.sidekick.num_classes or 0
                base = self.base.of(pl_module, outputs, inputs, targets, classes=known)
            classes = base.shape[1]
            if self.sidekick.num_classes not in (None, classes):
                raise ValueError(
                    f"the base gives {classes} classes but the sidekick was built for "
                    f"{self.sidekick.num_classes}; pass DuoCallback(..., num_classes={classes})"
                )
            model = self.build(trainer, pl_module, classes)
            targets = check_targets(targets, classes)
            deployed = self.sidekick.deployable()  # a transform may have modes too
            with evaluating(deployed), trainer.precision_plugin.val_step_context():
                sidekick = sidekick_logits(model, self.sidekick.inputs(pl_module, inputs))
        if sidekick.shape != base.shape:
            raise ValueError(
                f"the sidekick {self.sidekick.name!r} gives logits {tuple(sidekick.shape)} but "
                f"the base {tuple(base.shape)}: give it a head with {classes} outputs, or pass a "
                "name or a callable num_classes -> nn.Module"
            )
        if isinstance(inputs, Tensor) and len(inputs):
            self._example = inputs[:1].detach()
        return Logits(base.float().cpu(), sidekick.float().cpu(), targets.cpu())

    def cost(self, module: LightningModule) -> Cost | None:
        """FLOPs of both models for one sample, and parameters; None if they can't be counted."""
        if self._example is None or self.sidekick.model is None or is_sharded(module):
            return None
        sidekick = self.sidekick.deployable()
        try:
            with own_stream(module.device), unnoticed(module):
                base = count_flops(module, self._example, self.base.logits_fn or call_base)
                flops = base, count_flops(sidekick, self._example)
        except Exception as error:  # the user's forward may want more than a batch of one
            rank_zero_warn(f"DuoCallback: the FLOPs of base and sidekick are unknown: {error}")
            return None
        return Cost(*flops, count_parameters(module), count_parameters(sidekick))

    def duo(self, module: LightningModule, calibration: Calibration) -> DuoModule:
        """A deep copy of both models as a duo, on the base's device, in eval mode.

        Raises:
            ValueError: If the base's logits can be computed neither by its forward nor by the
                user's ``logits_fn``.
            MisconfigurationException: If the base is sharded, or cannot be copied.
        """
        if self.base.logits_fn is None and not has_forward(module):
            raise ValueError(
                f"{type(module).__name__} has no forward, so the duo cannot call it; define "
                "forward(x) or pass DuoCallback(..., logits_fn=lambda module, inputs: ...)"
            )
        if is_sharded(module):
            raise MisconfigurationException(
                "each process holds a shard of the base only, so no duo can be copied; save with "
                "ModelParallelStrategy(save_distributed_checkpoint=False), then in one process "
                "trainer.validate(model, data, ckpt_path=...) and callback.module"
            )
        self.base.unwatch()
        base, sidekick = _copies(module, self.sidekick.deployable())
        if getattr(base, "_compiler_ctx", None) is not None:
            # Lightning keeps the compiled methods of `torch.compile(module)` on the instance, and
            # a copied function still runs the original's weights.
            for name in ("forward", *(f"{stage}_step" for stage in _STAGES)):
                vars(base).pop(name, None)
        if self.base.logits_fn is not None:
            base = LogitsOf(self.base.logits_fn, base)
        duo = calibration.module(base, sidekick)
        return duo.to(module.device).requires_grad_(False).eval()


def _copies(base: nn.Module, sidekick: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Deep copies made in one go, so that neither refers to an original."""
    # Losses and outputs that the user's steps have kept on the module are no leaves of autograd,
    # which refuse to be copied.
    kept = [leaf for part in base.modules() for leaf in tree_leaves(list(vars(part).values()))]
    memo = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy((base, sidekick), memo)
    except Exception as error:
        raise MisconfigurationException(
            f"{type(base).__name__} or the sidekick cannot be copied ({type(error).__name__}: "
            f"{error}); give it a __deepcopy__ or take away the attribute that cannot be copied"
        ) from error

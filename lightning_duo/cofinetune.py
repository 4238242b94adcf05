"""Co-fine-tuning: the sidekick learns inside the base's training loop, without a trace in it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_duo.sidekick import head_parameters, sidekick_logits

OptimizerFn: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFn: TypeAlias = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Recipe:
    """How the sidekick is fine-tuned: linear probe of the head, then all of it (paper, A.2)."""

    probe: float = 0.3
    """Fraction of the optimizer steps that train the head only (paper: 8 of 28, 5 of 15 epochs)."""
    optimizer: OptimizerFn | None = None
    """Parameters -> optimizer, in both phases; None: AdamW, lr 1e-3 (probe) and 3e-4."""
    lr_scheduler: SchedulerFn | None = None
    """Optimizer -> scheduler, stepped after every optimizer step, made anew for each phase; None:
    linear warm-up over 5 % of the phase, then cosine to 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.probe <= 1:
            raise ValueError(
                f"probe must be a fraction of the training in [0, 1], got {self.probe}"
            )

        for name in ("optimizer", "lr_scheduler"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"{name} must be callable, such as functools.partial(torch.optim.AdamW, "
                    f"lr=1e-4) for the optimizer; got {value!r}"
                )

    def make_optimizer(self, parameters: list[nn.Parameter], *, probing: bool) -> Optimizer:
        """Optimizer of one phase."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return AdamW(parameters, lr=1e-3 if probing else 3e-4, weight_decay=1e-6)

    def make_scheduler(self, optimizer: Optimizer, steps: int | None) -> LRScheduler:
        """Scheduler of a phase of that many optimizer steps; None if it has no known end."""
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                raise MisconfigurationException(
                    "the sidekick's lr_scheduler is stepped after every update without a metric, "
                    "so ReduceLROnPlateau cannot be used; pass another scheduler"
                )
            return scheduler
        warmup = 100 if steps is None else max(1, round(0.05 * steps))
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        if steps is None:
            return rise
        fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
        return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


class SidekickTrainer:
    """Trains the sidekick inside someone else's training loop, without a trace in it.

    It steps when the base's optimizer has stepped, uses the Trainer's precision, gradient
    clipping and gradient averaging, and leaves the global random streams as they were.

    Args:
        model: The sidekick.
        num_classes: K.
        recipe: How to train it.
        trainer: The user's Trainer; training is about to start.
        state: What `state_dict` gave, to go on from there.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        recipe: Recipe,
        trainer: Trainer,
        state: dict[str, Any] | None,
    ) -> None:
        self.model, self.recipe, self.trainer = model, recipe, trainer
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        if not self._trainable:
            raise MisconfigurationException(
                "the sidekick has no trainable parameters; call requires_grad_(True) on it, or "
                "fit only the temperatures with trainer.validate"
            )
        self.updates = self.batches = 0
        self.seed = torch.initial_seed()
        self.total = self._total_updates()
        head = {id(p) for _, p in head_parameters(model, num_classes)}
        self._head = [p for p in self._trainable if id(p) in head]
        self.probe_updates = round(recipe.probe * (self.total or 0)) if self._head else 0
        if recipe.probe and not self.probe_updates and not self._head:
            rank_zero_info("DuoCallback: no final linear layer found, so there is no linear probe")
        mixed_half = getattr(trainer.precision_plugin, "scaler", None) is not None
        self.scaler = torch.amp.GradScaler(trainer.strategy.root_device.type, enabled=mixed_half)
        if state is not None:
            self.updates, self.batches = state["updates"], state["batches"]
            self.probe_updates, self.seed = state["probe_updates"], state["seed"]
        self._enter_phase()
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])

    @property
    def probing(self) -> bool:
        """Whether only the head is being trained."""
        return self.updates < self.probe_updates

    def _total_updates(self) -> int | None:
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            rank_zero_warn(
                "DuoCallback: the Trainer does not know when training ends (no max_epochs, or a "
                "train loader without length), so the sidekick trains without a linear probe at a "
                "constant learning rate; set max_steps for the full recipe"
            )
            return None
        return int(total)

    def _enter_phase(self) -> None:
        probing = self.probing
        parameters = self._head if probing else self._trainable
        for p in self._trainable:
            p.requires_grad_(not probing)
            p.grad = None
        for p in parameters:
            p.requires_grad_(True)
        steps = self.probe_updates if probing else self.total and self.total - self.probe_updates
        self.optimizer = self.recipe.make_optimizer(parameters, probing=probing)
        self.scheduler = self.recipe.make_scheduler(self.optimizer, steps)
        self._parallel: nn.Module = self.model
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and isinstance(strategy, DDPStrategy):
            self._parallel = DistributedDataParallel(
                self.model, device_ids=strategy.determine_ddp_device_ids()
            )

    def stop(self) -> None:
        """Leave the model as trainable as it was given."""
        for p in self._trainable:
            p.requires_grad_(True)

    def step(self, make_inputs: Callable[[], Any], targets: Tensor, *, update: bool) -> Tensor:
        """Learn from a batch.

        Args:
            make_inputs: Gives the sidekick's inputs; may draw random numbers.
            targets: True classes, shape (N,), int64.
            update: Whether this batch ends an accumulation window.

        Returns:
            Cross-entropy in nats per sample, detached.
        """
        # In the probe the features are frozen: normalisation statistics and dropout too.
        self.model.train(not self.probing)
        with isolate_rng(include_cuda=self.trainer.strategy.root_device.type == "cuda"):
            # A stream of its own, the same after a resume, and different on every rank.
            step_seed = self.batches * self.trainer.world_size + self.trainer.global_rank
            torch.manual_seed((self.seed + 1_000_003 * step_seed) % 2**63)
            with self._gradients_synced(update):
                with self.trainer.precision_plugin.train_step_context():
                    logits = sidekick_logits(self._parallel, make_inputs())
                    loss = nn.functional.cross_entropy(logits.float(), targets)
                accumulated = loss / self.trainer.accumulate_grad_batches
                torch.autograd.backward(self.scaler.scale(accumulated))
        self.batches += 1
        if update:
            self._update()
        return loss.detach()

    def _gradients_synced(self, update: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once per accumulation window."""
        if isinstance(self._parallel, DistributedDataParallel) and not update:
            no_sync: AbstractContextManager[None] = self._parallel.no_sync()
            return no_sync
        return nullcontext()

    def _update(self) -> None:
        if self.trainer.gradient_clip_val:
            self.scaler.unscale_(self.optimizer)
            self.trainer.precision_plugin.clip_gradients(
                self.optimizer,
                self.trainer.gradient_clip_val,
                GradClipAlgorithmType(self.trainer.gradient_clip_algorithm or "norm"),
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        was_probing = self.probing
        self.updates += 1
        if was_probing and not self.probing:
            self._enter_phase()
        else:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only; the model's weights are not among them."""
        return {
            "updates": self.updates,
            "batches": self.batches,
            "seed": self.seed,
            "probe_updates": self.probe_updates,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

"""Where the sidekick learns: inside the base's training loop, without a trace in it."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.reading import Example
from lightning_duo.callback.sidekick import Sidekick, check_model
from lightning_duo.isolation import own_stream
from lightning_duo.zoo import head_parameters


def _planned_updates(
    trainer: Trainer, steps_per_batch: int, *, epoch: int = 0, step: int = 0
) -> int | None:
    """How often the sidekick will be updated until training ends.

    Args:
        trainer: The user's Trainer, in fit.
        steps_per_batch: Optimizer steps of the base in a batch, which count towards ``max_steps``:
            1, or as many as a module makes that steps its optimizers itself; 0 if not known.
        epoch: At which the sidekick begins.
        step: The Trainer's global step there.

    Returns:
        The number, or None if nobody knows when training ends.
    """
    limit = math.inf
    if trainer.max_steps != -1:
        if not steps_per_batch:
            return None
        limit = math.ceil((trainer.max_steps - step) / steps_per_batch)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs >= 0 and batches < math.inf:
        schedules = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler)
        ]
        if schedules:
            windows = map(schedules[0].get_accumulate_grad_batches, range(epoch, epochs))
            planned = sum(math.ceil(batches / window) for window in windows)
        else:
            planned = (epochs - epoch) * math.ceil(batches / trainer.accumulate_grad_batches)
        limit = min(limit, planned)
    return int(limit) if 0 < limit < math.inf else None


class Progress(NamedTuple):
    """How far the sidekick's training is."""

    updates: int
    """Steps of its optimizer."""
    batches: int
    """Batches it has seen."""
    probe_updates: int
    """Steps, from the first, that train its head only."""
    total: int | None
    """Steps until training ends; None if nobody knows."""


class Training:
    """Trains the sidekick inside the base's training loop, without a trace in it.

    It steps when the base's optimizer has stepped, uses the Trainer's precision, gradient
    clipping and gradient averaging, and leaves the global random streams as they were.

    Args:
        sidekick: The sidekick.
        options: The user's.
        trainer: The user's Trainer, in fit.
        messages: Where to say what becomes of the recipe.
        state: What `state_dict` gave, to resume from it, or None.
        steps_per_batch: Optimizer steps of the base in a batch; see `_planned_updates`.
        step: The Trainer's global step where this begins.

    Raises:
        MisconfigurationException: If the model cannot be trained.
    """

    def __init__(
        self,
        sidekick: Sidekick,
        options: Options,
        trainer: Trainer,
        messages: Messages,
        state: dict[str, Any] | None = None,
        *,
        steps_per_batch: int = 1,
        step: int = 0,
    ) -> None:
        self.model, self.options, self.trainer = sidekick.model, options, trainer
        check_model(self.model, trained=True)
        # As the Trainer does with the base, if it was asked to; there is none for the CPU.
        self._layer_sync = getattr(trainer.strategy, "_layer_sync", None)
        if self._layer_sync is not None and trainer.strategy.root_device.type != "cpu":
            self._layer_sync.apply(self.model)
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.updates = self.batches = 0
        self.seed = trainer.strategy.broadcast(torch.initial_seed())
        # A sidekick that was stopped goes on counting; one that begins late plans for what is left.
        begin = {"epoch": trainer.current_epoch, "step": step} if state is None else {}
        self.total = _planned_updates(trainer, steps_per_batch, **begin)
        if self.total is None:
            messages.warn(
                "nobody knows when training ends (no max_epochs, a train loader without length, "
                "or a module that steps its optimizers itself under max_steps), so the sidekick "
                "trains without a linear probe at a constant learning rate; set max_epochs or "
                "max_steps for the full recipe"
            )
        head = {id(p) for _, p in head_parameters(self.model, sidekick.num_classes)}
        self._head = [p for p in self._trainable if id(p) in head]
        self.probe_updates = round(options.probe * (self.total or 0)) if self._head else 0
        if options.probe and not self.probe_updates and not self._head:
            messages.info("no final linear layer found, so there is no linear probe")
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
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.updates, self.batches, self.probe_updates, self.total)

    @property
    def probing(self) -> bool:
        """Whether only the head is being trained."""
        return self.updates < self.probe_updates

    def _enter_phase(self) -> None:
        probing = self.probing
        parameters = self._head if probing else self._trainable
        for p in self._trainable:
            p.requires_grad_(not probing)
            p.grad = None
        for p in parameters:
            p.requires_grad_(True)
        steps = self.probe_updates if probing else self.total and self.total - self.probe_updates
        self.optimizer = self.options.make_optimizer(parameters, probing=probing)
        self.scheduler = self.options.make_scheduler(self.optimizer, steps)
        self._parallel: nn.Module = self.model
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1:  # whole in every process, whatever becomes of the base
            options = getattr(strategy, "_ddp_kwargs", {})
            device = strategy.root_device
            self._parallel = DistributedDataParallel(
                self.model,
                device_ids=None if device.type == "cpu" else [device.index],
                find_unused_parameters=options.get("find_unused_parameters", False),
            )

    def leave(self) -> None:
        """Leave the model as it was before training, but for its weights."""
        for p in self._trainable:
            p.requires_grad_(True)
        if self._layer_sync is not None:
            self._layer_sync.revert(self.model)

    def sync_buffers(self) -> None:
        """Give every process the first one's normalisation statistics, which checkpoints hold."""
        if self._parallel is not self.model:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def step(
        self,
        examples: Sequence[Example],
        loss_of: Callable[[nn.Module, Example], Tensor],
        *,
        update: bool,
    ) -> Tensor:
        """Learn from a batch.

        Args:
            examples: What the base's step made of it.
            loss_of: The sidekick's loss on one of them; may draw random numbers.
            update: Whether this batch ends an accumulation window.

        Returns:
            Cross-entropy in nats per decision, detached.
        """
        # In the probe the features are frozen: normalisation statistics and dropout too.
        self.model.train(not self.probing)
        if all(example.is_single for example in examples):  # no statistics of a batch
            for part in self.model.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        # Random numbers of its own, the same after a resume, and others on every rank.
        step_seed = self.batches * self.trainer.world_size + self.trainer.global_rank
        seed = (self.seed + 1_000_003 * step_seed) % 2**63
        losses = []
        with own_stream(self.trainer.strategy.root_device, seed):
            for number, example in enumerate(examples, start=1):
                with self._gradients_synced(update and number == len(examples)):
                    with self.trainer.precision_plugin.train_step_context():
                        loss = loss_of(self._parallel, example)
                    share = self.trainer.accumulate_grad_batches * len(examples)
                    torch.autograd.backward(self.scaler.scale(loss / share))
                losses.append(loss.detach())
        self.batches += 1
        if update:
            self._update()
        return torch.stack(losses).mean()

    def pass_over(self, *, update: bool) -> None:
        """Let a batch go from which the base did not learn either."""
        self.batches += 1
        if update:
            self._update()

    def _gradients_synced(self, update: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once per accumulation window."""
        if isinstance(self._parallel, DistributedDataParallel) and not update:
            no_sync: AbstractContextManager[None] = self._parallel.no_sync()
            return no_sync
        return nullcontext()

    def _update(self) -> None:
        if any(p.grad is not None for p in self._trainable):
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

"""One run: all that is learnt beside one base, replaced as a whole when another run begins."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.callback.fingerprint import exact_fingerprint
from lightning_duo.callback.fitted import BestSidekick, Fitted
from lightning_duo.callback.inputs import first_input
from lightning_duo.callback.loss import check_range, task_loss
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.outputs import run_sidekick, sidekick_logits
from lightning_duo.callback.processes import agree
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.sidekick import Sidekick
from lightning_duo.callback.step import Learnt, Stage, Step
from lightning_duo.callback.training import Progress, Training
from lightning_duo.cost import Cost
from lightning_duo.evaluation import Predictions
from lightning_duo.isolation import own_stream
from lightning_duo.tasks import Classes, Labels, Task

UNKNOWN = -1  # no fingerprint is negative


@dataclass
class Run:
    """What is known of one base and its sidekick, from the first fit to the last test.

    A fit goes on with it where the base is, bit for bit, as the callback left it, or a checkpoint
    is resumed. Any other fit has a run of its own.
    """

    options: Options
    messages: Messages
    base: LightningModule = field(default_factory=LightningModule)
    """As the Trainer has it now, which for validate and test may be another; at first an empty
    module."""
    id: str = ""
    """Tells the checkpoints of one run from those of another."""
    sidekick: Sidekick | None = None
    step: Step | None = None
    """The training step that is going on."""
    training: Training | None = None
    """From the first batch of a fit to its end."""
    resume: dict[str, Any] | None = None
    """State of the training: of a checkpoint, or at the end of the last fit."""
    progress: Progress | None = None
    """Of the training when it was left."""
    fitted: Fitted | None = None
    best: BestSidekick | None = None
    results: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    predictions: dict[str, dict[str, Predictions]] = field(default_factory=dict)
    learnt: dict[Stage, Learnt] = field(default_factory=dict)
    """What the steps of each stage were seen to do."""
    example: Call | None = None
    """A call of the base for one sample, to count operations with."""
    cost: Cost | None = None
    global_step: int = -1
    """The Trainer's, at which the base has its weights; -1 if it is not known."""
    restored: bool = False
    """Whether the checkpoint that the Trainer has read held this run."""
    paired: bool = False
    """Whether the sidekick was taken from `best` and is that of no checkpoint."""
    dropped: bool = False
    """Whether a trained sidekick was dropped for this run, of which nobody has heard yet."""
    kept: bool = True
    """Whether the base is as it was left, or of a checkpoint that the Trainer has read since."""
    left: tuple[LightningModule, int | None] | None = None
    """The base as the callback left it last, and its fingerprint."""

    def enter(self, trainer: Trainer, base: LightningModule, stage: str) -> "Run":
        """The run of what the Trainer is about to do: this one, or a new one.

        Args:
            trainer: The user's.
            base: The module that it has.
            stage: "fit", "validate" or "test".
        """
        if stage != "fit":
            step = self.global_step if self.base is base else -1
            kept = self.left is None or not self._has_changed(base)
            return replace(self, base=base, restored=False, global_step=step, kept=kept)
        changed = trainer.strategy.broadcast(self._has_changed(base))
        run = self._anew(base) if changed else self
        # Like the base's optimizers, the sidekick's starts afresh unless a checkpoint says
        # otherwise, which is read after this.
        identity = trainer.strategy.broadcast(uuid.uuid4().hex)
        again: dict[str, Any] = {"resume": None, "progress": None, "best": None, "paired": False}
        again["learnt"] = {}
        return replace(run, base=base, id=identity, predictions={}, restored=False, **again)

    def _anew(self, base: LightningModule) -> "Run":
        """A run of this base that knows nothing of this one."""
        messages = Messages(self.options.name)
        return Run(self.options, messages, base, self.id, dropped=self.dropped or self.was_trained)

    def unless_changed(self, trainer: Trainer) -> "Run":
        """This run, or a new one where the base's own hooks gave it new weights after set-up.

        Args:
            trainer: The user's, in fit, before the first step.
        """
        compare = self.left is not None and not self.restored
        if compare and trainer.strategy.broadcast(self._has_changed(self.base)):
            return self._anew(self.base)
        self.left = None  # it is recognised, and may change from here on
        return self

    def _has_changed(self, base: LightningModule) -> bool:
        """Whether this is another base than was left, or has other weights."""
        if self.left is None:
            return self.base is not base
        module, then = self.left
        now = exact_fingerprint(base)
        return module is not base or (None not in (now, then) and now != then)

    @property
    def was_trained(self) -> bool:
        """Whether the sidekick has learnt anything."""
        return self.training is not None or self.resume is not None

    @property
    def num_classes(self) -> int | None:
        """How many outputs a head has; None as long as it is neither given nor seen."""
        return self.options.num_classes if self.sidekick is None else self.sidekick.num_classes

    @property
    def reading(self) -> Reading | None:
        """How the base is called and its logits are found, as a deployed duo needs to know it."""
        stages: tuple[Stage, ...] = ("validation", "test", "training")
        readings = (self.learnt[stage].reading for stage in stages if stage in self.learnt)
        return next((found for found in readings if found is not None), None)

    @property
    def _known(self) -> Reading | None:
        """What losses told of another stage."""
        stages: tuple[Stage, ...] = ("training", "validation", "test")
        readings = (self.learnt[stage].reading for stage in stages if stage in self.learnt)
        return next((found for found in readings if found and not found.guessed), None)

    @property
    def task(self) -> Task:
        """What is decided; several classes of each sample as long as nothing else was seen."""
        return Classes() if self.reading is None else self.with_member(self.reading.task)

    def with_member(self, task: Task) -> Task:
        """The task, with what is known of the sidekick's outputs."""
        if isinstance(task, Labels) and self.sidekick and self.sidekick.gives_probabilities:
            return Labels((*task.probabilities, "sidekick"))
        return task

    @property
    def classes(self) -> int | None:
        """How many classes each decision has; None as long as it is not known."""
        return 2 if isinstance(self.task, Labels) else self.num_classes

    def watch(self, trainer: Trainer, batch: Any, stage: Stage, *, fresh: bool) -> Step:
        """Look at a batch that the base is about to get."""
        return Step(
            trainer,
            self.base,
            batch,
            self.options,
            self.messages,
            stage=stage,
            learnt=self.learnt.setdefault(stage, Learnt()),
            known=self._known,
            fresh=fresh,
        )

    def ready_sidekick(self, trainer: Trainer, outputs: int, example: Example) -> Sidekick:
        """The sidekick, built if it was not, on the base's device and in the Trainer's precision.

        Args:
            trainer: The user's.
            outputs: How many outputs its head needs: K, or the number of labels.
            example: A call of the base that it is to be called like.

        Raises:
            ValueError: If it is for another number of outputs.
        """
        if self.num_classes not in (None, outputs):
            raise ValueError(
                f"the base gives {outputs} classes but the sidekick was built for "
                f"{self.num_classes}; pass DuoCallback(..., num_classes={outputs})"
            )
        with torch.inference_mode(False):
            if self.sidekick is None:
                inputs, logits = first_input(example.call), example.logits
                images = isinstance(inputs, Tensor) and inputs.ndim == 4
                self.sidekick = Sidekick.build(
                    self.options,
                    outputs,
                    self.base,
                    self.messages,
                    in_chans=inputs.shape[1] if images else 3,
                    per_token=logits is not None and logits.ndim == 3,
                )
            trainer.precision_plugin.convert_module(self.sidekick.model).to(self.base.device)
        return self.sidekick

    # ---- training ----

    def begin_step(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Look at a batch that the base is about to learn from."""
        self.finish_step()
        fresh = self.training is None or batch_idx == 0
        self.step = self.watch(trainer, batch, "training", fresh=fresh)

    def finish_step(self) -> None:
        """Let go of a step, whether it ended or not."""
        if self.step is not None:
            self.step.finish()
        self.step = None

    def learn(self, trainer: Trainer, outputs: Any) -> Tensor | None:
        """Let the sidekick learn from the batch that the base has learnt from.

        Args:
            trainer: The user's.
            outputs: What the training step returned.

        Returns:
            The sidekick's loss; None where the base did not learn from the batch either.
        """
        step = self.step
        assert step is not None
        self.finish_step()
        manual = not self.base.automatic_optimization
        before, self.global_step = self.global_step, trainer.global_step
        stepped = trainer.global_step - before
        examples = self._examples(trainer, step, outputs)
        if not examples and self.training is None:
            return None
        plan = {"steps_per_batch": stepped if manual else 1, "step": before}
        training = self.training or self._begin(trainer, examples[0], plan)
        update = manual or stepped > 0
        # A step that returns nothing skips the batch, which DDP cannot do.
        nothing = outputs is None or (isinstance(outputs, Mapping) and not outputs)
        if not examples or (nothing and not manual and trainer.world_size == 1):
            training.pass_over(update=update)
            return None
        reading = self.learnt["training"].reading
        assert reading is not None
        task, first = reading.task, training.batches == 0
        for example in examples:
            # Reading values back from an accelerator stalls it: later batches rely on the loss.
            if first or example.targets.device.type == "cpu":
                check_range(example, task, self.num_classes or 0)

        def loss_of(model: nn.Module, example: Example) -> Tensor:
            assert self.sidekick is not None
            output = run_sidekick(
                model, self.sidekick.call(example.call, reading.part_of(self.base))
            )
            logits = sidekick_logits(output, example.logits, reading.logits_at, task)
            self.sidekick.look(logits, task)
            given = self.with_member(task)
            return task_loss(logits, example.targets, given, reading.options, member="sidekick")

        return training.step(examples, loss_of, update=update)

    def _examples(self, trainer: Trainer, step: Step, outputs: Any) -> list[Example]:
        """What a training step made of its batch; all processes agree on how it is read."""
        if not step.looking:
            return step.examples(outputs, classes=self.num_classes)
        examples: list[Example] = []
        problem = None
        try:
            with own_stream(self.base.device):  # there may be one more forward
                examples = step.examples(outputs, classes=self.num_classes)
        except ValueError as error:
            if trainer.world_size == 1 or not step.fresh:
                raise
            problem = str(error)
        if trainer.world_size == 1 or not step.fresh:
            return examples
        reading = self.learnt["training"].reading
        agree(problem, None if reading is None else reading.state())
        return examples

    def _begin(self, trainer: Trainer, example: Example, plan: dict[str, int]) -> Training:
        reading, outputs = self.learnt["training"].reading, self.num_classes
        assert reading is not None
        if outputs is None or example.logits is not None:
            assert example.logits is not None
            outputs = reading.task.outputs(example.logits)
        sidekick = self.ready_sidekick(trainer, outputs, example)
        sidekick.initialize(self.base.device, example.call)
        self.training = Training(
            sidekick, self.options, trainer, self.messages, self.resume, **plan
        )
        return self.training

    def check_restored(self, trainer: Trainer, state_key: str) -> None:
        """Say what was made of the base that the Trainer has, once a checkpoint would be read.

        Raises:
            MisconfigurationException: If a test is of a checkpoint without this run's state, which
                has no temperatures for that base.
        """
        if self.dropped:
            self.messages.warn(
                "new run: the base is another one, or has changed, since the last fit, so a new "
                "sidekick is trained, as in a cross-validation; to go on with the earlier pair, "
                "pass ckpt_path"
            )
        if trainer.validating and trainer.ckpt_path is None and not self.kept:
            self.messages.warn(
                "the base has changed since this callback left it; its sidekick is kept for this "
                "validation, and a later fit of this base starts a new one"
            )
        started, self.dropped = self.dropped, False
        if self.restored or trainer.ckpt_path is None:
            return
        what = f"the checkpoint {trainer.ckpt_path} holds no state of {state_key}"
        if trainer.testing:
            raise MisconfigurationException(
                f"{what}, so there is no sidekick and no temperatures that belong to it; save with "
                "DuoCallback and save_weights_only=False, or refit with trainer.validate first and "
                "test without ckpt_path"
            )
        goes_on = "starts again" if started else "goes on from what is in memory"
        self.messages.warn(f"{what}; the sidekick {goes_on}")
        self.global_step = -1  # it does not say

    def training_state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the training."""
        return self.resume if self.training is None else self.training.state_dict()

    # ---- its end ----

    def warn_if_stale(self) -> None:
        """Warn where the temperatures are for other weights than those in memory."""
        fitted, sidekick = self.fitted, self.sidekick
        if fitted is None or sidekick is None or not fitted.is_stale(self.base, sidekick.model):
            return
        at = f" (the base is at step {self.global_step})" if self.global_step >= 0 else ""
        self.messages.warn(
            f"the temperatures were fitted at step {fitted.step} and the base or the sidekick has "
            f"changed since{at}; refit them with trainer.validate"
        )

    def say_notes(self) -> None:
        """Warn of the threshold that was chosen last; once, not at every validation of a fit."""
        notes = self.fitted.notes if self.fitted else ()
        for note in notes:
            self.messages.warn(note)
        if self.fitted and notes:
            self.fitted = replace(self.fitted, notes=())

    def warn_if_probing(self) -> None:
        """Warn where training ended before the whole sidekick was trained."""
        if self.training is not None and self.training.probing:
            self.messages.warn(
                f"training ended after {self.training.updates} of the "
                f"{self.training.probe_updates} steps that train the sidekick's head only, so "
                "the rest of it was never trained; set max_epochs to what will be run, or a "
                "smaller probe"
            )

    def leave(self, stage: str, *, failed: bool = False) -> None:
        """Let go of what belongs to the Trainer, and note how the base is now.

        Args:
            stage: What the Trainer was asked to do: "fit", "validate" or "test".
            failed: Whether an exception ended it, after which nothing may fail here.
        """
        self.finish_step()
        if self.training is not None:
            self.resume, self.progress = self.training.state_dict(), self.training.progress
            self.training.leave()
        self.training = None
        # A base that was only measured is not one that the sidekick was trained beside.
        if stage == "fit" or self.kept:
            self.note_base(failed=failed)

    def note_base(self, *, failed: bool = False) -> None:
        """Note the base as it is now, to recognise it.

        Args:
            failed: As in `leave`.
        """
        try:
            self.left = self.base, exact_fingerprint(self.base)
        except RuntimeError:  # of a device that does not answer any more
            if not failed:
                raise
            self.left = self.base, UNKNOWN

"""One run: all that is learnt beside one base, replaced as a whole when another run begins."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_duo.base import Call
from lightning_duo.callback.fitted import BestSidekick, Fitted
from lightning_duo.callback.learnt import Learnt, Stage
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.sidekick import Sidekick
from lightning_duo.callback.step import Step
from lightning_duo.callback.training import Progress, Training
from lightning_duo.cost import Cost
from lightning_duo.evaluation import Predictions
from lightning_duo.inputs import first_input
from lightning_duo.tasks import Classes, Labels, Task

UNKNOWN = -1  # no fingerprint is negative


def deployed_reading(learnt: dict[Stage, Learnt]) -> Reading | None:
    """Of what was learnt of several stages, what a deployed duo needs to know."""
    stages: tuple[Stage, ...] = ("validation", "test", "training")
    readings = (learnt[stage].reading for stage in stages if stage in learnt)
    return next((found for found in readings if found is not None), None)


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
        return deployed_reading(self.learnt)

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

    @property
    def deployed_task(self) -> Task:
        """The same for a duo that is given no targets, so that none of them can be left out."""
        task = self.task
        return Classes(task.dim) if isinstance(task, Classes) else task

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
                f"the base has {outputs} output{'s'[: outputs != 1]} but the sidekick was built "
                f"with {self.num_classes}; leave num_classes out of DuoCallback(...)"
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
                "the rest of it was never trained; set max_epochs to the number of epochs that "
                "will run, or pass DuoCallback(..., probe=...) with a smaller fraction"
            )

    def finish_step(self) -> None:
        """Let go of a step, whether it ended or not."""
        if self.step is not None:
            self.step.finish()
        self.step = None

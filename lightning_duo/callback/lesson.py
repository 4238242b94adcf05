"""One training batch: the base's step is seen, and the sidekick learns from what it saw."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_duo.callback.loss import check_range, task_loss
from lightning_duo.callback.outputs import run_sidekick, sidekick_logits
from lightning_duo.callback.processes import agree
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.run import Run
from lightning_duo.callback.step import Step
from lightning_duo.callback.trained import step_of_user
from lightning_duo.callback.training import Training
from lightning_duo.isolation import own_stream


def begin_step(run: Run, trainer: Trainer, batch: Any, batch_idx: int) -> None:
    """Look at a batch that the base is about to learn from; `learn` ends that."""
    run.finish_step()
    # A base that stays as it is runs for nothing but to be seen.
    fresh = run.training is None or (batch_idx == 0 and step_of_user(run.base) is None)
    run.step = run.watch(trainer, batch, "training", fresh=fresh)


def learn(run: Run, trainer: Trainer, outputs: Any) -> Tensor | None:
    """Let the sidekick learn from the batch that the base has learnt from.

    Args:
        run: The run.
        trainer: The user's.
        outputs: What the training step returned.

    Returns:
        The sidekick's loss; None where the base did not learn from the batch either.
    """
    step = run.step
    assert step is not None
    run.finish_step()
    manual = not run.base.automatic_optimization
    before, run.global_step = run.global_step, trainer.global_step
    stepped = trainer.global_step - before
    examples = _examples(run, trainer, step, outputs)
    if not examples and run.training is None:
        return None
    plan = {"steps_per_batch": stepped if manual else 1, "step": before}
    training = run.training or _begin(run, trainer, examples[0], plan)
    update = manual or stepped > 0
    # A step that returns nothing skips the batch, which DDP cannot do.
    nothing = outputs is None or (isinstance(outputs, Mapping) and not outputs)
    if not examples or (nothing and not manual and trainer.world_size == 1):
        training.pass_over(update=update)
        return None
    reading = run.learnt["training"].reading
    assert reading is not None
    first = training.batches == 0
    for example in examples:
        # Reading values back from an accelerator stalls it: later batches rely on the loss.
        if first or example.targets.device.type == "cpu":
            check_range(example, reading.task, run.num_classes or 0)
    return training.step(examples, _loss_of(run, reading), update=update)


def _loss_of(run: Run, reading: Reading) -> Callable[[nn.Module, Example], Tensor]:
    """The loss that the sidekick learns with: that of the base's step."""
    sidekick, task = run.sidekick, reading.task
    assert sidekick is not None

    def loss_of(model: nn.Module, example: Example) -> Tensor:
        output = run_sidekick(model, sidekick.call(example.call, reading.part_of(run.base)))
        logits = sidekick_logits(output, example.logits, reading.logits_at, task)
        sidekick.look(logits, task)
        given = run.with_member(task)
        return task_loss(logits, example.targets, given, reading.options, member="sidekick")

    return loss_of


def _examples(run: Run, trainer: Trainer, step: Step, outputs: Any) -> list[Example]:
    """What a training step made of its batch; all processes agree on how it is read."""
    if not step.looking:
        return step.examples(outputs, classes=run.num_classes)
    examples: list[Example] = []
    problem = None
    try:
        with own_stream(run.base.device):  # there may be one more forward
            examples = step.examples(outputs, classes=run.num_classes)
    except ValueError as error:
        if trainer.world_size == 1 or not step.fresh:
            raise
        problem = str(error)
    if trainer.world_size == 1 or not step.fresh:
        return examples
    reading = run.learnt["training"].reading
    agree(problem, None if reading is None else reading.state())
    return examples


def _begin(run: Run, trainer: Trainer, example: Example, plan: dict[str, int]) -> Training:
    reading, outputs = run.learnt["training"].reading, run.num_classes
    assert reading is not None
    if outputs is None or example.logits is not None:
        assert example.logits is not None
        outputs = reading.task.outputs(example.logits)
    sidekick = run.ready_sidekick(trainer, outputs, example)
    sidekick.initialize(run.base.device, example.call)
    run.training = Training(sidekick, run.options, trainer, run.messages, run.resume, **plan)
    return run.training

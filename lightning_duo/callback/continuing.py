"""Whether a run goes on, with the base as it was left or resumed, or another one begins."""

import uuid
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_duo.callback.fingerprint import exact_fingerprint
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.run import Run
from lightning_duo.callback.trained import step_of_user

UNKNOWN = -1  # no fingerprint is negative


def enter(run: Run, trainer: Trainer, base: LightningModule, stage: str) -> Run:
    """The run of what the Trainer is about to do: the last one, or a new one.

    Args:
        run: The last one.
        trainer: The user's.
        base: The module that it has.
        stage: "fit", "validate" or "test".
    """
    if stage != "fit":
        step = run.global_step if run.base is base else -1
        kept = run.left is None or not _has_changed(run, base)
        return replace(run, base=base, restored=False, global_step=step, kept=kept)
    if trainer.strategy.broadcast(_has_changed(run, base)):
        run = _anew(run, base)
    # Like the base's optimizers, the sidekick's starts afresh unless a checkpoint says
    # otherwise, which is read after this.
    identity = trainer.strategy.broadcast(uuid.uuid4().hex)
    again: dict[str, Any] = {"resume": None, "progress": None, "best": None, "paired": False}
    again["learnt"] = {}
    return replace(run, base=base, id=identity, predictions={}, restored=False, **again)


def _anew(run: Run, base: LightningModule) -> Run:
    """A run of this base that knows nothing of the last one."""
    messages = Messages(run.options.name)
    return Run(run.options, messages, base, run.id, dropped=run.dropped or run.was_trained)


def unless_changed(run: Run, trainer: Trainer) -> Run:
    """The run, or a new one where the base's own hooks gave it new weights after set-up.

    Args:
        run: The run.
        trainer: The user's, in fit, before the first step.
    """
    compare = run.left is not None and not run.restored
    if compare and trainer.strategy.broadcast(_has_changed(run, run.base)):
        return _anew(run, run.base)
    run.left = None  # it is recognised, and may change from here on
    return run


def _has_changed(run: Run, base: LightningModule) -> bool:
    """Whether this is another base than was left, or has other weights."""
    if run.left is None:
        return run.base is not base
    module, then = run.left
    now = exact_fingerprint(base)
    return module is not base or (None not in (now, then) and now != then)


def check_restored(run: Run, trainer: Trainer, state_key: str) -> None:
    """Say what was made of the base that the Trainer has, once a checkpoint would be read.

    Args:
        run: The run.
        trainer: The user's.
        state_key: Of the callback, as in checkpoints.

    Raises:
        MisconfigurationException: If a test is of a checkpoint without the run's state, which
            has no temperatures for that base.
    """
    if run.dropped:
        run.messages.warn(
            "new run: the base is another one, or has changed, since the last fit, so a new "
            "sidekick is trained, as in a cross-validation; to go on with the earlier pair, "
            "pass ckpt_path"
        )
    if trainer.validating and trainer.ckpt_path is None and not run.kept:
        run.messages.warn(
            "the base has changed since this callback left it; its sidekick is kept for this "
            "validation, and a later fit of this base starts a new one"
        )
    still = run.restored and step_of_user(run.base) is not None
    if still and run.fitted is not None and run.fitted.is_stale(run.base):
        run.messages.warn(
            "the sidekick was trained beside another base, so the checkpoint that is resumed does "
            "not hold all of the base; load the base's own checkpoint into it before"
        )
    started, run.dropped = run.dropped, False
    if run.restored or trainer.ckpt_path is None:
        return
    what = f"the checkpoint {trainer.ckpt_path} holds no state of {state_key}"
    if trainer.testing:
        raise MisconfigurationException(
            f"{what}, so there is no sidekick and no temperatures that belong to it; save with "
            "DuoCallback and save_weights_only=False, or refit with trainer.validate first and "
            "test without ckpt_path"
        )
    goes_on = "starts again" if started else "goes on from what is in memory"
    run.messages.warn(f"{what}; the sidekick {goes_on}")
    run.global_step = -1  # it does not say


def leave(run: Run, stage: str, *, failed: bool = False) -> None:
    """Let go of what belongs to the Trainer, and note how the base is now.

    Args:
        run: The run.
        stage: What the Trainer was asked to do: "fit", "validate" or "test".
        failed: Whether an exception ended it, after which nothing may fail here.
    """
    run.finish_step()
    if run.training is not None:
        run.resume, run.progress = run.training.state_dict(), run.training.progress
        run.training.leave()
    run.training = None
    # A base that was only measured is not one that the sidekick was trained beside.
    if stage == "fit" or run.kept:
        note_base(run, failed=failed)


def note_base(run: Run, *, failed: bool = False) -> None:
    """Note the base as it is now, to recognise it.

    Args:
        run: The run.
        failed: As in `leave`.
    """
    try:
        run.left = run.base, exact_fingerprint(run.base)
    except RuntimeError:  # of a device that does not answer any more
        if not failed:
            raise
        run.left = run.base, UNKNOWN

"""What a checkpoint keeps of a run, and how a run comes back from it."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import fsspec
import torch
from torch import Tensor, nn

from lightning_duo._version import __version__
from lightning_duo.calibration import Calibration
from lightning_duo.callback.fitted import BestSidekick, Fitted
from lightning_duo.callback.learnt import Learnt, Stage
from lightning_duo.callback.reading import Reading
from lightning_duo.callback.run import Run
from lightning_duo.callback.sidekick import Sidekick
from lightning_duo.callback.training import Progress
from lightning_duo.plain import call_state

STATE_VERSION = 3
COUNTED = ("updates", "batches", "probe_updates")


def state_of(run: Run) -> dict[str, Any]:
    """A run in tensors and plain types; without a sidekick if none was built yet."""
    written = {"version": STATE_VERSION, "library": __version__}
    if run.sidekick is None:
        return {**written, "sidekick": None}  # a learning rate finder comes back to this
    if run.training is not None and run.step is not None:
        run.messages.warn(
            "a checkpoint is being saved after the base's step and before the sidekick's, so "
            "resuming from it will not be exact; put DuoCallback before the callback that saves"
        )
    fitted = run.fitted
    return {
        **written,
        "name": run.options.sidekick_name,
        "named": isinstance(run.options.sidekick, str),
        "num_classes": run.sidekick.num_classes,
        "in_chans": run.sidekick.in_chans,
        "per_token": run.sidekick.per_token,
        "learnt": {k: v.reading.state() for k, v in run.learnt.items() if v.reading},
        "sidekick": run.sidekick.model.state_dict(),
        "transform": run.options.transform_name,
        "calling": run.sidekick.state(),
        "given": run.options.state(),
        "example": call_state(run.example),
        "training": run.training_state(),
        "run": run.id,
        "best": run.best and run.best.state_dict(),
        "calibration": fitted and fitted.calibration.state_dict(),
        "fitted_at_step": -1 if fitted is None else fitted.step,
        "fitted_to": [] if fitted is None else list(fitted.weights),
        "results": run.results,
    }


def loaded(run: Run, state: dict[str, Any], stage: str) -> Run:
    """The run as a checkpoint describes it.

    Args:
        run: What is in memory, of the base that the checkpoint is for.
        state: What `state_of` gave when the checkpoint was saved.
        stage: What the Trainer is about to do: "fit", "validate" or "test".

    Raises:
        ValueError: If another version of the library wrote it, or it is of other classes or of
            another architecture.
    """
    _check_state(state, run.num_classes)
    options, messages = run.options, run.messages
    if run.training is not None:
        run.training.leave()
    if state["sidekick"] is None:
        if stage != "fit":
            return run
        # Back to before it was built.
        return Run(
            options,
            messages,
            run.base,
            run.id,
            global_step=run.global_step,
            restored=True,
            dropped=run.dropped,
            left=run.left,
        )
    if state["transform"] != options.transform_name:
        messages.warn(
            f"the checkpoint's sidekick saw its inputs through {state['transform']}, this "
            f"callback's sees them through {options.transform_name}"
        )
    if run.paired and stage == "test":
        messages.warn(
            "the pair that trainer.validate refitted gives way to that of the checkpoint; to test "
            "the refitted one, call trainer.test(model, data) without ckpt_path"
        )
    sidekick = run.sidekick or Sidekick.build(
        options,
        state["num_classes"],
        run.base,
        messages,
        in_chans=state.get("in_chans", 3),  # earlier versions knew no other
        per_token=state.get("per_token", False),
        restored=True,
    )
    load_weights(sidekick.model, state["sidekick"], (state["name"], options.sidekick_name))
    messages.info(f"sidekick {options.sidekick_name!r} restored from the checkpoint")
    fitted = fitted_of(state)
    if fitted is not None:
        chosen = fitted.calibration.target_accuracy, fitted.calibration.delta
        asked = options.target_accuracy, options.delta
        if asked != chosen:
            messages.warn(
                f"the checkpoint's threshold was chosen for target_accuracy={chosen[0]}, "
                f"delta={chosen[1]}, this callback asks for {asked[0]}, {asked[1]}; refit with "
                "trainer.validate"
            )
    training = state["training"]
    return replace(
        run,
        id=state["run"],
        sidekick=sidekick,
        learnt=learnt_of(state) | run.learnt,
        training=None,
        resume=training,
        progress=training and Progress(**{k: training[k] for k in COUNTED}, total=None),
        fitted=fitted,
        best=_better(run.best if run.id == state["run"] else None, state["best"]),
        results=state["results"],
        predictions={},
        restored=True,
        dropped=False,
        paired=False,
    )


def learnt_of(state: dict[str, Any]) -> dict[Stage, Learnt]:
    """What steps were seen to do; steps to come are looked at anew."""
    known = state.get("learnt", {}).items()
    return {stage: Learnt(Reading.from_state(reading)) for stage, reading in known}


def fitted_of(state: dict[str, Any]) -> Fitted | None:
    """Temperatures and threshold of a checkpoint; None if none were fitted yet."""
    if state["calibration"] is None:
        return None
    calibration = Calibration.from_state_dict(state["calibration"])
    return Fitted(calibration, state["fitted_at_step"], tuple(state["fitted_to"]))


def _better(mine: BestSidekick | None, saved: dict[str, Any] | None) -> BestSidekick | None:
    """The better of two sidekicks of one run."""
    both = (mine, saved and BestSidekick(**saved))
    return min((best for best in both if best), key=lambda best: best.nll, default=None)


def check_version(state: dict[str, Any]) -> None:
    """Raise ValueError for a state that only another version of the library can read."""
    version = state.get("version")
    if version != STATE_VERSION:
        raise ValueError(
            f"the checkpoint holds duo state of version {version}, written by lightning_duo "
            f"{state.get('library', 'of an earlier day')}; this is lightning_duo {__version__}, "
            f"which reads version {STATE_VERSION}; load it with the version that wrote it, or "
            "without DuoCallback"
        )


def _check_state(state: dict[str, Any], num_classes: int | None) -> None:
    """Find what keeps a checkpoint's duo state from being loaded.

    Args:
        state: The state as it was saved.
        num_classes: K, or None if not known yet.

    Raises:
        ValueError: If another version of the library wrote it, or it is of other classes.
    """
    check_version(state)
    if state["sidekick"] is not None and num_classes not in (None, state["num_classes"]):
        raise ValueError(
            f"the checkpoint's sidekick {state['name']!r} has {state['num_classes']} outputs, this "
            f"callback's has {num_classes}; make them the same, or load the checkpoint without "
            "DuoCallback"
        )


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint of a Trainer; its tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or holds more than tensors and plain types although
            ``weights_only`` was asked for.
    """
    remote = "://" in str(path)
    if not remote and not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not remote and Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder, in which each process has saved its part; save the run once more "
            "in one file, with ModelParallelStrategy(save_distributed_checkpoint=False)"
        )
    how: dict[str, Any] = {"map_location": "cpu", "weights_only": weights_only}
    try:
        if not remote and is_zipfile(path):
            found = torch.load(path, mmap=True, **how)
        else:
            with fsspec.open(str(path), "rb") as file:
                found = torch.load(file, **how)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint of a Trainer, or holds more than tensors and plain types, "
            f"which may run code when it is read ({str(error).splitlines()[0]}); if you trust "
            "where it comes from, pass weights_only=False (--weights_only false)"
        ) from error
    except Exception as error:  # whatever the bytes of another file lead to
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no checkpoint of a Trainer ({why})") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        remedy = "; DuoModule.load reads a saved duo" if str(path).endswith(".safetensors") else ""
        raise ValueError(f"{path} is no checkpoint of a Trainer: it has no state_dict{remedy}")
    return found


def load_weights(model: nn.Module, weights: dict[str, Tensor], names: tuple[str, str]) -> None:
    """Load a sidekick's weights from a checkpoint.

    Args:
        model: The sidekick that was built here.
        weights: State dict of the checkpoint's.
        names: What the checkpoint's sidekick was called, and what this one is.

    Raises:
        ValueError: If they are those of another architecture.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint's sidekick {names[0]!r} has other weights than {names[1]!r} here; "
            "build it as it was when the checkpoint was saved, or load the checkpoint without "
            f"DuoCallback: {' '.join(str(error).split())[:800]}"
        ) from error

"""What comes of a run: the duo to deploy, its cost, a report, a line that describes it."""

from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from lightning_duo.base import LogitsOf, has_forward
from lightning_duo.callback.fingerprint import is_sharded
from lightning_duo.callback.log import stage_name
from lightning_duo.callback.options import FORMS
from lightning_duo.callback.replay import StepDuo, StepLogits
from lightning_duo.callback.run import Run
from lightning_duo.callback.sidekick import copies
from lightning_duo.cost import Cost, count_flops, count_parameters
from lightning_duo.isolation import own_stream, unnoticed
from lightning_duo.module import DuoModule
from lightning_duo.report import SEEN, print_summary, write_report


def duo_of(run: Run, *, copy: bool = True, called: nn.Module | None = None) -> DuoModule:
    """Both models as a duo, on the base's device, in eval mode.

    Args:
        run: The run.
        copy: Whether the duo has weights of its own, which want no gradients.
        called: What stands for the base; by default what the run has learnt that its steps call.

    Raises:
        MisconfigurationException: If no temperatures were fitted, or the base is sharded or cannot
            be copied.
        ValueError: If the base's logits can be computed neither by its forward nor by the user's
            ``logits_fn``.
    """
    if run.fitted is None or run.sidekick is None:
        raise MisconfigurationException(
            "there is no duo yet: no temperatures were fitted in this process; run trainer.fit "
            "with validation data, or trainer.validate"
        )
    run.warn_if_stale()
    if is_sharded(run.base):
        raise MisconfigurationException(
            "each process holds a shard of the base only, so no duo can be copied; save with "
            "ModelParallelStrategy(save_distributed_checkpoint=False), then in one process "
            "trainer.validate(model, data, ckpt_path=...) and callback.module"
        )
    base: nn.Module = run.base
    sidekick = run.sidekick.deployable()
    if copy:
        base, sidekick = copies(base, sidekick)
    threshold = run.fitted.calibration.threshold
    reading = run.reading
    duo = (StepDuo if reading is not None and reading.whole else DuoModule)(
        called or _callable(run, base),
        sidekick,
        run.fitted.calibration.temperatures,
        threshold=0.0 if threshold is None else threshold.value,
        task=run.deployed_task,
        logits_at=() if reading is None else reading.logits_at,
    )
    return (duo.to(run.base.device).requires_grad_(False) if copy else duo).eval()


def modes_of(run: Run) -> list[tuple[nn.Module, bool]]:
    """The modes of both models' parts, which a duo that shares them changes."""
    models = [run.base] if run.sidekick is None else [run.base, run.sidekick.model]
    return [(part, part.training) for model in models for part in model.modules()]


def _callable(run: Run, base: nn.Module) -> nn.Module:
    """What of the base the duo calls: all of it, a part, or its step."""
    reading, logits_fn = run.reading, run.options.logits_fn
    if logits_fn is not None:
        return LogitsOf(logits_fn, base)
    if reading is not None and reading.whole:
        assert run.num_classes is not None
        assert isinstance(base, LightningModule)
        return StepLogits(base, reading, run.num_classes)
    if reading is not None and reading.module:
        return base.get_submodule(reading.module)
    if not has_forward(base):
        raise ValueError(
            f"{type(base).__name__} has no forward, so the duo cannot call it; define "
            "forward(x) or pass DuoCallback(..., logits_fn=lambda module, inputs: ...)"
        )
    return base


def cost_of(run: Run) -> Cost | None:
    """FLOPs of both models for one sample, and parameters; None if they can't be counted."""
    if run.example is None or run.sidekick is None or is_sharded(run.base):
        return None
    base, sidekick = run.base, run.sidekick.deployable()
    try:
        eager = torch.compiler.set_stance("force_eager")  # the counter sees no compiled code
        with own_stream(base.device), unnoticed(base), eager:
            flops = count_flops(_callable(run, base), run.example)
            others = count_flops(sidekick, run.example)
    except Exception as error:  # the user's forward may want more than a batch of one
        run.messages.warn(
            "the FLOPs of base and sidekick cannot be counted, so cost and balance are None "
            f"({type(error).__name__}: {error}); with an input that both models run, "
            "lightning_duo.cost.flops_balance(base, sidekick, input) counts them"
        )
        return None
    return Cost(flops, others, count_parameters(base), count_parameters(sidekick))


def report_of(run: Run, path: str | Path, stage: str | None, resamples: int | None) -> Path:
    """Write a report on a stage; by default on the test after a test, else on the validation.

    Raises:
        MisconfigurationException: If that stage was not measured yet.
    """
    stage = stage or ("test" if "test" in run.predictions else "val")
    if run.fitted is None or stage not in run.predictions:
        raise MisconfigurationException(
            f"there is nothing to report on {stage!r} yet: run trainer.fit with validation data, "
            f"trainer.validate or trainer.test; known: {sorted(run.predictions)}"
        )
    fitted_on = stage_name("val", run.options.calibration_loader)
    # A module that was pickled or copied belongs to no Trainer.
    if run.base._trainer is not None and not run.base.trainer.is_global_zero:
        return Path(path)
    return write_report(
        path,
        run.predictions[stage],
        run.fitted.calibration,
        data={"val": "the validation set", "test": "the test set"}.get(stage, stage),
        held_out=stage != fitted_on,
        cost=run.cost or cost_of(run),
        resamples=resamples,
        seen=_seen(run, stage),
        seen_by_fit=_seen(run, fitted_on),
    )


def _seen(run: Run, stage: str) -> int | None:
    """How many decisions a stage saw, if only a sample of them is kept."""
    seen = run.results.get(stage, {}).get("duo", {}).get(SEEN)
    return None if seen is None else int(seen)


def show_gain(run: Run) -> None:
    """Print what the last validation gave, if there was one."""
    if run.fitted is None or "val" not in run.results:
        return
    options, results = run.options, run.results["val"]
    notes = ["which fitted the temperatures"] if options.calibration_loader == 0 else []
    notes += [f"duo {options.name!r}"] if options.name else []
    data = "the validation set" + (f" ({'; '.join(notes)})" if notes else "")
    balance = None if run.cost is None else run.cost.balance
    shown = {form: results[form] for form in FORMS}
    print_summary(shown, run.fitted.calibration, data=data, balance=balance)


def described(run: Run) -> str:
    """The models, temperatures and threshold of a run, as the callback's repr shows them."""
    said = [f"sidekick={run.options.sidekick_name!r}"]
    said += [f"name={run.options.name!r}"] if run.options.name else []
    said += [] if type(run.base) is LightningModule else [f"base={type(run.base).__name__}"]
    if run.fitted is None:
        return ", ".join([*said, "not fitted"])
    found = run.fitted.calibration
    said.append("temperatures=({:.4g}, {:.4g})".format(*found.temperatures))
    said += [f"threshold={found.threshold.value:.4g}"] if found.threshold else []
    return ", ".join([*said, f"fitted_at_step={run.fitted.step}"])

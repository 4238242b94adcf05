"""What a run must be like for a duo: what is refused, and what is warned of, before it starts."""

import difflib

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import FORMS, Options
from lightning_duo.callback.sidekick import check_model
from lightning_duo.evaluation import MEASURES

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
# Callbacks of Lightning that change the weights or statistics of the module; not every version has
# all of them.
CHANGING = {"BaseFinetuning", "ModelPruning", "StochasticWeightAveraging", "WeightAveraging"}


def check_trainer(trainer: Trainer, stage: str, options: Options, messages: Messages) -> None:
    """Refuse what a duo cannot run with, and warn of what will be missing.

    Args:
        trainer: The user's Trainer, about to start.
        stage: "fit", "validate" or "test".
        options: The user's.
        messages: Where to warn.

    Raises:
        MisconfigurationException: If the strategy is not supported, the precision replaces layers,
            the sidekick cannot be trained, or there is nothing to fit the temperatures on.
    """
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"DuoCallback is a callback of lightning.pytorch, and this Trainer is of "
            f"{type(trainer).__module__.split('.')[0]}; import it, and your LightningModule, from "
            "lightning.pytorch (import lightning.pytorch as pl)"
        )
    strategy = trainer.strategy
    # Some that are neither are made from these.
    if not isinstance(strategy, SUPPORTED) or isinstance(
        strategy, DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy
    ):
        raise MisconfigurationException(
            f"DuoCallback runs on one CPU or GPU, with DDP, or with FSDP2, not with "
            f'{type(strategy).__name__}; use Trainer(strategy="ddp") or ModelParallelStrategy'
        )
    if isinstance(strategy, ModelParallelStrategy):
        copies = strategy.device_mesh["tensor_parallel"].size()
        if copies > 1:
            raise MisconfigurationException(
                f"DuoCallback runs with ModelParallelStrategy as long as every process sees other "
                f"samples, but with tensor_parallel_size={copies} some see the same; set it to 1"
            )
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        raise MisconfigurationException(
            f"DuoCallback does not run with {type(trainer.precision_plugin).__name__}, which would "
            "replace the sidekick's layers too; use precision 32, 64, 16 or bf16, mixed or true"
        )
    if isinstance(options.sidekick, nn.Module):
        check_model(options.sidekick, trained=stage == "fit")
    if stage == "fit":
        if trainer.precision == "16-true" and options.optimizer is None:
            raise MisconfigurationException(
                "AdamW, the sidekick's default, cannot train weights in float16; pass "
                "DuoCallback(..., optimizer=functools.partial(torch.optim.SGD, lr=0.01)), or use "
                'precision "16-mixed" or "bf16-true"'
            )
        _check_fit(trainer, messages)


def check_still(trainer: Trainer) -> None:
    """Refuse callbacks that would change a base that is not trained."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if CHANGING & {kind.__name__ for kind in type(callback).__mro__}:
            raise MisconfigurationException(
                f"the base is not trained here, and {type(callback).__name__} would change it; "
                "leave that callback out of the Trainer"
            )


def check_siblings(callback: Callback, trainer: Trainer) -> None:
    """Refuse two callbacks of one kind that checkpoints could not tell apart."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        same = type(other) is type(callback) and other.state_key == callback.state_key
        if same and other is not callback:
            raise MisconfigurationException(
                "two DuoCallbacks of a Trainer need different names; pass "
                'DuoCallback(..., name="small") to one of them'
            )


def check_loaders(trainer: Trainer, options: Options) -> None:
    """Refuse a ``calibration_loader`` that is not there."""
    loaders = len(trainer.num_val_batches)  # 0 as long as they are not set up
    if loaders and options.calibration_loader >= loaders:
        raise MisconfigurationException(
            f"calibration_loader is {options.calibration_loader}, but the number of validation "
            f"dataloaders is {loaders}, and the first of them is 0"
        )


def check_monitors(trainer: Trainer, options: Options) -> None:
    """Refuse to let a callback or scheduler wait for a metric that is measured but not logged."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    watching = [(getattr(c, "monitor", None), type(c).__name__) for c in callbacks]
    watching += [(config.monitor, "a scheduler") for config in trainer.lr_scheduler_configs]
    logged = {*options.measured_names(), "duo/temperature_base", "duo/temperature_sidekick"}
    logged |= set() if options.target_accuracy is None else {"duo/threshold"}
    for name, who in watching:
        own = name if isinstance(name, str) and name.startswith(options.prefix) else ""
        bare = own.removeprefix(options.prefix).partition("/dataloader_idx_")[0]
        form, _, metric = bare.partition("/val_")
        if bare in logged:
            continue
        if form in FORMS and metric in MEASURES:
            remedy = f'pass DuoCallback(..., metrics={(*options.metrics, metric)}) or metrics="all"'
        elif bare in ("duo/threshold", "duo/val_coverage", "duo/val_selective_accuracy"):
            remedy = "pass DuoCallback(..., target_accuracy=...)"
        elif bare.startswith("duo/") and bare.count("/") == 1:  # nobody else's names are so
            near = [known for known in sorted(logged) if known.startswith(bare)]
            near += difflib.get_close_matches(bare, sorted(logged), n=1, cutoff=0.0)
            remedy = f"did you mean {options.prefix + near[0]!r}?"
        else:
            continue
        raise MisconfigurationException(f"{who} monitors {name!r}, which is not logged; {remedy}")


def warn_of_constant_monitors(trainer: Trainer, options: Options, messages: Messages) -> None:
    """Warn of a callback that waits for a metric of a base that is not trained."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and "duo/" not in name and "sidekick/" not in name:
            messages.warn(
                f"{type(callback).__name__} monitors {name!r}, but what the base logs stays the "
                "same while only the sidekick learns; monitor "
                f"'{options.prefix}duo/val_nll' instead (the lower the better)"
            )


def _check_fit(trainer: Trainer, messages: Messages) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in callbacks):
        messages.warn(
            "ModelCheckpoint(save_weights_only=True) leaves the sidekick and the "
            "temperatures out of the checkpoint; save them with callback.module.save(path)"
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        messages.warn(
            "this strategy trains in processes that it starts, and the sidekick ends "
            "with them; keep it in checkpoints (ModelCheckpoint) and go on with "
            "trainer.validate(model, ckpt_path=...) or trainer.test(model, ckpt_path=...), or use "
            'strategy="ddp" in a script'
        )
    if trainer.enable_validation:
        return
    if trainer.limit_val_batches == 0:
        messages.warn(
            "limit_val_batches=0, so no temperatures will be fitted; run "
            "trainer.validate afterwards"
        )
        return
    raise MisconfigurationException(
        "DuoCallback fits its temperatures on validation data, but there is no validation: give "
        "the Trainer a val_dataloader and the module a validation_step"
    )

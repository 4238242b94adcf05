"""What a run must be like for a duo, found out at set-up."""

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
from lightning_utilities.core.rank_zero import rank_zero_warn

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


def check_trainer(trainer: Trainer, stage: str) -> None:
    """Refuse what a duo cannot run with, and warn of what will be missing.

    Args:
        trainer: The user's Trainer, about to start.
        stage: "fit", "validate" or "test".

    Raises:
        MisconfigurationException: If the strategy is not supported, the precision replaces layers,
            or there is nothing to fit the temperatures on.
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
    if stage == "fit":
        _check_fit(trainer)


def _check_fit(trainer: Trainer) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in callbacks):
        rank_zero_warn(
            "DuoCallback: ModelCheckpoint(save_weights_only=True) leaves the sidekick and the "
            "temperatures out of the checkpoint; save them with callback.module.save(path)"
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            "DuoCallback: this strategy trains in processes that it starts, and the sidekick ends "
            "with them; keep it in checkpoints (ModelCheckpoint) and go on with "
            "trainer.validate(model, ckpt_path=...) or trainer.test(model, ckpt_path=...), or use "
            'strategy="ddp" in a script'
        )
    if trainer.enable_validation:
        return
    if trainer.limit_val_batches == 0:
        rank_zero_warn(
            "DuoCallback: limit_val_batches=0, so no temperatures will be fitted; run "
            "trainer.validate afterwards"
        )
        return
    raise MisconfigurationException(
        "DuoCallback fits its temperatures on validation data, but there is no validation: give "
        "the Trainer a val_dataloader and the module a validation_step"
    )

"""`add_sidekick`: a duo of a base that is trained already."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_duo.callback.checkpoint import read_checkpoint
from lightning_duo.callback.duo import DuoCallback
from lightning_duo.callback.trained import MARK, staying
from lightning_duo.zoo import SidekickSource

EPOCHS = 10


def add_sidekick(
    module: LightningModule,
    train_loader_or_datamodule: Any = None,
    val_loaders: Any = None,
    *,
    sidekick: SidekickSource,
    ckpt_path: str | None = None,
    trainer: Trainer | None = None,
    weights_only: bool = True,
    **options: Any,
) -> DuoCallback:
    """Train a sidekick for a base that is trained already, and fit the temperatures.

    The base stays as it is, bit for bit, in eval mode: training runs it for its first batches only,
    to see how its step reads a batch (and for all of them where only the step tells the targets).
    It costs little more than to train the sidekick alone. `Trainer.fit` of a module without a
    parameter that wants a gradient, with `DuoCallback`, does the same.

    Args:
        module: The base, as its training left it; its training and validation steps say what inputs
            and targets are.
        train_loader_or_datamodule: What the sidekick learns from, and with a datamodule also what
            the temperatures are fitted on; by default what the module's own hooks give.
        val_loaders: What the temperatures are fitted on, if there is no datamodule.
        sidekick: As for `DuoCallback`.
        ckpt_path: A checkpoint of the base, whose weights are loaded first; one of a run of this
            function is resumed.
        trainer: By default one for 10 epochs; callbacks, loggers, precision and strategy are its.
        weights_only: Whether to refuse a checkpoint that holds more than tensors and plain types;
            reading any other runs code that it names, so trust where it comes from.
        options: Further arguments of `DuoCallback`.

    Returns:
        The callback, which is among the Trainer's: `module` is the duo, `results` the figures.

    Raises:
        MisconfigurationException: If data to learn from or to validate on are missing, or given
            twice.
        TypeError: If the module or the Trainer is none.
        ValueError: If the checkpoint is of another module; and as `DuoCallback` does.

    Example:
        >>> callback = add_sidekick(model, datamodule, sidekick="resnet34")  # doctest: +SKIP
        >>> duo = callback.module  # doctest: +SKIP
    """
    if not isinstance(module, LightningModule):
        raise TypeError(f"the base must be a LightningModule, not a class or function: {module!r}")
    if trainer is not None and not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a Trainer of lightning.pytorch, got {trainer!r}")
    callback = DuoCallback(sidekick=sidekick, **options)
    data = {"train_dataloaders": train_loader_or_datamodule, "val_dataloaders": val_loaders}
    if isinstance(train_loader_or_datamodule, LightningDataModule):
        data = {"datamodule": train_loader_or_datamodule}
        if val_loaders is not None:
            raise MisconfigurationException(
                "val_loaders are given beside a datamodule, which has its own; pass either "
                "add_sidekick(module, train_loader, val_loader, ...) or a datamodule alone"
            )
    elif train_loader_or_datamodule is None and not is_overridden("train_dataloader", module):
        raise MisconfigurationException(
            "there is no data to learn from; pass add_sidekick(module, datamodule, ...) or "
            "add_sidekick(module, train_loader, val_loader, ...), on the command line --data"
        )
    elif val_loaders is None and train_loader_or_datamodule is not None:
        raise MisconfigurationException(
            "there is no validation data, which the temperatures are fitted on; pass "
            "add_sidekick(module, train_loader, val_loader, ...) or a datamodule"
        )
    trainer = trainer or Trainer(max_epochs=EPOCHS)
    of_base = None if ckpt_path is None else _of_base(ckpt_path, weights_only=weights_only)
    resumed = ckpt_path if of_base is None else None
    trusted: dict[str, Any] = {} if resumed is None or weights_only else {"weights_only": False}
    trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]  # those that save come last
    try:
        with staying(module, of_base):
            trainer.fit(module, **data, ckpt_path=resumed, **trusted)
    except BaseException:
        trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
        raise
    return callback


def _of_base(path: str, *, weights_only: bool) -> dict[str, Any] | None:
    """A checkpoint of the base; None if it is one of a run of `add_sidekick`, to be resumed."""
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    groups = [g for state in checkpoint.get("optimizer_states", ()) for g in state["param_groups"]]
    return None if any(MARK in group for group in groups) else checkpoint

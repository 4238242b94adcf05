"""Lightning's hooks, each passed on to the run, or to the validation or test that is going on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from lightning_duo.callback.checkpoint import loaded, state_of
from lightning_duo.callback.continuing import (
    check_restored,
    enter,
    leave,
    note_base,
    unless_changed,
)
from lightning_duo.callback.deploy import cost_of, show_gain
from lightning_duo.callback.lesson import begin_step, learn
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.requirements import (
    check_loaders,
    check_monitors,
    check_siblings,
    check_still,
    check_trainer,
    warn_of_constant_monitors,
)
from lightning_duo.callback.run import Run
from lightning_duo.callback.testing import Test
from lightning_duo.callback.trained import Trained, is_trained, step_of_user
from lightning_duo.callback.validation import Validation


class Hooks(Callback):
    """What the Trainer calls, in the order of a fit.

    Args:
        options: The user's.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self._run = Run(options, Messages(options.name))
        self._stage: Validation | Test | None = None
        self._trained: Trained | None = None  # a base that stays as it is
        self._modes: list[tuple[nn.Module, bool]] = []  # before a duo shared the models
        self._entered = ""  # what the Trainer is doing: "fit", "validate", "test" or "predict"

    # ---- from set-up to teardown ----

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":  # the duo predicts through `DuoPredictor`, a module of its own
            check_trainer(trainer, stage, self.options, self._run.messages)
            check_siblings(self, trainer)
            self._run = enter(self._run, trainer, pl_module, stage)
        self._entered = stage
        if stage == "fit":
            for part, training in self._modes:
                part.training = training
            self._modes = []
        if stage == "fit" and is_trained(pl_module) and step_of_user(pl_module) is None:
            check_still(trainer)
            self._trained = Trained(pl_module, trainer)
            self._run.messages.info(
                "the base is not trained: it stays as it is, in eval mode, and only the sidekick "
                "learns"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_monitors(trainer, self.options)
        if self._trained is not None:
            warn_of_constant_monitors(trainer, self.options, self._run.messages)
            if self._trained.begin():
                self._run.messages.warn(
                    f"precision={trainer.precision!r} has rounded the base's weights, as it does "
                    'in every run; to leave them as they are, use "16-mixed" or "bf16-mixed"'
                )

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run = unless_changed(self._run, trainer)  # the module's own set-up is over

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not before: callbacks that average weights write them at the end of training.
        self._run.warn_if_stale()
        self._run.say_notes()
        if self._trained is not None and not self._run.was_trained:
            self._run.messages.warn(
                "the sidekick has learnt nothing: the Trainer had no batches, or had reached "
                "max_epochs or max_steps before; pass a new Trainer"
            )
        if self.options.summary and trainer.is_global_zero:
            show_gain(self._run)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()
        if stage != "predict" and self._run.sidekick is not None:
            self._run.sidekick.model.to(pl_module.device)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave(failed=True)

    def _leave(self, *, failed: bool = False) -> None:
        if self._stage is not None:
            self._stage.finish()
        if self._entered not in ("", "predict"):
            leave(self._run, self._entered, failed=failed)
        self._stage, self._entered = None, ""
        trained, self._trained = self._trained, None
        if trained is not None:
            trained.leave()
            now = self._run.left and self._run.left[1]
            if not failed and trained.fingerprint not in (None, now):
                self._run.messages.warn(
                    "the base is no longer as it was: a callback, or the module itself in its "
                    "validation, has changed its weights or buffers during this fit; leave such a "
                    "callback out of the Trainer"
                )

    # ---- training ----

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run = unless_changed(self._run, trainer)
        check_restored(self._run, trainer, self.state_key)
        check_loaders(trainer, self.options)
        self._run.global_step = trainer.global_step
        note_base(self._run)
        if self._trained is not None and self._run.left is not None:
            self._trained.fingerprint = self._run.left[1]

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._run.training is None:  # the module's own on_train_start comes after ours
            self._run = unless_changed(self._run, trainer)
            check_restored(self._run, trainer, self.state_key)
        begin_step(self._run, trainer, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = learn(self._run, trainer, outputs)
        if loss is not None:
            name = self.options.prefix + "sidekick/train_nll"
            # Not in the bar, which has no room for it beside the base's own loss at 80 columns.
            # A size, which no mean is weighted with, since a step may draw its batches itself.
            pl_module.log(name, loss, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.finish_step()  # of a batch that the module skipped with the epoch's rest

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run.fitted is None and trainer.limit_val_batches != 0:
            self._run.messages.warn(
                "training ended without a validation, so no temperatures are fitted; run "
                "trainer.validate"
            )
        self._run.warn_if_probing()
        if trainer.is_global_zero:
            self._run.cost = cost_of(self._run)

    # ---- validation and test ----

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_loaders(trainer, self.options)
        self._stage = Validation(self._run, trainer, pl_module)
        if trainer.state.fn == TrainerFn.VALIDATING:
            check_restored(self._run, trainer, self.state_key)
            if trainer.ckpt_path is not None:
                self._run.kept = True
                self._stage.take_best()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._stage is not None:
            self._stage.start(batch, batch_idx, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._stage is not None:
            self._stage.end(outputs, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage, self._stage = self._stage, None
        assert isinstance(stage, Validation)
        stage.finish()
        stage.check()
        if trainer.sanity_checking:
            return
        self._run.fitted = stage.fit()
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._run.say_notes()

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_restored(self._run, trainer, self.state_key)
        self._run.kept |= trainer.ckpt_path is not None
        self._run.warn_if_stale()
        self._stage = Test(self._run, trainer, pl_module)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage, self._stage = self._stage, None
        assert isinstance(stage, Test)
        stage.finish()
        stage.check()
        stage.report()

    # ---- checkpoints ----

    @override
    def state_dict(self) -> dict[str, Any]:
        return state_of(self._run)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._entered != "predict":
            self._run.global_step = checkpoint["global_step"]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and self._entered != "predict":
            self._run = loaded(self._run, state_dict, self._entered)

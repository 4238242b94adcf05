"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_duo._version import __version__
from lightning_duo.base import LogitsFn
from lightning_duo.batch import BatchFn, read_batch
from lightning_duo.calibration import Calibration, check_request
from lightning_duo.callback.requirements import check_trainer
from lightning_duo.callback.run import (
    STATE_VERSION,
    BestSidekick,
    Record,
    check_state,
    fingerprint,
    load_weights,
)
from lightning_duo.callback.sidekick import Sidekick, check_model, share_weights, sidekick_logits
from lightning_duo.callback.stages import LOGGED, Evaluator, MetricLog, stage_name
from lightning_duo.callback.step import Pair
from lightning_duo.callback.training import (
    OptimizerFn,
    Progress,
    Recipe,
    SchedulerFn,
    SidekickTrainer,
    check_trainable,
)
from lightning_duo.cost import Cost
from lightning_duo.evaluation import Predictions
from lightning_duo.isolation import evaluating, own_stream
from lightning_duo.module import DuoModule
from lightning_duo.report import check_matplotlib, print_summary
from lightning_duo.tasks import check_soft_targets, check_targets
from lightning_duo.temperature import TemperatureFit
from lightning_duo.zoo import SidekickSource


class DuoCallback(Callback):
    """Fine-tunes a small sidekick beside your model and makes the two a calibrated duo.

    During fit the sidekick learns from the batches your model sees. At the end of every
    validation the two temperatures are fitted to the validation set, and metrics are logged as
    ``{base|base_scaled|sidekick|duo}/{val|test}_{metric}`` (accuracy, f1, nll, brier, ece, auroc,
    fpr95, aurc, e_aurc, augrc, sac98) with ``duo/temperature_base`` and
    ``duo/temperature_sidekick``; the val metrics of the fitted forms are thus measured on the set
    that fitted two numbers. `Trainer.test` evaluates with the fitted temperatures and never refits.
    Your module, its optimizer and its random numbers are left as they would be without the
    callback.

    `Trainer.validate` refits. Given a checkpoint, say by ``ckpt_path="best"``, it pairs its base
    with the sidekick whose validation loss, at its own best temperature, was lowest: in the process
    that trained, of the whole run, else up to that checkpoint. `Trainer.test` without ``ckpt_path``
    then measures that pair.

    With a ``target_accuracy`` the confidence from which predictions are accepted is chosen on the
    same samples, logged as ``duo/threshold``, and part of checkpoints and of `module`;
    ``duo/{val|test}_coverage`` and ``duo/{val|test}_selective_accuracy`` say what it accepts.

    The metrics of further dataloaders have ``/dataloader_idx_<i>`` behind their names, i = 1, 2,
    ...; those without usable targets are not measured.

    Args:
        sidekick: A timm name ("resnet34"), "torchvision/<name>", an ``nn.Module``, or a callable
            ``num_classes -> nn.Module``. It is moved to the base's device.
        num_classes: K; by default taken from the first logits of the base.
        pretrained: Whether a named sidekick starts from published weights.
        weights: Local weights of a named sidekick (safetensors or a state dict) instead.
        sidekick_transform: From the base's inputs to the sidekick's, on the device, for example
            ``torchvision.transforms.v2.Resize(96)``. By default inputs are resized if the sidekick
            takes one size only, and re-normalised if both models state how they normalise.
        batch_fn: ``batch -> (inputs, targets)``, for batches that are neither a tuple nor a mapping
            with usual keys. It is given the batch as the step will get it, before the step.
        logits_fn: ``(module, inputs) -> logits (N, K)``, for modules whose step and forward do not
            give the logits. To be named in a file of LightningCLI, a function is annotated
            ``-> torch.Tensor``.
        probe: Fraction of the training that trains the sidekick's head only.
        optimizer: ``parameters -> Optimizer``; by default AdamW.
        lr_scheduler: ``optimizer -> scheduler``, stepped with the optimizer; by default linear
            warm-up, then cosine.
        calibration_loader: Index of the validation dataloader that fits the temperatures and
            chooses the threshold, where there are several.
        target_accuracy: Accuracy that accepted predictions are to reach, in (0, 1]; by default all
            are accepted.
        delta: Probability with which the accepted of new data may miss it; see `select_threshold`.
        figures: Whether to send figures (risk-coverage, reliability, confidence) to the loggers at
            the end of every validation and test; needs matplotlib, and a logger that takes figures
            (TensorBoard, or one with ``log_image``).
        summary: Whether to print a table of what was gained after fit.
        name: Of this duo, where a Trainer has several: stands before all logged names, as in
            "small/duo/val_nll", and tells their states apart in checkpoints.

    Raises:
        ValueError: If no model is called ``sidekick``, or an argument is out of range.
        ImportError: If figures are wanted and matplotlib is missing.
        FileNotFoundError: If the weights file does not exist.

    Example:
        >>> DuoCallback(sidekick="resnet34", pretrained=False).results
        {}

    Source: Asymmetric Duos, Sec. 3.1 and App. A.2.
    """

    def __init__(
        self,
        sidekick: SidekickSource,
        *,
        num_classes: int | None = None,
        pretrained: bool = True,
        weights: str | Path | None = None,
        sidekick_transform: Callable[[Any], Any] | None = None,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
        probe: float = 0.3,
        optimizer: OptimizerFn | None = None,
        lr_scheduler: SchedulerFn | None = None,
        calibration_loader: int = 0,
        target_accuracy: float | None = None,
        delta: float | None = None,
        figures: bool = False,
        summary: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if name == "":
            raise ValueError("name must not be empty; leave it out, or pass a name")
        if calibration_loader < 0:
            raise ValueError(f"calibration_loader must be 0, 1, ..., got {calibration_loader}")
        self._name = name
        self._sidekick = Sidekick(
            sidekick,
            num_classes=num_classes,
            pretrained=pretrained,
            weights=weights,
            transform=sidekick_transform,
        )
        self._pair = Pair(self._sidekick, batch_fn or read_batch, logits_fn)
        self._recipe = Recipe(probe, optimizer, lr_scheduler)
        check_request(target_accuracy, delta)
        if figures:
            check_matplotlib()
        self._me = f"DuoCallback {name!r}" if name else "DuoCallback"
        self._summary = summary
        self._record = Record()
        self._evaluator = Evaluator(
            self._pair,
            self._record,
            MetricLog(f"{name}/" if name else "", figures),
            calibration_loader=calibration_loader,
            request=(target_accuracy, delta),
            me=self._me,
        )
        self.cost: Cost | None = None
        """FLOPs and parameters of both models, known after fit."""
        self._module: LightningModule | None = None
        self._training: SidekickTrainer | None = None
        self._training_state: dict[str, Any] | None = None
        self._stage = ""
        self._restored = self._paired_anew = False
        self._begun: set[int] = set()  # fingerprints of the base where fits began
        self._ended: int | None = None  # and where the last one ended

    @property
    @override
    def state_key(self) -> str:
        return (
            super().state_key if self._name is None else self._generate_state_key(name=self._name)
        )

    @property
    def calibration(self) -> Calibration | None:
        """Temperatures and threshold of the last validation; None before the first."""
        return self._record.calibration

    @property
    def sidekick(self) -> nn.Module | None:
        """The sidekick as it is trained; None before it is built."""
        return self._sidekick.model

    @property
    def progress(self) -> Progress | None:
        """How far the sidekick's training is, or was at its end; None before fit."""
        training, state = self._training, self._training_state
        if training is not None:
            return Progress(
                training.updates, training.batches, training.probe_updates, training.total
            )
        if state is None:
            return None
        return Progress(state["updates"], state["batches"], state["probe_updates"], None)

    @property
    def best(self) -> BestSidekick | None:
        """The sidekick of the validation where its loss was lowest; None before the first."""
        return self._record.best

    @property
    def fitted_at_step(self) -> int:
        """The Trainer's global step at that fit; -1 if there is none, or it is not known."""
        return self._record.fitted_at_step

    @property
    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Stage ("val", "test") -> model -> metric -> value, of the last run; see `DuoMetrics`.

        Of a further dataloader the stage is "val/dataloader_idx_1", say.
        """
        return self._record.results

    @property
    def predictions(self) -> dict[str, dict[str, Predictions]]:
        """Stage -> form -> what it said of the samples of the last run; what `results` measure."""
        return self._record.predictions

    @property
    def fit(self) -> TemperatureFit | None:
        """The last temperature fit; None before the first validation."""
        return None if self.calibration is None else self.calibration.fit

    @property
    def balance(self) -> float | None:
        """FLOPs of the sidekick over those of the base, known after fit."""
        return None if self.cost is None else self.cost.balance

    @property
    def module(self) -> DuoModule:
        """The duo as it is now: a deep copy in eval mode, which later training leaves alone.

        Raises:
            MisconfigurationException: If no temperatures were fitted yet, or each process holds a
                shard of the base only.
            ValueError: If the base's logits can be computed neither by its forward nor by
                ``logits_fn``.
        """
        if self.calibration is None or self._module is None:
            raise MisconfigurationException(
                "there is no duo yet: no temperatures were fitted in this process; run trainer.fit "
                "with validation data, or trainer.validate"
            )
        self._warn_if_stale(self._module)
        return self._pair.duo(self._module, self.calibration)

    def write_report(
        self, path: str | Path, *, stage: str | None = None, resamples: int | None = None
    ) -> Path:
        """Write a report on the last test, or validation, as one HTML file.

        Args:
            path: The file to write, ``*.html``.
            stage: A key of `results`; by default "test" after a test, else "val".
            resamples: Of the bootstrap that gives the intervals; see `report.write_report`.

        Returns:
            The path. With several processes the first one writes.

        Raises:
            MisconfigurationException: If nothing was measured yet.
            ImportError: If matplotlib is missing.
        """
        from lightning_duo.report import write_report

        stage = stage or ("test" if "test" in self.predictions else "val")
        if self.calibration is None or self._module is None or stage not in self.predictions:
            raise MisconfigurationException(
                f"there is nothing to report on {stage!r} yet: run trainer.fit with validation "
                f"data, trainer.validate or trainer.test; known: {sorted(self.predictions)}"
            )
        # A module that was pickled or copied belongs to no Trainer.
        if self._module._trainer is not None and not self._module.trainer.is_global_zero:
            return Path(path)
        name = {"val": "the validation set", "test": "the test set"}.get(stage, stage)
        return write_report(
            path,
            self.predictions[stage],
            self.calibration,
            data=name,
            held_out=stage != stage_name("val", self._evaluator.calibration_loader),
            cost=self.cost or self._pair.cost(self._module),
            resamples=resamples,
        )

    # ---- set-up ----

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "predict":
            return  # the duo predicts through `DuoPredictor`, a module of its own
        check_trainer(trainer, stage)
        self._check_others(trainer)
        if self._module is not pl_module:
            self._record.step = 0 if stage == "fit" else -1
        if stage == "fit" and self._is_another(trainer, pl_module):
            self._sidekick.forget()
            self._record.forget()
        if (sidekick := self._sidekick.module) is not None:
            check_model(sidekick, pl_module)
            if stage == "fit":
                check_trainable(sidekick)
        if stage == "fit":
            if trainer.precision == "16-true" and self._recipe.optimizer is None:
                raise MisconfigurationException(
                    "AdamW, the sidekick's default, cannot train weights in float16; pass "
                    "DuoCallback(..., optimizer=functools.partial(torch.optim.SGD, lr=0.01)), or "
                    'use precision "16-mixed" or "bf16-true"'
                )
            # Like the base's optimizers, the sidekick's starts afresh unless a checkpoint says
            # otherwise, which is read after this.
            self._training = self._training_state = self._record.best = None
            self._record.run = trainer.strategy.broadcast(uuid.uuid4().hex)
            self._record.predictions = {}  # of models that are about to change
        self._module, self._restored = pl_module, False

    def _is_another(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether this is another base than that of the last fit, so that all begins anew.

        It is too if its weights are those that an earlier fit began with, as in cross-validation.
        """
        if self._module is None or self._module is not module:
            self._begun.clear()
        another = self._module is not None and self._module is not module
        now = fingerprint(module) if trainer.ckpt_path is None else None
        if now is not None and not another and self._ended != now:
            another = now in self._begun
            if not another and self._ended is not None:
                rank_zero_warn(
                    f"{self._me}: the base has other weights than at the end of the last fit, and "
                    "the sidekick goes on from what it learned there; if this is another run, as "
                    "a fold of a cross-validation, make a new DuoCallback for it"
                )
        if now is not None:
            self._begun.add(now)
        self._ended = None  # until this fit ends, and for good if it is interrupted
        found: bool = trainer.strategy.broadcast(another)
        return found

    def _check_others(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, DuoCallback):
                continue
            if other.state_key == self.state_key:
                raise MisconfigurationException(
                    "two DuoCallbacks of a Trainer need different names; pass "
                    'DuoCallback(..., name="small") to one of them'
                )
            mine, its = self._sidekick.module, other._sidekick.module
            if mine is not None and its is not None and share_weights(mine, its):
                raise MisconfigurationException(
                    "two DuoCallbacks train the same sidekick, or a part of it; give each a model "
                    "of its own (copy.deepcopy it)"
                )

    def _check_restored(self, trainer: Trainer) -> None:
        """A checkpoint without duo state must not be paired with what is in memory unsaid."""
        if trainer.ckpt_path is None or self._restored:
            return
        what = f"the checkpoint {trainer.ckpt_path} holds no state of {self.state_key}"
        if trainer.testing:
            raise MisconfigurationException(
                f"{what}, so there is no sidekick and no temperatures that belong to it; save with "
                "DuoCallback and save_weights_only=False, or refit with trainer.validate first and "
                "test without ckpt_path"
            )
        rank_zero_warn(f"{self._me}: {what}; the sidekick goes on from what is in memory")
        self._record.step = -1  # it does not say

    def _check_loaders(self, trainer: Trainer) -> None:
        chosen = self._evaluator.calibration_loader
        loaders = len(trainer.num_val_batches)  # 0 as long as they are not set up
        if loaders and chosen >= loaders:
            raise MisconfigurationException(
                f"calibration_loader is {chosen}, but the number of validation dataloaders is "
                f"{loaders}, and the first of them is 0"
            )

    def _warn_if_stale(self, module: LightningModule) -> None:
        model = self._sidekick.model
        if model is not None and self._record.is_stale(module, model):
            rank_zero_warn(
                f"{self._me}: the temperatures were fitted at step {self.fitted_at_step} and the "
                "weights of base or sidekick are others now"
                + (f" (the base is at step {self._record.step})" if self._record.step >= 0 else "")
                + "; refit them with trainer.validate"
            )

    # ---- training ----

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_restored(trainer)
        self._check_loaders(trainer)
        self._record.step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first = self._training is None
        watch = self._sidekick.num_classes is None
        self._pair.before_step(pl_module, batch, watch=watch, first=first)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        inputs, targets = self._pair.after_step(pl_module)
        manual = not pl_module.automatic_optimization
        before, self._record.step = self._record.step, trainer.global_step
        stepped = trainer.global_step - before
        first = self._training is None
        if self._training is None:
            plan = {"steps_per_batch": stepped if manual else 1, "step": before}
            self._training = self._begin(trainer, pl_module, outputs, (inputs, targets), plan)
        update = manual or stepped > 0
        # A step that returns nothing skips the batch, which DDP cannot do.
        nothing = outputs is None or (isinstance(outputs, Mapping) and not outputs)
        if nothing and not manual and trainer.world_size == 1:
            self._training.pass_over(update=update)
            return
        classes = self._sidekick.num_classes or 0
        soft = check_soft_targets(targets, classes)
        if soft is None:
            # Reading values back from an accelerator stalls it, so later batches rely on the loss.
            look = first or targets.device.type == "cpu"
            targets = check_targets(targets, classes, values=look)
        loss = self._training.step(
            lambda: self._sidekick.inputs(pl_module, inputs),
            targets if soft is None else soft,
            update=update,
        )
        name = f"{self._evaluator.log.prefix}sidekick/train_nll"
        pl_module.log(name, loss, prog_bar=True, on_step=True, on_epoch=False)

    def _begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Any, Tensor],
        plan: dict[str, int],
    ) -> SidekickTrainer:
        num_classes = self._sidekick.num_classes
        if num_classes is None:
            with own_stream(pl_module.device):
                num_classes = self._pair.base.num_classes(pl_module, outputs, *batch)
            self._pair.base.unwatch()
        model = self._pair.build(trainer, pl_module, num_classes)
        if any(is_lazy(parameter) for parameter in model.parameters()):
            with own_stream(pl_module.device), evaluating(model):
                sidekick_logits(model, self._sidekick.inputs(pl_module, batch[0]))
        self._sidekick.remember()
        return SidekickTrainer(
            model,
            num_classes,
            self._recipe,
            trainer,
            self._training_state,
            **plan,
        )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.reset()  # of a batch that the module skipped together with the epoch's rest

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fit is None and trainer.limit_val_batches != 0:
            rank_zero_warn(
                f"{self._me}: training ended before any validation that could fit temperatures; "
                "run trainer.validate"
            )
        if self._training is not None and self._training.probing:
            rank_zero_warn(
                f"{self._me}: training ended after {self._training.updates} of the "
                f"{self._training.probe_updates} steps that train the sidekick's head only, so "
                "the rest of it was never trained; set max_epochs to what will be run, or a "
                "smaller probe"
            )
        if trainer.is_global_zero:
            self.cost = self._pair.cost(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not before: callbacks that average weights write them at the end of training.
        self._warn_if_stale(pl_module)
        self._evaluator.say()
        if self._summary and self.calibration is not None and "val" in self.results:
            shown = {model: self.results["val"][model] for model in LOGGED}
            fitted = self._evaluator.calibration_loader == 0
            data = "the validation set" + (" (which fitted the temperatures)" if fitted else "")
            data += f", {self._name}" if self._name else ""
            rank_zero_only(print_summary)(shown, self.calibration, data=data, balance=self.balance)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        self._pair.reset()
        self._evaluator.clear()
        self._stop_training()
        if stage == "fit":
            self._ended = fingerprint(pl_module)
        if self._sidekick.model is not None:
            self._sidekick.model.to(pl_module.device)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._pair.reset()
        self._stop_training()

    def _stop_training(self) -> None:
        if self._training is not None:
            self._training.stop()
            self._training_state = self._training.state_dict()
            self._training = None

    # ---- evaluation ----

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluator.begin_validation(trainer)
        self._check_loaders(trainer)
        if self._training is not None:
            self._training.sync_buffers()
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_restored(trainer)
            if trainer.ckpt_path is not None:
                self._take_best()

    def _take_best(self) -> None:
        """Pair the base of a checkpoint with the best sidekick of the run."""
        best, step = self._record.best, self._record.step
        if best is None or self._sidekick.model is None:
            return
        self._sidekick.model.load_state_dict(best.weights)
        self._paired_anew = True
        rank_zero_info(
            f"{self._me}: the base of step {step if step >= 0 else 'that is not known'} is paired "
            f"with the sidekick of step {best.step}, whose validation loss of {best.nll:.4f} (at "
            "its own best temperature) is its lowest"
        )

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluator.before_step(trainer, pl_module, batch, (batch_idx, dataloader_idx))

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
        self._evaluator.add_validation(trainer, pl_module, outputs, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.reset()
        if trainer.sanity_checking:
            return
        trained = self._training or self._training_state
        if self._sidekick.pretrained_only and not trained:
            rank_zero_warn(
                f"{self._me}: the sidekick was not fine-tuned (no fit, no ckpt_path), so its head "
                "is random and the duo is little more than the temperature-scaled base"
            )
        self._evaluator.end_validation(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_restored(trainer)
        if self.fit is None:
            raise MisconfigurationException(
                "DuoCallback cannot test without temperatures: run trainer.fit or trainer.validate "
                "first, or pass trainer.test(ckpt_path=...) a checkpoint saved after a validation"
            )
        self._warn_if_stale(pl_module)
        self._evaluator.begin_test(trainer, pl_module)

    @override
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluator.before_step(trainer, pl_module, batch, (batch_idx, dataloader_idx))

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluator.add_test(trainer, pl_module, outputs, dataloader_idx)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.reset()
        self._evaluator.end_test(trainer, pl_module)

    # ---- checkpoints ----

    @override
    def state_dict(self) -> dict[str, Any]:
        written = {"version": STATE_VERSION, "library": __version__}
        if self._sidekick.model is None:
            return {**written, "sidekick": None}  # a learning rate finder comes back to this
        if self._training is not None and self._pair.in_step:
            rank_zero_warn(
                f"{self._me}: a checkpoint is being saved after the base's step and before the "
                "sidekick's, so resuming from it will not be exact; put DuoCallback before the "
                "callback that saves"
            )
        training = self._training.state_dict() if self._training else self._training_state
        return {
            **written,
            "name": self._sidekick.name,
            "num_classes": self._sidekick.num_classes,
            "sidekick": self._sidekick.model.state_dict(),
            "transform": self._sidekick.transform_name,
            "training": training,
            **self._record.state_dict(),
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._stage != "predict":
            self._record.step = checkpoint["global_step"]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict or self._stage == "predict":
            return
        sidekick = self._sidekick
        check_state(state_dict, sidekick.num_classes)
        if state_dict["sidekick"] is None:
            if self._stage == "fit":  # back to before it was built
                self._stop_training()
                self._training_state = None
                sidekick.forget()
                self._record.unfit()
                self._restored = True
            return
        if state_dict["transform"] != sidekick.transform_name:
            rank_zero_warn(
                f"{self._me}: the checkpoint's sidekick saw its inputs through "
                f"{state_dict['transform']}, this callback's sees them through "
                f"{sidekick.transform_name}"
            )
        if self._paired_anew and self._stage == "test":
            rank_zero_warn(
                f"{self._me}: the pair that trainer.validate refitted gives way to that of the "
                "checkpoint; to test the refitted one, call trainer.test(model, data) without "
                "ckpt_path"
            )
        self._paired_anew = False
        assert self._module is not None, "the Trainer calls setup first"
        # No download: the weights are in the checkpoint.
        model = sidekick.build(state_dict["num_classes"], self._module, pretrained=False)
        load_weights(model, state_dict["sidekick"], (state_dict["name"], sidekick.name))
        self._training, self._training_state = None, state_dict["training"]
        self._record.load_state_dict(state_dict)
        self._restored = True
        if self.calibration is not None:
            chosen = (self.calibration.target_accuracy, self.calibration.delta)
            asked = self._evaluator.request
            if asked != chosen:
                rank_zero_warn(
                    f"{self._me}: the checkpoint's threshold was chosen for target_accuracy="
                    f"{chosen[0]}, delta={chosen[1]}, this callback asks for {asked[0]}, "
                    f"{asked[1]}; refit with trainer.validate"
                )
        rank_zero_info(f"{self._me}: sidekick {sidekick.name!r} restored from the checkpoint")

"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_duo import __version__
from lightning_duo.batch import (
    BatchFn,
    LogitsFn,
    check_soft_targets,
    check_targets,
    read_batch,
)
from lightning_duo.calibration import Calibration, check_request, choose_threshold
from lightning_duo.checks import check_trainer
from lightning_duo.cofinetune import (
    OptimizerFn,
    Recipe,
    SchedulerFn,
    SidekickTrainer,
    check_trainable,
)
from lightning_duo.cost import Cost
from lightning_duo.evaluation import DuoMetrics, Predictions
from lightning_duo.evaluator import LOGGED, Collected, MetricLog, Processes
from lightning_duo.figures import check_matplotlib
from lightning_duo.logits import Logits
from lightning_duo.module import DuoModule
from lightning_duo.pair import Pair
from lightning_duo.randomness import own_stream
from lightning_duo.sidekick import Sidekick, check_model
from lightning_duo.state import (
    STATE_VERSION,
    BestSidekick,
    check_state,
    fingerprints,
    load_weights,
)
from lightning_duo.summary import print_summary
from lightning_duo.temperature import TemperatureFit, check_samples, fit_temperatures
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

    `Trainer.validate` pairs the base it is given, say by ``ckpt_path="best"``, with the sidekick
    whose validation loss was lowest, and refits. In the process that trained that is the best of
    the whole run, else the best up to that checkpoint.

    With a ``target_accuracy`` the confidence from which predictions are accepted is chosen on the
    same samples, logged as ``duo/threshold``, and part of checkpoints and of `module`;
    ``duo/{val|test}_coverage`` and ``duo/{val|test}_selective_accuracy`` say what it accepts.

    The metrics of further dataloaders have ``/loader_<i>`` behind their names, i = 1, 2, ...

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
            give the logits.
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
        self._request = (target_accuracy, delta)
        self._calibration_loader, self._summary = calibration_loader, summary
        self._log = MetricLog(f"{name}/" if name else "", figures)
        self.calibration: Calibration | None = None
        """Temperatures and threshold of the last validation; None before the first."""
        self.fitted_at_step = -1
        """The Trainer's global step at that fit."""
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        """Stage ("val", "test") -> model -> metric -> value, of the last run; see `DuoMetrics`."""
        self.predictions: dict[str, dict[str, Predictions]] = {}
        """Stage -> form -> what it said of the samples of the last run; what `results` measure."""
        self.cost: Cost | None = None
        """FLOPs and parameters of both models, known after fit."""
        self._module: LightningModule | None = None
        self._training: SidekickTrainer | None = None
        self._training_state: dict[str, Any] | None = None
        self._restored = self._predicting = False
        self._forget_run()
        self._collected = Collected()
        self._metrics: dict[int, DuoMetrics] = {}

    def _forget_run(self) -> None:
        self.calibration, self.fitted_at_step, self.results = None, -1, {}
        # Fingerprints of the weights the temperatures are for, and of those validated last.
        self._fitted_to: list[int | None] | None = None
        self._validated: list[int | None] | None = None
        self._best: BestSidekick | None = None
        self._run = ""  # tells the checkpoints of one run from those of another
        self._step = 0  # of the base in memory; -1 if not known

    @property
    @override
    def state_key(self) -> str:
        return (
            super().state_key if self._name is None else self._generate_state_key(name=self._name)
        )

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
        if not self._module.trainer.is_global_zero:
            return Path(path)
        name = {"val": "the validation set", "test": "the test set"}.get(stage, stage)
        return write_report(
            path,
            self.predictions[stage],
            self.calibration,
            data=name,
            held_out=stage != "val",
            cost=self.cost or self._pair.cost(self._module),
            resamples=resamples,
        )

    # ---- set-up ----

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._predicting = stage == "predict"
        if self._predicting:
            return  # the duo predicts through `DuoPredictor`, a module of its own
        check_trainer(trainer, stage)
        self._check_others(trainer)
        if self._module is not pl_module:
            self._step = 0
            if stage == "fit" and self._module is not None:  # another base, another sidekick
                self._sidekick.forget()
                self._forget_run()
        if (sidekick := self._sidekick.module) is not None:
            check_model(sidekick, pl_module)
            if stage == "fit":
                check_trainable(sidekick)
        if stage == "fit":
            # Like the base's optimizers, the sidekick's starts afresh unless a checkpoint says
            # otherwise, which is read after this.
            self._training = self._training_state = self._best = None
            self._run = trainer.strategy.broadcast(uuid.uuid4().hex)
            self.predictions = {}  # of models that are about to change
        self._module, self._restored = pl_module, False

    def _check_others(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, DuoCallback):
                continue
            if other.state_key == self.state_key:
                raise MisconfigurationException(
                    "two DuoCallbacks of a Trainer need different names; pass "
                    'DuoCallback(..., name="small") to one of them'
                )
            if self._sidekick.module is not None and (
                self._sidekick.module is other._sidekick.module
            ):
                raise MisconfigurationException(
                    "two DuoCallbacks train the same sidekick; give each a model of its own "
                    "(copy.deepcopy it)"
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
        rank_zero_warn(f"DuoCallback: {what}; the sidekick goes on from what is in memory")
        self._step = -1  # it does not say

    def _check_loaders(self, trainer: Trainer) -> None:
        loaders = len(trainer.num_val_batches)  # 0 as long as they are not set up
        if loaders and self._calibration_loader >= loaders:
            raise MisconfigurationException(
                f"calibration_loader is {self._calibration_loader}, but the validation dataloaders "
                f"are {loaders}, counted from 0"
            )

    def _warn_if_stale(self, module: LightningModule) -> None:
        model = self._sidekick.model
        if self._fitted_to is None or model is None:
            return
        pairs = zip(fingerprints(module, model), self._fitted_to, strict=True)
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            rank_zero_warn(
                f"DuoCallback: the temperatures were fitted at step {self.fitted_at_step} and the "
                f"weights of base or sidekick are others now (the base is at step {self._step}); "
                "refit them with trainer.validate"
            )

    # ---- training ----

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_restored(trainer)
        self._check_loaders(trainer)
        self._step = trainer.global_step

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
        stepped = trainer.global_step - self._step
        self._step = trainer.global_step
        first = self._training is None
        if self._training is None:
            per_batch = max(1, stepped) if manual else 1
            self._training = self._begin(trainer, pl_module, outputs, (inputs, targets), per_batch)
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
        name = f"{self._log.prefix}sidekick/train_nll"
        pl_module.log(name, loss, prog_bar=True, on_step=True, on_epoch=False)

    def _begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Any, Tensor],
        steps_per_batch: int,
    ) -> SidekickTrainer:
        num_classes = self._sidekick.num_classes
        if num_classes is None:
            with own_stream(pl_module.device):
                num_classes = self._pair.base.num_classes(pl_module, outputs, *batch)
            self._pair.base.unwatch()
        return SidekickTrainer(
            self._pair.build(trainer, pl_module, num_classes),
            num_classes,
            self._recipe,
            trainer,
            self._training_state,
            steps_per_batch=steps_per_batch,
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fit is None and trainer.limit_val_batches != 0:
            rank_zero_warn(
                "DuoCallback: training ended before any validation, so no temperatures were "
                "fitted; run trainer.validate"
            )
        if trainer.is_global_zero:
            self.cost = self._pair.cost(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not before: callbacks that average weights write them at the end of training.
        self._warn_if_stale(pl_module)
        if self._summary and self.calibration is not None and "val" in self.results:
            shown = {model: self.results["val"][model] for model in LOGGED}
            fitted = self._calibration_loader == 0
            data = "the validation set" + (" (which fitted the temperatures)" if fitted else "")
            rank_zero_only(print_summary)(shown, self.calibration, data=data, balance=self.balance)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._predicting:
            return
        self._pair.reset()
        self._collected.clear()
        self._metrics.clear()
        self._stop_training()
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
        self._collected.clear()
        self._validated = None
        self._check_loaders(trainer)
        if self._training is not None:
            self._training.sync_buffers()
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_restored(trainer)
            self._take_best()

    def _take_best(self) -> None:
        """Pair the base with the best sidekick of the run."""
        if self._best is None or self._sidekick.model is None:
            return
        load_weights(self._sidekick.model, self._best.weights, self._sidekick.name)
        step = self._step if self._step >= 0 else "that is not known"
        rank_zero_info(
            f"DuoCallback: the base of step {step} is paired with the sidekick of step "
            f"{self._best.step}, whose validation loss of {self._best.nll:.4f} is its lowest"
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
        self._pair.before_step(pl_module, batch, watch=True, first=batch_idx == 0)

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
        logits = self._pair.logits(trainer, pl_module, outputs)
        if trainer.sanity_checking:
            return
        self._collected.add(logits, dataloader_idx)
        if self._validated is None and self._sidekick.model is not None:
            # Here and not at the end: callbacks that average weights swap them for the batches.
            self._validated = fingerprints(pl_module, self._sidekick.model)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.reset()
        if trainer.sanity_checking:
            return
        trained = self._training or self._training_state
        if self._sidekick.pretrained_only and not trained:
            rank_zero_warn(
                "DuoCallback: the sidekick was not fine-tuned (no fit, no ckpt_path), so its head "
                "is random and the duo is little more than the temperature-scaled base"
            )
        processes = Processes(trainer, pl_module)
        classes = processes.num_classes(self._sidekick.num_classes)
        samples = self._collected.of_loaders(len(trainer.num_val_batches), classes)
        self._collected.clear()
        self.predictions = {}  # whatever was tested had other temperatures
        self._calibrate(processes, samples, classes)
        results = self.results[_stage("val", self._calibration_loader)]["sidekick"]
        model, nll = self._sidekick.model, results["nll"]
        if trainer.state.fn == TrainerFn.FITTING and model is not None:
            if self._best is None or nll < self._best.nll:
                self._best = BestSidekick.of(model, nll, self._step)

    def _calibrate(self, processes: Processes, samples: list[Logits], classes: int) -> None:
        """Fit on the samples of one loader, and measure all of them."""
        chosen = self._calibration_loader
        fit = fit_temperatures(*samples[chosen], reduce=processes.reduce)
        if fit.status == "separable":
            rank_zero_warn(
                "DuoCallback: the duo separates the validation set without error, so no finite "
                "temperatures are best and confidences will be near 1; validate on more samples"
            )
        found = []
        for logits in samples:
            metrics = DuoMetrics(classes, fit)
            metrics.update(*logits)
            found.append(processes.predictions(metrics))
        with warnings.catch_warnings():
            if not processes.trainer.is_global_zero:  # one process says what all of them find
                warnings.simplefilter("ignore")
            self.calibration = choose_threshold(fit, found[chosen]["duo"], *self._request)
        self.fitted_at_step, self._fitted_to = self._step, self._validated
        for index, predictions in enumerate(found):
            self._measure(processes, "val", index, predictions)
        for name, value in fit.temperatures._asdict().items():
            self._log.value(processes, f"duo/temperature_{name}", value)
        if self.calibration.threshold is not None:
            self._log.value(processes, "duo/threshold", self.calibration.threshold.value)

    def _measure(
        self,
        processes: Processes,
        stage: str,
        loader: int,
        predictions: dict[str, Predictions],
    ) -> None:
        threshold = None if self.calibration is None else self.calibration.threshold
        place = (stage, _stage("", loader))
        key = _stage(stage, loader)
        self.results[key] = self._log.write(processes, place, predictions, threshold)
        self.predictions[key] = predictions

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_restored(trainer)
        if self.fit is None:
            raise MisconfigurationException(
                "DuoCallback cannot test without temperatures: run trainer.fit or trainer.validate "
                "first, or pass trainer.test(ckpt_path=...) a checkpoint saved after a validation"
            )
        self._warn_if_stale(pl_module)
        classes = Processes(trainer, pl_module).num_classes(self._sidekick.num_classes)
        loaders = range(len(trainer.num_test_batches))
        self._metrics = {index: DuoMetrics(classes, self.fit) for index in loaders}

    @override
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._pair.before_step(pl_module, batch, watch=True, first=batch_idx == 0)

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
        logits = self._pair.logits(trainer, pl_module, outputs)
        check_samples(*logits)
        self._metrics[dataloader_idx].update(*logits)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.reset()
        processes = Processes(trainer, pl_module)
        for index, metrics in sorted(self._metrics.items()):
            self._measure(processes, "test", index, processes.predictions(metrics))

    # ---- checkpoints ----

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._sidekick.model is None:
            return {}
        training = self._training.state_dict() if self._training else self._training_state
        return {
            "version": STATE_VERSION,
            "library": __version__,
            "run": self._run,
            "name": self._sidekick.name,
            "num_classes": self._sidekick.num_classes,
            "sidekick": self._sidekick.model.state_dict(),
            "training": training,
            "best": self._best and self._best.state_dict(),
            "calibration": self.calibration and self.calibration.state_dict(),
            "fitted_at_step": self.fitted_at_step,
            "fitted_to": self._fitted_to,
            "results": self.results,
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._predicting:
            self._step = checkpoint["global_step"]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict or self._predicting:
            return
        sidekick = self._sidekick
        check_state(state_dict, sidekick.name, sidekick.num_classes)
        assert self._module is not None, "the Trainer calls setup first"
        # No download: the weights are in the checkpoint.
        model = sidekick.build(state_dict["num_classes"], self._module, pretrained=False)
        load_weights(model, state_dict["sidekick"], sidekick.name)
        best = state_dict["best"] and BestSidekick(**state_dict["best"])
        mine = self._best if self._run == state_dict["run"] else None
        self._best = min((b for b in (mine, best) if b), key=lambda b: b.nll, default=None)
        self._run = state_dict["run"]
        self._training, self._training_state = None, state_dict["training"]
        calibration = state_dict["calibration"]
        self.calibration = calibration and Calibration.from_state_dict(calibration)
        self.fitted_at_step = state_dict["fitted_at_step"]
        self._fitted_to = state_dict["fitted_to"]
        self.results = state_dict["results"]
        self.predictions = {}
        self._restored = True
        if self.calibration is not None:
            chosen = (self.calibration.target_accuracy, self.calibration.delta)
            if self._request != chosen:
                rank_zero_warn(
                    "DuoCallback: the checkpoint's threshold was chosen for target_accuracy="
                    f"{chosen[0]}, delta={chosen[1]}, this callback asks for {self._request[0]}, "
                    f"{self._request[1]}; refit with trainer.validate"
                )
        rank_zero_info(f"DuoCallback: sidekick {sidekick.name!r} restored from the checkpoint")


def _stage(stage: str, loader: int) -> str:
    """A stage, with a dataloader after the first."""
    return f"{stage}/loader_{loader}" if loader else stage

"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_duo.batch import BatchFn, LogitsFn, check_targets, read_batch
from lightning_duo.calibration import Calibration, check_request, choose_threshold
from lightning_duo.cofinetune import OptimizerFn, Recipe, SchedulerFn, SidekickTrainer
from lightning_duo.cost import Cost
from lightning_duo.evaluation import DuoMetrics, Predictions, measure, measure_accepted
from lightning_duo.figures import check_matplotlib, log_figures
from lightning_duo.module import DuoModule
from lightning_duo.pair import Pair
from lightning_duo.sidekick import Sidekick, SidekickSource
from lightning_duo.summary import print_summary
from lightning_duo.temperature import TemperatureFit, check_samples, fit_temperatures

LOGGED = ("base", "base_scaled", "sidekick", "duo")
STATE_VERSION = 2


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

    With a ``target_accuracy`` the confidence from which predictions are accepted is chosen on the
    same samples, logged as ``duo/threshold``, and part of checkpoints and of `module`;
    ``duo/{val|test}_coverage`` and ``duo/{val|test}_selective_accuracy`` say what it accepts.

    With several dataloaders the first validation loader fits; the metrics of further loaders have
    ``/loader_<i>`` behind their names, i = 1, 2, ...

    Args:
        sidekick: A timm name ("resnet34"), "torchvision/<name>", an ``nn.Module``, or a callable
            ``num_classes -> nn.Module``.
        num_classes: K; by default taken from the first logits of the base.
        pretrained: Whether a named sidekick starts from published weights.
        weights: Local weights of a named sidekick (safetensors or a state dict) instead.
        sidekick_transform: From the base's inputs to the sidekick's, on the device, for example
            ``torchvision.transforms.v2.Resize(96)``. By default inputs are resized if the sidekick
            takes one size only, and re-normalised if both models state how they normalise.
        batch_fn: ``batch -> (inputs, targets)``, for batches that are neither a tuple nor a mapping
            with usual keys.
        logits_fn: ``(module, inputs) -> logits (N, K)``, for modules whose step and forward do not
            give the logits.
        probe: Fraction of the training that trains the sidekick's head only.
        optimizer: ``parameters -> Optimizer``; by default AdamW.
        lr_scheduler: ``optimizer -> scheduler``, stepped with the optimizer; by default linear
            warm-up, then cosine.
        target_accuracy: Accuracy that accepted predictions are to reach, in (0, 1]; by default all
            are accepted.
        delta: Probability with which the accepted of new data may miss it; see `select_threshold`.
        figures: Whether to send figures (risk-coverage, reliability, confidence) to the loggers at
            the end of every validation and test; needs matplotlib, and a logger that takes figures
            (TensorBoard, or one with ``log_image``).
        summary: Whether to print a table of what was gained after fit.

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
        target_accuracy: float | None = None,
        delta: float | None = None,
        figures: bool = False,
        summary: bool = True,
    ) -> None:
        super().__init__()
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
        self._target_accuracy, self._delta = target_accuracy, delta
        self._figures, self._summary = figures, summary
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
        self._seen_step = 0
        self._restored = False
        self._collected: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._metrics: dict[int, DuoMetrics] = {}

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
            MisconfigurationException: If no temperatures were fitted yet.
            ValueError: If the base's logits can be computed neither by its forward nor by
                ``logits_fn``.
        """
        if self.calibration is None or self._module is None:
            raise MisconfigurationException(
                "there is no duo yet: no temperatures were fitted; run trainer.fit with validation "
                "data, or trainer.validate"
            )
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
        if stage == "fit":
            # Like the base's optimizers, the sidekick's starts afresh unless a checkpoint says
            # otherwise, which is read after this. For another base it is another sidekick.
            self._training = self._training_state = None
            self.predictions = {}  # of models that are about to change
            if self._module is not None and self._module is not pl_module:
                self._sidekick.forget()
                self.calibration, self.fitted_at_step, self.results = None, -1, {}
        self._module, self._restored = pl_module, False
        if any(
            isinstance(callback, ModelCheckpoint) and callback.save_weights_only
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ):
            rank_zero_warn(
                "DuoCallback: ModelCheckpoint(save_weights_only=True) leaves the sidekick and the "
                "temperatures out of the checkpoint; save them with callback.module.save(path)"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"DuoCallback runs on one device or with DDP, not with "
                f"{type(trainer.strategy).__name__}: the base's weights must be whole on each "
                'process; use Trainer(strategy="ddp")'
            )
        if stage == "fit" and not trainer.enable_validation:
            if trainer.limit_val_batches == 0:
                rank_zero_warn(
                    "DuoCallback: limit_val_batches=0, so no temperatures will be fitted; run "
                    "trainer.validate afterwards"
                )
            else:
                raise MisconfigurationException(
                    "DuoCallback fits its temperatures on validation data, but there is no "
                    "validation: give the Trainer a val_dataloader and the module a "
                    "validation_step"
                )

    def _check_restored(self, trainer: Trainer) -> None:
        """A checkpoint without duo state must not be paired with what is in memory unsaid."""
        if trainer.ckpt_path is None or self._restored:
            return
        what = f"the checkpoint {trainer.ckpt_path} holds no state of DuoCallback"
        if trainer.testing:
            raise MisconfigurationException(
                f"{what}, so there is no sidekick and no temperatures that belong to it; save with "
                "DuoCallback and save_weights_only=False, or refit with trainer.validate first and "
                "test without ckpt_path"
            )
        rank_zero_warn(f"DuoCallback: {what}; the sidekick goes on from what is in memory")

    # ---- training ----

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_restored(trainer)
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._sidekick.num_classes is None:
            self._pair.base.watch(pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            inputs, targets = self._pair.read_batch(batch)
        first = self._training is None
        if self._training is None:
            self._training = self._begin(trainer, pl_module, outputs, inputs, targets)
        # Reading values back from an accelerator stalls it, so later batches rely on the loss.
        look = first or targets.device.type == "cpu"
        targets = check_targets(targets, self._sidekick.num_classes or 0, values=look)
        # The Trainer foresees one step a batch where the module steps its optimizers itself.
        manual = not pl_module.automatic_optimization
        update = manual or trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        loss = self._training.step(
            lambda: self._sidekick.inputs(pl_module, inputs), targets, update=update
        )
        pl_module.log("sidekick/train_nll", loss, prog_bar=True, on_step=True, on_epoch=False)

    def _begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        inputs: Any,
        targets: Tensor,
    ) -> SidekickTrainer:
        num_classes = self._sidekick.num_classes
        if num_classes is None:
            with isolate_rng():
                num_classes = self._pair.base.num_classes(pl_module, outputs, inputs, targets)
            self._pair.base.unwatch()
        model = self._pair.build(trainer, pl_module, num_classes)
        return SidekickTrainer(model, num_classes, self._recipe, trainer, self._training_state)

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
        if self._summary and self.calibration is not None and "val" in self.results:
            shown = {model: self.results["val"][model] for model in LOGGED}
            data = "the validation set (which fitted the temperatures)"
            rank_zero_only(print_summary)(shown, self.calibration, data=data, balance=self.balance)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._pair.base.unwatch()
        self._collected.clear()
        self._metrics.clear()
        self._stop_training()
        if self._sidekick.model is not None:
            self._sidekick.model.to(pl_module.device)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._pair.base.unwatch()
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
        if trainer.validating:
            self._check_restored(trainer)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._pair.base.watch(pl_module)

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
        logits = self._pair.logits(trainer, pl_module, outputs, batch)
        if not trainer.sanity_checking:
            self._collected.setdefault(dataloader_idx, []).append(logits)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.base.unwatch()
        if trainer.sanity_checking:
            return
        trained = self._training or self._training_state
        if self._sidekick.pretrained_only and not trained:
            rank_zero_warn(
                "DuoCallback: the sidekick was not fine-tuned (no fit, no ckpt_path), so its head "
                "is random and the duo is little more than the temperature-scaled base"
            )
        samples = self._gather(loaders=len(trainer.num_val_batches))
        self.predictions = {}  # whatever was tested had other temperatures
        fit = fit_temperatures(*samples[0], reduce=_sum_over_processes(trainer, pl_module))
        self.fitted_at_step = trainer.global_step
        if fit.status == "separable":
            rank_zero_warn(
                "DuoCallback: the duo separates the validation set without error, so no finite "
                "temperatures are best and confidences will be near 1; validate on more samples"
            )
        for index, (base, sidekick, targets) in enumerate(samples):
            metrics = DuoMetrics(base.shape[1], fit)
            metrics.update(base, sidekick, targets)
            predictions = self._gathered(trainer, pl_module, metrics)
            if index == 0:
                asked = self._target_accuracy, self._delta
                with warnings.catch_warnings():
                    if not trainer.is_global_zero:  # one process says what all of them find
                        warnings.simplefilter("ignore")
                    self.calibration = choose_threshold(fit, predictions["duo"], *asked)
            self._log(trainer, pl_module, ("val", index), predictions)
        pl_module.log("duo/temperature_base", fit.temperatures.base)
        pl_module.log("duo/temperature_sidekick", fit.temperatures.sidekick)
        assert self.calibration is not None
        if self.calibration.threshold is not None:
            pl_module.log("duo/threshold", self.calibration.threshold.value)
        self._collected.clear()

    def _gather(self, loaders: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Logits and targets of each loader in this process, which may have got no sample."""
        classes = self._sidekick.num_classes or 1
        empty = (torch.zeros(0, classes), torch.zeros(0, classes), torch.zeros(0).long())
        return [
            (torch.cat(base), torch.cat(sidekick), torch.cat(targets))
            for batches in (self._collected.get(index, [empty]) for index in range(loaders))
            for base, sidekick, targets in [zip(*batches, strict=True)]
        ]

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_restored(trainer)
        if self.fit is None:
            raise MisconfigurationException(
                "DuoCallback cannot test without temperatures: run trainer.fit or trainer.validate "
                "first, or pass trainer.test(ckpt_path=...) a checkpoint saved after a validation"
            )
        classes = self._sidekick.num_classes or 1
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
        self._pair.base.watch(pl_module)

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
        logits = self._pair.logits(trainer, pl_module, outputs, batch)
        check_samples(*logits)
        self._metrics[dataloader_idx].update(*logits)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pair.base.unwatch()
        for index, metrics in sorted(self._metrics.items()):
            predictions = self._gathered(trainer, pl_module, metrics)
            self._log(trainer, pl_module, ("test", index), predictions)

    def _gathered(
        self, trainer: Trainer, pl_module: LightningModule, metrics: DuoMetrics
    ) -> dict[str, Predictions]:
        """Predictions of all processes."""
        if trainer.world_size > 1:  # processes exchange what is on their devices
            metrics = metrics.to(pl_module.device)
        return metrics.predictions()

    def _log(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        measured: tuple[str, int],
        predictions: dict[str, Predictions],
    ) -> None:
        """Log the metrics of a stage's dataloader, and keep them."""
        stage, index = measured
        results = {form: measure(found) for form, found in predictions.items()}
        if self.calibration is not None and self.calibration.threshold is not None:
            results["duo"] |= measure_accepted(predictions["duo"], self.calibration.threshold)
        suffix = f"/loader_{index}" if index else ""
        self.results[stage + suffix], self.predictions[stage + suffix] = results, predictions
        for model in LOGGED:
            for metric, value in results[model].items():
                pl_module.log(f"{model}/{stage}_{metric}{suffix}", value)
        if self._figures and trainer.is_global_zero:
            name = f"duo/{stage}_{{figure}}{suffix}"
            if not log_figures(trainer.loggers, predictions, name, step=trainer.global_step):
                rank_zero_warn(
                    "DuoCallback: figures=True, but no logger of the Trainer takes figures "
                    "(TensorBoardLogger does, and any with log_image)"
                )

    # ---- checkpoints ----

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._sidekick.model is None:
            return {}
        training = self._training.state_dict() if self._training else self._training_state
        return {
            "version": STATE_VERSION,
            "name": self._sidekick.name,
            "num_classes": self._sidekick.num_classes,
            "sidekick": self._sidekick.model.state_dict(),
            "training": training,
            "calibration": self.calibration and self.calibration.state_dict(),
            "fitted_at_step": self.fitted_at_step,
            "step": self._seen_step,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["version"] != STATE_VERSION:
            raise ValueError(
                f"the checkpoint holds duo state of version {state_dict['version']}; this "
                f"lightning_duo reads version {STATE_VERSION}; load it with the version that wrote "
                "it, or without DuoCallback"
            )
        saved = (state_dict["name"], state_dict["num_classes"])
        mine = (self._sidekick.name, self._sidekick.num_classes or saved[1])
        if mine != saved:
            raise ValueError(
                f"the checkpoint's sidekick is {saved[0]!r} with {saved[1]} classes, this "
                f"callback's is {mine[0]!r} with {mine[1]}; make them the same, or load the "
                "checkpoint without DuoCallback"
            )
        # No download: the weights are in the checkpoint.
        model = self._sidekick.build(saved[1], None, pretrained=False)
        model.load_state_dict(state_dict["sidekick"])
        self._training_state = state_dict["training"]
        calibration = state_dict["calibration"]
        self.calibration = calibration and Calibration.from_state_dict(calibration)
        self.predictions = {}
        self.fitted_at_step = state_dict["fitted_at_step"]
        self._training, self._restored = None, True
        if self.calibration is not None:
            asked = self._target_accuracy, self._delta
            if asked != (self.calibration.target_accuracy, self.calibration.delta):
                rank_zero_warn(
                    "DuoCallback: the checkpoint's threshold was chosen for target_accuracy="
                    f"{self.calibration.target_accuracy}, delta={self.calibration.delta}, this "
                    f"callback asks for {asked[0]}, {asked[1]}; refit with trainer.validate"
                )
        if self.calibration is not None and self.fitted_at_step != state_dict["step"]:
            rank_zero_warn(
                f"DuoCallback: the checkpoint is of step {state_dict['step']}, but its "
                f"temperatures were fitted at step {self.fitted_at_step}; refit them with "
                "trainer.validate"
            )
        rank_zero_info(f"DuoCallback: sidekick {saved[0]!r} restored from the checkpoint")


def _sum_over_processes(
    trainer: Trainer, pl_module: LightningModule
) -> Callable[[Tensor], Tensor] | None:
    """What `fit_temperatures` calls to add up its sums; None in a single process."""
    if trainer.world_size == 1:
        return None

    def reduce(sums: Tensor) -> Tensor:
        total = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()

    return reduce

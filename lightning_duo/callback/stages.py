"""Validation and test: from batches to temperatures, metrics and what is logged."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_duo.calibration import choose_threshold
from lightning_duo.callback.run import Record, fingerprints
from lightning_duo.callback.samples import Collected, Processes
from lightning_duo.callback.step import Pair
from lightning_duo.evaluation import (
    HIGHER_IS_BETTER,
    DuoMetrics,
    Predictions,
    measure,
    measure_accepted,
)
from lightning_duo.logits import Logits
from lightning_duo.report import log_figures
from lightning_duo.selective import Threshold
from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures
from lightning_duo.temperature.samples import check_samples

LOGGED = ("base", "base_scaled", "sidekick", "duo")


def stage_name(stage: str, loader: int) -> str:
    """A stage, with a dataloader after the first as Lightning names it."""
    return f"{stage}/dataloader_idx_{loader}" if loader else stage


@dataclass(frozen=True)
class MetricLog:
    """Measures predictions and sends the values, and figures if wanted, to the user's loggers."""

    prefix: str
    """Of every name."""
    figures: bool

    def value(self, processes: Processes, name: str, value: float) -> None:
        """Log a value that all processes have found, as Lightning wants to be told."""
        # Lightning asks for it in any process group, even of one.
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes.module.log(self.prefix + name, value, sync_dist=several, add_dataloader_idx=False)

    def write(
        self,
        processes: Processes,
        stage: tuple[str, str],
        predictions: dict[str, Predictions],
        threshold: Threshold | None,
    ) -> dict[str, dict[str, float]]:
        """Measure and log the predictions of a loader.

        Args:
            processes: The run.
            stage: What stands before and behind a metric's name: ("val", "/dataloader_idx_1").
            predictions: Form -> predictions; see `evaluate`.
            threshold: From which to accept, if one was chosen.

        Returns:
            Form -> metric -> value.
        """
        trainer, (name, suffix) = processes.trainer, stage
        results = {form: measure(found) for form, found in predictions.items()}
        if threshold is not None:
            results["duo"] |= measure_accepted(predictions["duo"], threshold)
        for model in LOGGED:
            for metric, value in results[model].items():
                self.value(processes, f"{model}/{name}_{metric}{suffix}", value)
        if self.figures and trainer.is_global_zero:
            pattern = f"{self.prefix}duo/{name}_{{figure}}{suffix}"
            if not log_figures(trainer.loggers, predictions, pattern, step=trainer.global_step):
                rank_zero_warn(
                    "DuoCallback: figures=True, but no logger of the Trainer takes figures "
                    "(TensorBoardLogger does, and any with log_image)"
                )
        return results


class Evaluator:
    """Fits the temperatures at the end of a validation, and measures validation and test.

    Args:
        pair: Both models.
        record: What is known of the run; it is brought up to date here.
        log: Where values go.
        calibration_loader: Index of the validation dataloader that fits.
        request: Target accuracy and delta of the threshold, each None if there is none.
        me: What to call the callback in messages.
    """

    def __init__(
        self,
        pair: Pair,
        record: Record,
        log: MetricLog,
        *,
        calibration_loader: int,
        request: tuple[float | None, float | None],
        me: str,
    ) -> None:
        self.pair, self.record, self.log = pair, record, log
        self.calibration_loader, self.request, self.me = calibration_loader, request, me
        self._collected = Collected()
        self._metrics: dict[int, DuoMetrics] = {}
        self._weights: list[int | None] = []
        self._said: list[str] = []

    def clear(self) -> None:
        """Forget the samples."""
        self._collected.clear()
        self._metrics.clear()

    def begin_validation(self, trainer: Trainer) -> None:
        """Expect the samples of the Trainer's validation loaders."""
        self._collected.begin(trainer.val_dataloaders)
        self._weights = []

    def before_step(
        self, trainer: Trainer, module: LightningModule, batch: Any, place: tuple[int, int]
    ) -> None:
        """Read a batch that a validation or test step is about to get.

        Args:
            trainer: The Trainer.
            module: The base.
            batch: The batch.
            place: Its number, and that of its dataloader.
        """
        number, loader = place
        if loader in self._collected.unusable:
            return
        with self._leaving_out(trainer, loader):
            self.pair.before_step(module, batch, watch=True, first=number == 0)

    @contextmanager
    def _leaving_out(self, trainer: Trainer, loader: int) -> Iterator[None]:
        """Note what is wrong with the batches of a loader that is not needed, and go on."""
        try:
            yield
        except ValueError as error:
            if loader == (0 if trainer.testing else self.calibration_loader):
                raise
            self.pair.reset()
            self._collected.unusable.setdefault(loader, str(error))

    def add_validation(
        self, trainer: Trainer, module: LightningModule, outputs: Any, loader: int
    ) -> None:
        """Take the batch whose validation step just returned ``outputs``."""
        if loader in self._collected.unusable:
            return
        with self._leaving_out(trainer, loader):
            logits = self.pair.logits(trainer, module, outputs)
        if trainer.sanity_checking or loader in self._collected.unusable:
            return
        self._collected.add(logits, loader)
        if not self._weights:
            # Here and not at the end: callbacks that average weights swap them for the batches.
            self._weights = self._fingerprints(module)

    def _fingerprints(self, module: LightningModule) -> list[int | None]:
        model = self.pair.sidekick.model
        return [] if model is None else fingerprints(module, model)

    def end_validation(self, trainer: Trainer, module: LightningModule) -> None:
        """Fit the temperatures, choose the threshold, measure and log.

        Raises:
            ValueError: If there is nothing to fit, and this is no validation within fit; there a
                warning says so and NaN is logged: the base's training ends with the sidekick only
                where a callback that watches these values wants it so.
        """
        processes = Processes(trainer, module)
        classes = processes.num_classes(self.pair.sidekick.num_classes)
        needed = self.calibration_loader
        loaders = self._measurable(processes, "validation", len(trainer.num_val_batches), needed)
        samples = self._collected.of_loaders(len(trainer.num_val_batches), classes)
        self._collected.clear()
        self.record.unfit()
        fitting = trainer.state.fn == TrainerFn.FITTING
        try:
            chosen = samples[self.calibration_loader]
            fit = fit_temperatures(*chosen, reduce=processes.reduce)
        except ValueError as error:
            if not fitting:
                raise
            # For those that watch these values: Lightning would go on with the last ones, or fail.
            self._log_nothing(processes, loaders)
            rank_zero_warn(
                f"{self.me}: no temperatures can be fitted at step {self.record.step}: {error}. If "
                "it is the sidekick that diverges, give it a smaller learning rate "
                "(optimizer=...) or clip gradients; if the base masks classes, the sidekick must "
                "mask them too"
            )
            return
        self._calibrate(processes, fit, {index: samples[index] for index in loaders}, classes)
        if not fitting:
            self.say()
        elif self.pair.sidekick.model is not None:
            self.record.consider(self.pair.sidekick.model, fit.nll_sidekick)

    def _log_nothing(self, processes: Processes, loaders: list[int]) -> None:
        """NaN for what is logged at a validation, where there are no temperatures."""
        names = [f"duo/temperature_{model}" for model in Temperatures._fields]
        measured = [f"{model}/val_{metric}" for model in LOGGED for metric in HIGHER_IS_BETTER]
        if self.request[0] is not None:
            names.append("duo/threshold")
            measured += ["duo/val_coverage", "duo/val_selective_accuracy"]
        for loader in loaders:
            names += [stage_name(name, loader) for name in measured]
        for name in names:
            self.log.value(processes, name, math.nan)

    def _measurable(self, processes: Processes, stage: str, loaders: int, needed: int) -> list[int]:
        """Loaders with samples, all of which are usable; others than the needed one may lack."""
        found = []
        for index in range(loaders):
            why = self._collected.unusable.get(index)
            if processes.total(int(why is not None)):
                rank_zero_warn(
                    f"{self.me}: {stage} dataloader {index} is not measured: "
                    f"{why or 'another process cannot use its batches'}"
                )
            elif index == needed or processes.total(self._collected.count(index)):
                found.append(index)
        return found

    def _calibrate(
        self, processes: Processes, fit: TemperatureFit, samples: dict[int, Logits], classes: int
    ) -> None:
        """Take the temperatures, and measure the samples of all loaders with them."""
        if fit.status == "separable":
            rank_zero_warn(
                f"{self.me}: the duo separates the validation set without error, so no finite "
                "temperatures are best and confidences will be near 1; validate on more samples"
            )
        found = {}
        for index, logits in samples.items():
            metrics = DuoMetrics(classes, fit)
            metrics.update(*logits)
            found[index] = processes.predictions(metrics)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            calibration = choose_threshold(fit, found[self.calibration_loader], *self.request)
        self._said = [str(warning.message) for warning in said]
        self.record.fit(calibration, self._weights or self._fingerprints(processes.module))
        for index, predictions in found.items():
            self._measure(processes, "val", index, predictions)
        for name, value in fit.temperatures._asdict().items():
            self.log.value(processes, f"duo/temperature_{name}", value)
        if calibration.threshold is not None:
            self.log.value(processes, "duo/threshold", calibration.threshold.value)

    def say(self) -> None:
        """Warn of the threshold that was chosen last; once, not at every validation of a fit."""
        for message in self._said:
            rank_zero_warn(f"{self.me}: {message}")
        self._said = []

    def begin_test(self, trainer: Trainer, module: LightningModule) -> None:
        """Expect the samples of the Trainer's test loaders; temperatures must have been fitted."""
        assert self.record.calibration is not None
        classes = Processes(trainer, module).num_classes(self.pair.sidekick.num_classes)
        self._collected.begin(trainer.test_dataloaders)
        fit = self.record.calibration.fit
        for results in (self.record.results, self.record.predictions):
            for stage in [stage for stage in results if stage.partition("/")[0] == "test"]:
                del results[stage]
        loaders = range(len(trainer.num_test_batches))
        self._metrics = {index: DuoMetrics(classes, fit) for index in loaders}

    def add_test(
        self, trainer: Trainer, module: LightningModule, outputs: Any, loader: int
    ) -> None:
        """Take the batch whose test step just returned ``outputs``."""
        if loader in self._collected.unusable:
            return
        with self._leaving_out(trainer, loader):
            logits = self.pair.logits(trainer, module, outputs)
            check_samples(*logits)
            self._metrics[loader].update(*self._collected.own(logits, loader))

    def end_test(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure and log."""
        processes = Processes(trainer, module)
        for index in self._measurable(processes, "test", len(self._metrics), needed=0):
            if processes.total(self._collected.count(index)):
                predictions = processes.predictions(self._metrics[index])
                self._measure(processes, "test", index, predictions)

    def _measure(
        self,
        processes: Processes,
        stage: str,
        loader: int,
        predictions: dict[str, Predictions],
    ) -> None:
        calibration = self.record.calibration
        threshold = None if calibration is None else calibration.threshold
        name = stage_name(stage, loader)
        place = (stage, name.removeprefix(stage))
        self.record.results[name] = self.log.write(processes, place, predictions, threshold)
        self.record.predictions[name] = predictions

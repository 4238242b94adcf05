"""A validation: it fits the temperatures, chooses the threshold, and measures all forms."""

import math
import warnings

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_duo.calibration import choose_threshold
from lightning_duo.callback.fingerprint import fingerprint
from lightning_duo.callback.fitted import BestSidekick, Fitted
from lightning_duo.callback.found import Found
from lightning_duo.callback.log import stage_name, without
from lightning_duo.callback.run import Run
from lightning_duo.callback.stage import Stage
from lightning_duo.evaluation import DuoMetrics, Tally, single_forms
from lightning_duo.logits import Sample
from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures
from lightning_duo.temperature.samples import check_samples


class Validation(Stage):
    """Collects the samples of a validation, and fits the temperatures at its end."""

    name = "val"
    kind = "validation"
    kept_for = "fit the temperatures and measure the duo; base and sidekick are measured on all"

    def __init__(self, run: Run, trainer: Trainer, module: LightningModule) -> None:
        needed = run.options.calibration_loader
        super().__init__(run, trainer, module, needed)
        self._weights: tuple[int | None, ...] = ()
        run.predictions = {}  # which would take memory beside the new ones, and be outdated soon
        if run.training is not None:
            run.training.sync_buffers()

    def take_best(self) -> None:
        """Pair the base of a checkpoint with the best sidekick of the run."""
        run, best, step = self.run, self.run.best, self.run.global_step
        if best is None or run.sidekick is None:
            return
        run.sidekick.model.load_state_dict(best.weights)
        run.paired = True
        run.messages.info(
            f"the base of step {step if step >= 0 else 'that is not known'} is paired with the "
            f"sidekick of step {best.step}, whose validation loss of {best.nll:.4f} (at its own "
            "best temperature) is its lowest"
        )

    @override
    def take(self, found: Found, loader: int) -> None:
        """Keep the logits of a batch."""
        if self.trainer.sanity_checking:
            return
        self.collected.add(found.logits, loader, items=found.items, part=found.part)
        if not self._weights:
            # Here and not at the end: callbacks that average weights swap them for the batches.
            self._weights = self._fingerprints()

    @override
    def new_tally(self, num_classes: int) -> Tally:
        return Tally(single_forms(), num_classes)

    def _fingerprints(self) -> tuple[int | None, ...]:
        sidekick = self.run.sidekick
        return () if sidekick is None else tuple(map(fingerprint, (self.module, sidekick.model)))

    def fit(self) -> Fitted | None:
        """Fit the temperatures, choose the threshold, measure and log.

        Returns:
            What was fitted; None if nothing could be, within a fit of the base. There a warning
            says so and NaN is logged: the base's training ends with the sidekick only where a
            callback that watches these values wants it so.

        Raises:
            ValueError: If there is nothing to fit, and this is no validation within fit.
        """
        run, processes, loaders = self.run, self.processes, len(self.trainer.num_val_batches)
        classes = processes.num_classes(run.classes)
        measurable = self.measurable(loaders)
        samples = self.collected.of_loaders(loaders, classes)
        self._say_what_is_kept(self.needed)
        if not run.was_trained and not run.options.knows_the_task:
            run.messages.warn(
                "the sidekick was not fine-tuned (no fit, no ckpt_path), so its head is random and "
                "the duo is little more than the temperature-scaled base"
            )
        run.fitted, run.results = None, without(run.results, "val")
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        try:
            fit = fit_temperatures(*samples[self.needed].logits, reduce=processes.reduce)
        except ValueError as error:
            if not fitting:
                raise
            self._give_up(error, {index: samples[index] for index in measurable})
            return None
        found = {
            i: samples[i] for i in measurable if i == self.needed or self._is_usable(i, samples[i])
        }
        samples.clear()
        fitted = self._fitted(fit, found, classes)
        if fitting and run.sidekick is not None:
            if run.best is None or fit.nll_sidekick < run.best.nll:
                run.best = BestSidekick.of(run.sidekick.model, fit.nll_sidekick, run.global_step)
        return fitted

    def _give_up(self, error: ValueError, samples: dict[int, Sample]) -> None:
        """Log NaN and warn, where no temperatures can be fitted."""
        # For those that watch these values: Lightning would go on with the last ones, or fail.
        names = [f"duo/temperature_{model}" for model in Temperatures._fields]
        if self.run.options.target_accuracy is not None:
            names.append("duo/threshold")
        for name in names:
            self.log.value(name, math.nan)
        for loader, sample in samples.items():
            self._log_nothing(loader, sample)
        self.run.messages.warn(
            f"no temperatures can be fitted at step {self.run.global_step}: {error}. If the base "
            "diverges, look at its learning rate and inputs; if the sidekick does, give it a "
            "smaller learning rate (optimizer=...) or clip gradients; if the base masks "
            "classes, the sidekick must mask them too"
        )

    def _log_nothing(self, loader: int, sample: Sample) -> None:
        """NaN for what is measured of a loader."""
        for name in self.run.options.measured_names(several=sample.items is not None):
            self.log.value(stage_name(name, loader), math.nan)

    def _is_usable(self, loader: int, sample: Sample) -> bool:
        """Whether the samples of a loader that did not fit can be measured; else NaN is logged."""
        try:
            check_samples(*sample.logits, self.processes.reduce or (lambda sums: sums))
        except ValueError as error:
            self.run.messages.warn(f"validation dataloader {loader} is not measured: {error}")
            self._log_nothing(loader, sample)
            return False
        return True

    def _fitted(self, fit: TemperatureFit, samples: dict[int, Sample], classes: int) -> Fitted:
        """Take the temperatures, and measure the samples of all loaders with them."""
        run = self.run
        if fit.status == "separable":
            run.messages.warn(
                "the duo separates the validation set without error, so no finite temperatures "
                "are best and confidences will be near 1; validate on more samples"
            )
        found = {
            index: self.judged(index, DuoMetrics(classes, fit), samples) for index in list(samples)
        }
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            asked = run.options.target_accuracy, run.options.delta
            predictions, task = found[self.needed].predictions, self.run.deployed_task
            calibration = choose_threshold(fit, predictions, *asked, task=task)
        self.log.measure(found, calibration.threshold)
        for name, value in fit.temperatures._asdict().items():
            self.log.value(f"duo/temperature_{name}", value)
        if calibration.threshold is not None:
            self.log.value("duo/threshold", calibration.threshold.value)
        notes = tuple(str(warning.message) for warning in said)
        weights = self._weights or self._fingerprints()
        return Fitted(calibration, run.global_step, weights, notes)

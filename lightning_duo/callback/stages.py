"""Validation and test, from start to end: what is collected, fitted, measured and logged."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_duo.calibration import choose_threshold
from lightning_duo.callback.fingerprint import fingerprint
from lightning_duo.callback.fitted import BestSidekick, Fitted
from lightning_duo.callback.found import (
    Found,
    check_independent,
    check_no_softmax,
    one_sample,
    together,
)
from lightning_duo.callback.kept import Sample
from lightning_duo.callback.learnt import Stage as StepOf
from lightning_duo.callback.log import MetricLog, stage_name, without
from lightning_duo.callback.outputs import run_sidekick, sidekick_logits
from lightning_duo.callback.processes import Processes, agree
from lightning_duo.callback.reading import Example
from lightning_duo.callback.run import Run
from lightning_duo.callback.samples import Collected, running_loaders
from lightning_duo.callback.step import Step
from lightning_duo.evaluation import (
    DuoMetrics,
)
from lightning_duo.isolation import evaluating, own_stream
from lightning_duo.logits import Logits
from lightning_duo.nested import Path
from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures
from lightning_duo.temperature.samples import check_samples


class Stage(ABC):
    """A validation or a test while it runs: the batches that are seen, and their logits.

    Args:
        run: The run.
        trainer: The user's Trainer.
        module: The base.
    """

    name: str
    """What stands before the names of metrics."""
    kind: StepOf
    """Which steps it sees."""

    def __init__(self, run: Run, trainer: Trainer, module: LightningModule, needed: int) -> None:
        self.run, self.trainer, self.module, self.needed = run, trainer, module, needed
        self.processes = Processes(trainer, module)
        memory = run.options.fit_memory
        self.collected = Collected(running_loaders(trainer), self.processes, memory=memory)
        self.log = MetricLog(run, trainer, module, self.name)
        self.step: Step | None = None
        self._seen: set[int] = set()  # loaders of which a batch was seen

    def start(self, batch: Any, number: int, loader: int) -> None:
        """Look at a batch that a step is about to get.

        Args:
            batch: The batch.
            number: Its number.
            loader: That of its dataloader.
        """
        self.finish()
        if loader in self.collected.unusable:
            return
        fresh = loader not in self._seen
        self._seen.add(loader)
        with self._leaving_out(loader):
            self.step = self.run.watch(self.trainer, batch, self.kind, fresh=fresh)

    def end(self, outputs: Any, loader: int) -> None:
        """Take the batch whose step just returned ``outputs``."""
        step = self.step
        self.finish()
        if step is not None:
            with self._leaving_out(loader):
                for found in self._found(step, outputs, loader):
                    self.take(found, loader)

    @abstractmethod
    def take(self, found: "Found", loader: int) -> None:
        """Do with the logits of a batch what this stage does."""

    def finish(self) -> None:
        """Let go of a step, whether it ended or not."""
        if self.step is not None:
            self.step.finish()
        self.step = None

    @contextmanager
    def _leaving_out(self, loader: int) -> Iterator[None]:
        """Note what is wrong with the batches of a loader that is not needed, and go on."""
        try:
            yield
        except ValueError as error:
            if loader == self.needed and self.trainer.world_size == 1:
                raise
            self.finish()  # with several processes, all raise at the end of the stage
            self.collected.unusable.setdefault(loader, str(error))

    def check(self) -> None:
        """Raise ValueError in every process, if one cannot use the loader that is needed."""
        if self.trainer.world_size > 1:
            agree(self.collected.unusable.get(self.needed))

    def _found(self, step: Step, outputs: Any, loader: int) -> list["Found"]:
        """What both models say of a batch, on the CPU: together for each of its loaders."""
        run, context = self.run, self.trainer.precision_plugin.val_step_context
        with own_stream(self.module.device):
            with context():
                examples = step.examples(outputs, classes=run.num_classes)
            every = [self._both(example) for example in examples]
        parts: dict[Path, list[Found]] = {}
        for found in every:
            part = found.part if self.collected.has_part(loader, found.part) else ()
            parts.setdefault(part, []).append(found)
        return [together(several, part) for part, several in parts.items()]

    def _both(self, example: Example) -> "Found":
        run, reading = self.run, self.run.learnt[self.kind].reading
        base = example.logits
        assert reading is not None
        assert base is not None
        task = reading.task
        rows = task.rows(base, example.targets, "base")
        check_no_softmax(run.messages, rows, task)
        sidekick = run.ready_sidekick(self.trainer, task.outputs(base), example)
        # A transform may have modes too.
        context = self.trainer.precision_plugin.val_step_context
        with evaluating(sidekick.deployable()), context():
            output = run_sidekick(
                sidekick.model, sidekick.call(example.call, reading.part_of(self.module))
            )
        logits = sidekick_logits(output, base, reading.logits_at, task)
        sidekick.look(logits, task)
        theirs = run.with_member(task).rows(logits, example.targets, "sidekick")
        if not reading.whole:  # else a part of the base is not all that it costs
            run.example = one_sample(example.call, len(base)) or run.example
        assert rows.targets is not None
        if rows.items is not None or example.items is not None:
            check_independent(run.options.delta)
        items = rows.items
        if example.items is not None:
            items = example.items if items is None else example.items[items]
        found = Logits(rows.logits.float(), theirs.logits.float(), rows.targets)
        return Found(
            Logits(*(part.cpu() for part in found)),
            None if items is None else items.cpu(),
            example.part,
        )

    def _say_what_is_kept(self, loader: int) -> None:
        seen = self.collected.seen(loader)
        rows, kept = (self.processes.total(number) for number in seen)
        if kept < rows:
            self.run.messages.info(
                f"{kept:,} of {rows:,} decisions are measured, as many as fit_memory="
                f"{self.run.options.fit_memory:,} bytes hold; every one had the same chance",
                once=f"{kept} of {rows}",
            )

    def measurable(self, loaders: int) -> list[int]:
        """Loaders with samples, all of which are usable; others than the needed one may lack."""
        found = []
        for note in self.collected.notes():
            self.run.messages.warn(note, once=note)
        stage = {"val": "validation"}.get(self.name, self.name)
        for index in range(loaders):
            why = self.collected.unusable.get(index)
            if self.processes.total(int(why is not None)):
                self.run.messages.warn(
                    f"{stage} dataloader {index} is not measured: "
                    f"{why or 'another process cannot use its batches'}"
                )
            elif index == self.needed or self.processes.total(self.collected.count(index)):
                found.append(index)
        return found


class Validation(Stage):
    """Collects the samples of a validation, and fits the temperatures at its end."""

    name = "val"
    kind = "validation"

    def __init__(self, run: Run, trainer: Trainer, module: LightningModule) -> None:
        needed = run.options.calibration_loader
        super().__init__(run, trainer, module, needed)
        self._weights: tuple[int | None, ...] = ()
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
        run.fitted, run.predictions, run.results = None, {}, without(run.results, "val")
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        try:
            fit = fit_temperatures(*samples[self.needed].logits, reduce=processes.reduce)
        except ValueError as error:
            if not fitting:
                raise
            # For those that watch these values: Lightning would go on with the last ones, or fail.
            self._log_nothing(measurable)
            run.messages.warn(
                f"no temperatures can be fitted at step {run.global_step}: {error}. If the base "
                "diverges, look at its learning rate and inputs; if the sidekick does, give it a "
                "smaller learning rate (optimizer=...) or clip gradients; if the base masks "
                "classes, the sidekick must mask them too"
            )
            return None
        found = {
            i: samples[i]
            for i in measurable
            if i == self.needed or self._is_usable(i, samples[i].logits)
        }
        samples.clear()
        fitted = self._fitted(fit, found, classes)
        if fitting and run.sidekick is not None:
            if run.best is None or fit.nll_sidekick < run.best.nll:
                run.best = BestSidekick.of(run.sidekick.model, fit.nll_sidekick, run.global_step)
        return fitted

    def _is_usable(self, loader: int, logits: Logits) -> bool:
        """Whether the samples of a loader that did not fit can be measured; else NaN is logged."""
        try:
            check_samples(*logits, self.processes.reduce or (lambda sums: sums))
        except ValueError as error:
            self.run.messages.warn(f"validation dataloader {loader} is not measured: {error}")
            for name in self.run.options.measured_names():
                self.log.value(stage_name(name, loader), math.nan)
            return False
        return True

    def _log_nothing(self, loaders: list[int]) -> None:
        """NaN for what is logged at a validation, where there are no temperatures."""
        options = self.run.options
        names = [f"duo/temperature_{model}" for model in Temperatures._fields]
        if options.target_accuracy is not None:
            names.append("duo/threshold")
        measured = options.measured_names()
        names += [stage_name(name, loader) for loader in loaders for name in measured]
        for name in names:
            self.log.value(name, math.nan)

    def _fitted(self, fit: TemperatureFit, samples: dict[int, Sample], classes: int) -> Fitted:
        """Take the temperatures, and measure the samples of all loaders with them.

        They are taken out one by one: there may be no memory for them and what they are told of.
        """
        run = self.run
        if fit.status == "separable":
            run.messages.warn(
                "the duo separates the validation set without error, so no finite temperatures "
                "are best and confidences will be near 1; validate on more samples"
            )
        found = {}
        for index in list(samples):
            metrics = DuoMetrics(classes, fit)
            logits, items = samples.pop(index)
            metrics.update(*logits, items=items)
            del logits, items
            found[index] = self.processes.predictions(metrics)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            asked = run.options.target_accuracy, run.options.delta
            calibration = choose_threshold(fit, found[self.needed], *asked)
        self.log.measure(found, calibration.threshold)
        for name, value in fit.temperatures._asdict().items():
            self.log.value(f"duo/temperature_{name}", value)
        if calibration.threshold is not None:
            self.log.value("duo/threshold", calibration.threshold.value)
        notes = tuple(str(warning.message) for warning in said)
        weights = self._weights or self._fingerprints()
        return Fitted(calibration, run.global_step, weights, notes)


class Test(Stage):
    """Measures the samples of a test with the temperatures that were fitted before."""

    name = "test"
    kind = "test"

    def __init__(self, run: Run, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(run, trainer, module, needed=0)
        if run.fitted is None:
            raise MisconfigurationException(
                "DuoCallback cannot test without temperatures: run trainer.fit or trainer.validate "
                "first, or pass trainer.test(ckpt_path=...) a checkpoint saved after a validation"
            )
        calibration = run.fitted.calibration
        self.threshold = calibration.threshold
        classes = self.processes.num_classes(run.classes)
        run.results = without(run.results, self.name)
        run.predictions = without(run.predictions, self.name)
        loaders = range(len(trainer.num_test_batches))
        self.metrics = {index: DuoMetrics(classes, calibration.fit) for index in loaders}

    @override
    def take(self, found: Found, loader: int) -> None:
        """Measure a batch."""
        check_samples(*found.logits)
        if found.items is not None:
            self.collected.add(found.logits, loader, items=found.items, part=found.part)
        else:
            own = self.collected.own(found.logits, loader, part=found.part)
            self.metrics[loader].update(*own.logits)

    def report(self) -> None:
        """Measure and log."""
        found = {}
        measurable, classes = self.measurable(len(self.metrics)), self.metrics[0].num_classes
        samples = self.collected.of_loaders(len(self.metrics), classes)
        for index in measurable:
            if not self.processes.total(self.collected.count(index)):
                continue
            if self.processes.total(self.collected.seen(index).kept):
                sample = samples[index]
                self.metrics[index].update(*sample.logits, items=sample.items)
                self._say_what_is_kept(index)
            found[index] = self.processes.predictions(self.metrics[index])
        self.log.measure(found, self.threshold)

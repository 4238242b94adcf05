"""A test: it measures all forms with the temperatures that were fitted before."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_duo.callback.found import Found
from lightning_duo.callback.log import without
from lightning_duo.callback.run import Run
from lightning_duo.callback.stage import Stage
from lightning_duo.evaluation import DuoMetrics, Tally, duo_forms
from lightning_duo.temperature.samples import check_samples


class Test(Stage):
    """Measures the samples of a test with the temperatures that were fitted before."""

    name = "test"
    kind = "test"
    kept_for = "are kept for reports; the metrics are of all"

    def __init__(self, run: Run, trainer: Trainer, module: LightningModule) -> None:
        if run.fitted is None:
            raise MisconfigurationException(
                "DuoCallback cannot test without temperatures: run trainer.fit or trainer.validate "
                "first, or pass trainer.test(ckpt_path=...) a checkpoint saved after a validation"
            )
        super().__init__(run, trainer, module, needed=0)
        self.calibration = calibration = run.fitted.calibration
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

    @override
    def new_tally(self, num_classes: int) -> Tally:
        fit, threshold = self.calibration.fit, self.calibration.threshold
        return Tally(duo_forms(fit), num_classes, threshold)

    def report(self) -> None:
        """Measure and log."""
        found = {}
        measurable, classes = self.measurable(len(self.metrics)), self.metrics[0].num_classes
        samples = dict(enumerate(self.collected.of_loaders(len(self.metrics), classes)))
        for index in measurable:
            if self.processes.total(self.collected.count(index)):
                self._say_what_is_kept(index)
                found[index] = self.judged(index, self.metrics[index], samples)
        self.log.measure(found, self.calibration.threshold)

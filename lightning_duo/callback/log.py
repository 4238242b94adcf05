"""Where metrics are logged: measured, named, sent to the loggers, kept in the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_duo.callback.options import FORMS
from lightning_duo.callback.run import Run
from lightning_duo.evaluation import MEASURES, Predictions, measure, measure_accepted
from lightning_duo.report import MEASURED, SEEN, log_figures
from lightning_duo.selective import Threshold

_T = TypeVar("_T")


def stage_name(stage: str, loader: int) -> str:
    """A stage, with a dataloader after the first as Lightning names it."""
    return f"{stage}/dataloader_idx_{loader}" if loader else stage


def without(kept: dict[str, _T], stage: str) -> dict[str, _T]:
    """What is kept of all stages but this one and its further dataloaders."""
    return {name: found for name, found in kept.items() if name.partition("/")[0] != stage}


class Judged(NamedTuple):
    """What the forms say of the decisions of a loader."""

    predictions: dict[str, Predictions]
    """Of those that are kept."""
    seen: int
    """How many there are."""
    of_all: Mapping[str, Mapping[str, float]]
    """Form -> metric -> value of what is measured on all of them, where only a sample is kept."""

    def results(self, threshold: Threshold | None) -> dict[str, dict[str, float]]:
        """Form -> metric -> value; of a sample also of how many decisions out of how many."""
        results = {form: measure(predicted) for form, predicted in self.predictions.items()}
        if threshold is not None:
            results["duo"] |= measure_accepted(self.predictions["duo"], threshold)
        kept = len(self.predictions["duo"].targets)
        if kept < self.seen:
            for form, row in results.items():
                whole = self.of_all.get(form)
                row |= whole or {}
                row |= {MEASURED: kept if whole is None else self.seen, SEEN: self.seen}
        return results


@dataclass(frozen=True)
class MetricLog:
    """Measures what the forms say at the end of a stage, and tells the user's loggers."""

    run: Run
    trainer: Trainer
    module: LightningModule
    stage: str
    """What stands before the names of metrics: "val" or "test"."""

    def value(self, name: str, value: float) -> None:
        """Log a value that all processes have found, as Lightning wants to be told."""
        # Lightning asks for it in any process group, even of one.
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        name = self.run.options.prefix + name
        self.module.log(name, value, sync_dist=several, add_dataloader_idx=False)

    def measure(self, judged: Mapping[int, Judged], threshold: Threshold | None) -> None:
        """Measure and log what all forms say of each loader, and keep it in the run."""
        run = self.run
        hidden = {*MEASURES, MEASURED, SEEN} - set(run.options.metrics)
        for loader, of_loader in judged.items():
            found, results = of_loader.predictions, of_loader.results(threshold)
            stage = stage_name(self.stage, loader)
            suffix = stage.removeprefix(self.stage)
            for form in FORMS:
                for metric in [metric for metric in results[form] if metric not in hidden]:
                    self.value(f"{form}/{self.stage}_{metric}{suffix}", results[form][metric])
            if run.options.figures and self.trainer.is_global_zero:
                self._draw(found, suffix)
            run.results = {**run.results, stage: results}
            run.predictions = {**run.predictions, stage: found}

    def _draw(self, predictions: dict[str, Predictions], suffix: str) -> None:
        pattern = f"{self.run.options.prefix}duo/{self.stage}_{{figure}}{suffix}"
        trainer = self.trainer
        if not log_figures(trainer.loggers, predictions, pattern, step=trainer.global_step):
            self.run.messages.warn(
                "figures=True, but no logger of the Trainer takes figures (TensorBoardLogger "
                "does, and any with log_image)",
                once="no logger for figures",
            )

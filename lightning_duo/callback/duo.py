"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_duo.base import LogitsFn
from lightning_duo.batch import BatchFn
from lightning_duo.calibration import Calibration
from lightning_duo.callback.deploy import described, duo_of, modes_of, report_of
from lightning_duo.callback.fitted import BestSidekick
from lightning_duo.callback.hooks import Hooks
from lightning_duo.callback.options import (
    METRICS,
    MetricNames,
    OptimizerFn,
    Options,
    SchedulerFn,
)
from lightning_duo.callback.training import Progress
from lightning_duo.cost import Cost
from lightning_duo.evaluation import Predictions
from lightning_duo.logits import MEMORY
from lightning_duo.module import DuoModule
from lightning_duo.tasks import Task
from lightning_duo.temperature import TemperatureFit
from lightning_duo.zoo import SidekickSource


class DuoCallback(Hooks):
    """Fine-tunes a small sidekick beside your model and makes the two a calibrated duo.

    During fit the sidekick learns from the batches your model sees. At the end of every
    validation the two temperatures are fitted to the validation set, and metrics are logged as
    ``{base|base_scaled|sidekick|duo}/{val|test}_{metric}`` with ``duo/temperature_base`` and
    ``duo/temperature_sidekick``; the val metrics of the fitted forms are thus measured on the set
    that fitted two numbers. `Trainer.test` evaluates with the fitted temperatures and never refits.
    Your module, its optimizer and its random numbers are left as they would be without the
    callback.

    A fit goes on with the sidekick of the last one if your module is, bit for bit, as this callback
    left it, or if it resumes a checkpoint. Any other fit, such as the next fold of a
    cross-validation, trains a new sidekick.

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
            ``num_classes -> nn.Module``. A module is copied, and the copy is trained; `sidekick`
            is the trained one.
        num_classes: K; by default taken from the first logits of the base.
        pretrained: Whether a named sidekick starts from published weights.
        weights: Local weights of a named sidekick (safetensors or a state dict) instead.
        sidekick_transform: From the base's inputs to the sidekick's, on the device, for example
            ``torchvision.transforms.v2.Resize(96)``. By default inputs are resized if the sidekick
            takes one size only, and re-normalised if both models state how they normalise.
        batch_fn: ``batch -> (inputs, targets)``, where inputs and targets cannot be seen from the
            step, or others are meant. It is given the batch as the step will get it, before it.
        logits_fn: ``(module, inputs) -> logits``, where the logits cannot be seen from the step, or
            others are meant. To be named in a file of LightningCLI, a function is annotated
            ``-> torch.Tensor``.
        task: `tasks.Classes` or `tasks.Labels`, where the logits' shape leaves a doubt beside
            ``batch_fn`` or ``logits_fn``.
        head: Of a module with several heads the one that is meant: the name of the submodule that
            gives its logits, or their place in the output; by default that of the first loss.
        probe: Fraction of the training that trains the sidekick's head only.
        optimizer: ``parameters -> Optimizer``; by default AdamW.
        lr_scheduler: ``optimizer -> scheduler``, stepped with the optimizer; by default linear
            warm-up, then cosine.
        calibration_loader: Index of the validation dataloader that fits the temperatures and
            chooses the threshold, where there are several.
        target_accuracy: Accuracy that accepted predictions are to reach, in (0, 1]; by default all
            are accepted.
        delta: Probability with which the accepted of new data may miss it; see `select_threshold`.
        metrics: Which metrics to log: names of `evaluation.MEASURES`, or "all"; `results` holds all
            in any case.
        fit_memory: Bytes for what a validation or test keeps of the logits and of what is said of
            them, over all processes. Where there are more, as of the pixels of many images, a
            random sample is kept.
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
        task: Task | None = None,
        head: str | None = None,
        probe: float = 0.3,
        optimizer: OptimizerFn | None = None,
        lr_scheduler: SchedulerFn | None = None,
        calibration_loader: int = 0,
        target_accuracy: float | None = None,
        delta: float | None = None,
        metrics: MetricNames = METRICS,
        fit_memory: int = MEMORY,
        figures: bool = False,
        summary: bool = True,
        name: str | None = None,
    ) -> None:
        options = Options(
            sidekick=sidekick,
            num_classes=num_classes,
            pretrained=pretrained,
            weights=weights,
            sidekick_transform=sidekick_transform,
            batch_fn=batch_fn,
            logits_fn=logits_fn,
            task=task,
            head=head,
            probe=probe,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            calibration_loader=calibration_loader,
            target_accuracy=target_accuracy,
            delta=delta,
            metrics=metrics,
            fit_memory=fit_memory,
            figures=figures,
            summary=summary,
            name=name,
        )
        super().__init__(options)

    def __repr__(self) -> str:
        return f"DuoCallback({described(self._run)})"

    @property
    @override
    def state_key(self) -> str:
        name = self.options.name
        return super().state_key if name is None else self._generate_state_key(name=name)

    # ---- what is known ----

    @property
    def sidekick(self) -> nn.Module | None:
        """The sidekick that is trained; None before it is built."""
        return None if self._run.sidekick is None else self._run.sidekick.model

    @property
    def progress(self) -> Progress | None:
        """How far the sidekick's training is, or was when fit ended; None before fit."""
        training = self._run.training
        return self._run.progress if training is None else training.progress

    @property
    def best(self) -> BestSidekick | None:
        """The sidekick of the validation where its loss was lowest; None before the first."""
        return self._run.best

    @property
    def calibration(self) -> Calibration | None:
        """Temperatures and threshold of the last validation; None before the first."""
        return None if self._run.fitted is None else self._run.fitted.calibration

    @property
    def fit(self) -> TemperatureFit | None:
        """The last temperature fit; None before the first validation."""
        return None if self.calibration is None else self.calibration.fit

    @property
    def fitted_at_step(self) -> int:
        """The Trainer's global step at that fit; -1 if there is none, or it is not known."""
        return -1 if self._run.fitted is None else self._run.fitted.step

    @property
    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Stage ("val", "test") -> model -> metric -> value, of the last run; see `DuoMetrics`.

        Of a further dataloader the stage is "val/dataloader_idx_1", say. Where only a sample of the
        decisions is kept, each model has two entries more: on how many decisions it was "measured",
        and how many were "seen".
        """
        return self._run.results

    @property
    def predictions(self) -> dict[str, dict[str, Predictions]]:
        """Stage -> form -> what it said of the samples of the last run; what `results` measure."""
        return self._run.predictions

    @property
    def cost(self) -> Cost | None:
        """FLOPs and parameters of both models, known after fit."""
        return self._run.cost

    @property
    def balance(self) -> float | None:
        """FLOPs of the sidekick over those of the base, known after fit."""
        return None if self.cost is None else self.cost.balance

    @property
    def module(self) -> DuoModule:
        """The duo as it is now: a deep copy in eval mode, which later training leaves alone.

        `duo` shares the weights instead.

        Raises:
            MisconfigurationException: If no temperatures were fitted yet, or each process holds a
                shard of the base only.
            ValueError: If the base's logits can be computed neither by its forward nor by
                ``logits_fn``.
        """
        return duo_of(self._run)

    def duo(self, *, copy: bool = True) -> DuoModule:
        """The duo as it is now, as `module` gives it, or with the weights that are there.

        Args:
            copy: Whether the duo has weights of its own. Without them it takes next to no memory,
                but it is your module and the sidekick: they are put in eval mode till the next
                fit with this callback, training or converting (``.half()``) either changes both,
                and the duo is right only as long as they are in eval mode.

        Raises:
            As `module` does.
        """
        if not copy:
            self._modes = self._modes or modes_of(self._run)
        return duo_of(self._run, copy=copy)

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
        return report_of(self._run, path, stage, resamples)

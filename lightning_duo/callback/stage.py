"""A stage: a validation or a test, from the start of an epoch to its end."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_duo.callback.found import Found, both, together
from lightning_duo.callback.learnt import Stage as StepOf
from lightning_duo.callback.log import Judged, MetricLog
from lightning_duo.callback.processes import Processes, agree
from lightning_duo.callback.run import Run
from lightning_duo.callback.samples import Collected, running_loaders
from lightning_duo.callback.step import Step
from lightning_duo.evaluation import DuoMetrics, Tally
from lightning_duo.isolation import own_stream
from lightning_duo.logits import Sample
from lightning_duo.nested import Path


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
    kept_for: str
    """What a sample is for, where not all decisions are kept."""

    def __init__(self, run: Run, trainer: Trainer, module: LightningModule, needed: int) -> None:
        self.run, self.trainer, self.module, self.needed = run, trainer, module, needed
        self.processes = Processes(trainer, module)
        memory = run.options.fit_memory
        self.collected = Collected(
            running_loaders(trainer), self.processes, memory=memory, new_tally=self.new_tally
        )
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
    def take(self, found: Found, loader: int) -> None:
        """Do with the logits of a batch what this stage does."""

    @abstractmethod
    def new_tally(self, num_classes: int) -> Tally:
        """A tally of the forms that can be measured before the stage ends."""

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

    def _found(self, step: Step, outputs: Any, loader: int) -> list[Found]:
        """What both models say of a batch, on the CPU: together for each of its loaders."""
        run, context = self.run, self.trainer.precision_plugin.val_step_context
        with own_stream(self.module.device):
            with context():
                examples = step.examples(outputs, classes=run.num_classes)
            reading = run.learnt[self.kind].reading
            every = [both(run, self.trainer, reading, x) for x in examples] if reading else []
        parts: dict[Path, list[Found]] = {}
        for found in every:
            part = found.part if self.collected.has_part(loader, found.part) else ()
            parts.setdefault(part, []).append(found)
        return [together(several, part) for part, several in parts.items()]

    def judged(self, loader: int, metrics: DuoMetrics, samples: dict[int, Sample]) -> Judged:
        """Judge the sample of a loader, beside what the metrics have already.

        It is taken out of the samples and let go of: there may be no memory for it and what is said
        of it.
        """
        logits, items, tally = samples.pop(loader)
        if self.processes.total(len(logits.targets)):
            metrics.update(*logits, items=items)
        del logits
        predictions = self.processes.predictions(metrics)
        seen, kept = self.processes.total(self.collected.count(loader)), predictions["duo"].targets
        of_all: dict[str, dict[str, float]] = {}
        if len(kept) < seen and tally is not None:
            reduce = self.processes.reduce or (lambda sums: sums)
            of_all = tally.compute(several=items is not None, reduce=reduce)
        return Judged(predictions, seen, of_all)

    def _say_what_is_kept(self, loader: int) -> None:
        rows, kept = (self.processes.total(number) for number in self.collected.seen(loader))
        if 0 < kept < rows:
            self.run.messages.info(
                f"{kept:,} of {rows:,} decisions {self.kept_for}. They are as many as fit_memory="
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

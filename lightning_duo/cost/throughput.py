"""What a duo costs beside its base alone, measured: throughput, latency, overhead."""

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_duo.base import Call, logits_in
from lightning_duo.cost.memory import Batch, batch_of, device_of, largest_batch
from lightning_duo.cost.timing import environment, interleave
from lightning_duo.export import export_duo
from lightning_duo.module import DuoModule
from lightning_duo.nested import Path
from lightning_duo.tasks import Classes, Task

ENSEMBLE = "2 bases"
COMPILED = ", compiled"
EXPORTED = {"program": "duo, exported", "aoti": "duo, AOTInductor"}


class Ensemble(nn.Module):
    """Two bases that predict together: the mean of their probabilities, and its maximum.

    Source: Lakshminarayanan, Pritzel and Blundell 2017, with two members.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        task: Task = Classes(),  # noqa: B008 (it is frozen)
        logits_at: Path = (),
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.task, self.logits_at = task, logits_at

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Probabilities, prediction and confidence, in the shapes of `DuoOutput`."""
        outputs = (model(*args, **kwargs) for model in (self.first, self.second))
        first, second = (logits_in(output, self.logits_at) for output in outputs)
        if first is None or second is None:
            raise ValueError("both members must return logits")
        one, other = (self.task.rows(logits).logits for logits in (first, second))
        probs = (one.float().softmax(1) + other.float().softmax(1)) / 2
        confidence, prediction = probs.max(1)
        return tuple(self.task.back(part, first) for part in (probs, prediction, confidence))


def largest_batch_of_pair(
    base: nn.Module,
    sidekick: nn.Module,
    sample: Any,
    *,
    task: Task = Classes(),  # noqa: B008 (it is frozen)
    logits_at: Path = (),
) -> Batch:
    """The batch to measure a pair with, as `largest_batch` finds it.

    On CUDA the ensemble of two bases must fit, beside what else is measured. On the CPU a forward
    of the duo takes at most a second.

    Args:
        base: The base.
        sidekick: The sidekick.
        sample: An input of batch one, or a `Call` of several, on their device.
        task: As of `DuoModule`.
        logits_at: As of `DuoModule`.

    Raises:
        RuntimeError: If not even one sample fits.
    """
    duo = _duo(base, sidekick, sample, task, logits_at)
    if device_of(sample).type != "cuda":
        return largest_batch(duo, sample, seconds=1.0)
    pair = _two_of(duo)
    return largest_batch(duo if isinstance(pair, str) else pair, sample)


def _duo(
    base: nn.Module, sidekick: nn.Module, sample: Any, task: Task, logits_at: Path
) -> DuoModule:
    duo = DuoModule(base, sidekick, (1.0, 1.0), task=task, logits_at=logits_at)
    return duo.eval().to(device_of(sample))


def _two_of(duo: DuoModule) -> Ensemble | str:
    """The ensemble of a duo's base and its copy, or why it cannot be copied."""
    try:
        return Ensemble(duo.base, copy.deepcopy(duo.base), duo.task, duo.logits_at).eval()
    except Exception as error:  # of whatever a user's module holds, such as a lock
        return f"the base cannot be copied: {_reason(error)}"


def measure_throughput(
    base: nn.Module,
    sidekick: nn.Module,
    sample: Any,
    batches: Sequence[int],
    *,
    task: Task = Classes(),  # noqa: B008 (it is frozen)
    logits_at: Path = (),
    compiled: bool = True,
    exported: Iterable[str] = tuple(EXPORTED),
    repeats: int = 10,
    budget: float | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Time base, sidekick, duo and two bases side by side, as they are, compiled and exported.

    What is exported is the duo.

    All run in inference mode with the same inputs; for each batch all are in one interleaved
    measurement. The duo is `DuoModule` with its head, threshold and all; ``2 bases`` is the deep
    ensemble of two members that a user would otherwise run.

    Args:
        base: The base, in the precision and on the device to measure.
        sidekick: The sidekick, likewise; weights may be random.
        sample: An input of batch one, or a `Call` of several, likewise.
        batches: Batch sizes to measure.
        task: As of `DuoModule`.
        logits_at: As of `DuoModule`.
        compiled: Also measure all of them under `torch.compile`.
        exported: Formats of `export_duo` to measure the duo in: ``program``, ``aoti``.
        repeats: Turns of each measurement.
        budget: Seconds that the turns of one batch should take; see `interleave`.
        say: Called with what is being done, which takes minutes where it compiles.

    Returns:
        One row for each batch, method and reference (``base``, or ``base + sidekick`` for the duo):
        those of `Timing.row` with ``batch``, ``images_per_s`` and what `environment` says. Of what
        cannot be compiled or exported here, a row with ``batch``, ``method`` and the reason as
        ``not_measured``.

    Raises:
        RuntimeError: If a model cannot run the sample.
        ValueError: If a format is none of those.

    Source: Asymmetric Duos, Sec. 3.2 and App. B.
    """
    exported = tuple(exported)
    if unknown := set(exported) - set(EXPORTED):
        raise ValueError(f"exported formats to measure are {set(EXPORTED)}, got {unknown}")
    duo, device = _duo(base, sidekick, sample, task, logits_at), device_of(sample)
    eager: dict[str, Callable[..., Any]] = {"base": base, "sidekick": sidekick, "duo": duo}
    pair = _two_of(duo)
    cannot: dict[str, str] = {}
    if isinstance(pair, str):
        cannot[ENSEMBLE] = pair
    else:
        eager[ENSEMBLE] = pair
    rows: list[dict[str, Any]] = []
    with _exported(duo, sample, exported, say) as (files, not_exported), torch.inference_mode():
        for batch in batches:
            inputs = batch_of(sample, batch)
            models, failed = dict(eager), cannot | not_exported
            if compiled:
                say(f"batch {batch}: compiling")
                faster, not_compiled = _compiled(eager, inputs)
                models, failed = models | faster, failed | not_compiled
            models |= files
            say(f"batch {batch}: measuring")
            methods = {name: partial(inputs.of, model) for name, model in models.items()}
            timing = interleave(
                methods, repeats=repeats, device=device, budget=budget, overlap=False
            )
            for name in models:
                for reference in _references(name, models):
                    row = timing.row(name, *reference)
                    speed = 1e3 * batch / row["ms"]
                    rows.append({"batch": batch, **row, "images_per_s": speed})
            rows += [
                {"batch": batch, "method": name, "not_measured": reason}
                for name, reason in failed.items()
            ]
    surroundings = environment(device)
    return [{**row, **surroundings} for row in rows]


def _compiled(
    models: Mapping[str, Callable[..., Any]], inputs: Call
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """The models under torch.compile, warm, with code for these inputs; and why others failed."""
    torch._dynamo.reset()
    found: dict[str, Callable[..., Any]] = {}
    failed: dict[str, str] = {}
    for name, model in models.items():
        try:
            made = torch.compile(model, dynamic=False)
            inputs.of(made)
            found[name + COMPILED] = made
        except Exception as error:  # of the compiler, or of the C++ compiler that it needs
            failed[name + COMPILED] = _reason(error)
    return found, failed


def _reason(error: Exception) -> str:
    """What went wrong, in a line."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:200]}"


def _references(name: str, measured: Container[str]) -> list[tuple[str, ...]]:
    """What a method's time is compared with: the base run in the same way, and for duos both.

    Where those could not be compiled, it is the base as it is.
    """
    same = COMPILED if name.endswith(COMPILED) or name == EXPORTED["aoti"] else ""
    base, both = ("base" + same,), ("base" + same, "sidekick" + same)
    if base[0] not in measured:
        base, both = ("base",), ("base", "sidekick")
    is_duo = name.startswith("duo") and all(part in measured for part in both)
    return [base, both] if is_duo else [base]


@contextmanager
def _exported(
    duo: DuoModule, sample: Any, formats: Iterable[str], say: Callable[[str], None]
) -> Iterator[tuple[dict[str, Callable[..., Any]], dict[str, str]]]:
    """The duo read back from files that last as long as this context; and why others failed."""
    example = batch_of(sample, 2)
    with TemporaryDirectory() as folder:
        found: dict[str, Callable[..., Any]] = {}
        failed: dict[str, str] = {}
        for kind in formats:
            say(f"exporting: {kind}")
            try:
                path = export_duo(duo, f"{folder}/{kind}.pt2", example, format=kind)  # type: ignore[arg-type]
                load = torch._inductor.aoti_load_package if kind == "aoti" else _load_program
                loaded = load(str(path))
                example.of(loaded)
                found[EXPORTED[kind]] = loaded
            except Exception as error:  # of torch.export, or of the compilers
                failed[EXPORTED[kind]] = _reason(error)
        yield found, failed


def _load_program(path: str) -> nn.Module:
    return torch.export.load(path).module()

"""How long the selective metrics take, beside one sort of the same confidences.

    python benchmarks/bench_metrics.py [--quick] [--device cuda] [--threads 1]

No metric of a ranking can be faster than ranking, so each is shown as a multiple of torch.sort.
Other libraries are measured where they are installed and have the same metric: torch-uncertainty's
AURC (of probabilities; with two classes here), scikit-learn's and torchmetrics' AUROC. "kept_bytes"
is what the AURC metric keeps of a sample.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from harness import Growth, Options, Row, parser, run
from torch import Tensor

from lightning_duo import metrics, selective
from lightning_duo.cost import interleave, peak_memory
from lightning_duo.selective import select_thresholds

QUICK = (10**4, 10**5, 3 * 10**5)
SIZES = (10**4, 10**5, 10**6, 10**7)
SORT = "torch.sort"
GROWTH = (Growth("samples", {}, ("ms", "peak_mb")),)


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Confidences of a calibrated model that is right 80 % of the time."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(count, generator=generator) ** 0.25
    return confidence, torch.rand(count, generator=generator) < confidence


def others(confidence: Tensor, correct: Tensor) -> dict[str, Callable[[], object]]:
    """The same metrics in libraries that are here."""
    from torchmetrics.functional.classification import binary_auroc

    right = correct.long()
    found: dict[str, Callable[[], object]] = {
        "torchmetrics AUROC": lambda: binary_auroc(confidence, right)
    }
    if find_spec("torch_uncertainty"):
        from torch_uncertainty.metrics import AURC

        # With two classes: the confidence is the larger probability, and the target says whether
        # the prediction is right. Confidences below a half are mapped above it, order kept.
        upper = 0.5 + confidence / 2
        probs = torch.stack([1 - upper, upper], dim=1)

        def aurc() -> Tensor:
            metric = AURC().to(confidence.device)
            metric.update(probs, right)
            return metric.compute()

        found["torch-uncertainty AURC"] = aurc
    if find_spec("sklearn") and not confidence.is_cuda:
        from sklearn.metrics import roc_auc_score

        arrays = correct.numpy(), confidence.numpy()
        found["scikit-learn AUROC"] = lambda: roc_auc_score(*arrays)
    return found


def ours(confidence: Tensor, correct: Tensor) -> dict[str, Callable[[], object]]:
    """Each metric of this library, and the sort."""
    data = (confidence, correct)
    return {
        SORT: lambda: confidence.sort(descending=True),
        "aurc": lambda: selective.aurc(*data),
        "e_aurc": lambda: selective.e_aurc(*data),
        "augrc": lambda: selective.augrc(*data),
        "correctness_auroc": lambda: selective.correctness_auroc(*data),
        "coverage_at_accuracy": lambda: selective.coverage_at_accuracy(*data, 0.9),
        "fpr_at_tpr": lambda: selective.fpr_at_tpr(*data),
        "select_threshold": lambda: select_thresholds(*data, [0.9]),
        "select_threshold, delta": lambda: select_thresholds(*data, [0.9], delta=0.05),
    }


def bytes_per_sample(data: tuple[Tensor, Tensor]) -> float:
    """What an AURC metric keeps of batches of 100."""
    metric = metrics.AURC()
    for confidence, correct in zip(*(part.split(100) for part in data), strict=True):
        metric.update(confidence.clone(), correct.clone())
    kept = metric.confidence + metric.correct
    return sum(part.untyped_storage().nbytes() for part in kept) / len(data[0])


def measure(asked: Options, sizes: tuple[int, ...] | None = None) -> Iterator[Row]:
    """Rows for all sizes."""
    for count in sizes or (QUICK if asked.quick else SIZES):
        confidence, correct = (part.to(asked.device) for part in samples(count))
        methods = {**ours(confidence, correct), **others(confidence, correct)}
        timing = interleave(methods, repeats=asked.repeats, device=asked.device, budget=60)
        for name, method in methods.items():
            peak = peak_memory(method, asked.device)
            row = {"samples": count, **timing.row(name, SORT)}
            row["peak_mb"] = None if peak is None else peak / 1e6
            if name == "aurc":
                row["kept_bytes"] = bytes_per_sample((confidence[:10_000], correct[:10_000]))
            yield row


if __name__ == "__main__":
    run("metrics", parser(__doc__).parse_args(), measure, GROWTH)

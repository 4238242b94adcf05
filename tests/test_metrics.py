"""Every torchmetrics class against its function: batches, processes, checkpoints and plots."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from subprocesses import two_processes
from torch import Tensor
from torchmetrics import Metric

from lightning_duo import metrics, selective

GENERATOR = torch.Generator().manual_seed(0)
SCORES = (torch.rand(100, generator=GENERATOR), torch.rand(100, generator=GENERATOR) < 0.7)
PROBS = (
    torch.randn(100, 4, generator=GENERATOR).softmax(1),
    torch.randint(4, (100,), generator=GENERATOR),
)
SHARES = {
    "constraint": (metrics.SelectiveAccuracyConstraint, "accuracy", selective.coverage_at_accuracy),
    "accuracy": (metrics.SelectiveAccuracy, "coverage", selective.accuracy_at_coverage),
    "fpr": (metrics.FalsePositiveRate, "tpr", selective.fpr_at_tpr),
}


def brier(probs: Tensor, targets: Tensor) -> Tensor:
    return selective.brier_scores(probs, targets).mean().float()


# Metric, function of all samples, and the samples.
CASES: dict[str, tuple[Callable[[], Metric], Callable, tuple[Tensor, Tensor]]] = {
    "aurc": (metrics.AURC, selective.aurc, SCORES),
    "e_aurc": (metrics.ExcessAURC, selective.e_aurc, SCORES),
    "augrc": (metrics.AUGRC, selective.augrc, SCORES),
    "auroc": (metrics.CorrectnessAUROC, selective.correctness_auroc, SCORES),
    **{
        name: (partial(metric, **{option: 0.85}), partial(function, **{option: 0.85}), SCORES)
        for name, (metric, option, function) in SHARES.items()
    },
    "curve": (metrics.RiskCoverageCurve, selective.risk_coverage_curve, SCORES),
    "generalized": (
        partial(metrics.RiskCoverageCurve, generalized=True),
        selective.generalized_risk_coverage_curve,
        SCORES,
    ),
    "brier": (metrics.Brier, brier, PROBS),
    "brier_mean": (
        partial(metrics.Brier, mean_over_classes=True),
        lambda probs, targets: brier(probs, targets) / 4,
        PROBS,
    ),
}
SCALARS = [name for name in CASES if name not in ("curve", "generalized")]
every_metric = pytest.mark.parametrize("name", CASES)
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


def first(data: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    return data[0][rows], data[1][rows]


def filled(name: str) -> Metric:
    metric = CASES[name][0]()
    for start in range(0, 100, 30):
        metric.update(*first(CASES[name][2], slice(start, start + 30)))
    return metric


@every_metric
def test_batches_are_the_function_of_all_samples(name: str) -> None:
    _, function, data = CASES[name]
    metric = filled(name)
    metric.update(*first(data, slice(0, 0)))
    close(metric.compute(), function(*data))
    metric.reset()
    few = first(data, slice(0, 9))
    metric.update(*few)
    close(metric.compute(), function(*few))


@every_metric
def test_forward_gives_the_batch_and_keeps_the_rest(name: str) -> None:
    make, function, data = CASES[name]
    metric = make()
    for start in (0, 30, 60):
        batch = first(data, slice(start, start + 30))
        close(metric(*batch), function(*batch))
    close(metric.compute(), function(*first(data, slice(0, 90))))


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_of_the_same_values(name: str, dtype: torch.dtype) -> None:
    make, function, (scores, labels) = CASES[name]
    metric = make()
    metric.update(scores.to(dtype), labels)
    found, exact = metric.compute(), function(scores.to(dtype).float(), labels)
    torch.testing.assert_close(found, exact, rtol=0, atol=0)


@every_metric
def test_copies_are_independent(name: str) -> None:
    _, function, data = CASES[name]
    metric = filled(name)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        close(twin.compute(), function(*data))
        twin.reset()
        twin.update(*first(data, slice(0, 9)))
        close(twin.compute(), function(*first(data, slice(0, 9))))
    close(metric.compute(), function(*data))


@every_metric
def test_a_checkpoint_goes_on_where_it_was(name: str) -> None:
    make, function, data = CASES[name]
    metric, buffer = make(), io.BytesIO()
    assert not metric.state_dict()
    metric.persistent(True)
    for start in (0, 30):
        metric.update(*first(data, slice(start, start + 30)))
    torch.save(metric.state_dict(), buffer)
    buffer.seek(0)
    loaded = make()
    loaded.persistent(True)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    loaded.update(*first(data, slice(60, 100)))
    close(loaded.compute(), function(*data))


def test_float64_stays_float64() -> None:
    confidence, correct = torch.rand(50).double(), SCORES[1][:50]
    metric = metrics.AURC()
    metric.update(confidence, correct)
    close(metric.compute(), selective.aurc(confidence, correct), rtol=0, atol=0)


@pytest.mark.parametrize("name", SCALARS)
def test_plots_follow_torchmetrics(name: str) -> None:
    plt.switch_backend("Agg")
    metric = filled(name)
    value = float(metric.compute())
    figure, axes = metric.plot()
    assert isinstance(figure, plt.Figure)
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([value])
    _, axes = metric.plot([torch.tensor(0.25), torch.tensor(0.5)])
    assert axes.lines[0].get_ydata().tolist() == [0.25, 0.5]
    low, high = axes.get_ylim()
    assert low <= 0
    assert high >= (metric.plot_upper_bound or 0.5)
    assert metric.plot(torch.tensor(0.25), ax=axes)[1] is axes
    plt.close("all")


@pytest.mark.parametrize(("name", "area"), [("curve", "aurc"), ("generalized", "augrc")])
def test_curves_are_drawn_with_their_area(name: str, area: str) -> None:
    plt.switch_backend("Agg")
    metric = filled(name)
    curve = metric.compute()
    figure, axes = metric.plot()
    assert isinstance(figure, plt.Figure)
    assert axes.lines[0].get_xdata().tolist() == curve.coverage.tolist()
    assert axes.lines[0].get_ydata().tolist() == curve.risk.tolist()
    expected = float(CASES[area][1](*SCORES))
    assert axes.get_legend().get_texts()[0].get_text() == f"AUC={expected:0.3f}"
    assert metric.plot(score=False)[1].get_legend() is None
    plt.close("all")


def everything(rank: int, world: int) -> dict[str, list]:
    """All metrics on this process's part: 63 and 37 samples, then 100 and none."""
    if world > 1:
        torch.distributed.init_process_group("gloo")
    results: dict[str, list] = {}
    for split in (63, 100):
        part = slice(0, split) if rank == 0 else slice(split, 100)
        for name, (make, _, data) in CASES.items():
            for dtype in (torch.float32, torch.float64):
                metric = make()
                if dtype == torch.float64:  # so that an empty process exchanges it too
                    metric.set_dtype(dtype)
                scores, labels = first(data, part if world > 1 else slice(None))
                if len(labels):
                    metric.update(scores.to(dtype), labels)
                found = metric.compute()
                values = list(found) if isinstance(found, tuple) else [found]
                results[f"{name} {split} {dtype}"] = [v.double().tolist() for v in values]
    return results


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_one_of_them_empty_are_one(tmp_path: Path) -> None:
    both = two_processes("test_metrics.everything(rank, 2)", tmp_path, port=5)
    alone = everything(0, 1)
    assert len(alone) == 4 * len(CASES)
    for found in both:
        assert found.keys() == alone.keys()
        for case, values in alone.items():
            close(torch.tensor(found[case]), torch.tensor(values))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("brier")])
def test_bad_samples_are_named_when_they_come(name: str) -> None:
    metric = CASES[name][0]()
    kind = type(metric).__name__
    with pytest.raises(ValueError, match=rf"{kind} .*\(3,\) and \(1,\)"):
        metric.update(torch.rand(3), torch.tensor([True]))
    with pytest.raises(ValueError, match=rf"{kind} .*\(3, 1\) and \(3, 1\)"):
        metric.update(torch.rand(3, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"confidence .*NaN"):
        metric.update(torch.tensor([torch.nan]), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"correct .*booleans"):
        metric.update(torch.tensor([0.5]), torch.tensor([7]))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="apply softmax"):
        metrics.Brier().update(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"targets in 0\.\.1"):
        metrics.Brier().update(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))
    for metric, option, _ in SHARES.values():
        with pytest.raises(ValueError, match=rf"{option} .*\[0, 1\].* 98.*0\.98"):
            metric(**{option: 98})

"""The benchmarks' own code: what they compare must be what they say; speeds are not judged."""

import csv
import json
import sys
from pathlib import Path

import bench_fit
import bench_head
import bench_metrics
import harness
import numpy as np
import pytest
import render
import torch
from helpers import make_logits
from hypothesis import given
from hypothesis import strategies as st
from published import GRID, published_fit, published_head
from torch.nn import functional as F

ASKED = harness.Options(quick=True, device="cpu", repeats=3, threads=1)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@given(st.floats(-1, 3), st.floats(1e-3, 1e3))
def test_the_exponent_of_a_power_is_found(power: float, factor: float) -> None:
    sizes = [10, 100, 5000]
    found = harness.exponent(sizes, [factor * size**power for size in sizes])
    assert found["exponent"] == pytest.approx(power, abs=1e-6)
    assert found["exponent_top"] == pytest.approx(power, abs=1e-6)


def test_a_constant_cost_hides_growth_at_small_sizes_only() -> None:
    found = harness.exponent([1, 10, 100, 1000], [100 + n for n in (1, 10, 100, 1000)])
    assert found["exponent"] < 0.5 < found["exponent_top"] < 1


def test_growth_takes_the_rows_it_is_about() -> None:
    rows = [
        {"method": m, "n": n, "k": k, "ms": n * k, "peak_mb": None}
        for m in "ab"
        for n in (1, 2, 4)
        for k in (1, 7)
    ]
    curves = list(harness.grow(rows, [harness.Growth("n", {"k": 7}, ("ms", "peak_mb"))]))
    assert [(c["method"], c["value"], c["values"]) for c in curves] == [
        ("a", "ms", (7, 14, 28)),
        ("b", "ms", (7, 14, 28)),
    ]
    assert not list(harness.grow(rows, [harness.Growth("k", {"n": 1})]))  # two sizes are no curve
    with pytest.raises(ValueError, match="takes several rows of a at one size"):
        list(harness.grow(rows, [harness.Growth("n")]))


def test_the_published_fit_finds_the_best_of_its_grid_and_improves_it() -> None:
    base, sidekick, targets = make_logits(300, 6, seed=1)

    def nll(t_base: float, t_sidekick: float) -> float:
        return F.cross_entropy(t_base * base + t_sidekick * sidekick, targets).item()

    grid = min(nll(0.5 / a, 0.5 / b) for a in GRID.tolist() for b in GRID.tolist())
    t_base, t_sidekick, passes = published_fit(base, sidekick, targets)
    assert nll(t_base, t_sidekick) <= grid + 1e-6
    assert 625 < passes <= 625 + 70


def test_the_published_head_predicts_as_the_duo_and_is_less_sure() -> None:
    base, sidekick, _ = make_logits(50, 6, seed=1)
    t = torch.tensor([0.9, 0.3])
    probs, prediction, uncertainty = published_head(base, sidekick, t)
    want = (0.9 * base + 0.3 * sidekick).double().softmax(1)
    torch.testing.assert_close(probs.double(), want, rtol=1e-5, atol=1e-7)
    assert torch.equal(prediction, want.argmax(1))
    p, q = ((2 * w * x).double().softmax(1) for w, x in ((0.9, base), (0.3, sidekick)))
    divergence = (q * (q.log() - p.log())).sum(1)
    torch.testing.assert_close(
        uncertainty.double(), 1 - want.amax(1) + 0.1 * divergence, rtol=1e-4, atol=1e-6
    )


def test_fits_reach_the_optimum_but_the_published_one() -> None:
    rows = list(bench_fit.measure(ASKED, ((400, 8),)))
    found = {row["method"]: row for row in rows}
    assert {"fit_temperatures", "published", "torch L-BFGS", "scipy L-BFGS-B"} <= set(found)
    for name, row in found.items():
        assert -1e-12 < row["excess"] < (0.05 if name == "published" else 1e-6)
    assert found["published"]["passes"] > 600
    base, sidekick, targets = bench_fit.two_models(400, 8)
    one, none, _ = bench_fit.torch_uncertainty(base, sidekick, targets)
    losses = [F.cross_entropy(t * base, targets).item() for t in (0.98 * one, one, 1.02 * one)]
    assert min(losses) == losses[1]
    assert none == 0


def test_heads_agree_and_their_traffic_is_counted() -> None:
    base, sidekick, _ = make_logits(16, 10, seed=0)
    methods = bench_head.methods(base, sidekick)
    probs, prediction, confidence = methods["plain"]()
    for name in ("head", "head, compiled"):
        head = methods[name]()
        torch.testing.assert_close(head.probs, probs)
        assert torch.equal(head.prediction, prediction)
        torch.testing.assert_close(head.confidence, confidence)
    assert methods["head, compiled, no probs"]().probs is None
    assert bench_head.traffic(base, "head") == 3 * 4 * 160
    assert bench_head.traffic(base.bfloat16(), "head, compiled, no probs") == 2 * 2 * 160


def test_other_libraries_measure_the_same() -> None:
    confidence, correct = bench_metrics.samples(2000)
    mine, theirs = (f(confidence, correct) for f in (bench_metrics.ours, bench_metrics.others))
    auroc = mine["correctness_auroc"]()
    assert float(theirs["torchmetrics AUROC"]()) == pytest.approx(float(auroc), abs=1e-5)
    assert theirs["scikit-learn AUROC"]() == pytest.approx(float(auroc), abs=1e-6)
    # torch-uncertainty integrates by trapezoids from the first sample on.
    aurc = float(mine["aurc"]())
    assert float(theirs["torch-uncertainty AURC"]()) == pytest.approx(aurc, rel=0.05)


def test_a_run_writes_rows_growth_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_metrics.py", "--repeats", "3", "--quick"])
    given = harness.parser("").parse_args()
    given.output = tmp_path
    harness.run(
        "metrics", given, lambda asked: bench_metrics.measure(asked, (100, 200, 400)),
        bench_metrics.GROWTH,
    )  # fmt: skip
    rows = render.load(tmp_path, "metrics")
    assert {row["samples"] for row in rows} == {100, 200, 400}
    for row in rows:
        assert {"device", "hardware", "threads", "torch", "profile", "date", "ms"} <= set(row)
        assert row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["reference"] == "torch.sort"
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    curves = render.load(tmp_path, "metrics", "growth.jsonl")
    assert {c["method"] for c in curves if c["value"] == "ms"} == {row["method"] for row in rows}
    assert (tmp_path / "metrics.png").stat().st_size > 10_000
    assert "grow as samples^" in capsys.readouterr().out


def target_rows(ratio: float, excess: float) -> str:
    times = {"ms": 1.0, "ms_20": 1.0, "ms_80": 1.0, "reference": "fit_temperatures"}
    machine = {"threads": 1, "device": "cpu", "samples": 2500, "classes": 1000, "part": "fit"}
    ratios = {"ratio": ratio, "ratio_20": ratio, "ratio_80": ratio, "excess": excess}
    rows = [{**times, **machine, **ratios, "method": m} for m in ("published", "fit_temperatures")]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_targets_can_be_missed(tmp_path: Path) -> None:
    (tmp_path / "fit.jsonl").write_text(target_rows(99.0, 2e-6))
    text = "\n".join(render.targets(tmp_path))
    assert "99.0 (99.0-99.0) | >= 100 | **no** |" in text
    assert "2.0e-06 | <= 1e-06 | **no** |" in text
    (tmp_path / "fit.jsonl").write_text(target_rows(101.0, 1e-9))
    text = "\n".join(render.targets(tmp_path))
    assert "101.0 (101.0-101.0) | >= 100 | yes |" in text
    assert "duo / (base + sidekick), eager |  | not measured" in text


def pair_rows(device: str, ratio: float) -> str:
    """Rows of throughput.py for a base of 3 G and a sidekick of 1 G operations."""
    machine = {"device": device, "hardware": "abacus", "threads": 1, "cores": 2, "torch": "2"}
    machine |= {
        "triton": None,
        "python": "3",
        "dtype": "float32",
        "command": "python x",
        "date": "d",
    }
    times = {"ms": 1.0, "ms_20": 1.0, "ms_80": 1.0, "ratio_20": 0.5, "ratio_80": 9.0, "batch": 4}
    ratios = {"base": 1.0, "sidekick": 0.3, "duo": ratio, "2 bases": 2.1}
    rows = [
        {"part": "pair", "pair": "a+b", "method": name + mode, "reference": "base" + mode,
         "ratio": value + extra, "images_per_s": 10 * value, **times}
        for name, value in ratios.items()
        for mode, extra in (("", 0), (", compiled", 0.1))
    ]  # fmt: skip
    counted = {"flops_base": 3e9, "flops_sidekick": 1e9, "balance": 1 / 3, "balance_fused": 0.25}
    counted |= {"parameters_base": 5e6, "parameters_sidekick": 2e6, "balance_fvcore": None}
    rows.append({"part": "cost", "pair": "a+b", "method": "c", "skipped_fvcore": None, **counted})
    rows.append({"part": "zoo", "method": "single", "model": "m", "reference": "base", "ratio": 0.7,
                 **times})  # fmt: skip
    return "".join(json.dumps(row | machine) + "\n" for row in rows)


def test_the_report_says_what_rows_say_on_each_device(tmp_path: Path) -> None:
    assert "Throughput: not measured." in "\n".join(render.brief(tmp_path))
    (tmp_path / "throughput.jsonl").write_text(pair_rows("cpu", 1.25))
    (tmp_path / "throughput_cuda.jsonl").write_text(pair_rows("cuda", 1.125))
    text = "\n".join(render.brief(tmp_path))
    cells = "12.5 | 1.250 (0.500-9.000) | 1.350 (0.500-9.000) | 4.0 | 7.0 |"
    assert f"| duo, a+b, batch 4 | {cells}" in text
    assert "| duo, a+b, batch 4, CUDA | 11.2 | 1.125 (0.500-9.000) | 1.225" in text
    assert "| 2 bases, a+b, batch 4 | 21 | 2.100 (0.500-9.000) | 2.200" in text
    assert "| 6.0 | 10.0 |" in text
    text = "\n".join(render.section(tmp_path, "throughput", "results"))
    cpu, cuda = text.split("abacus (cuda)")
    assert "| a+b | duo | 4 | 1.250 (0.500-9.000) | 1.333 |" in cpu
    assert "| a+b | duo | 4 | 1.125 (0.500-9.000) | 1.333 |" in cuda
    assert "| a+b | 3.00 + 1.00 | 5.0 + 2.0 | 0.3333 | 0.2500 | not measured | nothing |" in cuda
    assert "| zoo | " in cpu
    assert "not measured; `python benchmarks/throughput.py" not in text
    missing = "\n".join(render.section(tmp_path, "head", "results"))
    assert "CUDA: not measured; `python benchmarks/bench_head.py --device cuda`." in missing


def test_figures_of_other_runs_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "throughput.png").write_text("old")
    (tmp_path / "results" / "fit.png").write_text("kept, as its benchmark was not run")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "throughput.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | {"profile": "full"}) + "\n"
                for line in pair_rows("cpu", 1.25).splitlines())
    )  # fmt: skip
    (rows / "figure8.png").write_text("new")
    render.render(rows, tmp_path / "RESULTS.md")
    kept = {path.name for path in (tmp_path / "results").iterdir()}
    assert kept == {"throughput.jsonl", "figure8.png", "fit.png"}
    assert "figure8.png](results/figure8.png)" in (tmp_path / "RESULTS.md").read_text()


def test_the_report_in_the_repository_is_what_its_rows_say() -> None:
    assert (BENCHMARKS / "RESULTS.md").read_text() == render.report(BENCHMARKS / "results")


def test_rows_in_the_repository_are_consistent() -> None:
    kept = {name: render.load(BENCHMARKS / "results", name) for name in render.NAMES}
    assert sum(map(len, kept.values())) > 100
    for rows in kept.values():
        for row in (row for row in rows if "ms" in row):
            assert row["ms_20"] <= row["ms"] <= row["ms_80"]
            assert row["ratio_20"] <= row["ratio"] <= row["ratio_80"]
            assert all(np.isfinite(row[key]) for key in ("ms", "ratio"))

"""The benchmarks that train or run networks, at sizes that take seconds; speeds are not judged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench_cofinetune
import numpy as np
import pytest
import run_all
import throughput as pairs
import torch
from harness import Options
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_duo.cost import Timing

ASKED = Options(quick=True, device="cpu", repeats=3, threads=1)
ROOT = Path(__file__).parents[2]


def test_photographs_are_files_with_a_class(tmp_path: Path) -> None:
    files = bench_cofinetune.write_files(tmp_path, 25)
    assert len(set(files)) == 25
    data = bench_cofinetune.Photographs(files, np.asarray)
    for number in (0, 3, 24):
        with Image.open(files[number]) as image:
            assert (image.format, image.size) == ("JPEG", (500, 375))
        pixels, target = data[number]
        assert target == number % 20
        assert pixels.std() > 10


def test_co_training_is_compared_with_both_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Timing] = []

    def in_turns(methods: dict, repeats: int) -> Timing:
        assert repeats == 3
        for method in methods.values():
            assert 0 < method() < 60
        seconds = {"base": [4.0, 5.0], "sidekick": [2.0, 2.0], "callback": [5.0, 6.0]}
        seen.append(Timing({**seconds, "data": [1.0, 1.4]}))
        return seen[-1]

    monkeypatch.setattr(bench_cofinetune, "in_turns", in_turns)
    monkeypatch.setattr(bench_cofinetune, "peak_memory", lambda method, _: 1e6)
    small = bench_cofinetune.Case("mobilenetv3_small_050", "resnet10t", 32, 2, 2)
    files = bench_cofinetune.write_files(tmp_path, 6)  # two batches to train on, one to validate
    rows = {row["method"]: row for row in bench_cofinetune.compare(small, files, ASKED, 0)}
    assert list(rows) == ["base", "sidekick", "callback", "data"]
    both = rows["callback"]
    assert both["reference"] == "base + sidekick"
    assert both["ratio"] == pytest.approx((5 / 6 + 6 / 7) / 2)
    assert both["ideal"] == pytest.approx((5 / 6 + 5.6 / 7) / 2)
    assert rows["sidekick"]["reference"] == "base"


def test_bookkeeping_is_a_part_of_a_step() -> None:
    row = bench_cofinetune.bookkeeping(4, 9)
    assert (row["method"], row["reference"], row["readings"]) == ("bookkeeping", "base's step", 3)


def test_throughput_is_set_against_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PIXELS", 32)
    names = ["resnet10t", "mobilenetv3_small_050", "resnet18"]
    rows = [{**row, "part": "zoo"} for row in pairs.zoo("resnet18", names, ASKED)]
    assert [(row["model"], row["method"]) for row in rows] == [
        (name, method) for name in names for method in ("single", "duo")
    ]
    last = rows[-2:]
    assert [row["relative_flops"] for row in last] == [1, 2]
    for row in rows:
        assert row["relative_throughput"] == pytest.approx(1 / row["ratio"])
    machine = {"hardware": "-", "device": "cpu", "threads": 1, "cores": 1}
    machine |= {"torch": "-", "triton": "-", "python": "-"}
    pairs.draw([{**row, **machine} for row in rows], tmp_path / "figure8.png")
    with Image.open(tmp_path / "figure8.png") as image:
        assert image.size[0] > 1000


@given(
    points=st.lists(
        st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
        min_size=3,
        max_size=30,
        unique_by=(lambda point: round(point[0], 2), lambda point: round(point[1], 2)),
    )
)
def test_determination_is_that_of_the_least_squares_line(
    points: list[tuple[float, float]],
) -> None:
    rows = [
        {"part": "zoo", "method": "duo", "relative_flops": flops, "relative_throughput": throughput}
        for flops, throughput in points
    ]
    ignored = {**rows[0], "method": "single"}, {"part": "growth", "method": "duo"}
    x, y = np.log(np.array(points)).T
    slope, offset = np.polyfit(x, y, 1)
    want = 1 - ((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert pairs.determination([*rows, *ignored], "duo") == pytest.approx(want, abs=1e-9)


def test_the_gain_is_that_of_the_demos_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("elpv_dataset")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import gain
    import timm
    from solar_cells import NUM_CLASSES, CellClassifier
    from torch import nn
    from torchvision.transforms import v2

    from lightning_duo import DuoModule

    torch.manual_seed(0)
    sidekick = timm.create_model("tf_efficientnet_lite0", num_classes=NUM_CLASSES)
    small = nn.Sequential(v2.Resize(32, antialias=True), sidekick)
    DuoModule(CellClassifier(pretrained=False), small, (0.7, 0.0)).save(
        tmp_path / "duo.safetensors"
    )
    demo = {"size": 32, "sidekick_size": 32, "seed": 0, "epochs": 0, "flops_balance": 0.1}
    (tmp_path / "results.json").write_text(json.dumps(demo))
    monkeypatch.setattr(gain, "second_base", lambda *_: CellClassifier(pretrained=False).eval())
    rows = {row["method"]: row for row in gain.compare(tmp_path, ASKED)}
    assert {name: row["flops"] for name, row in rows.items()} == {
        "base": 1,
        "scaled base": 1,
        "duo": 1.1,
        "2 bases": 2,
        "2 bases, mean": 2,
    }
    assert rows["scaled base"]["nll_change"] == 0
    for row in rows.values():
        assert row["nll_change"] == pytest.approx(row["nll"] / rows["scaled base"]["nll"] - 1)


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_the_report_is_rendered_from_rows_at_hand(tmp_path: Path) -> None:
    kept = tmp_path / "rows"
    shutil.copytree(ROOT / "benchmarks" / "results", kept)
    done = run("--render", "--output", str(kept), "--results", "RESULTS.md", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert (tmp_path / "RESULTS.md").read_text() == report
    names = {path.name for path in kept.iterdir()} - {"summary.md"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names


def test_a_benchmark_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, fine = tmp_path / "broken.py", tmp_path / "fine.py"
    broken.write_text("raise SystemExit(3)")
    fine.write_text("import pathlib, sys; pathlib.Path('ran').write_text(' '.join(sys.argv[1:]))")
    monkeypatch.setattr(run_all, "BENCHMARKS", {"head": str(broken), "metrics": str(fine)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--quick", "--output", "out"])
    with pytest.raises(SystemExit, match="failed: head; see above"):
        run_all.main()
    assert (tmp_path / "ran").read_text() == "--quick --device cpu --output out --threads 1"
    assert os.path.exists(tmp_path / "out" / "summary.md")

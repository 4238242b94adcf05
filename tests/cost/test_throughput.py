"""The measurement of a pair: what is measured, and against what; speeds are not judged."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lightning_duo import cost
from lightning_duo.base import Call
from lightning_duo.cost import (
    Ensemble,
    Timing,
    compare_counters,
    find,
    largest_batch,
    largest_batch_of_pair,
    measure_throughput,
    memory,
    overhead_text,
    ratio_text,
    throughput_table,
)
from lightning_duo.tasks import Labels
from lightning_duo.zoo import input_size


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return (
        base.eval(),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval(),
        torch.randn(1, 3, 8, 8),
    )


def test_the_ensemble_is_the_mean_of_both_softmaxes() -> None:
    base, sidekick, _ = pair()
    x = torch.randn(6, 3, 8, 8)
    probs, prediction, confidence = Ensemble(base, sidekick)(x)
    want = torch.stack([base(x).softmax(1), sidekick(x).softmax(1)]).mean(0)
    torch.testing.assert_close(probs, want)
    assert torch.equal(prediction, want.argmax(1))
    torch.testing.assert_close(confidence, want.amax(1))


def test_pairs_of_other_tasks_and_calls_are_measured() -> None:
    class Both(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 1))

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.net(x * mask), None

    base, sidekick = Both(40).eval(), Both(4).eval()
    sample = Call((torch.randn(1, 6),), {"mask": torch.rand(1, 6)})
    options = {"task": Labels(), "logits_at": (0,)}
    assert largest_batch_of_pair(base, sidekick, sample, **options).size > 1
    rows = measure_throughput(
        base, sidekick, sample, [3], compiled=False, exported=["program"], repeats=3, **options
    )
    methods = {row["method"] for row in rows if "ms" in row}
    assert methods == {"base", "sidekick", "duo", "2 bases", "duo, exported"}
    pair_of_two = Ensemble(base, sidekick, Labels(), (0,))
    want = torch.stack([sample.of(model)[0].sigmoid() for model in (base, sidekick)]).mean(0)
    torch.testing.assert_close(sample.of(pair_of_two)[0], want)


def test_rows_hold_every_method_against_its_own_reference() -> None:
    said: list[str] = []
    rows = measure_throughput(*pair(), [1, 4], repeats=3, say=said.append)
    found = {(row["method"], row["reference"]) for row in rows}
    compiled = "base, compiled + sidekick, compiled"
    assert found == {
        ("base", "base"),
        ("sidekick", "base"),
        ("duo", "base"),
        ("duo", "base + sidekick"),
        ("2 bases", "base"),
        ("2 bases, compiled", "base, compiled"),
        ("base, compiled", "base, compiled"),
        ("sidekick, compiled", "base, compiled"),
        ("duo, compiled", "base, compiled"),
        ("duo, compiled", compiled),
        ("duo, exported", "base"),
        ("duo, exported", "base + sidekick"),
        ("duo, AOTInductor", "base, compiled"),
        ("duo, AOTInductor", compiled),
    }
    assert {row["batch"] for row in rows} == {1, 4}
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["ratio_20"] <= row["ratio"] <= row["ratio_80"]
        assert row["torch"]
    assert "exporting: aoti" in said
    text = "\n".join(overhead_text(rows, compare_counters(*pair())))
    row = find(rows, "duo", "base + sidekick", batch=4)
    assert f"duo / (base + sidekick) {ratio_text(row)}" in text


def test_a_base_that_cannot_be_copied_or_counted_is_measured_without_it() -> None:
    base, sidekick, sample = pair()
    base.lock = threading.Lock()
    rows = measure_throughput(base, sidekick, sample, [2], compiled=False, exported=(), repeats=3)
    measured = {row["method"] for row in rows if "ms" in row}
    assert measured == {"base", "sidekick", "duo"}
    reason = "the base cannot be copied: TypeError: cannot pickle '_thread.lock' object"
    assert find(rows, "2 bases")["not_measured"] == reason

    def uncountable(*_: object) -> None:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise TypeError("no implementation found")

    handle = base.register_forward_pre_hook(uncountable)
    counted = compare_counters(base, sidekick, sample)
    handle.remove()
    assert counted["balance"] is counted["flops_base"] is None
    assert counted["parameters_base"] == cost.count_parameters(base)
    text = overhead_text(rows, counted)
    assert "FLOPs could not be counted: TypeError: no implementation found." in text[0]
    assert f"Not measured: 2 bases: {reason}" in text
    sizes = compare_counters(sidekick, nn.Identity(), sample)
    assert sizes["balance"] == 0
    assert overhead_text(rows, sizes)[1].startswith("The sidekick has no operation that is counted")


class Branching(nn.Module):
    """Does one thing or another by its values, which torch.export refuses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) < 1e9 else -self.inner(x)


def test_what_cannot_be_exported_or_compiled_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    base, sidekick, sample = pair()
    rows = measure_throughput(Branching(base), sidekick, sample, [2], repeats=3)
    failed = {row["method"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert failed["duo, compiled"] == "RuntimeError: no C++ compiler"
    assert {"duo, exported", "duo, AOTInductor", "base, compiled"} < set(failed)
    measured = {(row["method"], row["reference"]) for row in rows if "ms" in row}
    assert {("duo", "base"), ("duo", "base + sidekick"), ("2 bases", "base")} <= measured
    text = overhead_text(rows, compare_counters(base, sidekick, sample))
    names = "base, compiled; sidekick, compiled; duo, compiled; 2 bases, compiled"
    assert f"Not measured: {names}: RuntimeError: no C++ compiler" in text
    assert not any("Measured, compiled" in line for line in text)
    assert throughput_table(rows, "").row_count == 10


def test_the_batch_is_halved_until_its_memory_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, sample = pair()
    assert largest_batch(base, sample) == (128, "the largest that is tried")
    peaks = iter([100_000, 120_000] * 2)  # of batches of one and three: 90 + 10 kB a sample
    monkeypatch.setattr(memory, "peak_memory", lambda *_: next(peaks))
    monkeypatch.setattr(memory, "free_memory", lambda: 820_000)  # of which half may be used
    said = "a larger one would not fit into memory"
    assert largest_batch(base, sample) == (32, said)  # 90 + 320 = 410 kB; 64 would take 730
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    with pytest.raises(RuntimeError, match="one sample"):
        largest_batch(base, sample)


def test_the_batch_is_halved_until_a_forward_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, sample = pair()
    readings = Timing({"1": [0.3], "4": [0.9]})  # 0.1 s and 0.2 s a sample
    monkeypatch.setattr(memory, "interleave", lambda *_, **__: readings)
    said = "the forward of a larger one would take over 1.75 s, as estimated"
    assert largest_batch(base, sample, seconds=1.75) == (8, said)
    assert largest_batch(base, sample, seconds=0.01).size == 1
    assert largest_batch(base, sample, seconds=99).size == 128


def test_counters_agree_but_for_what_fused_attention_hides() -> None:
    convolutions = timm.create_model("resnet10t").eval()
    x = torch.zeros(1, 3, 64, 64)
    ours, (theirs, skipped) = (
        cost.count_flops(convolutions, x),
        cost.count_flops_fvcore(convolutions, x),
    )
    assert ours == pytest.approx(theirs, rel=0.02)
    assert skipped == []
    transformer = timm.create_model("vit_tiny_patch16_224").eval()
    x = torch.zeros(1, 3, 224, 224)
    whole, fused = cost.count_flops(transformer, x), cost.count_flops(transformer, x, fused=True)
    # Two products of 197 x 197 x 192 multiply-adds in each of 12 layers are hidden.
    assert whole - fused == 2 * 12 * 2 * 197 * 197 * 192
    theirs, skipped = cost.count_flops_fvcore(transformer, x)
    assert theirs == pytest.approx(fused, rel=0.02)
    assert skipped == ["aten::scaled_dot_product_attention"]


def test_sizes_that_models_state() -> None:
    assert input_size("resnet18", timm.create_model("resnet18")) == (3, 224, 224)
    assert input_size("torchvision/inception_v3", nn.Identity()) == (3, 299, 299)
    assert input_size("torchvision/swin_v2_t", nn.Identity()) == (3, 256, 256)
    with torch.device("meta"):  # its published weights are for 518 pixels, it is built for 224
        huge = torchvision.models.vit_h_14()
    assert input_size("torchvision/vit_h_14", huge) == (3, 224, 224)


def bench(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_duo.cli", "bench", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_command_line_measures_a_pair_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1000))\n"
    )
    pair = ["--base", "resnet10t", "--sidekick", "mine:small", "--input_size", "3x32x32"]
    more = ["--compiled", "false", "--repeats", "3", "--batch", "2", "--output", "rows.jsonl"]
    run = bench(*pair, *more, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["batch"] for row in rows} == {1, 2}
    assert rows[0]["base"] == "resnet10t"
    assert rows[0]["flops_sidekick"] == 2 * 3072 * 1000
    assert "FLOPs balance" in run.stdout
    assert "2 bases" in run.stdout
    assert "batch 2: measuring" in run.stderr
    assert f"each of {min(row['readings'] for row in rows)} turns" in " ".join(run.stdout.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--repeats", "1"], "--repeats must be at least 3, got 1"),
        (["--output", "rows.csv"], r"--output must be named *.jsonl, got rows.csv"),
        (["--output", "/dev/null/rows.jsonl"], "--output /dev/null/rows.jsonl cannot be written"),
        (["--output", "folder.jsonl"], "--output folder.jsonl cannot be written"),
        (["--classes", "1"], "--classes must be at least 2, got 1"),
        (["--threads", "99999"], "--threads must be at most the number of cores"),
        (["--batch", "9" * 12], "such a batch of 3x176x176 takes 3.72e+08 GB"),
        (
            ["--input_size", "3x32"],
            "the base resnet10t cannot run a batch of 1 of random float32 numbers of size 3x32:",
        ),
        (
            ["--sidekick", "vit_tiny_patch16_224", "--input_size", "3x32x32"],
            "the sidekick vit_tiny_patch16_224 cannot run a batch of 1",
        ),
        (
            ["--sidekick", "torch.nn:Identity"],
            "the sidekick torch.nn:Identity must return logits of shape (1, K), K >= 2, for a "
            "batch of 1, as a tensor or under 'logits'; it returned torch.float32 tensor (1, 3,",
        ),
        (["--sidekick", "mine:one_row"], "must return logits of shape (2, K)"),
        (
            ["--sidekick", "torchvision.models:resnet18", "--classes", "7"],
            "the base resnet10t has 7 classes and the sidekick torchvision.models:resnet18 1000",
        ),
        (["--input_size", "wide"], "--input_size must be the size of one sample"),
        (["--input_size", "3x999999x999999"], "--input_size must be the size of one sample"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Mixed(nn.Module):\n    def forward(self, x):\n        return x.reshape(1, -1)\n"
        "def one_row():\n    return Mixed()\n"
    )
    pair = ["--base", "resnet10t", "--sidekick", "resnet10t", "--compiled", "false"]
    run = bench(*pair, *options, folder=tmp_path)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr

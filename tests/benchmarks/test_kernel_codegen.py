"""The machine code of the head's kernels: what would make them slow on a GPU, seen without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        cwd=BENCHMARKS,
        timeout=300,
    )


def records_of(*arguments: str) -> list[dict[str, Any]]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Rows of whole granules and others, short and streamed; registers are shortest on sm_100.
REPORT = """
import json, kernel_codegen
everything = {"float32", "bfloat16", "float16"}
asked = (
    ("sm_90", 1000, everything),
    ("sm_90", 1001, {"bfloat16"}),
    ("sm_90", 21841, {"bfloat16"}),
    ("sm_100", 16001, {"float32"}),
    ("gfx942", 1000, {"float32", "bfloat16"}),
)
for record in kernel_codegen.report(
    (launch, target)
    for target, classes, dtypes in asked
    for launch in kernel_codegen.head_launches([classes])
    if str(launch.dtype).removeprefix("torch.") in dtypes
):
    print(json.dumps(record))
"""


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    records = records_of("-c", REPORT)
    variants = {"probs", "no probs", "uq, probs", "uq, no probs"}
    assert len(records) == (3 + 1 + 1 + 1 + 2) * len(variants) + (3 + 2) * 2  # 2 of padded rows
    assert {r["variant"] for r in records} == variants
    assert {r["function"] for r in records} == {"block_kernel", "stream_kernel"}
    return records


def test_nothing_is_spilled(report: list[dict[str, Any]]) -> None:
    for record in report:
        assert record["registers"] > 0
        assert record["spills"] == record["stack"] == 0, record


def test_each_logit_is_loaded_once_and_again_only_for_many_probabilities(
    report: list[dict[str, Any]],
) -> None:
    for record in report:
        again = record["classes"] > 16384 and record["variant"] in ("probs", "uq, probs")
        assert record["loads_per_logit"] == (2 if again else 1), record


def test_loads_are_of_16_bytes_even_where_rows_do_not_begin_at_a_multiple(
    report: list[dict[str, Any]],
) -> None:
    for record in report:
        assert set(record["loads"]) == {"128"}, record
    assert {r["stride"] for r in report if r["classes"] == 1000} == {1000, 1001, 1024}


BAD_PLANS = """
import json, kernel_codegen
from lightning_duo_kernels import head_triton

good, head_triton.BLOCK_CLASSES = head_triton.plan, 32768
for classes, changes in (
    (1000, {"VECTOR": 1, "EVEN": False}),
    (32768, {}),
    (10, {"ROWS": 1}),
):
    head_triton.plan = lambda *arguments: {**good(*arguments), **changes}
    launch = next(kernel_codegen.head_launches([classes]))
    print(json.dumps(*kernel_codegen.report([(launch, "sm_90")])))
"""


def test_the_report_would_see_narrow_loads_spills_and_repeated_loads() -> None:
    narrow, long, sparse = records_of("-c", BAD_PLANS)
    assert set(narrow["loads"]) == {"32"}
    assert long["spills"] > 0
    assert long["stack"] > 0
    assert sparse["loads_per_logit"] > 1  # more threads than logits


def test_the_command_reports_the_kernel_of_the_fit() -> None:
    records = records_of(
        *"kernel_codegen.py --json --kernel nll --target gfx942 --classes 1000".split()
    )
    assert len(records) == 3 * 2  # dtypes, numbers of points
    for record in records:
        assert record["function"] == "nll_kernel"
        assert record["spills"] == record["stack"] == 0, record


def test_the_interpreter_compiles_nothing_and_the_report_says_so() -> None:
    done = run("kernel_codegen.py", "--classes", "10", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr

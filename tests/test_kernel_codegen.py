"""The machine code of the head's kernels: what would make them slow on a GPU, seen without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Rows of whole granules and others; on targets that differ in where registers are short.
ASKED = {"sm_90": ("1000", "1001", "21841"), "sm_100": ("16001",), "gfx942": ("1000",)}


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


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    script = ("kernel_codegen.py", "--json", "--kernel", "head")
    return [
        record
        for target, classes in ASKED.items()
        for record in records_of(*script, "--target", target, "--classes", *classes)
    ]


def test_the_report_has_every_variant_of_every_shape(report: list[dict[str, Any]]) -> None:
    variants = {"probs", "no probs", "uq, probs", "uq, no probs"}
    dtypes = {"float32", "bfloat16", "float16"}
    for target, classes in ASKED.items():
        for count in classes:
            rows = [r for r in report if (r["target"], str(r["classes"])) == (target, count)]
            seen = {(r["dtype"], r["variant"]) for r in rows if r["stride"] == r["classes"]}
            assert seen == {(dtype, variant) for dtype in dtypes for variant in variants}
    assert {r["function"] for r in report} == {"block_kernel", "stream_kernel"}


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
import json, kernel_codegen as report
from lightning_duo_kernels import head_triton

good, head_triton.BLOCK_CLASSES = head_triton.plan, 32768
for classes, changes in (
    (1000, {"VECTOR": 1, "EVEN": False}),
    (32768, {}),
    (10, {"ROWS": 1}),
):
    head_triton.plan = lambda *arguments: {**good(*arguments), **changes}
    launch = next(report.head_launches([classes]))
    print(json.dumps(report.examine(launch, "sm_90")))
"""


def test_the_report_would_see_narrow_loads_spills_and_repeated_loads() -> None:
    narrow, long, sparse = records_of("-c", BAD_PLANS)
    assert set(narrow["loads"]) == {"32"}
    assert long["spills"] > 0
    assert long["stack"] > 0
    assert sparse["loads_per_logit"] > 1  # more threads than logits


def test_the_interpreter_compiles_nothing_and_the_report_says_so() -> None:
    done = run("kernel_codegen.py", "--classes", "10", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr

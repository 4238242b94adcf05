"""The tests that the documentation names exist, and no case is left out of its table."""

import re
from pathlib import Path

import pytest
import test_any_run

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs" / "any_run.md").read_text()
NAMED = re.findall(r"`(?:tests/(\w+)\.py::)?(test_\w+)(?:\[([^\]`]+)\])?`", TABLE)


def test_the_table_is_read() -> None:
    assert len(NAMED) > 70
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line]
    heads = ("test |", "| |")
    unproven = [r for r in rows if "test_" not in r and not r.endswith(heads)]
    assert not unproven


@pytest.mark.parametrize(("file", "name", "case"), NAMED)
def test_named_tests_exist(file: str, name: str, case: str) -> None:
    text = (ROOT / "tests" / f"{file or 'test_any_run'}.py").read_text()
    assert f"\ndef {name}(" in text
    if case:
        assert f'    "{case}": ' in text


@pytest.mark.parametrize("cases", ["STYLES", "SETTINGS", "PRECISIONS"])
def test_every_case_is_in_the_table(cases: str) -> None:
    assert set(getattr(test_any_run, cases)) <= {case for _, _, case in NAMED}

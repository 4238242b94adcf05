"""The tests that the documentation names exist, and no case is left out of its table."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs" / "any_run.md").read_text()
NAMED = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)(?:\[([^\]`]+)\])?`", TABLE)
ANY_RUN = "tests/callback/test_any_run.py"  # which the table does not name
STRANGERS = "tests/strangers/test_strangers.py"  # nor this one, where the tests are of its cases
OF_STRANGERS = ("test_a_duo_beside_it_is_as_by_hand", "test_what_is_no_classification_is_refused")


def cases(name: str) -> set[str]:
    """Keys of a table of cases."""
    for node in ast.parse((ROOT / ANY_RUN).read_text()).body:
        if isinstance(node, ast.AnnAssign) and node.target.id == name:
            return set(map(ast.literal_eval, node.value.keys))
    raise AssertionError(f"{ANY_RUN} has no {name}")


def test_the_table_is_read() -> None:
    assert len(NAMED) > 70
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line]
    heads = ("test |", "| |")
    unproven = [r for r in rows if "test_" not in r and not r.endswith(heads)]
    assert not unproven


@pytest.mark.parametrize(("file", "name", "case"), NAMED)
def test_named_tests_exist(file: str, name: str, case: str) -> None:
    path = ROOT / (file or (STRANGERS if name in OF_STRANGERS else ANY_RUN))
    assert f"\ndef {name}(" in path.read_text()
    if case and name in OF_STRANGERS:
        assert any(f"\nclass {case}(" in p.read_text() for p in path.parent.glob("*.py"))
    elif case:
        assert f'    "{case}": ' in path.read_text()


@pytest.mark.parametrize("table", ["STYLES", "SETTINGS", "PRECISIONS"])
def test_every_case_is_in_the_table(table: str) -> None:
    assert cases(table) <= {case for _, _, case in NAMED}

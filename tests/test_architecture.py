"""Imports run one way, cost little, and the user's example knows nothing of this library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A file may import those before it.
ORDER = [
    "inputs",
    "newton",
    "temperature",
    "ranking",
    "selective",
    "threshold",
    "metrics",
    "evaluation",
    "bootstrap",
    "randomness",
    "batch",
    "quiet",
    "base",
    "module",
    "predict",
    "export",
    "arrays",
    "logits",
    "calibration",
    "zoo",
    "sidekick",
    "cofinetune",
    "cost",
    "timing",
    "throughput",
    "throughput_text",
    "state",
    "pair",
    "checks",
    "figures",
    "samples",
    "evaluator",
    "summary",
    "report_figures",
    "report",
    "callback",
    "options",
    "cli_bench",
    "cli",
]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_every_file_has_its_place() -> None:
    files = {p.stem for p in (ROOT / "lightning_duo").glob("*.py")} - {"__init__"}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name: str) -> None:
    used = {
        found.split(".")[1]
        for found in imports(ROOT / "lightning_duo" / f"{name}.py")
        if found.startswith("lightning_duo.") and found != "lightning_duo.__version__"
    }
    assert used <= set(ORDER[: ORDER.index(name)]), f"{name} imports {sorted(used)}"


def test_kernels_import_torch_and_triton_only() -> None:
    for path in (ROOT / "kernels" / "lightning_duo_kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        own = {"torch", "triton", "lightning_duo_kernels"}
        assert roots <= own | sys.stdlib_module_names, path


def test_the_users_example_knows_nothing_of_this_library() -> None:
    assert "lightning_duo" not in (ROOT / "examples" / "solar_cells.py").read_text()


def newly_imported(statement: str, before: str = "pass") -> set[str]:
    script = (
        f"import sys\n{before}\nold = set(sys.modules)\n{statement}\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - old})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"timm", "matplotlib", "plotly", "fvcore", "onnx", "onnxruntime"}


def test_importing_the_library_costs_little() -> None:
    assert not newly_imported("import lightning_duo") & {*HEAVY, "torch", "lightning"}
    # Lightning itself imports matplotlib where it is installed, through torchmetrics.
    added = newly_imported("from lightning_duo import DuoCallback", before="import lightning")
    assert not added & {*HEAVY, "scipy", "sklearn", "pandas"}


def test_deployment_needs_no_lightning() -> None:
    found = newly_imported("from lightning_duo import DuoModule, fit_temperatures")
    assert "torch" in found
    assert not found & {*HEAVY, "lightning", "pytorch_lightning", "torchmetrics"}
    assert "lightning" not in newly_imported("import lightning_duo_kernels")


def test_public_names_are_few_and_exist() -> None:
    import lightning_duo

    assert len(lightning_duo.__all__) <= 10
    assert all(getattr(lightning_duo, name) is not None for name in lightning_duo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trio'"):
        _ = lightning_duo.Trio

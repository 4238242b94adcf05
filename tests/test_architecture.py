"""Imports run one way, cost little, and the user's example knows nothing of this library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_duo"
DRAWN = re.search(
    r"```text\n(\d+ +__init__.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL
)
FLOORS = {
    room: int(line.split()[0]) for line in DRAWN.group(1).splitlines() for room in line.split()[1:]
}


# Files that import what users name, or what stands above them when it is asked for.
LAZY = ("__init__.py", "cli/options.py", "lightning_duo/plain.py", "lightning_duo/module.py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
            if "lightning_duo" in found:  # its names are reached by attributes
                found.add("lightning_duo.anything")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute, so that they can be checked"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            hidden = name in ("import_module", "__import__")
            assert not hidden or path.as_posix().endswith(LAZY), f"{path}: imports are statements"
    return found


def files() -> dict[str, Path]:
    """Dotted name, without the package -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(name)] = path
    return found


FILES = files()


def used(name: str) -> set[str]:
    """The files of the package that a file imports, lazily or not."""
    found = imports(FILES[name])
    names = {other.removeprefix("lightning_duo.") for other in found}
    submodules = {other for other in names & set(FILES) if f"lightning_duo.{other}" in found}
    # A name of the package that is no file is one of its own: it stands on the top floor.
    top = {f.removeprefix("lightning_duo.") for f in found if f.count(".") == 1} - set(FILES)
    is_top = "lightning_duo" in found and any(f"lightning_duo.{x}" in found for x in top)
    return (submodules | ({"__init__"} if is_top else set())) - {name}


def test_every_room_has_a_floor() -> None:
    assert {name.split(".")[0] for name in FILES} == set(FLOORS)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_down(name: str) -> None:
    room = name.split(".")[0]
    others = {other.split(".")[0] for other in used(name)} - {room}
    up = {other for other in others if FLOORS[other] >= FLOORS[room]}
    assert not up, f"{name} is on floor {FLOORS[room]} and imports {sorted(up)}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from lightning_duo import __version__", "__init__"),
        ("from lightning_duo import DuoCallback", "__init__"),
        ("import lightning_duo", "__init__"),
        ("from lightning_duo import callback", "callback"),
        ("import lightning_duo.callback.run as run", "callback.run"),
        ("from .callback import run", None),
        ("from importlib import import_module; import_module('x')", None),
        ("import importlib; importlib.import_module('x')", None),
    ],
)
def test_no_import_is_hidden(
    line: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "files.py"
    path.write_text(f"def late():\n    {line}\n")
    monkeypatch.setitem(FILES, "files", path)
    if found is not None:
        assert found in used("files")
    else:
        with pytest.raises(AssertionError, match="imports are"):
            used("files")


def test_every_file_of_the_callback_is_described() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    described = re.search(r"## The callback\n\n```text\n(.*?)```", text, re.DOTALL).group(1)
    names = [line.split()[0] for line in described.splitlines()]
    assert sorted(names) == sorted(
        path.stem for path in (PACKAGE / "callback").glob("*.py") if path.stem != "__init__"
    )


@pytest.mark.parametrize("room", [room for room in FLOORS if (PACKAGE / room).is_dir()])
def test_no_circle_inside_a_room(room: str) -> None:
    inside = [name for name in FILES if name.split(".")[0] == room]
    left = {name: used(name) & set(inside) for name in inside}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_each_face_only_imports() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        if path.parent.name == "cli":  # `main`, which imports no torch
            continue
        lines = path.read_text().splitlines()
        assert len(lines) < 60, path
        kinds = {type(node) for node in ast.parse(path.read_text()).body[1:]}
        assert kinds <= {ast.ImportFrom, ast.Assign}, path


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


HEAVY = {"timm", "matplotlib", "plotly", "fvcore", "onnx", "onnxruntime", "transformers"}


def test_importing_the_library_costs_little() -> None:
    assert not newly_imported("import lightning_duo") & {*HEAVY, "torch", "lightning"}
    # Lightning itself imports matplotlib where it is installed, through torchmetrics.
    added = newly_imported("from lightning_duo import DuoCallback", before="import lightning")
    assert not added & {*HEAVY, "scipy", "sklearn", "pandas"}


def test_deployment_needs_no_lightning() -> None:
    found = newly_imported("from lightning_duo import DuoModule, fit_temperatures")
    assert "torch" in found
    assert not found & {
        *HEAVY,
        "lightning",
        "lightning_utilities",
        "pytorch_lightning",
        "torchmetrics",
    }
    assert "lightning" not in newly_imported("import lightning_duo_kernels")


def test_public_names_are_few_and_exist() -> None:
    import lightning_duo

    assert len(lightning_duo.__all__) <= 12
    assert all(getattr(lightning_duo, name) is not None for name in lightning_duo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trio'"):
        _ = lightning_duo.Trio

"""docs/architecture.md and the package agree: which rooms there are, and what each of them imports."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import hbx_gpu
import hbx_gpu.atlas
import hbx_gpu.scdl
import hbx_gpu.testing

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hbx_gpu"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
HEAVY = {
    "torch",
    "numba",
    "lancedb",
    "pandas",
    "anndata",
    "cupy",
    "nvidia",
    "lightning",
    "scvi",
    "accelerate",
}
FACADES = [hbx_gpu, hbx_gpu.atlas, hbx_gpu.scdl, hbx_gpu.testing]


def rows_of(heading: str) -> list[list[str]]:
    """Cells of the page's table that begins with a heading cell."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROOMS = {room: row for row, cells in enumerate(rows_of("rooms")) for room in named(cells[0])}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room_of(module: str) -> str | None:
    """The most special room of the page that holds a module; None for the package itself."""
    parts = module.split(".")[1:]
    names = ("/".join(parts[:k]) for k in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), None)


def imports(tree: ast.AST, kind: str = "at once") -> Iterator[tuple[str, str]]:
    """(module, kind) of every import: "at once", "on use" inside functions, or "types"."""
    for node in ast.iter_child_nodes(tree):
        inner = kind
        if isinstance(node, ast.Import):
            yield from ((alias.name, kind) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", kind) for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = "on use" if kind == "at once" else kind
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inner = "types"
            for other in node.orelse:
                yield from imports(ast.Module([other], []), kind)
            node = ast.Module(node.body, [])
        yield from imports(node, inner)


def inside(name: str) -> str:
    """The module of the package that an imported name belongs to."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def test_every_module_is_in_a_room() -> None:
    missing = [module for module in MODULES if module != "hbx_gpu" and room_of(module) is None]
    assert not missing, f"add a row for them to docs/architecture.md: {missing}"
    there = {room_of(module) for module in MODULES}
    assert not set(ROOMS) - there, "docs/architecture.md names rooms that do not exist"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_rows_above_it(room: str) -> None:
    for module, path in MODULES.items():
        if room_of(module) != room:
            continue
        for name, _ in imports(ast.parse(path.read_text())):
            if not name.startswith("hbx_gpu."):
                continue
            target = room_of(inside(name))
            assert target is None or ROOMS[target] <= ROOMS[room], f"{module} imports {name}"


def test_who_imports_what_is_heavy() -> None:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, path in MODULES.items():
        for name, kind in imports(ast.parse(path.read_text())):
            package = name.partition(".")[0]
            if package in HEAVY and kind != "types":
                found[package][kind].add(room_of(module) or module)
    table = {
        named(cells[0])[0]: {"at once": set(named(cells[1])), "on use": set(named(cells[2]))}
        for cells in rows_of("package")
    }
    assert set(table) == HEAVY
    for package, kinds in table.items():
        for kind, rooms in kinds.items():
            assert rooms == found[package][kind], f"docs/architecture.md, {package}, {kind}"


@pytest.mark.parametrize(
    "module", ["hbx_gpu", "hbx_gpu.atlas", "hbx_gpu.scdl", "hbx_gpu.batch", "hbx_gpu.cli"]
)
def test_a_light_import(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code, *HEAVY, "pyarrow"], capture_output=True, text=True)
    assert run.stdout.split() == [], run.stderr


def test_readers_of_an_atlas_do_not_import_zarr() -> None:
    """Metadata are parsed as JSON and chunks decoded here: only writers need it."""
    code = "import sys, hbx_gpu.atlas._atlas, hbx_gpu.atlas._query.opening; print('zarr' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False"], run.stderr


@pytest.mark.parametrize("facade", FACADES, ids=lambda module: module.__name__)
def test_type_checkers_see_the_lazy_names(facade: object) -> None:
    """The names that are resolved on use are spelled out for type checkers, from the same modules."""
    name = facade.__name__  # type: ignore[attr-defined]
    tree = ast.parse(MODULES[name].read_text())
    spelled = {
        full.rpartition(".")[2]: full.rpartition(".")[0] for full, kind in imports(tree) if kind == "types"
    }
    assert set(spelled) == set(facade.__all__) - {"__version__"}  # type: ignore[attr-defined]
    for public, module in spelled.items():
        assert getattr(facade, public) is getattr(importlib.import_module(module), public)


def test_the_wheel_has_types_and_kernels(tmp_path: Path) -> None:
    build = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (wheel,) = build.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    assert "hbx_gpu/py.typed" in names
    kernels = {f"hbx_gpu/kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if path.is_file()}
    assert kernels <= set(names)
    assert Path(wheel).name.startswith(f"hbx_gpu-{hbx_gpu.__version__}-")

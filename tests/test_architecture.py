"""The walls of the house: which way imports run, what lies at the top, how long a recipe may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("distill", "bridges", "recipes", "tests")
TOP_FILES = {"pyproject.toml", "README.md", "LICENSE"}
LEFT_BY_TOOLS = {"runs", "build", "dist", "venv", "__pycache__"}
LONGEST_RECIPE = 100
# room: what its modules must not import
WALLS = {
    "distill": ("bridges", "recipes", "tests"),
    "bridges": ("recipes", "tests"),
    "recipes": ("recipes", "tests"),
    "distill.model": ("distill.data", "distill.training", "distill.circuits", "distill.formats"),
    "distill.data": ("distill.training", "distill.circuits", "distill.formats"),
    "distill.training": ("distill.circuits", "distill.formats"),
    "distill.circuits": ("distill.training", "distill.formats"),
    "distill.artifact": ("distill.model", "distill.data", "distill.training", "distill.circuits", "distill.command"),
    "distill.command": ("distill.model", "distill.data", "distill.training", "distill.circuits", "distill.artifact"),
}
PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every module that is named in an import anywhere in the file, relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".") if is_package else module.split(".")[:-1]
            base = (
                ".".join([*home[: len(home) - node.level + 1], node.module or ""]).rstrip(".")
                if node.level
                else node.module
            )
            yield from (f"{base}.{alias.name}" for alias in node.names)


def broken_walls(module: str, imported: str) -> list[str]:
    return [
        f"{module} imports {imported}: {room} must not know {wall}"
        for room, walls in WALLS.items()
        for wall in walls
        if inside(module, room) and inside(imported, wall)
    ]


def unsafe_loads(tree: ast.AST) -> Iterator[int]:
    """Lines that call `torch.load` (under any import of it) without weights_only=True."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization")
        for alias in node.names
        if alias.name == "load"
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called not in names and called not in ("torch.load", "torch.serialization.load"):
            continue
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if given.get("weights_only") != "True":
            yield node.lineno


def sources(*rooms: str) -> list[tuple[Path, str, ast.Module]]:
    paths = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [(path, name_of(path, ROOT), ast.parse(path.read_bytes(), str(path))) for path in paths]


def test_imports_never_run_back() -> None:
    modules = sources("distill", "bridges", "recipes")
    assert modules
    broken = [
        complaint
        for path, module, tree in modules
        for imported in imports(tree, module, path.name == "__init__.py")
        for complaint in broken_walls(module, imported)
    ]
    assert broken == []


def test_top_level_is_the_design() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    found = {name for name in found if not name.endswith(".egg-info")} - LEFT_BY_TOOLS
    assert found <= {*ROOMS, *TOP_FILES}


def test_recipes_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "recipes").glob("*.py")}
    assert {name: length for name, length in lengths.items() if length >= LONGEST_RECIPE} == {}


def test_nothing_is_unpickled() -> None:
    unsafe = []
    for path, module, tree in sources("distill", "bridges"):
        unsafe += [
            f"{module} imports {imported}"
            for imported in imports(tree, module, path.name == "__init__.py")
            if imported.split(".")[0] in PICKLES
        ]
        unsafe += [f"{module}:{line} torch.load without weights_only=True" for line in unsafe_loads(tree)]
    assert unsafe == []


def test_search_path_is_left_alone() -> None:
    touching = [
        f"{module}:{node.lineno}"
        for _, module, tree in sources("distill", "bridges", "recipes")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]
    assert touching == []


# --- the checks themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os, distill.model as m", ["os", "distill.model"]),
        ("from distill import model", ["distill.model"]),
        ("from . import prune", ["distill.circuits.prune"]),
        ("from ..training import trainer", ["distill.training.trainer"]),
        ("from .. import training", ["distill.training"]),
        ("def f():\n    from bridges.fit import fit", ["bridges.fit.fit"]),
    ],
)
def test_imports_are_read(source: str, expected: list[str]) -> None:
    assert list(imports(ast.parse(source), "distill.circuits.masks", False)) == expected


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imports(ast.parse("from .masks import x"), "distill.circuits", True)) == ["distill.circuits.masks.x"]


@pytest.mark.parametrize(
    ("module", "imported", "walls"),
    [
        ("distill.model.topk", "bridges.fit", 1),
        ("bridges.fit", "recipes.quickstart", 1),
        ("recipes.quickstart", "recipes.train_sparse", 1),
        ("distill.circuits.prune", "distill.training.optim", 1),
        ("distill.training.trainer", "distill.circuits", 1),
        ("distill.model.dense", "distill.data.tokens", 1),
        ("bridges.fit", "distill.training.trainer", 0),
        ("recipes.quickstart", "bridges.compare", 0),
        ("distill.models", "distill.data", 0),
    ],
)
def test_walls_stand(module: str, imported: str, walls: int) -> None:
    assert len(broken_walls(module, imported)) == walls


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, weights_only=flag)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("from torch import load as read\nread(p)", 1),
        ("json.load(p)", 0),
    ],
)
def test_unsafe_loads_are_found(source: str, unsafe: int) -> None:
    assert len(list(unsafe_loads(ast.parse(source)))) == unsafe

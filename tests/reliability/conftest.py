"""Examples of every format for the tests here, recipes to call in this process, and a small disk to fill."""

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"


def load(path: Path) -> ModuleType:
    """A module by its file: neither tests nor recipes are packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARTIFACTS = load(HERE / "artifacts.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "known" in metafunc.fixturenames:
        names = list(ARTIFACTS.FORMATS)
        metafunc.parametrize("known", [ARTIFACTS.FORMATS[name] for name in names], ids=names)


@pytest.fixture(scope="session")
def formats() -> dict[str, Any]:
    return dict(ARTIFACTS.FORMATS)


@pytest.fixture
def recipe() -> Callable[[str, Sequence[object]], int]:
    """Runs a recipe in this process and returns its status."""
    return lambda name, argv: load(RECIPES / f"{name}.py").main([str(word) for word in argv])


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text."""
    place = tmp_path_factory.mktemp("texts")
    for n in range(40):
        lines = [f"for i in range({n * i}):\n    print('value {n}', i)\n    call(\"name {n}\")\n" for i in range(5)]
        (place / f"{n}.py").write_text("".join(lines))
    return place


@pytest.fixture
def tiny() -> list[str]:
    """Flags of the smallest training."""
    shape = ["--architecture.d-model", "16", "--architecture.d-head", "8", "--architecture.n-layer", "1"]
    length = ["--architecture.context", "32", "--config.context", "32", "--config.batch", "4", "--config.steps", "12"]
    return [*shape, *length, "--vocab-size", "300", "--config.save-every", "4", "--device", "cpu"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of its own, and what mounts it anew with other options; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)

    try:
        mount("size=64k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """The same bytes with one bit changed."""
    place = draw.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1 :]


@pytest.fixture
def flip() -> Callable[[bytes, random.Random], bytes]:
    return flipped


def error_lines(text: str) -> list[str]:
    """The lines by which a recipe refuses."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture
def errors() -> Callable[[str], list[str]]:
    return error_lines

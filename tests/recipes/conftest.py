"""Four tiny models by the recipes themselves, for the recipes that need some."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name: str) -> ModuleType:
    """A recipe as a module; recipes are scripts and no package."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    import sys

    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe() -> Callable[[str, Sequence[str]], int]:
    """Runs a recipe in this process and returns its status."""
    return lambda name, argv: load(name).main([str(word) for word in argv])


SNIPPETS = """import os
class Box:
    def __init__(self, size, name):
        self.size = size
        self.name = name
for item in range({n}):
    print('value {n}', item)
    call("name {n}")
while item:
    item -= {n}
values = [[{n}, 2], [3, {n}]]
seen = set()
seen.add({n})
text = ''
text += "{n}"
"""

TINY = ["--architecture.d-model", "16", "--architecture.d-head", "8", "--architecture.n-layer", "1",
        "--architecture.context", "64", "--config.context", "64", "--config.batch", "4",
        "--vocab-size", "400"]  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., int]) -> Path:
    """A folder with texts/, sparse/, dense/, gpt2/ and student/."""
    place = tmp_path_factory.mktemp("models")
    (place / "texts").mkdir()
    for n in range(40):
        (place / "texts" / f"{n}.py").write_text("".join(SNIPPETS.format(n=n * i) for i in range(1, 6)))
    texts, packed = str(place / "texts"), str(place / "sparse.tokens")
    out = {name: ["--out", str(place / name)] for name in ("sparse", "dense", "gpt2", "student")}
    length = ["--config.steps", "12"]
    assert recipe("train_sparse", ["--corpus", texts, *TINY, *length, "--config.kept", "0.25", *out["sparse"]]) == 0
    assert recipe("train_dense", ["--corpus", packed, *TINY, *length, *out["dense"]]) == 0
    assert recipe("train_dense", ["--kind", "gpt2", "--corpus", packed, *TINY, *length, *out["gpt2"]]) == 0
    fit = ["--student.d-model", "16", "--student.d-head", "8", "--config.context", "64", "--config.batch", "4"]
    assert (
        recipe("fit_bridges", ["--dense", str(place / "gpt2"), "--corpus", packed, *fit, *length, *out["student"]]) == 0
    )
    return place

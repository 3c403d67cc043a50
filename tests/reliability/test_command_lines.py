"""Wrong command lines, made from the options of every recipe: status 2, one line that names what is wrong, no
traceback, and nothing written. What can be refused without a model is refused before one is loaded."""

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))
NOWHERE = "/nowhere/at/all"
SHARE = 3
"""By default one in so many is tried."""
FREE = {"label", "name"}
"""Fields in which any value is right."""
POSITIONAL = {"convert": ["to-openai", "sparse"], "view": ["none.circuit.safetensors"]}
Case = tuple[list[str], str]
"""Words of a command line, and what the complaint has to hold."""


def load(name: str) -> Any:
    """A recipe, read once."""
    key = f"recipe_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def leaves(options: type, path: str = "") -> Iterator[tuple[str, Any, type]]:
    """Every option: its flag, the type of its value, and the dataclass it stands in."""
    hints = get_type_hints(options, include_extras=False)
    for one in fields(options):
        kind, flag = hints[one.name], f"{path}{one.name}".replace("_", "-")
        if is_dataclass(kind):
            yield from leaves(kind, f"{flag}.")  # pyright: ignore[reportArgumentType]
        else:
            yield f"--{flag}", kind, options


def kinds(kind: Any) -> list[Any]:
    """The plain types that a value may have, those in tuples among them."""
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for part in get_args(kind) for inner in kinds(part)]
    if get_origin(kind) is tuple:
        return [inner for part in get_args(kind) if part is not Ellipsis for inner in kinds(part)]
    return [kind]


def required(name: str, without: str = "") -> list[str]:
    """What a recipe asks for in any case."""
    module, words = load(name), list(POSITIONAL.get(name, []))
    hints = get_type_hints(module.Options)
    for one in fields(module.Options):
        flag = f"--{one.name.replace('_', '-')}"
        positional = "Positional" in str(module.Options.__annotations__.get(one.name)) or one.name in (
            "action",
            "source",
        )
        if one.default is MISSING and one.default_factory is MISSING and flag != without and not positional:
            if name in POSITIONAL and one.name == "circuit":
                continue
            words += [flag, "out" if hints[one.name] is Path else "word"]
    return words


def of_types(name: str, seen: set[tuple[type, str]]) -> Iterator[Case]:
    """For every option once: a value of another type, none at all, one that is no choice."""
    for flag, kind, owner in leaves(load(name).Options):
        if (owner, flag.rpartition(".")[2]) in seen and owner is not load(name).Options:
            continue
        seen.add((owner, flag.rpartition(".")[2]))
        base, plain = required(name, flag), kinds(kind)
        if any(get_origin(one) is Literal for one in plain):
            if flag not in ("--action",):
                yield [*base, flag, "nonesuch"], flag
        elif bool in plain:
            yield [*base, f"{flag}=perhaps"], flag
        elif (int in plain or float in plain) and str not in plain:
            count = 2 if get_origin(kind) is tuple and Ellipsis not in get_args(kind) else 1
            yield [*base, flag, *["many"] * count], flag
        elif get_origin(kind) is not tuple and flag not in ("--source", "--circuit"):
            yield [*base, flag], flag


def out_of_range(name: str, seen: set[tuple[type, str]]) -> Iterator[Case]:
    """For every number in a nested configuration once: a value that no setting has."""
    for flag, kind, owner in leaves(load(name).Options):
        last = flag.rpartition(".")[2]
        if owner is load(name).Options or (owner, last) in seen or last in FREE:
            continue
        seen.add((owner, last))
        plain = kinds(kind)
        count = 2 if get_origin(kind) is tuple and Ellipsis not in get_args(kind) else 1
        late = [*required(name), *FAILS_LATE.get(name, [])]
        if float in plain:
            yield [*late, flag, *["nan"] * count], last.removeprefix("--").replace("-", "_")
        elif int in plain:
            yield [*late, flag, *["-7"] * count], last.removeprefix("--").replace("-", "_")


FAILS_LATE: dict[str, list[str]] = {
    **dict.fromkeys(("train_sparse", "train_dense"), ["--corpus", NOWHERE]),
    "fit_bridges": ["--dense", "dense_gpt2", "--dry-run"],
    **dict.fromkeys(("prune_circuit", "compare_circuits", "quickstart", "sweep_circuits", "steer"), ["--task", "none"]),
}
"""Should a number be taken after all, then this stops the recipe before it has worked for long."""


def by_hand() -> Iterator[tuple[str, list[str], str]]:
    """Options that contradict each other, paths that are not there or cannot be written, numbers of the recipes."""
    for name in ("train_sparse", "train_dense", "fit_bridges"):
        yield name, ["--resume", "--overwrite"], "resume"
        yield name, ["--seed", "-1"], "seed"
        yield name, ["--device", "abacus"], "device"
        yield name, ["--device", "cuda:99"], "device"
        yield name, ["--config.steps", "0"], "steps"
        yield name, ["--out", "{file}"], "file"
        yield name, ["--out", "{file}/inside"], "file"
    for name in ("train_sparse", "train_dense"):
        yield name, ["--corpus", NOWHERE], NOWHERE
        yield name, ["--vocab-size", "0"], "vocab_size"
        yield name, ["--corpus", "package:nonesuch"], "nonesuch"
    yield "train_sparse", ["--weights", "1"], "weights"
    yield "train_sparse", ["--linear-path", NOWHERE], NOWHERE
    yield "train_dense", ["--config.kept", "0.5"], "kept"
    yield "fit_bridges", ["--dense", NOWHERE], NOWHERE
    for name in ("prune_circuit", "compare_circuits", "quickstart", "steer", "sweep_circuits", "tasks"):
        yield name, ["--task", "none"], "none"
        yield name, ["--task", f"{NOWHERE}.jsonl"], NOWHERE
        yield name, ["--task"], "task"
    for name in ("prune_circuit", "compare_circuits", "steer", "quickstart"):
        yield name, ["--out", "{file}"], "file"
        yield name, ["--out", "{file}/inside"], "file"
        yield name, ["--out", "{full}"], "manifest.json"
    for name in ("prune_circuit", "compare_circuits", "sweep_circuits", "quickstart"):
        yield name, ["--target", "-1"], "target"
        yield name, ["--target", "nan"], "target"
    yield "sweep_circuits", ["--seeds", "1", "1"], "seeds"
    yield "sweep_circuits", ["--targets", "0.5", "0.5"], "targets"
    yield "sweep_circuits", ["--model", "a/same", "b/same"], "same"
    for name in ("prune_circuit", "steer", "compare_circuits"):
        flag = {"steer": "--bridge"}.get(name, "--model")
        yield name, [flag, NOWHERE], NOWHERE
        yield name, [flag, "{file}"], "file"
        yield name, [flag, "{full}"], "full"
    for name in ("steer",):
        for flag in ("--top", "--controls", "--pairs"):
            yield name, [flag, "0"], flag.removeprefix("--")
        yield name, ["--strength", "a:b"], "strength"
        yield name, ["--strength", "0:1:0"], "strength"
        yield name, ["--node", "auto", "0.attn.act_in.1"], "node"
    yield "tasks", ["--pairs", "0"], "pairs"
    yield "tasks", ["--show", "-1"], "show"
    yield "tasks", ["--out", "x.json"], "out"
    yield "check_circuit", ["--circuit", NOWHERE], NOWHERE
    yield "check_circuit", ["--circuit", "{file}"], "file"
    yield "check_circuit", ["--circuit", "a", "b", "--against", "c"], "circuit"
    yield "view", [NOWHERE], NOWHERE
    yield "view", ["{file}"], "file"
    yield "view", [], "circuit"
    yield "convert", ["export", NOWHERE, "--out", "x.csv"], NOWHERE
    yield "convert", ["from-openai", NOWHERE, "--out", "x"], NOWHERE
    yield "convert", ["from-openai", NOWHERE], "out"
    yield "convert", ["to-openai", NOWHERE, "--out", "x"], NOWHERE
    yield "convert", ["to-openai", "sparse", "--out", "{file}"], "out"
    yield "convert", ["to-openai", "sparse", "--out", "x", "--target", "0.5"], "target"
    yield "convert", ["import-viz", NOWHERE, "--out", "x"], "model"
    yield "ship", ["--model", NOWHERE, "--out", "x"], NOWHERE
    yield "ship", ["--model", "{file}", "--out", "x"], "file"
    yield "ship", ["--model", "{full}", "--out", "x"], "full"
    yield "ship", ["--model", "sparse", "--out", "{file}"], "file"
    yield "ship", ["--model", "sparse", "--out", "{file}/inside"], "file"
    yield "ship", ["--model", "sparse", "--out", "{full}", "--overwrite"], "manifest.json"
    yield "ship", ["--model", "sparse", "--out", "x", "--dense", "dense_gpt2"], "dense"
    yield "ship", ["--model", "student", "--out", "x", "--dense", NOWHERE], NOWHERE
    yield "publish", ["--model", "sparse", "--repo", "one", "--dry-run"], "repo"
    yield "publish", ["--model", NOWHERE, "--repo", "me/mine", "--dry-run"], NOWHERE


def cases(name: str) -> list[Case]:
    """All wrong command lines of a recipe."""
    seen: set[tuple[type, str]] = set()
    ranges: set[tuple[type, str]] = set()
    for before in RECIPES[: RECIPES.index(name)]:  # a configuration that two recipes share is gone through once
        list(of_types(before, seen)), list(out_of_range(before, ranges))
    found: list[Case] = [([*required(name), "--nonesuch", "1"], "--nonesuch")]
    found += [*of_types(name, seen), *out_of_range(name, ranges)]
    found += [(words, said) for recipe, words, said in by_hand() if recipe == name]
    if "preset" in str(getattr(load(name), "PRESETS", "")) or hasattr(load(name), "PRESETS"):
        found.append(([*required(name), "--preset", "nonesuch"], "preset"))
    return found


def places(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years")
    return {"file": str(folder / "file"), "full": str(folder / "full")}


def wrong_answer(status: int, error: str, said: str) -> str:
    """What is wrong with how a recipe refused; nothing where all is as it should be."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    if status != 2:
        return f"status {status}"
    if len(lines) != 1 or "Traceback" in error:
        return f"{len(lines)} lines: {error[-300:]}"
    plain = lines[0].lower().replace("-", "_")
    return "" if said.lower().replace("-", "_").lstrip("_") in plain else f"{said!r} is not named in {lines[0][:300]!r}"


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_are_many_and_of_every_recipe() -> None:
    numbers = {name: len(cases(name)[::SHARE]) for name in RECIPES}
    assert sum(numbers.values()) >= 150 and all(number >= 2 for number in numbers.values()), numbers


@pytest.mark.parametrize("share", [SHARE, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
def test_wrong_command_lines_are_one_line(
    name: str, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given, faults = places(tmp_path), []
    before = listing(tmp_path)
    main: Callable[[Sequence[str]], int] = load(name).main
    for words, said in cases(name)[::share]:
        argv = [word.format(**given) for word in words]
        capsys.readouterr()
        try:
            fault = wrong_answer(main(argv), capsys.readouterr().err, said)
        except Exception as error:  # collected, so that one run shows all
            fault = f"{type(error).__name__}: {error}"
        if listing(tmp_path) != before:
            fault += f" wrote {sorted(listing(tmp_path).keys() - before.keys())}"
            before = listing(tmp_path)
        if fault:
            faults.append(f"{name} {' '.join(argv)}: {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [("train_sparse", ["--config.steps", "many"], "steps"), ("view", [NOWHERE], NOWHERE)],
)
def test_as_processes_too(name: str, words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert not wrong_answer(done.returncode, done.stderr, said) and done.stdout == ""
    assert list(tmp_path.iterdir()) == []

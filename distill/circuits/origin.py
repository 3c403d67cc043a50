"""Where a circuit comes from: the model and the task that its file only names."""

import re
from collections.abc import Sequence
from pathlib import Path

from distill.artifact import MANIFEST, read_manifest
from distill.circuits.circuit import SUFFIX, Circuit, CircuitMismatchError
from distill.circuits.subject import Subject, load_subject
from distill.circuits.tasks import Task, load_task, task_names
from distill.model import load_model
from distill.model.load import model_folder, shipped_names

_CONTROL = re.compile(r"(.+)_(nonsense|shuffled\d*)")
_OPTIONS = ("model", "dense", "bridge")
"""Options of recipes that name a model."""


def labels(files: Sequence[Path]) -> list[str]:
    """A name for each circuit: that of its file, with those of its folders in front as far as names are alike."""
    paths = [file.resolve() for file in files]
    stems = [path.name.removesuffix(SUFFIX) for path in paths]
    for depth in range(1, max((len(path.parts) for path in paths), default=1)):
        if len(set(stems)) == len(set(paths)):
            break
        stems = [
            ".".join([*path.parts[-1 - depth : -1], path.name.removesuffix(SUFFIX)]) if stems.count(stem) > 1 else stem
            for path, stem in zip(paths, stems, strict=True)
        ]
    return stems


def find_subject(
    circuit: Circuit,
    file: Path,
    *,
    models: Sequence[str] = (),
    corpus: Sequence[str] = (),
    device: str = "cpu",
) -> Subject:
    """The model of a circuit, with all that a judgement of it needs.

    Args:
        circuit: as read from `file`.
        file: its file; the manifest beside it says which models it was made from.
        models: where the model is, if known: folders or names, one of which is it.
        corpus: as for `load_subject`.
        device: where the model goes.

    Without `models` those that the manifest names are looked at, then the circuit's own name for its model, then
    those that are shipped. ValueError, as CircuitMismatchError, where none has the circuit's fingerprint.
    """
    places = list(models) or _places(circuit, file)
    for place in places:
        if _is_it(place, circuit, named=bool(models)):
            return load_subject(place, name=circuit.model_name or None, corpus=corpus, device=device)
    raise CircuitMismatchError(
        f"circuit: {file} was made for model {circuit.model_name!r} with fingerprint {circuit.model[:12]}, and none of "
        f"{', '.join(places)} is that model; say where it is with --model"
    )


def find_subjects(
    circuits: Sequence[Circuit],
    files: Sequence[Path],
    *,
    models: Sequence[str] = (),
    corpus: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Subject]:
    """`find_subject` for several circuits: their models by fingerprint, each loaded once."""
    found: dict[str, Subject] = {}
    for circuit, file in zip(circuits, files, strict=True):
        if circuit.model not in found:
            found[circuit.model] = find_subject(circuit, file, models=models, corpus=corpus, device=device)
    return found


def _places(circuit: Circuit, file: Path) -> list[str]:
    named: list[str] = []
    if (file.parent / MANIFEST).is_file():
        config = read_manifest(file.parent, verify=False)["provenance"]["config"]
        named = [str(config[option]) for option in _OPTIONS if isinstance(config.get(option), str)]
    return list(dict.fromkeys([*named, *([circuit.model_name] if circuit.model_name else []), *shipped_names()]))


def _is_it(place: str, circuit: Circuit, *, named: bool) -> bool:
    """Whether the model at a place is the circuit's. What a person `named` has to be a model; hubs are not searched."""
    if named:
        return load_model(place).fingerprint() == circuit.model
    try:
        return model_folder(place) is not None and load_model(place).fingerprint() == circuit.model
    except ValueError:
        # Another thing lies by now where the name points: the next place may be right.
        return False


def find_task(circuit: Circuit, task: str | None = None) -> Task:
    """The task of a circuit: `task` where given (a name or a JSONL file), else the built-in one of its name.

    Controls are found by their names too. ValueError where there is no such task.
    """
    if task is not None:
        return load_task(task)
    control = _CONTROL.fullmatch(circuit.task)
    if control is not None and control[1] in task_names("all"):
        return load_task(f"{control[1]}:{control[2]}")
    if circuit.task not in task_names("all"):
        raise ValueError(f"task: {circuit.task!r} is no built-in task; name the file of its pairs with --task")
    return load_task(circuit.task)

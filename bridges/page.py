"""Pages of circuits by their files: each with its model, task, scorecard and labels, two with the bridge between."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridges.correspondence import node_links
from bridges.folder import load_bridged
from bridges.lineup import bridge_folder
from bridges.maps import Bridges
from distill.artifact import ArtifactError, read_record
from distill.circuits.circuit import SUFFIX, Circuit
from distill.circuits.origin import find_subjects, find_task
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, encode
from distill.circuits.viewer import Page, ViewConfig, read_labels, render, view

SCORECARD = ".scorecard.json"
ENDING = ".html"


def circuit_files(paths: Sequence[Path]) -> list[Path]:
    """The circuits' files among `paths`: files as they are, folders with all circuits in them, by name.

    ValueError for a path that is not there, and a folder that holds no circuit.
    """
    if not paths:
        raise ValueError(f"circuit: got none; allowed are files *{SUFFIX} and folders")
    found: list[Path] = []
    for path in paths:
        files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(f"circuit: {path} is no circuit and no folder with any; allowed are files *{SUFFIX}")
        found += files
    return list(dict.fromkeys(found))


def circuit_page(
    files: Sequence[Path],
    *,
    models: Sequence[str] = (),
    task: str | None = None,
    bridge: str | None = None,
    corpus: Sequence[str] = (),
    device: str = "cpu",
    config: ViewConfig | None = None,
) -> Page:
    """One page for all circuits of `files`; those of one model and task become one, with a slider over the targets.

    Arguments:
        files: circuit files; what lies beside them (scorecard, labels) is shown too.
        models: where the models are, if known.
        task: name or JSONL file of the task, where it is no built-in one.
        bridge: folder of a student with bridges, or a short name: circuits of it and of its dense model are put side
            by side and linked, task by task.
        corpus: text for models that bring none.
        config: how much is shown.

    ValueError where a model, a task or the bridge's two circuits cannot be found.
    """
    config = config or ViewConfig()
    circuits = [Circuit.load(file) for file in files]
    subjects = find_subjects(circuits, files, models=models, corpus=corpus, device=device)
    groups: dict[tuple[str, str], list[int]] = {}
    for index, circuit in enumerate(circuits):
        groups.setdefault((circuit.model, circuit.task), []).append(index)
    curves = [part for places in groups.values() for part in _curves(places, circuits)]
    tasks = {circuit.task: find_task(circuit, task) for circuit in circuits}
    links: list[dict[str, Any]] = []
    if bridge is not None:
        student, bridges, info = load_bridged(bridge_folder(bridge))
        curves, pairs = _paired(curves, circuits, info.dense.fingerprint, student.fingerprint())
        for left in range(0, 2 * pairs, 2):
            found = _links(curves[left : left + 2], circuits, subjects, tasks, bridges, config)
            links += [{**link, "left": left, "right": left + 1} for link in found]
    views = [_view(part, circuits, files, subjects, tasks, config) for part in curves]
    names = [str(one["name"]) for one in views]
    return render(views, title=names[0] if len(names) == 1 else "Circuits", links=links, config=config)


def _curves(places: list[int], circuits: Sequence[Circuit]) -> list[list[int]]:
    """Circuits of one model and task as one curve; those that share a target are of other seeds, one view each."""
    targets = [circuits[place].target for place in places]
    return [places] if len(set(targets)) == len(targets) else [[place] for place in places]


def _view(
    places: list[int],
    circuits: Sequence[Circuit],
    files: Sequence[Path],
    subjects: dict[str, Subject],
    tasks: dict[str, Task],
    config: ViewConfig,
) -> dict[str, Any]:
    first = circuits[places[0]]
    file = files[places[0]]
    subject = subjects[first.model]
    name = f"{first.task} in {subject.name}"
    if len(places) == 1 and sum(one.model == first.model and one.task == first.task for one in circuits) > 1:
        name += f", {file.name.removesuffix(SUFFIX)}"
    return view(
        subject,
        [circuits[place] for place in places],
        tasks[first.task],
        name=name,
        scorecard=scorecard_beside(file),
        labels=read_labels(file),
        file=file.name.removesuffix(SUFFIX),
        config=config,
    )


def scorecard_beside(file: Path) -> dict[str, Any] | None:
    """The scorecard that lies beside a circuit's file, by its name, None where there is none.

    ArtifactError for a file that is no scorecard.
    """
    path = file.with_name(file.name.removesuffix(SUFFIX) + SCORECARD)
    if not path.is_file():
        return None
    card = read_record(path, what="scorecard")
    if not isinstance(card.get("checks"), list) or "verdict" not in card:
        raise ArtifactError(f"{path}: is no scorecard, it has no checks and verdict")
    return card


def _paired(
    curves: list[list[int]], circuits: Sequence[Circuit], dense: str, student: str
) -> tuple[list[list[int]], int]:
    """The curves with those of the dense model in front, each with one of the student and of its task behind it, and
    how many such pairs there are."""
    by_end = {end: [part for part in curves if circuits[part[0]].model == end] for end in (dense, student)}
    pairs: list[list[int]] = []
    for mine in by_end[dense]:
        of_task = [
            yours
            for yours in by_end[student]
            if circuits[mine[0]].task == circuits[yours[0]].task and yours not in pairs
        ]
        pairs += [mine, of_task[0]] if of_task else []
    if not pairs:
        raise ValueError(
            "bridge: needs a circuit of its student and one of the dense model it was fitted to, of one task; "
            f"the circuits given are of {', '.join(sorted({circuit.model_name for circuit in circuits}))}"
        )
    return [*pairs, *(part for part in curves if part not in pairs)], len(pairs) // 2


def _links(
    curves: Sequence[Sequence[int]],
    circuits: Sequence[Circuit],
    subjects: dict[str, Subject],
    tasks: dict[str, Task],
    bridges: Bridges,
    config: ViewConfig,
) -> list[dict[str, Any]]:
    """Links between two curves, the dense model's first, over the nodes of all their circuits."""
    ends = [[circuits[place] for place in part] for part in curves]
    dense, student = (subjects[part[0].model] for part in ends)
    unions = [{loc: _any([one.nodes[loc] for one in part]) for loc in part[0].nodes} for part in ends]
    task = tasks[ends[0][0].task]
    pairs = min(config.judged, task.size("test"))
    batch = encode(task, dense.tokenizer, "test", pairs, config.seed, context=dense.model.context)
    device = next(dense.model.parameters()).device
    return node_links(
        dense.model,
        student.model,
        bridges.to(device),
        batch.to(device),
        dense.means,
        (unions[0], unions[1]),
    )


def _any(masks: Sequence[Any]) -> Any:
    found = masks[0]
    for mask in masks[1:]:
        found = found | mask
    return found

"""Tasks: next-token choices between two completions, kept as data [G Table 1].

    task = load_task("for_while")          # built in, or load_task("mine.jsonl"): one pair of texts a line
    batch = encode(task, tokenizer, "test", 200, seed=0)
    loss = task_loss(model.readout(...), batch).mean()

The built-in tasks are template files in `task_data` (see the README there); a user's own is a JSONL file. Everything
downstream treats both alike: `load_task` reads and checks the file, `Task.pairs` draws pairs without repeats, `encode`
turns them into token ids with one answer token each, `batches` deals these out for training, `task_loss` scores logits,
`nonsense` and `shuffled` make controls.
"""

import re
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from distill.circuits.task_batches import TaskBatch, batches, encode, logit_difference, task_loss
from distill.circuits.task_controls import nonsense, shuffled
from distill.circuits.task_files import read_lines, read_templates
from distill.circuits.task_fit import MisfitError, spelled
from distill.circuits.task_pairs import KINDS, SPLITS, Family, Listed, Pair, Source, Task

__all__ = [
    "KINDS",
    "SPLITS",
    "Family",
    "Listed",
    "MisfitError",
    "Pair",
    "Source",
    "Task",
    "TaskBatch",
    "batches",
    "encode",
    "load_task",
    "logit_difference",
    "nonsense",
    "shuffled",
    "spelled",
    "task_loss",
    "task_names",
]

_CONTROL = re.compile(r"(?P<task>.+):(?P<control>nonsense|shuffled(?P<seed>\d*))")


def task_names(kind: str = "python") -> list[str]:
    """Names of the built-in tasks of a kind, sorted.

    `kind` is "python" (the twenty choices of [G Table 1]), "language" (English, for models with a natural-language
    tokenizer), or "all". ValueError for any other.
    """
    if kind not in (*KINDS, "all"):
        raise ValueError(f"kind: got {kind!r}; allowed: {', '.join(KINDS)}, all")
    names = sorted(entry.name.removesuffix(".json") for entry in _data().iterdir() if entry.name.endswith(".json"))
    return [name for name in names if kind == "all" or _built_in(name).kind == kind]


def load_task(name_or_path: str | Path) -> Task:
    """Read a task; a user's own file is checked as it is read.

    Args:
        name_or_path: a built-in name (`task_names`), or the path of a `.jsonl` file with one pair per line: `clean`,
            `corrupt`, `answer` (completion of clean), `other` (completion of corrupt), and if wished `split`. Lines
            without a split are dealt out, half to train, a quarter each to val and test. Either may be followed by
            `:nonsense`, `:shuffled` or `:shuffled7` (a seed) for that control of the task.

    Raises:
        ValueError: unknown name (the message lists the known ones), no such file, or a fault in the file (the
            message names file, line and field).
    """
    control = _CONTROL.fullmatch(str(name_or_path))
    if control is not None:
        task = load_task(control["task"])
        return nonsense(task) if control["control"] == "nonsense" else shuffled(task, int(control["seed"] or 0))
    path = Path(name_or_path)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ValueError(f"task: no such file: {path}")
        return read_lines(path)
    if str(name_or_path) not in task_names("all"):
        known = ", ".join(task_names("all"))
        raise ValueError(f"task: unknown task {str(name_or_path)!r}; known: {known}, or the path of a .jsonl file")
    return _built_in(str(name_or_path))


def _data() -> Any:
    return resources.files("distill.circuits") / "task_data"


@lru_cache
def _built_in(name: str) -> Task:
    return read_templates((_data() / f"{name}.json").read_bytes())

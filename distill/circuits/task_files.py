"""Tasks from files: the built-in template files, and a user's own pairs as JSONL.

A template file (`task_data/{name}.json`) holds name, kind, description, the classes, and

    spellings   completions by class, and for code the closings that make whole statements of them; the first is the
                one meant, further ones are for tokenizers that it does not fit
    parts       the class-dependent slots: how each is written in a text of the first and of the second class
    splits      per split the template families (lists of lines), `ends` (what a family wants behind the closing), and
                the fillers (lists of what the slots may hold)

A user's file has one pair per line; it is checked as it is read, and every fault is named by file, line and field.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from distill.circuits.task_pairs import SPLITS, Family, Listed, Pair, Task

PAIR_FIELDS = ("clean", "corrupt", "answer", "other")
# Lines without a split of their own are dealt out in this order: half for pruning, a quarter for each other.
_DEAL = ("train", "val", "train", "test")


def read_templates(raw: bytes) -> Task:
    """A task from a template file of the package, which the tests check, so that it need not be checked here."""
    record = json.loads(raw)
    first, *others = (_spelled(record, raw, spelling) for spelling in record["spellings"])
    return Task(**{**vars(first), "others": tuple(others)})


def _spelled(record: Mapping[str, Any], raw: bytes, spelling: Mapping[str, Any]) -> Task:
    completions = tuple(spelling["completions"])
    return Task(
        **{field: record[field] for field in ("name", "kind", "description", "choice", "shift_change")},
        classes=tuple(record["classes"]),
        oriented=not any(Template(completion).get_identifiers() for completion in completions),
        own=False,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        splits={split: _families(record, spelling, content) for split, content in record["splits"].items()},
    )


def _families(record: Mapping[str, Any], spelling: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[Family, ...]:
    """Families of one split, each with the one class-dependent part that its template names."""
    fillers = {key: tuple(entries) for key, entries in content["fillers"].items()}
    closings = spelling.get("closings")
    families = []
    for name, lines in content["families"].items():
        text = "\n".join(lines)
        (part,) = record["parts"].keys() & set(Template(text).get_identifiers())
        end = content.get("ends", {}).get(name, "")
        families.append(
            Family(
                name=name,
                text=text,
                part=part,
                variants=tuple(record["parts"][part]),
                completions=tuple(spelling["completions"]),
                fillers=fillers,
                closings=None if closings is None else (closings[0] + end, closings[1] + end),
            )
        )
    return tuple(families)


def read_lines(path: Path) -> Task:
    """A user's own task: one pair per line with `clean`, `corrupt`, `answer`, `other`, and if wished `split`.

    Lines without a split are dealt out by their hash, half to train, a quarter each to val and test. The task is called
    after the file. Where the file holds two completions in all, the one that comes first is the first class's.

    ValueError naming file, line and field for whatever is wrong.
    """
    raw = path.read_bytes()
    records: list[tuple[dict[str, str], int]] = []
    line_of: dict[frozenset[tuple[str, str]], int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        if line.strip():
            record = _object(line, f"{path}, line {number}")
            _check_pair(record, f"{path}, line {number}")
            # A pair is the same pair with its texts exchanged: it may not stand in two splits.
            key = frozenset({(record["clean"], record["answer"]), (record["corrupt"], record["other"])})
            if line_of.setdefault(key, number) != number:
                raise ValueError(f"{path}, line {number}: field 'clean' repeats the pair of line {line_of[key]}")
            records.append((record, number))
    if not records:
        raise ValueError(f"{path}: no pairs; one JSON object per line with the fields {', '.join(PAIR_FIELDS)}")
    return _listed_task(records, path, hashlib.sha256(raw).hexdigest())


def _listed_task(records: Sequence[tuple[dict[str, str], int]], path: Path, fingerprint: str) -> Task:
    completions = list(dict.fromkeys(record[field] for record, _ in records for field in ("answer", "other")))
    oriented = len(completions) == 2
    listed: dict[str, list[tuple[Pair, str]]] = {}
    for record, number, split in _deal(records):
        label = completions.index(record["answer"]) if oriented else 0
        clean, corrupt, answer, other = (record[field] for field in PAIR_FIELDS)
        where = f"{path}, line {number}"
        listed.setdefault(split, []).append((Pair(clean, corrupt, answer, other, label), where))
    return Task(
        name=path.stem,
        kind="own",
        description=f"own task of {path.name}",
        choice=" or ".join(map(repr, completions[:2])) if oriented else "varies by pair",
        shift_change="",
        classes=(completions[0], completions[1]) if oriented else ("clean", "corrupt"),
        oriented=oriented,
        own=True,
        fingerprint=fingerprint,
        splits={
            split: (Listed(listed=tuple(pair for pair, _ in held), lines=tuple(where for _, where in held)),)
            for split, held in sorted(listed.items(), key=lambda entry: SPLITS.index(entry[0]))
        },
    )


def _check_pair(record: Mapping[str, Any], where: str) -> None:
    for field in sorted(record.keys() - {*PAIR_FIELDS, "split"}):
        raise ValueError(f"{where}: unknown field {field!r}; allowed: {', '.join(PAIR_FIELDS)}, split")
    for field in PAIR_FIELDS:
        if not isinstance(record.get(field), str) or not record[field]:
            raise ValueError(f"{where}: field {field!r} must be a text that is not empty, got {record.get(field)!r}")
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise ValueError(f"{where}: field {field!r} holds half of a surrogate pair, which is no character")
    for field, twin in (("corrupt", "clean"), ("other", "answer")):
        if record[field] == record[twin]:
            raise ValueError(f"{where}: field {field!r} equals {twin!r}: {record[field]!r}; they must differ")
    if record.get("split", SPLITS[0]) not in SPLITS:
        raise ValueError(f"{where}: field 'split' is {record['split']!r}; allowed: {', '.join(SPLITS)}")


def _deal(records: Sequence[tuple[dict[str, str], int]]) -> list[tuple[dict[str, str], int, str]]:
    """Give each record its split; those that name none are dealt out by their hash, whatever their order."""
    named = [(record, number, record["split"]) for record, number in records if "split" in record]
    rest = [(record, number) for record, number in records if "split" not in record]
    rest.sort(key=lambda entry: hashlib.sha256(json.dumps(entry[0], sort_keys=True).encode()).digest())
    return named + [(record, number, _DEAL[place % len(_DEAL)]) for place, (record, number) in enumerate(rest)]


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
    return record

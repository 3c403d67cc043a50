"""Tasks: next-token choices between two completions, kept as data [G Table 1].

A built-in task is a JSON file in `task_data`. For each split it lists template families (lines of code with
`$slots`) and fillers (what the slots may hold). Exactly one slot of a template is the class-dependent part, so
the two texts of a pair differ in one place: the one that decides the answer. A slot that ends in digits draws
from the list named without them (`$number1`, `$number2`: two different entries of `number`).

A user's own task is a JSONL file with one pair per line; everything downstream treats both alike:
`load_task` reads and checks the file, `Task.pairs` draws pairs without repeats, `encode` turns them into token
ids with one answer token each, `task_loss` scores logits.
"""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "val", "test", "shift")
"""Pruning, discretising and clean-up, reporting, and reporting on a changed distribution."""

_PAIR_FIELDS = ("clean", "corrupt", "answer", "other")
# Lines without a split of their own are dealt out in this order: half for pruning, a quarter for each other.
_DEAL = ("train", "val", "train", "test")


@dataclass(frozen=True)
class Pair:
    """Two texts that differ only in what decides the answer, and the completion of each.

    `label` is the class (0 or 1) of `answer`, the completion of `clean`; the corrupt text has the other class.
    """

    clean: str
    corrupt: str
    answer: str
    other: str
    label: int = 0

    def turned(self) -> "Pair":
        """The same pair with clean and corrupt exchanged."""
        return Pair(self.corrupt, self.clean, self.other, self.answer, 1 - self.label)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One template with its slots: `size` different pairs, numbered from 0, of which `at` writes one out."""

    name: str
    text: str
    part: str
    variants: tuple[str, str]
    completions: tuple[str, str]
    fillers: Mapping[str, tuple[str, ...]]

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Slots to be filled, in order of appearance; those inside the part and the completions included."""
        written = (self.text, *self.variants, *self.completions)
        found = dict.fromkeys(slot for text in written for slot in Template(text).get_identifiers())
        return tuple(slot for slot in found if slot != self.part)

    @cached_property
    def size(self) -> int:
        """Number of different pairs: slots that share a list never hold the same entry."""
        lists = [_list_of(slot) for slot in self.slots]
        return math.prod(len(self.fillers[name]) - lists[:place].count(name) for place, name in enumerate(lists))

    def at(self, index: int) -> Pair:
        """Pair number `index`, 0 <= index < size, with the text of the first class as clean."""
        values: dict[str, str] = {}
        for slot in self.slots:
            free = [entry for entry in self.fillers[_list_of(slot)] if entry not in values.values()]
            index, choice = divmod(index, len(free))
            values[slot] = free[choice]
        first, second = (
            Template(self.text).substitute(values, **{self.part: Template(variant).substitute(values)})
            for variant in self.variants
        )
        answer, other = (Template(completion).substitute(values) for completion in self.completions)
        return Pair(first, second, answer, other)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Pairs written out one by one, as in a user's own file; the same interface as a family."""

    listed: tuple[Pair, ...]

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.listed)

    def at(self, index: int) -> Pair:
        """Pair number `index`, 0 <= index < size."""
        return self.listed[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A next-token choice between two completions, with disjoint splits.

    `oriented` says that the two completions are the same in all pairs, so that a class has an answer of its own
    and calibration may shift one class against the other [G A.5]. `own` marks a user's file: its pairs keep their
    direction, and a pair that does not fit a tokenizer is an error. `fingerprint` is the sha256 of the file.
    """

    name: str
    description: str
    choice: str
    shift_change: str
    classes: tuple[str, str]
    oriented: bool
    own: bool
    fingerprint: str
    splits: Mapping[str, tuple[Family | Listed, ...]]

    def size(self, split: str) -> int:
        """Number of different pairs that a split holds; ValueError for a split that the task does not have."""
        return sum(source.size for source in self._sources(split))

    def pairs(self, split: str, n: int, seed: int) -> list[Pair]:
        """Draw pairs without repeats; a longer draw with the same seed begins with the shorter one.

        Families take turns, and of every two pairs drawn one has the first class as clean, the other the second
        (a user's own pairs keep their direction).

        Args:
            split: one of the task's splits.
            n: number of pairs, 1 to `size(split)`.
            seed: any integer; the draw depends on task name, split and seed alone.

        Returns:
            n different pairs.

        Raises:
            ValueError: the split is not there, or n is not within 1 and what it holds.
        """
        self._check_count(split, n)
        return self._balance(list(islice(self._stream(split, seed), n)), split, seed)

    def _sources(self, split: str) -> tuple[Family | Listed, ...]:
        if not self.splits.get(split):
            held = ", ".join(name for name in SPLITS if self.splits.get(name))
            raise ValueError(f"split: task {self.name!r} has no pairs in {split!r}; splits with pairs: {held}")
        return self.splits[split]

    def _check_count(self, split: str, n: int) -> None:
        held = self.size(split)
        if not 1 <= n <= held:
            raise ValueError(f"n: {n} pairs asked of split {split!r} of task {self.name!r}; it holds 1 to {held}")

    def _random(self, split: str, seed: int, purpose: str) -> random.Random:
        return random.Random(f"{self.name}/{split}/{seed}/{purpose}")

    def _stream(self, split: str, seed: int) -> Iterator[Pair]:
        """All pairs of a split in random order, families in turn until each is used up."""
        rng = self._random(split, seed, "order")
        sources = self._sources(split)
        draws = [map(source.at, _shuffled(source.size, rng)) for source in rng.sample(sources, len(sources))]
        while draws:
            drawn = [(next(draw, None), draw) for draw in draws]
            yield from (pair for pair, _ in drawn if pair is not None)
            draws = [draw for pair, draw in drawn if pair is not None]

    def _balance(self, pairs: list[Pair], split: str, seed: int) -> list[Pair]:
        """Turn one of every two pairs, chosen by the seed."""
        if self.own:
            return pairs
        rng = self._random(split, seed, "direction")
        coins = [rng.randrange(2) for _ in pairs[::2]]
        return [pair.turned() if (coins[at // 2] + at) % 2 else pair for at, pair in enumerate(pairs)]


@dataclass(frozen=True, kw_only=True)
class TaskBatch:
    """Encoded pairs: rows [0:n] are the clean texts, rows [n:2n] their corrupts, answer and other exchanged.

    Right-padded; R = 2n rows. `last` is the index of each row's last prompt token, whose logits hold the answer.
    `labels` is the class (0 or 1) of a row's right answer, `orientation` +1 for class 0 and -1 for class 1, and 0
    throughout where the answer tokens vary per pair. `dropped` counts pairs left out because they do not fit the
    tokenizer.
    """

    tokens: Int[Tensor, "R T"]
    attention_mask: Int[Tensor, "R T"]
    last: Int[Tensor, " R"]
    answer: Int[Tensor, " R"]
    other: Int[Tensor, " R"]
    orientation: Float[Tensor, " R"]
    labels: Int[Tensor, " R"]
    dropped: int = 0

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The same batch on another device."""
        return self._each(lambda value: value.to(device))

    def select(self, rows: Int[Tensor, " K"] | slice) -> "TaskBatch":
        """Only these rows, in this order; halves are clean and corrupt only if the rows are chosen so."""
        return self._each(lambda value: value[rows])

    def _each(self, change: Any) -> "TaskBatch":
        tensors = {key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


def task_names() -> list[str]:
    """Names of the built-in tasks, sorted."""
    return sorted(entry.name.removesuffix(".json") for entry in _data().iterdir() if entry.name.endswith(".json"))


def load_task(name_or_path: str | Path) -> Task:
    """Read a task; a user's own file is checked as it is read.

    Args:
        name_or_path: a built-in name (`task_names`), or the path of a `.jsonl` file with one pair per line: `clean`,
            `corrupt`, `answer` (completion of clean), `other` (completion of corrupt), and if wished `split`. Lines
            without a split are dealt out, half to train, a quarter each to val and test.

    Raises:
        ValueError: unknown name (the message lists the known ones), no such file, or a fault in the file (the
            message names file, line and field).
    """
    path = Path(name_or_path)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ValueError(f"task: no such file: {path}")
        return _parse_lines(path.read_bytes(), path)
    if str(name_or_path) not in task_names():
        known = ", ".join(task_names())
        raise ValueError(f"task: unknown task {str(name_or_path)!r}; known: {known}, or the path of a .jsonl file")
    return _built_in(str(name_or_path))


def encode(
    task: Task, tokenizer: PreTrainedTokenizerBase, split: str, n: int, seed: int, *, context: int | None = None
) -> TaskBatch:
    """Draw pairs as `Task.pairs` does and find the answer token of each.

    Right and wrong completion are tokenized in context; both must begin with the prompt's own tokens. The answer
    is the first token at which they differ; tokens they share before it join the prompt. A pair of a built-in
    task for which this cannot be done is replaced by another and counted in `dropped`.

    Args:
        task: from `load_task`.
        tokenizer: of the model that will see the batch; no special tokens are added.
        split: one of the task's splits.
        n: number of pairs; the batch has 2n rows.
        seed: of the draw.
        context: largest number of tokens the model takes; None for no check.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: as `Task.pairs`; fewer than n pairs fit the tokenizer (any misfit for an own task); a prompt is
            longer than the context.
    """
    task._check_count(split, n)
    # A tokenizer that fails this many pairs of a built-in task does not fit it: no use in trying them all.
    stream = islice(task._stream(split, seed), n if task.own else 8 * n + 64)
    kept: dict[Pair, tuple[_Row, _Row]] = {}
    faults: list[str] = []
    while len(kept) < n:
        drawn = list(islice(stream, n - len(kept)))
        if not drawn:
            raise ValueError(
                f"task {task.name!r} does not fit this tokenizer: {len(kept)} of {len(kept) + len(faults)} pairs of "
                f"split {split!r} fit, {n} asked; for example {faults[0]}"
            )
        for pair, found in zip(drawn, _find_answers(drawn, tokenizer), strict=True):
            if not isinstance(found, str):
                kept[pair] = found
            elif task.own:
                raise ValueError(f"task {task.name!r} does not fit this tokenizer: {found}")
            else:
                faults.append(found)
    pairs = task._balance(list(kept), split, seed)
    first = [kept.get(pair) or kept[pair.turned()][::-1] for pair in pairs]
    rows = [clean for clean, _ in first] + [corrupt for _, corrupt in first]
    labels = torch.tensor([pair.label for pair in pairs] + [1 - pair.label for pair in pairs])
    longest = max(len(row.ids) for row in rows)
    if context is not None and longest > context:
        raise ValueError(f"task {task.name!r}: a prompt has {longest} tokens; the model's context allows {context}")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    return _collate(rows, labels, task.oriented, pad, len(faults))


def logit_difference(logits: Float[Tensor, "R V"], batch: TaskBatch) -> Float[Tensor, " R"]:
    """Logit of the right answer minus that of the wrong one, per row; `logits` at each row's last prompt token."""
    right = logits.gather(1, batch.answer[:, None])
    return (right - logits.gather(1, batch.other[:, None]))[:, 0]


def task_loss(logits: Float[Tensor, "R V"], batch: TaskBatch) -> Float[Tensor, " R"]:
    """Two-way cross-entropy between right and wrong answer [G 2.2], nats per row; 0.693 is chance.

    `logits` are those at each row's last prompt token. The task loss is the mean, both members of each pair counted.
    """
    return functional.softplus(-logit_difference(logits, batch))


@dataclass(frozen=True)
class _Row:
    """A prompt's token ids (shared tokens of the completions included) and the two answer tokens."""

    ids: tuple[int, ...]
    answer: int
    other: int


def _find_answers(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[tuple[_Row, _Row] | str]:
    """For each pair its clean and corrupt row, or in words why it does not fit the tokenizer."""
    texts = [
        prompt + completion
        for pair in pairs
        for prompt, right, wrong in ((pair.clean, pair.answer, pair.other), (pair.corrupt, pair.other, pair.answer))
        for completion in ("", right, wrong)
    ]
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    found: list[tuple[_Row, _Row] | str] = []
    for place, pair in enumerate(pairs):
        six = ids[6 * place : 6 * place + 6]
        clean = _find_answer(pair.clean, pair.answer, pair.other, six[:3], tokenizer)
        corrupt = _find_answer(pair.corrupt, pair.other, pair.answer, six[3:], tokenizer)
        if isinstance(clean, str) or isinstance(corrupt, str):
            found.append(clean if isinstance(clean, str) else str(corrupt))
        elif (clean.answer, clean.other) != (corrupt.other, corrupt.answer):
            found.append(f"the answer tokens after {pair.clean!r} are not those after {pair.corrupt!r}")
        else:
            found.append((clean, corrupt))
    return found


def _find_answer(
    prompt: str, right: str, wrong: str, ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> _Row | str:
    """The row of one prompt, given the ids of prompt, prompt + right and prompt + wrong; or the fault in words."""
    start, with_right, with_wrong = ids
    for completion, whole in ((right, with_right), (wrong, with_wrong)):
        if whole[: len(start)] != start:
            tokens = tokenizer.convert_ids_to_tokens(whole)
            return f"the answer {completion!r} straddles the end of the prompt {prompt!r} (tokens {tokens})"
    for place, (answer, other) in enumerate(zip(with_right, with_wrong, strict=False)):
        if answer != other and place > 0:
            return _Row(tuple(with_right[:place]), answer, other)
    tokens = [tokenizer.convert_ids_to_tokens(whole[len(start) :]) for whole in (with_right, with_wrong)]
    return (
        f"the answers {right!r} and {wrong!r} after {prompt!r} cannot be told apart by one token "
        f"(tokens {tokens[0]} and {tokens[1]})"
    )


def _collate(rows: Sequence[_Row], labels: Tensor, oriented: bool, pad: int, dropped: int) -> TaskBatch:
    """Rows as right-padded tensors. Causal models never look right, so any pad id gives the same answers."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    width = int(lengths.max())
    return TaskBatch(
        tokens=torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in rows]),
        attention_mask=(torch.arange(width) < lengths[:, None]).long(),
        last=lengths - 1,
        answer=torch.tensor([row.answer for row in rows]),
        other=torch.tensor([row.other for row in rows]),
        orientation=(1.0 - 2.0 * labels) * float(oriented),
        labels=labels,
        dropped=dropped,
    )


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """A random order of range(size), drawn as it is read: a Fisher-Yates shuffle that stores only what moved."""
    moved: dict[int, int] = {}
    for place in range(size):
        pick = rng.randrange(place, size)
        yield moved.get(pick, pick)
        moved[pick] = moved.get(place, place)


def _list_of(slot: str) -> str:
    """Name of the filler list that a slot draws from."""
    return slot.rstrip("0123456789")


def _data() -> Any:
    return resources.files("distill.circuits") / "task_data"


@lru_cache
def _built_in(name: str) -> Task:
    """A task from its template file, which the tests check, so that it need not be checked at each start."""
    raw = (_data() / f"{name}.json").read_bytes()
    record = json.loads(raw)
    return Task(
        **{field: record[field] for field in ("name", "description", "choice", "shift_change", "oriented")},
        classes=tuple(record["classes"]),
        own=False,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        splits={split: _families(record, content) for split, content in record["splits"].items()},
    )


def _families(record: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[Family, ...]:
    """Families of one split, each with the one class-dependent part that its template names."""
    fillers = {key: tuple(entries) for key, entries in content["fillers"].items()}
    completions = tuple(record["completions"])
    families = []
    for name, lines in content["families"].items():
        text = "\n".join(lines)
        (part,) = record["parts"].keys() & set(Template(text).get_identifiers())
        variants = tuple(record["parts"][part])
        families.append(
            Family(name=name, text=text, part=part, variants=variants, completions=completions, fillers=fillers)
        )
    return tuple(families)


def _parse_lines(raw: bytes, path: Path) -> Task:
    """A user's own task: one pair per line."""
    records: list[dict[str, str]] = []
    line_of: dict[frozenset[tuple[str, str]], int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        if line.strip():
            record = _object(line, f"{path}, line {number}")
            _check_pair(record, f"{path}, line {number}")
            # A pair is the same pair with its texts exchanged: it may not stand in two splits.
            key = frozenset({(record["clean"], record["answer"]), (record["corrupt"], record["other"])})
            if line_of.setdefault(key, number) != number:
                raise ValueError(f"{path}, line {number}: field 'clean' repeats the pair of line {line_of[key]}")
            records.append(record)
    if not records:
        raise ValueError(f"{path}: no pairs; one JSON object per line with the fields {', '.join(_PAIR_FIELDS)}")
    completions = list(dict.fromkeys(record[f] for record in records for f in ("answer", "other")))
    oriented = len(completions) == 2
    listed: dict[str, list[Pair]] = {}
    for record, split in _deal(records):
        label = completions.index(record["answer"]) if oriented else 0
        clean, corrupt, answer, other = (record[field] for field in _PAIR_FIELDS)
        listed.setdefault(split, []).append(Pair(clean, corrupt, answer, other, label))
    return Task(
        name=path.stem,
        description=f"own task of {path.name}",
        choice=" or ".join(map(repr, completions[:2])) if oriented else "varies by pair",
        shift_change="",
        classes=(completions[0], completions[1]) if oriented else ("clean", "corrupt"),
        oriented=oriented,
        own=True,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        splits={split: (Listed(listed=tuple(pairs)),) for split, pairs in listed.items()},
    )


def _check_pair(record: Mapping[str, Any], where: str) -> None:
    for field in sorted(record.keys() - {*_PAIR_FIELDS, "split"}):
        raise ValueError(f"{where}: unknown field {field!r}; allowed: {', '.join(_PAIR_FIELDS)}, split")
    for field in _PAIR_FIELDS:
        if not isinstance(record.get(field), str) or not record[field]:
            raise ValueError(f"{where}: field {field!r} must be a text that is not empty, got {record.get(field)!r}")
    for field, twin in (("corrupt", "clean"), ("other", "answer")):
        if record[field] == record[twin]:
            raise ValueError(f"{where}: field {field!r} equals {twin!r}: {record[field]!r}; they must differ")
    if record.get("split", SPLITS[0]) not in SPLITS:
        raise ValueError(f"{where}: field 'split' is {record['split']!r}; allowed: {', '.join(SPLITS)}")


def _deal(records: Sequence[dict[str, str]]) -> list[tuple[dict[str, str], str]]:
    """Give each record its split; those that name none are dealt out by their hash, whatever their order."""
    named = [(record, record["split"]) for record in records if "split" in record]
    rest = [record for record in records if "split" not in record]
    rest.sort(key=lambda record: hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest())
    return named + [(record, _DEAL[place % len(_DEAL)]) for place, record in enumerate(rest)]


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
    return record

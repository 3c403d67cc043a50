"""Pairs of texts that differ in what decides an answer, and tasks to draw them from [G Table 1].

A template family writes pairs: lines of text with `$slots`, of which exactly one is the class-dependent part, so that
the two texts of a pair differ in one place. A slot that ends in digits draws from the list named without them
(`$number1`, `$number2`: two different entries of `number`). A user's own pairs are listed one by one.
"""

import math
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from string import Template
from typing import Protocol, runtime_checkable

SPLITS = ("train", "val", "test", "shift")
"""Pruning, discretising and clean-up, reporting, and reporting on a changed distribution."""
KINDS = ("python", "language")
"""What a task's texts are: Python code, or English for models with a natural-language tokenizer."""


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


@runtime_checkable
class Source(Protocol):
    """Where a task's pairs come from: `size` different ones, numbered from 0."""

    @property
    def size(self) -> int:
        """Number of pairs."""
        ...

    def at(self, index: int, /) -> Pair:
        """Pair number `index`, 0 <= index < size."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """One template with its slots; `at` writes out one of its pairs, the text of the first class as clean.

    `closings` is what makes whole statements of prompt and completion, by class, with `$indent` for the indentation of
    the prompt's last line; None where the text is not code.
    """

    name: str
    text: str
    part: str
    variants: tuple[str, str]
    completions: tuple[str, str]
    fillers: Mapping[str, tuple[str, ...]]
    closings: tuple[str, str] | None = None

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Slots of the prompts, in order of appearance, those inside the part included."""
        return self._found(self.text, *self.variants)

    @property
    def size(self) -> int:
        """Number of different pairs of prompts: slots that share a list never hold the same entry."""
        lists = [list_of(slot) for slot in self.slots]
        return math.prod(len(self.fillers[name]) - lists[:place].count(name) for place, name in enumerate(lists))

    def at(self, index: int, /) -> Pair:
        """Pair number `index`, 0 <= index < size, with the text of the first class as clean."""
        values = self._values(index)
        first, second = (
            Template(self.text).substitute(values, **{self.part: Template(variant).substitute(values)})
            for variant in self.variants
        )
        answer, other = (Template(completion).substitute(values) for completion in self.completions)
        return Pair(first, second, answer, other)

    def programs(self, index: int) -> tuple[str, str]:
        """Both texts of pair `index` with their completions and closings: whole statements of Python.

        ValueError for a family without closings, which does not claim to be code.
        """
        if self.closings is None:
            raise ValueError(f"closings: template family {self.name!r} has none; its texts are no whole programs")
        pair, values = self.at(index), self._values(index)
        whole = []
        for text, completion, closing in zip(
            (pair.clean, pair.corrupt), (pair.answer, pair.other), self.closings, strict=True
        ):
            last = text.rsplit("\n", 1)[-1]
            indent = last[: len(last) - len(last.lstrip())]
            whole.append(text + completion + Template(closing).substitute(values, indent=indent))
        return whole[0], whole[1]

    def _values(self, index: int) -> dict[str, str]:
        """What the slots hold in pair `index`; slots of the completions alone follow from it, as if drawn."""
        values: dict[str, str] = {}
        rest = index
        for slot in self.slots:
            free = self._free(slot, values)
            rest, choice = divmod(rest, len(free))
            values[slot] = free[choice]
        for slot in self._found(*self.completions):
            if slot not in values:
                free = self._free(slot, values)
                values[slot] = free[zlib.crc32(f"{slot} {index}".encode()) % len(free)]
        return values

    def _free(self, slot: str, values: Mapping[str, str]) -> list[str]:
        return [entry for entry in self.fillers[list_of(slot)] if entry not in values.values()]

    def _found(self, *texts: str) -> tuple[str, ...]:
        found = dict.fromkeys(slot for text in texts for slot in Template(text).get_identifiers())
        return tuple(slot for slot in found if slot != self.part)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Pairs written out one by one, as in a user's own file; `lines` says where each stands, for messages."""

    listed: tuple[Pair, ...]
    lines: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.listed)

    def at(self, index: int, /) -> Pair:
        """Pair number `index`, 0 <= index < size."""
        return self.listed[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A next-token choice between two completions, with disjoint splits."""

    name: str
    """What tables and files call it."""
    kind: str
    """python or language."""
    description: str
    """The rule, in a sentence."""
    choice: str
    """The two completions, in words."""
    shift_change: str
    """How the texts of the split `shift` differ from the others."""
    classes: tuple[str, str]
    """Names of the two classes of text."""
    oriented: bool
    """Whether the two completions are the same in all pairs, so that a class has an answer of its own and calibration
    may shift one class against the other [G A.5]."""
    own: bool
    """Whether it is a user's file: pairs keep their direction, and one that does not fit a tokenizer is an error."""
    fingerprint: str
    """sha256 of the file, and for a control of how it was changed."""
    splits: Mapping[str, tuple[Source, ...]]
    """Where the pairs of each split come from."""
    others: tuple["Task", ...] = ()
    """The same task with other completions, for tokenizers that the first spelling does not fit, in order."""
    drawn_as: str = ""
    """Name that seeds the draw, if not the task's own: a control is drawn as the task it controls."""

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
        self.check_count(split, n)
        return self.balanced(list(islice(self.stream(split, seed), n)), split, seed)

    def check_count(self, split: str, n: int) -> None:
        """ValueError unless the split can give `n` pairs."""
        held = self.size(split)
        if not 1 <= n <= held:
            raise ValueError(f"n: {n} pairs asked of split {split!r} of task {self.name!r}; it holds 1 to {held}")

    def stream(self, split: str, seed: int) -> Iterator[Pair]:
        """All pairs of a split in random order, as their sources write them, sources in turn until each is used up."""
        rng = self._random(split, seed, "order")
        sources = self._sources(split)
        draws = [map(source.at, _shuffled(source.size, rng)) for source in rng.sample(sources, len(sources))]
        while draws:
            drawn = [(next(draw, None), draw) for draw in draws]
            yield from (pair for pair, _ in drawn if pair is not None)
            draws = [draw for pair, draw in drawn if pair is not None]

    def balanced(self, pairs: list[Pair], split: str, seed: int) -> list[Pair]:
        """One of every two pairs turned, chosen by the seed; a user's own pairs as they are."""
        if self.own:
            return pairs
        rng = self._random(split, seed, "direction")
        coins = [rng.randrange(2) for _ in pairs[::2]]
        return [pair.turned() if (coins[at // 2] + at) % 2 else pair for at, pair in enumerate(pairs)]

    def where(self, pair: Pair) -> str:
        """File and line of a user's own pair, followed by a colon; empty for any other."""
        for sources in self.splits.values():
            for source in sources:
                if isinstance(source, Listed) and source.lines and pair in source.listed:
                    return f"{source.lines[source.listed.index(pair)]}: "
        return ""

    def _sources(self, split: str) -> tuple[Source, ...]:
        if not self.splits.get(split):
            held = ", ".join(name for name in SPLITS if self.splits.get(name))
            raise ValueError(f"split: task {self.name!r} has no pairs in {split!r}; splits with pairs: {held}")
        return self.splits[split]

    def _random(self, split: str, seed: int, purpose: str) -> random.Random:
        return random.Random(f"{self.drawn_as or self.name}/{split}/{seed}/{purpose}")


def list_of(slot: str) -> str:
    """Name of the filler list that a slot draws from."""
    return slot.rstrip("0123456789")


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """A random order of range(size), drawn as it is read: a Fisher-Yates shuffle that stores only what moved."""
    moved: dict[int, int] = {}
    for place in range(size):
        pick = rng.randrange(place, size)
        yield moved.get(pick, pick)
        moved[pick] = moved.get(place, place)

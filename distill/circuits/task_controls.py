"""Controls of a task: the same pairs with answers that no model has a reason to give (FAITHFULNESS.md, check 10).

Pruning that finds a circuit for these as easily as for the task itself tells nothing of the model. Exchanging the two
labels throughout would be no control, as a calibration with a negative scale undoes it.
"""

import hashlib
from dataclasses import dataclass, replace

from distill.circuits.task_pairs import Pair, Source, Task

UNRELATED = ((" blue", " seven"), (" Thursday", " zinc"), ("~", "^"))
"""Completions that have nothing to do with any task, by class; the first pair that a tokenizer allows is taken."""


@dataclass(frozen=True, kw_only=True)
class _Unrelated:
    """The pairs of a source, answered by fixed completions, one for each class."""

    source: Source
    completions: tuple[str, str]

    @property
    def size(self) -> int:
        return self.source.size

    def at(self, index: int, /) -> Pair:
        pair = self.source.at(index)
        return replace(pair, answer=self.completions[pair.label], other=self.completions[1 - pair.label])


@dataclass(frozen=True, kw_only=True)
class _Shuffled:
    """The pairs of a source, with the answers of some pairs exchanged: which ones a hash of seed and pair decides."""

    source: Source
    seed: int

    @property
    def size(self) -> int:
        return self.source.size

    def at(self, index: int, /) -> Pair:
        pair = self.source.at(index)
        # Sorted, so that a pair and the same pair with its texts exchanged fall alike.
        digest = hashlib.sha256("\0".join([str(self.seed), *sorted((pair.clean, pair.corrupt))]).encode()).digest()
        if digest[0] % 2:
            return pair
        return replace(pair, answer=pair.other, other=pair.answer, label=1 - pair.label)


def nonsense(task: Task) -> Task:
    """The same pairs, to be answered by unrelated completions: one for the first class, another for the second.

    A rule like the task's own, which a model can only follow by telling the classes apart and was never taught. Pairs,
    splits and draws are the task's; the answers are the same in all pairs, so classes are oriented. In a user's file
    whose completions vary, the classes are the clean and the corrupt texts.
    """
    first, *others = (_with_completions(task, completions) for completions in UNRELATED)
    return replace(first, others=tuple(others))


def shuffled(task: Task, seed: int) -> Task:
    """The same pairs, with right and wrong answer exchanged in about half of them, drawn by `seed`.

    There is no rule left to find: beyond its prompts nothing does better than chance, 0.693 nats. A pair has the same
    answers in every draw.
    """
    name, fingerprint = f"{task.name}_shuffled{seed}", f"{task.fingerprint}-shuffled{seed}"
    others = tuple(
        replace(
            other, name=name, fingerprint=fingerprint, drawn_as=task.drawn_as or task.name, splits=_deal(other, seed)
        )
        for other in (task, *task.others)
    )
    described = f"Control: {task.description} The answers of half the pairs are exchanged."
    return replace(others[0], description=described, others=others[1:])


def _deal(task: Task, seed: int) -> dict[str, tuple[Source, ...]]:
    return {
        split: tuple(_Shuffled(source=source, seed=seed) for source in sources)
        for split, sources in task.splits.items()
    }


def _with_completions(task: Task, completions: tuple[str, str]) -> Task:
    return replace(
        task,
        name=f"{task.name}_nonsense",
        description=f"Control: the contrast of {task.name}, answered by unrelated words.",
        choice=f"`{completions[0]}` or `{completions[1]}`",
        oriented=True,
        fingerprint=f"{task.fingerprint}-nonsense",
        splits={
            split: tuple(_Unrelated(source=source, completions=completions) for source in sources)
            for split, sources in task.splits.items()
        },
        drawn_as=task.drawn_as or task.name,
    )

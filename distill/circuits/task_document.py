"""Tasks to look at: a list of them, pairs with the boundaries of their tokens, and the document beside the data."""

from collections.abc import Iterator, Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.circuits.task_batches import encode
from distill.circuits.task_pairs import Family, Pair, Task

DOCUMENT_COMMAND = "python recipes/tasks.py --document > distill/circuits/task_data/README.md"
_HEAD = f"""# The task suite

Next-token choices between two completions. Each task is a template file beside this one; a pair is two texts that
differ in one place, the one that decides the answer, and both directions of a pair are counted. Templates and fillers
of the splits `train` (pruning), `val` (discretising and clean-up), `test` (reporting) and `shift` (reporting on a
changed distribution) are disjoint, and no filler is a word of the generated training text. What stands in the files is
said in `distill/circuits/task_files.py`; a task of one's own is a JSONL file with a pair per line:

    {{"clean": "f('a", "corrupt": "f(\\"a", "answer": "')", "other": "\\")", "split": "test"}}

Below, two examples of every task: a pair of the split `test` and one of `shift`, the text of the first class above that
of the second, each with its completion and the other's. This file is written by

    {DOCUMENT_COMMAND}

Where a task of the literature has more than two answers it is asked here as a choice between two. *greater_than*: the
field compares all later years with all earlier ones after `from 1741 to 17`; as whatever is later than a late year is
later than an early one too, no two answers could change places between two years, so what is exchanged here is the
direction (`lasted from` or `lasted until`, `born` or `died`, a son or a father), and right and wrong are one later and
one earlier year. *ioi*: the two names of the text are the answers, any third one counts for nothing.
*subject_verb_agreement* and *gendered_pronoun*: one verb and one pronoun by number and gender.
"""


def listing(tasks: Sequence[Task]) -> str:
    """A line per task: its name, the pairs that each split holds, and the rule."""
    width = max(len(task.name) for task in tasks)
    lines = []
    for task in tasks:
        sizes = " ".join(f"{split} {task.size(split):,}" for split in task.splits)
        note = "" if task.oriented else "; answers vary by pair"
        lines.append(f"{task.name:{width}}  {task.choice}. {task.description} ({sizes} pairs{note})")
    return "\n".join(lines)


def pairs_shown(task: Task, tokenizer: PreTrainedTokenizerBase, n: int, seed: int, split: str = "test") -> str:
    """The first pairs of a draw with `|` between tokens and `↵` for a new line, then right and wrong answer token.

    n: number of pairs, or as many as the split holds; where the task has no such split, its last one is shown.
    Raises: ValueError as `encode` does.
    """
    split = split if split in task.splits else list(task.splits)[-1]
    n = min(n, task.size(split))
    batch = encode(task, tokenizer, split, n, seed)
    lines = [f"{task.name}, {split}: {task.choice}"]
    for pair in range(n):
        for row, member in ((pair, "clean"), (pair + n, "corrupt")):
            text = "|".join(_pieces(batch.tokens[row, : int(batch.last[row]) + 1], tokenizer))
            right, wrong = (_pieces(ids[row : row + 1], tokenizer)[0] for ids in (batch.answer, batch.other))
            lines.append(f"  {member:7}  {text}  ->  [{right}] not [{wrong}]")
    return "\n".join(lines)


def document(tasks: Sequence[Task]) -> str:
    """The document beside the data, in Markdown: per task its rule and two example pairs."""
    return "\n".join([_HEAD, *(line for task in tasks for line in _section(task))])


def _pieces(ids: Int[Tensor, " T"], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode([one])).replace("\n", "↵").replace("\t", "⇥") for one in ids.tolist()]


def _section(task: Task) -> Iterator[str]:
    families = ", ".join(f"{split} {len(sources)}" for split, sources in task.splits.items())
    yield f"## {task.name}\n"
    yield f"{task.description} Choice: {task.choice}. Classes: {task.classes[0]}, {task.classes[1]}."
    shift = f"In the shifted split: {task.shift_change}. " if task.shift_change else ""
    yield f"{shift}Template families: {families}."
    for other in task.others:
        (source, *_) = other.splits["train"]
        assert isinstance(source, Family)
        yield f"Other spelling, where a tokenizer needs it: `{source.completions[0]!r}`, `{source.completions[1]!r}`."
    yield "\n```"
    for split in [split for split in ("test", "shift") if split in task.splits]:
        (pair,) = task.pairs(split, 1, seed=0)
        yield from _example(pair if pair.label == 0 else pair.turned(), split)
    yield "```\n"


def _example(pair: Pair, split: str) -> Iterator[str]:
    yield f"--- {split}"
    yield f"{pair.clean}\n    -> {pair.answer!r}, not {pair.other!r}"
    yield f"{pair.corrupt}\n    -> {pair.other!r}, not {pair.answer!r}"

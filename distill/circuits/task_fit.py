"""Where a pair meets a tokenizer: the answer tokens, and why there may be none.

Right and wrong completion are tokenized in context, and both must begin with the prompt's own tokens, else a completion
straddles the end of the prompt. The answer is the first token at which the two differ; tokens they share before it join
the prompt, so that `]` and `]]` before a new line work wherever a tokenizer splits them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from distill.circuits.task_pairs import Pair, Task

_TRIED = 8  # pairs of each split that decide between spellings


class MisfitError(ValueError):
    """A task, or a pair of a user's own task, cannot be asked of a model with this tokenizer or context."""


@dataclass(frozen=True)
class Row:
    """A prompt's token ids (shared tokens of the completions included) and the two answer tokens."""

    ids: tuple[int, ...]
    answer: int
    other: int


def spelled(task: Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task with the completions that suit a tokenizer: the first spelling of which most pairs fit, in every split.

    The same for every split, number of pairs and seed. Where no spelling fits it is the first one, the task as given.
    """
    if not task.others:
        return task
    for candidate in (task, *task.others):
        tried = [list(islice(candidate.stream(split, 0), _TRIED)) for split in candidate.splits]
        faults = [[isinstance(found, str) for found in find_rows(pairs, tokenizer)] for pairs in tried]
        if all(2 * sum(of_split) <= len(of_split) for of_split in faults):
            return candidate
    return task


def find_rows(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Row, Row] | str]:
    """For each pair its clean and corrupt row, or in words why it does not fit the tokenizer."""
    texts = [
        prompt + completion
        for pair in pairs
        for prompt, right, wrong in ((pair.clean, pair.answer, pair.other), (pair.corrupt, pair.other, pair.answer))
        for completion in ("", right, wrong)
    ]
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    found: list[tuple[Row, Row] | str] = []
    for place, pair in enumerate(pairs):
        six = ids[6 * place : 6 * place + 6]
        clean = _find_row(pair.clean, pair.answer, pair.other, six[:3], tokenizer)
        corrupt = _find_row(pair.corrupt, pair.other, pair.answer, six[3:], tokenizer)
        if isinstance(clean, str) or isinstance(corrupt, str):
            found.append(clean if isinstance(clean, str) else str(corrupt))
        elif (clean.answer, clean.other) != (corrupt.other, corrupt.answer):
            found.append(f"the answer tokens after {pair.clean!r} are not those after {pair.corrupt!r}")
        elif clean.ids == corrupt.ids:
            found.append(f"the prompts {pair.clean!r} and {pair.corrupt!r} are the same tokens")
        else:
            found.append((clean, corrupt))
    return found


def _find_row(
    prompt: str, right: str, wrong: str, ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> Row | str:
    """The row of one prompt, given the ids of prompt, prompt + right and prompt + wrong; or the fault in words."""
    start, with_right, with_wrong = ids
    for completion, whole in ((right, with_right), (wrong, with_wrong)):
        if whole[: len(start)] != start:
            tokens = tokenizer.convert_ids_to_tokens(whole)
            return f"the answer {completion!r} straddles the end of the prompt {prompt!r} (tokens {tokens})"
    for place, (answer, other) in enumerate(zip(with_right, with_wrong, strict=False)):
        if answer != other and place > 0:
            return Row(tuple(with_right[:place]), answer, other)
    tokens = [tokenizer.convert_ids_to_tokens(whole[len(start) :]) for whole in (with_right, with_wrong)]
    return (
        f"the answers {right!r} and {wrong!r} after {prompt!r} cannot be told apart by one token "
        f"(tokens {tokens[0]} and {tokens[1]})"
    )

"""Pairs as token ids, with one answer token each; what a model loses on them; and smaller batches for training.

Prompts are padded on the right. A causal model never looks right and its positions count from the left, so the logits
at a prompt's last token are those of the prompt alone, whatever the padding.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from distill.circuits.task_fit import MisfitError, Row, find_rows, spelled
from distill.circuits.task_pairs import Pair, Task


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

    @property
    def aligned(self) -> Bool[Tensor, " n"]:
        """For each pair whether both prompts have as many tokens, so that positions can be set against each other."""
        clean, corrupt = self.last.chunk(2)
        return clean == corrupt

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The same batch on another device."""
        return self._each(lambda value: value.to(device))

    def select(self, rows: Int[Tensor, " K"] | slice) -> "TaskBatch":
        """Only these rows, in this order; halves are clean and corrupt only if the rows are chosen so."""
        return self._each(lambda value: value[rows])

    def take(self, pairs: Int[Tensor, " k"]) -> "TaskBatch":
        """Only these pairs, both members of each, without the padding that they do not need."""
        chosen = self.select(torch.cat([pairs, pairs + len(self) // 2]))
        length = int(chosen.last.max()) + 1
        tokens, mask = chosen.tokens[:, :length], chosen.attention_mask[:, :length]
        return dataclasses.replace(chosen, tokens=tokens, attention_mask=mask)

    def _each(self, change: Any) -> "TaskBatch":
        tensors = {key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


def encode(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    n: int,
    seed: int,
    *,
    context: int | None = None,
    aligned: bool = False,
) -> TaskBatch:
    """Draw pairs as `Task.pairs` does and find the answer token of each (see `distill.circuits.task_fit`).

    The completions are those of the first spelling that suits the tokenizer. A pair of a built-in task that does not
    fit is replaced by another and counted in `dropped`.

    Args:
        task: from `load_task`.
        tokenizer: of the model that will see the batch; no special tokens are added.
        split: one of the task's splits.
        n: number of pairs; the batch has 2n rows.
        seed: of the draw.
        context: largest number of tokens the model takes; None for no check.
        aligned: draw only pairs whose two prompts have as many tokens; others count as not fitting.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: as `Task.pairs`. As MisfitError: fewer than n pairs fit the tokenizer (any misfit for an own task);
            a prompt is longer than the context.
    """
    task.check_count(split, n)
    task = spelled(task, tokenizer)
    kept, dropped = _fitting(task, tokenizer, split, n, seed, aligned)
    pairs = task.balanced(list(kept), split, seed)
    first = [kept.get(pair) or kept[pair.turned()][::-1] for pair in pairs]
    rows = [clean for clean, _ in first] + [corrupt for _, corrupt in first]
    labels = torch.tensor([pair.label for pair in pairs] + [1 - pair.label for pair in pairs])
    longest = max(len(row.ids) for row in rows)
    if context is not None and longest > context:
        raise MisfitError(f"task {task.name!r}: a prompt has {longest} tokens; the model's context allows {context}")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    return _collate(rows, labels, task.oriented, pad, dropped)


def batches(batch: TaskBatch, pairs: int, seed: int) -> Iterator[TaskBatch]:
    """Smaller batches without end, for training: no pair comes twice before every pair has come.

    Pairs of like length go together, so that padding is little; which ones, and the order of the batches, is drawn
    anew each epoch. Both members of a pair are always in the same batch.

    Args:
        batch: as `encode` gives it.
        pairs: in each smaller batch; the last of an epoch holds what is left.
        seed: any whole number; the same seed gives the same batches.

    Yields:
        Batches of 2 * pairs rows or fewer, trimmed to their longest prompt.

    Raises:
        ValueError: `pairs` is below 1.
    """
    if pairs < 1:
        raise ValueError(f"pairs: got {pairs}; allowed: 1 and more")
    return _epochs(batch, pairs, random.Random(f"batches/{seed}"))


def _epochs(batch: TaskBatch, pairs: int, rng: random.Random) -> Iterator[TaskBatch]:
    clean, corrupt = batch.last.chunk(2)
    length = torch.maximum(clean, corrupt).tolist()
    while True:
        order = rng.sample(range(len(length)), len(length))
        order.sort(key=length.__getitem__)  # stable: pairs of one length stay in the order drawn
        chunks = [order[start : start + pairs] for start in range(0, len(order), pairs)]
        rng.shuffle(chunks)
        yield from (batch.take(torch.tensor(chunk)) for chunk in chunks)


def logit_difference(logits: Float[Tensor, "R V"], batch: TaskBatch) -> Float[Tensor, " R"]:
    """Logit of the right answer minus that of the wrong one, per row; `logits` at each row's last prompt token."""
    right = logits.gather(1, batch.answer[:, None])
    return (right - logits.gather(1, batch.other[:, None]))[:, 0]


def task_loss(logits: Float[Tensor, "R V"], batch: TaskBatch) -> Float[Tensor, " R"]:
    """Two-way cross-entropy between right and wrong answer [G 2.2], nats per row; 0.693 is chance.

    `logits` are those at each row's last prompt token. The task loss is the mean, both members of each pair counted.
    """
    return functional.softplus(-logit_difference(logits, batch))


def _fitting(
    task: Task, tokenizer: PreTrainedTokenizerBase, split: str, n: int, seed: int, aligned: bool
) -> tuple[dict[Pair, tuple[Row, Row]], int]:
    """The first n pairs of the draw that fit, with their rows, and how many before them did not."""
    # A tokenizer that fails this many pairs of a built-in task does not fit it: no use in trying them all.
    stream = islice(task.stream(split, seed), n if task.own and not aligned else 8 * n + 64)
    kept: dict[Pair, tuple[Row, Row]] = {}
    faults: list[str] = []
    while len(kept) < n:
        drawn = list(islice(stream, n - len(kept)))
        if not drawn:
            raise MisfitError(
                f"task {task.name!r} does not fit this tokenizer: {len(kept)} of {len(kept) + len(faults)} pairs of "
                f"split {split!r} fit, {n} asked; for example {faults[0]}"
            )
        for pair, found in zip(drawn, find_rows(drawn, tokenizer), strict=True):
            if isinstance(found, str):
                if task.own:
                    raise MisfitError(f"{task.where(pair)}task {task.name!r} does not fit this tokenizer: {found}")
                faults.append(found)
            elif aligned and len(found[0].ids) != len(found[1].ids):
                faults.append(f"the prompts {pair.clean!r} and {pair.corrupt!r} differ in their number of tokens")
            else:
                kept[pair] = found
    return kept, len(faults)


def _collate(rows: Sequence[Row], labels: Tensor, oriented: bool, pad: int, dropped: int) -> TaskBatch:
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

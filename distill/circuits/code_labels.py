"""Held-out code with what Python's own tokenizer says of it: which tokens stand inside a string, and of what quotes.

The labels are those of `tokenize` on whole files, so that nothing has to be guessed at the edge of a window. A model's
token is inside a string when its first character is behind the opening quote and not behind the closing one: what may
come next is then the string's content or its end. f-strings, whose fields are code, are left out, with their lines.
"""

import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.circuits.training_split import TrainingSplit
from distill.data.corpus import read_corpus

OUTSIDE, SINGLE, DOUBLE, TRIPLE, UNKNOWN = 0, 1, 2, 3, -1
"""Outside of strings; inside '...', inside "...", inside triple quotes of either kind; in an f-string's lines."""


@dataclass(frozen=True, kw_only=True)
class LabelledCode:
    """Windows of held-out code; every label is of the token at that place, each window has one more than targets."""

    tokens: Int[Tensor, "n T1"]
    inside: Int[Tensor, "n T1"]
    """OUTSIDE, SINGLE, DOUBLE, TRIPLE or UNKNOWN."""
    closes: Bool[Tensor, "n T1"]
    """Whether the token holds the quote that closes a string."""
    since: Int[Tensor, "n T1"]
    """Tokens since the one that opened the string: 0 for the first token inside, -1 outside."""

    def part(self, rows: slice) -> "LabelledCode":
        """Some of the windows."""
        return LabelledCode(**{name: value[rows] for name, value in vars(self).items()})


def string_spans(text: str) -> list[tuple[int, int, int]]:
    """(first character of the content, character of the closing quote, label) of every string of a Python text.

    A string's prefix and opening quotes are outside, its closing quotes count as the end. f-strings come with the label
    UNKNOWN and all of their lines. ValueError for a text that Python cannot tokenize.
    """
    starts = [0]
    # As tokenize counts lines: str.splitlines ends them at form feeds as well.
    for line in io.StringIO(text, newline=""):
        starts.append(starts[-1] + len(line))
    found: list[tuple[int, int, int]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            if token.type == tokenize.STRING:
                found.append(_span(token.string, first, last))
            elif tokenize.tok_name[token.type].startswith("FSTRING"):
                found.append((starts[token.start[0] - 1], starts[min(token.end[0], len(starts) - 1)], UNKNOWN))
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(f"text: is no Python that can be tokenized ({error})") from None
    return found


def _span(string: str, first: int, last: int) -> tuple[int, int, int]:
    quote = next(character for character in string if character in "'\"")
    prefix = string.index(quote)
    if "f" in string[:prefix].lower():
        return first, last, UNKNOWN
    if string[prefix : prefix + 3] == 3 * quote:
        return first + prefix + 3, last - 3, TRIPLE
    return first + prefix + 1, last - 1, SINGLE if quote == "'" else DOUBLE


def label_tokens(
    offsets: Sequence[tuple[int, int]], text: str
) -> tuple[Int[Tensor, "T"], Bool[Tensor, "T"], Int[Tensor, "T"]]:
    """`inside`, `closes` and `since` of tokens that cover the characters [first, last) of a text."""
    kind = torch.zeros(len(text) + 1, dtype=torch.long)
    opened = torch.full((len(text) + 1,), -1, dtype=torch.long)
    ends = torch.zeros(len(text) + 1, dtype=torch.bool)
    for first, last, label in string_spans(text):
        kind[first : last + (label != UNKNOWN)] = label
        opened[first : last + 1] = first
        if label != UNKNOWN:
            ends[last] = True
    at = torch.tensor([first for first, _ in offsets], dtype=torch.long)
    inside, begun = kind[at], opened[at]
    closes = torch.tensor([bool(ends[first:last].any()) for first, last in offsets])
    since = torch.full_like(at, -1)
    count, current = 0, -1
    for place, (label, start) in enumerate(zip(inside.tolist(), begun.tolist(), strict=True)):
        if label > OUTSIDE:
            count, current = (count + 1, current) if start == current else (0, start)
            since[place] = count
    return inside, closes, since


def labelled_code(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    length: int,
    held: TrainingSplit | None,
    limit: int = 256,
    seed: int = 0,
) -> LabelledCode:
    """Windows of `length` targets out of files of `sources` (see `read_corpus`) that the model was not trained on.

    Arguments:
        held: the split that the model was trained with (`training_split`). Which side a file is on depends on its name
            alone, so the files are those that the training held out where it read these sources, whatever else it read;
            of sources that it did not read none was trained on anyway.
        limit: windows at most: so many stretches of all there are, of equal length, give one each.
        seed: decides which.

    In the order of the files. ValueError where there are no windows, and without a split: then no file can be called
    held out.
    """
    if held is None:
        raise ValueError(
            "code: nothing says which files the training of this model held out (its folder needs a manifest that says "
            "seed and heldout_fraction of the corpus), so none can be judged on; allowed is to leave code out"
        )
    parts: dict[str, list[Tensor]] = {"tokens": [], "inside": [], "closes": [], "since": []}
    for text in _texts(sources, held):
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = label_tokens(offsets, text)
        whole = len(ids) // (length + 1) * (length + 1)
        for name, value in zip(parts, (torch.tensor(ids), *labels), strict=True):
            parts[name].append(value[:whole].view(-1, length + 1))
    if not sum(len(part) for part in parts["tokens"]):
        raise ValueError(f"code: no held-out file of {', '.join(sources)} has {length + 1} tokens")
    joined = {name: torch.cat(values) for name, values in parts.items()}
    count = len(joined["tokens"])
    limit = min(limit, count)
    luck = torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Stretches of no whole length may share the window at their border.
    rows = ((torch.arange(limit) + luck) * count / limit).long().clamp_max(count - 1).unique()
    return LabelledCode(**{name: value[rows] for name, value in joined.items()})


def _texts(sources: Sequence[str], held: TrainingSplit) -> Iterator[str]:
    """Held-out texts that Python can tokenize."""
    for document in read_corpus(sources, heldout_fraction=held.heldout_fraction, seed=held.seed).heldout:
        try:
            string_spans(document.text)
        except ValueError:
            continue  # a template, or code of another version of Python
        yield document.text

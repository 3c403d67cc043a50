"""Labels of code: what Python's tokenizer says, carried to a model's tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.circuits.code_labels import (
    DOUBLE,
    OUTSIDE,
    SINGLE,
    TRIPLE,
    UNKNOWN,
    label_tokens,
    labelled_code,
    string_spans,
)
from distill.circuits.training_split import TrainingSplit
from distill.data.corpus import read_corpus

TEXT = "x = 'a b' + \"c\"\n'''d\n'''\ny = rb'e'\nprint(f'{x}')\n"


def labels(text: str) -> tuple[list[int], list[bool], list[int]]:
    """With one token a character."""
    inside, closes, since = label_tokens([(i, i + 1) for i in range(len(text))], text)
    return inside.tolist(), closes.tolist(), since.tolist()


def test_spans_are_contents_without_quotes() -> None:
    found = [(TEXT[first:last], kind) for first, last, kind in string_spans(TEXT) if kind != UNKNOWN]
    assert found == [("a b", SINGLE), ("c", DOUBLE), ("d\n", TRIPLE), ("e", SINGLE)]


def test_tokens_between_the_quotes_are_inside() -> None:
    inside, closes, since = labels(TEXT)
    start = TEXT.index("a b")
    # The closing quote itself is still inside: what comes there was to be said from inside.
    assert inside[start : start + 4] == [SINGLE] * 4 and since[start : start + 4] == [0, 1, 2, 3]
    assert inside[start - 1] == OUTSIDE and inside[start + 4] == OUTSIDE and since[start + 4] == -1
    assert [TEXT[i] for i, one in enumerate(closes) if one] == ["'", '"', "'", "'"]
    assert inside[TEXT.index("c")] == DOUBLE and inside[TEXT.index("d")] == TRIPLE
    assert inside[TEXT.index("{x}")] == UNKNOWN and inside[TEXT.index("y = ")] == OUTSIDE


def test_tokens_of_several_characters_count_by_their_first() -> None:
    text = "f('ab')"
    inside, closes, since = label_tokens([(0, 3), (3, 5), (5, 7)], text)
    assert inside.tolist() == [OUTSIDE, SINGLE, SINGLE] and closes.tolist() == [False, False, True]
    assert since.tolist() == [-1, 0, 1]


def test_strings_side_by_side_are_counted_anew() -> None:
    _, _, since = labels("'a''b'")
    assert since == [-1, 0, 1, -1, 0, 1]
    assert torch.equal(label_tokens([(0, 1)], "x")[2], torch.tensor([-1]))


def test_what_is_no_python_is_refused() -> None:
    with pytest.raises(ValueError, match="no Python that can be tokenized"):
        string_spans("x = (")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Files whose every token is the file's number."""
    for n in range(60):
        (tmp_path / f"{n}.py").write_text(f"{n} " * 40)
    return tmp_path


def numbers() -> PreTrainedTokenizerFast:
    found = Tokenizer(models.WordLevel({str(n): n for n in range(60)}, unk_token="0"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=found)


@pytest.mark.parametrize(("seed", "fraction"), [(0, 0.2), (5, 0.2), (5, 0.5)])
def test_files_are_those_that_the_training_held_out(texts: Path, seed: int, fraction: float) -> None:
    held = TrainingSplit(seed=seed, heldout_fraction=fraction, sources=(str(texts),))
    code = labelled_code(numbers(), [str(texts)], length=7, held=held, limit=1000)
    corpus = read_corpus([str(texts)], seed=seed, heldout_fraction=fraction)
    wanted = {int(document.text.split()[0]) for document in corpus.heldout}
    assert set(code.tokens.flatten().tolist()) == wanted and len(code.tokens) == 5 * len(wanted)


def test_windows_follow_the_seed_and_are_spread(texts: Path) -> None:
    held = TrainingSplit(seed=0, heldout_fraction=0.5, sources=())
    every = labelled_code(numbers(), [str(texts)], length=3, held=held, limit=1000).tokens
    some = [
        labelled_code(numbers(), [str(texts)], length=3, held=held, limit=9, seed=seed).tokens for seed in (0, 0, 1)
    ]
    assert torch.equal(some[0], some[1]) and not torch.equal(some[0], some[2])
    files = list(dict.fromkeys(every[:, 0].tolist()))
    places = [files.index(int(one)) for one in some[2][:, 0]]
    assert places == sorted(places) and len(set(places)) == 9 and places[-1] - places[0] > len(files) // 2


def test_without_a_split_no_file_is_held_out(texts: Path) -> None:
    with pytest.raises(ValueError, match="nothing says which files the training of this model held out"):
        labelled_code(numbers(), [str(texts)], length=3, held=None)


def test_a_form_feed_ends_no_line() -> None:
    text = "a = 1\f\nb = 'yy'\n"
    assert [text[first:last] for first, last, _ in string_spans(text)] == ["yy"]

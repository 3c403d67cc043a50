"""Labels of code: what Python's tokenizer says, carried to a model's tokens."""

import pytest
import torch

from distill.circuits.code_labels import DOUBLE, OUTSIDE, SINGLE, TRIPLE, UNKNOWN, label_tokens, string_spans

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


def test_a_form_feed_ends_no_line() -> None:
    text = "a = 1\f\nb = 'yy'\n"
    assert [text[first:last] for first, last, _ in string_spans(text)] == ["yy"]

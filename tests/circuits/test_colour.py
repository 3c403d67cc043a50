"""Coloured text: nothing of it is lost, and nothing of it can break a page."""

import re
from html import unescape

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.circuits.colour import as_html, as_page, in_terminal, token_pieces

PIECES = ["<script>alert('x')</script>", ' & "two"', "\n", "three"]
SCORES = [0.0, 1.5, 9.0, -3.0]


def test_terminal_text_without_codes_is_the_text() -> None:
    found = in_terminal(PIECES, SCORES, threshold=2.0)
    assert re.sub(r"\x1b\[[0-9;]*m", "", found) == "".join(PIECES)
    assert in_terminal(["a"], [0.0]) == "a"
    assert in_terminal(["a"], [3.0]) == "\x1b[30;48;5;196ma\x1b[0m" and "48;5;21m" in in_terminal(["a"], [-3.0])
    assert "\x1b[4m" in in_terminal(["a"], [3.0], threshold=2.0)


def test_html_is_escaped_and_whole() -> None:
    found = as_html(PIECES, SCORES, threshold=2.0)
    assert "<script>" not in found and found.count("<span") == 4 and found.count('class="flag"') == 2
    assert unescape(re.sub(r"<[^>]*>", "", found)) == "".join(PIECES)
    assert 'rgba(220,40,40,0.50)" title="1.500"' in found and "rgba(40,80,220,1.00)" in found
    page = as_page(found, title="<b>", note="<i>")
    assert page.startswith("<!doctype html>") and found in page and "&lt;b&gt;" in page and "<i>" not in page
    assert not re.search(r"src=|href=|http", page)


def test_characters_of_several_tokens_come_with_the_last() -> None:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocab, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_)
    ids = tokenizer("aé\u4e2d!")["input_ids"]
    assert token_pieces(ids, tokenizer) == ["a", "", "é", "", "", "\u4e2d", "!"]
    assert "".join(token_pieces(ids[:-2], tokenizer)) == "aé\ufffd" and token_pieces([], tokenizer) == []


def test_what_does_not_fit_is_refused() -> None:
    for paint in (in_terminal, as_html):
        with pytest.raises(ValueError, match="one for each"):
            paint(["a"], [])
        with pytest.raises(ValueError, match="largest: got 0"):
            paint(["a"], [1.0], largest=0.0)

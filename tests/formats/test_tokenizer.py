"""OpenAI's tokenizer files: held to a plain byte-pair encoding written from what the files say."""

import json
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.artifact import ArtifactError
from distill.data.tokens import SPLIT_PATTERN
from distill.formats import read_tokenizer, write_tokenizer

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MERGES = ["i n", "Ġ in", "s e", "se l", "sel f", "( self", ". x", "Ġ Ġ", "1 2", "12 3", "Ã ©"]


def byte_names() -> dict[int, str]:
    """The printable character that stands for each byte: itself where it is one, else the next above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


NAMES = byte_names()


def encoder() -> dict[str, int]:
    tokens = [*NAMES.values(), *("".join(merge.split()) for merge in MERGES)]
    return {token: number for number, token in enumerate(tokens)}


def plain_encode(text: str) -> list[int]:
    ranks, ids = {tuple(merge.split()): n for n, merge in enumerate(MERGES)}, encoder()
    found = []
    for piece in regex.findall(PATTERN, text):
        parts = [NAMES[byte] for byte in piece.encode()]
        while True:
            pairs = [(ranks.get(pair, len(ranks)), n) for n, pair in enumerate(zip(parts, parts[1:], strict=False))]
            if not pairs or min(pairs)[0] == len(ranks):
                break
            at = min(pairs)[1]
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        found += [ids[part] for part in parts]
    return found


def put(folder: Path, *, end: bool = False) -> Path:
    tokens = encoder()
    (folder / "encoder.json").write_text(json.dumps(tokens | ({"<|endoftext|>": len(tokens)} if end else {})))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return read_tokenizer(put(tmp_path_factory.mktemp("words")))


def test_the_pattern_is_theirs() -> None:
    assert SPLIT_PATTERN == PATTERN


CODE = [
    "in",
    " in",
    "self",
    "(self.x",
    "123",
    "12",
    "1234",
    "    ",
    "\n",
    "\r\n",
    "é",
    " ",
    "\t",
    "for i in range(12):\n",
]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(CODE) | st.text(max_size=4), max_size=8).map("".join))
def test_text_is_encoded_as_the_files_say_and_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == plain_encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("end", [True, False])
def test_the_end_of_text_is_the_last_token_and_pads(tmp_path: Path, end: bool) -> None:
    tokenizer = read_tokenizer(put(tmp_path, end=end))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(encoder()) == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path / "ours")
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again.get_vocab() == tokenizer.get_vocab() and again.padding_side == "left"
    assert again.encode("in<|endoftext|>") == [encoder()["in"], len(encoder())]


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    write_tokenizer(tmp_path / "back", read_tokenizer(put(tmp_path, end=True)))
    assert json.loads((tmp_path / "back" / "encoder.json").read_text()) == json.loads(
        (tmp_path / "encoder.json").read_text()
    )
    assert (tmp_path / "back" / "vocab.bpe").read_bytes() == (tmp_path / "vocab.bpe").read_bytes()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("encoder.json", "[]", "allowed is an object of tokens with whole numbers"),
        ("encoder.json", '{"a": 5}', "ids of 1 tokens, allowed are 0 to 0, each once"),
        ("encoder.json", '{"a": 0}', "allowed are encoders with all 256 bytes"),
        ("encoder.json", '{"a"', "is not JSON"),
        ("vocab.bpe", "a b c", "line 1: 'a b c'; allowed are two tokens"),
        ("vocab.bpe", "a b", "merges 'a' and 'b'; allowed are tokens that come before"),
        ("vocab.bpe", "\n".join(reversed(MERGES[:2])), "allowed are tokens that come before"),
        ("vocab.bpe", "\n".join([*MERGES[2:5], *MERGES[:2], *MERGES[5:]]), "'in' has id 256; allowed: in merge order"),
        ("vocab.bpe", "\n".join(MERGES[:-1]), "'Ã©', which no merge in vocab.bpe makes"),
        ("vocab.bpe", None, "no such merges file"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    put(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError) as error:
        read_tokenizer(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_tokenizers_of_another_kind_are_not_written(tmp_path: Path) -> None:
    words = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    with pytest.raises(ValueError, match="tokenizer: a BPE that splits text its own way"):
        write_tokenizer(tmp_path, PreTrainedTokenizerFast(tokenizer_object=words))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="its own way"):
        write_tokenizer(tmp_path, PreTrainedTokenizerFast(tokenizer_object=words))
    whole = read_tokenizer(put(tmp_path))
    whole.add_tokens(["extra"])
    with pytest.raises(ValueError, match="its ids go another way"):
        write_tokenizer(tmp_path, whole)

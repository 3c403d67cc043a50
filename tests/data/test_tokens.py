"""Tokenizer, packing and windows."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.artifact import ArtifactError, read_manifest, save_tensors
from distill.data.corpus import Corpus, Document, read_corpus
from distill.data.tokens import (
    END_OF_TEXT,
    Sampler,
    TokenData,
    batch_at,
    load_ids,
    pack,
    save_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
    windows,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(["idioms:0.3"], heldout_fraction=0.1)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in corpus.train], 512)


@pytest.fixture
def packed(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> TokenData:
    return pack(corpus, tokenizer, tmp_path / "tokens", command="make tokens")


class TestTokenizer:
    def test_end_of_text_is_the_last_id(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert len(tokenizer) == vocabulary_size(tokenizer) == 512
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 511
        assert tokenizer.convert_ids_to_tokens(511) == END_OF_TEXT

    @settings(deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def test_round_trip(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(text.encode()) and 511 not in ids

    @pytest.mark.parametrize("text", ["  a , b .  c 's\n\n\t", "\r\n \u00a0", "d\u0301e\u0301 🙂", "n't  !"])
    def test_round_trip_of_what_clean_up_would_spoil(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_split_pattern_lets_code_be_single_tokens(self) -> None:
        stdlib = read_corpus(["stdlib"], max_bytes=3_000_000)
        vocabulary = train_tokenizer((document.text for document in stdlib.train), 2048).get_vocab()
        assert {".add", "=None", "')", "Ġ+=", "):Ċ"} <= vocabulary.keys()
        assert vocabulary[END_OF_TEXT] == 2047 and sorted(vocabulary.values()) == list(range(2048))

    def test_pieces_never_cross_the_split(self) -> None:
        tokenizer = train_tokenizer(["a.add(x=None)\n" * 50, "1234567 " * 50], 270)
        assert tokenizer.tokenize("a.add(x=None)\n") == ["a", ".add", "(x", "=None", ")Ċ"]
        assert tokenizer.tokenize("1234567") == ["123", "456", "7"]

    def test_saved_and_loaded(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "def f(x=None):\n    y.add('é🙂 ')\n"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text and loaded.eos_token_id == 511
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)

    def test_fingerprint_follows_the_vocabulary(self, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
        other = train_tokenizer([document.text for document in corpus.train], 511)
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="vocab_size: got 256, allowed are 257"):
            train_tokenizer(["text"], 256)
        with pytest.raises(ValueError, match="vocab_size: got 2048, the text has merges for 25"):
            train_tokenizer(["ab"], 2048)
        with pytest.raises(ValueError, match="texts: got one string"):
            train_tokenizer("ab", 300)


class TestPack:
    def test_ids_decode_to_the_documents(self, packed: TokenData, corpus: Corpus) -> None:
        tokenizer = packed.tokenizer()
        for ids, documents in ((packed.train, corpus.train), (packed.heldout, corpus.heldout)):
            assert ids.dtype == np.uint16 and isinstance(ids, np.memmap)
            expected = "".join(document.text + END_OF_TEXT for document in documents)
            assert tokenizer.decode(ids.tolist()) == expected

    def test_record(self, packed: TokenData, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
        assert packed.vocab_size == 512 and packed.record == corpus.record()
        assert packed.folder is not None
        provenance = read_manifest(packed.folder, "tokens")["provenance"]
        assert provenance["command"] == "make tokens" and provenance["data"] == corpus.fingerprint()
        extra = provenance["extra"]
        assert extra["tokens"] == {"train": len(packed.train), "heldout": len(packed.heldout)}
        assert extra["tokenizer"] == tokenizer_fingerprint(tokenizer)

    def test_fingerprint_is_of_the_ids(
        self, packed: TokenData, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        again = pack(corpus, tokenizer, tmp_path / "again")
        assert again.fingerprint == packed.fingerprint
        other = pack(read_corpus(["idioms:0.01"], seed=9), tokenizer, tmp_path / "again", replace=True)
        assert other.fingerprint != packed.fingerprint
        assert TokenData.load(tmp_path / "again").fingerprint == other.fingerprint

    def test_text_that_spells_a_special_token_ends_nothing(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        text = f"a{END_OF_TEXT}b"
        corpus = Corpus(train=[Document("a", text, "s")], heldout=[], heldout_fraction=0.0, seed=0)
        data = pack(corpus, tokenizer, tmp_path / "tokens")
        assert (data.train == 511).sum() == 1 and data.train[-1] == 511
        assert tokenizer.decode(data.train[:-1].tolist()) == text
        assert len(data.heldout) == 0 and data.heldout.dtype == np.uint16

    def test_large_vocabularies_take_32_bits(self, tmp_path: Path) -> None:
        words = {END_OF_TEXT: 0, **{f"w{i}": i for i in range(1, 65_537)}}
        large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token=END_OF_TEXT)
        assert vocabulary_size(large) == 65_537
        corpus = Corpus(train=[Document("a", "w65536", "s")], heldout=[], heldout_fraction=0.0, seed=0)
        data = pack(corpus, large, tmp_path / "tokens")
        assert data.train.dtype == np.uint32 and data.train.tolist() == [65_536, 0]

    def test_bad_input(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, packed: TokenData) -> None:
        assert packed.folder is not None
        with pytest.raises(ArtifactError, match="exists already"):
            pack(corpus, tokenizer, packed.folder)
        endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        with pytest.raises(ValueError, match="no end-of-text token"):
            pack(corpus, endless, packed.folder.parent / "other")
        assert not (packed.folder.parent / "other").exists()

    def test_damage_is_noticed(self, packed: TokenData, tmp_path: Path) -> None:
        assert packed.folder is not None
        path = packed.folder / "heldout.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[:-2])
        with pytest.raises(ArtifactError, match="bytes"):
            TokenData.load(packed.folder)
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(ArtifactError, match="sha256"):
            TokenData.load(packed.folder)
        with pytest.raises(ArtifactError, match="no such folder"):
            TokenData.load(tmp_path / "nowhere")


class TestMemory:
    def test_from_arrays(self) -> None:
        data = TokenData.from_arrays([0, 5, 9], [1], vocab_size=10)
        assert data.train.tolist() == [0, 5, 9] and data.train.dtype == np.uint16 and data.heldout.tolist() == [1]
        assert data.fingerprint == TokenData.from_arrays(np.array([0, 5, 9]), [1], vocab_size=10).fingerprint
        assert data.fingerprint != TokenData.from_arrays([0, 5, 9], [2], vocab_size=10).fingerprint
        with pytest.raises(ValueError, match="made in memory"):
            data.tokenizer()

    @pytest.mark.parametrize(
        ("train", "vocab_size", "message"),
        [
            ([0, 10], 10, "train: ids from 0 to 10, allowed are 0 to 9"),
            ([-1], 10, "train: ids from -1 to -1"),
            ([0.5], 10, "train: got float64"),
            ([[1]], 10, r"shape \(1, 1\)"),
            ([0], 0, "vocab_size: got 0"),
            ([0], 2**32 + 1, "vocab_size: got 4294967297"),
        ],
    )
    def test_bad_ids(self, train: list, vocab_size: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TokenData.from_arrays(np.array(train), vocab_size=vocab_size)

    @pytest.mark.parametrize(("vocab_size", "dtype"), [(2048, np.uint16), (100_000, np.uint32)])
    def test_ids_in_one_file(self, tmp_path: Path, vocab_size: int, dtype: type) -> None:
        ids = np.array([1, 0, vocab_size - 1])
        save_ids(tmp_path / "ids.safetensors", ids, vocab_size=vocab_size, record={"files": 3})
        loaded, metadata = load_ids(tmp_path / "ids.safetensors")
        assert loaded.dtype == dtype and loaded.tolist() == ids.tolist()
        assert metadata["vocab_size"] == vocab_size and metadata["record"] == {"files": 3}
        assert windows(loaded, 2).tolist() == [ids.tolist()]

    def test_bad_id_files(self, tmp_path: Path) -> None:
        path = tmp_path / "ids.safetensors"
        with pytest.raises(ValueError, match="ids from 7 to 7, allowed are 0 to 6"):
            save_ids(path, np.array([7]), vocab_size=7)
        assert not path.exists()
        with pytest.raises(ArtifactError, match="no such ids file"):
            load_ids(path)
        save_tensors(path, {"ids": torch.tensor([7])}, {"kind": "ids", "vocab_size": 7})
        with pytest.raises(ArtifactError, match="ids.safetensors: ids: ids from 7 to 7"):
            load_ids(path)
        save_tensors(path, {"other": torch.tensor([7])}, {"kind": "ids"})
        with pytest.raises(ArtifactError, match="holds no 'ids'"):
            load_ids(path)


class TestWindows:
    def test_by_hand(self) -> None:
        assert windows(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
        assert windows(np.arange(7), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
        assert windows(np.arange(6), 3).tolist() == [[0, 1, 2, 3]]
        assert windows(np.arange(8, dtype=np.uint16), 3, limit=1).tolist() == [[0, 1, 2, 3]]
        assert windows(np.arange(8, dtype=np.uint16), 3).dtype == torch.int64

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="context: got 8, which needs 9 tokens, but there are 8 tokens"):
            windows(np.arange(8), 8)
        with pytest.raises(ValueError, match="context: got 0"):
            windows(np.arange(8), 0)
        with pytest.raises(ValueError, match="limit: got 0"):
            windows(np.arange(8), 3, limit=0)


class TestSampler:
    @settings(deadline=None)
    @given(tokens=st.integers(2, 400), context=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 2**32))
    def test_an_epoch_repeats_no_window(self, tokens: int, context: int, batch: int, seed: int) -> None:
        ids = np.arange(tokens)
        if tokens < context + 1:
            with pytest.raises(ValueError, match=f"context: got {context}.*{tokens} tokens"):
                Sampler(ids, batch=batch, context=context, seed=seed)
            return
        sampler = Sampler(ids, batch=batch, context=context, seed=seed)
        number = sampler.epoch_windows
        assert number >= 1 and tokens - number * context <= 2 * context
        rows = torch.cat([sampler.batch(step) for step in range(-(-2 * number // batch))])
        assert torch.equal(rows[:, 1:] - rows[:, :1], torch.arange(1, context + 1).expand(len(rows), -1))
        for epoch in (rows[:number], rows[number : 2 * number]):
            begins = epoch[:, 0].sort().values
            assert torch.equal(begins - begins[0], torch.arange(number) * context)
            assert 0 <= begins[0] < context and epoch.max() < tokens

    def test_order_and_borders_differ_between_epochs_and_seeds(self) -> None:
        ids = np.arange(4_100, dtype=np.uint16)
        sampler = Sampler(ids, batch=64, context=63, seed=5)
        assert sampler.epoch_windows == 64
        epochs = [sampler.batch(step)[:, 0] for step in range(6)]
        assert len({int(epoch.min()) for epoch in epochs}) > 2
        assert all(not torch.equal(epochs[0].argsort(), epoch.argsort()) for epoch in epochs[1:])
        other = Sampler(ids, batch=64, context=63, seed=6).batch(0)
        assert not torch.equal(other[:, 0], epochs[0])

    def test_a_batch_is_a_function_of_seed_and_step(self) -> None:
        ids = np.random.default_rng(0).integers(0, 2048, 5_000).astype(np.uint16)
        forward = [Sampler(ids, batch=4, context=16, seed=1).batch(step) for step in range(200)]
        assert forward[0].shape == (4, 17) and forward[0].dtype == torch.int64
        for step in (199, 0, 77, 150):
            assert torch.equal(batch_at(ids, step, batch=4, context=16, seed=1), forward[step])

    def test_numbers_are_fixed_for_all_time(self) -> None:
        drawn = batch_at(np.arange(100), 0, batch=3, context=5, seed=0)
        assert drawn.tolist() == [list(range(first, first + 6)) for first in (79, 24, 9)]

    def test_bad_input(self) -> None:
        for settings_, message in (
            ({"batch": 0, "context": 4, "seed": 0}, "batch: got 0"),
            ({"batch": 1, "context": 0, "seed": 0}, "context: got 0"),
            ({"batch": 1, "context": 4, "seed": -1}, "seed: got -1"),
            ({"batch": 1, "context": 9, "seed": 0}, "context: got 9, which needs 10 tokens, but there are 9 tokens"),
        ):
            with pytest.raises(ValueError, match=message):
                Sampler(np.arange(9), **settings_)
        with pytest.raises(ValueError, match="step: got -1"):
            Sampler(np.arange(9), batch=1, context=4, seed=0).batch(-1)

    def test_speed(self) -> None:
        ids = np.zeros(3_000_000, np.uint16)
        batch_at(ids, 0, batch=8, context=256, seed=0)
        start = time.process_time()
        for step in range(100):
            batch_at(ids, step, batch=8, context=256, seed=0)
        assert (time.process_time() - start) / 100 < 1e-3


def test_batches_count_every_token_once_as_target() -> None:
    ids = np.arange(1_000)
    sampler = Sampler(ids, batch=1, context=10, seed=3)
    targets = Counter(int(token) for step in range(sampler.epoch_windows) for token in sampler.batch(step)[0, 1:])
    assert set(targets.values()) == {1} and len(targets) == 990


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """A letter is a token; there is no end of text."""
    tokenizer = Tokenizer(WordLevel({"A": 0, "B": 1, "C": 2}, unk_token="A"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class TestSeparate:
    """Sequences of one length that are never run together."""

    LINES = ("ABC", "BCA", "CAB", "AAB", "CCA", "BBB", "ACC", "BAC")

    @pytest.fixture
    def packed(self, letters: PreTrainedTokenizerFast, tmp_path: Path) -> TokenData:
        (tmp_path / "lines.txt").write_text("\n".join([*self.LINES, "", "ABC\n"]))
        corpus = read_corpus([f"lines:{tmp_path / 'lines.txt'}"], heldout_fraction=0.3)
        assert corpus.separate and not corpus.record()["sources"][0]["undecodable"]
        return pack(corpus, letters, tmp_path / "tokens")

    def test_every_line_is_a_row_on_one_side(self, packed: TokenData, letters: PreTrainedTokenizerFast) -> None:
        sides = [[str(letters.decode(row)).replace(" ", "") for row in side] for side in (packed.train, packed.heldout)]
        assert all(sides) and sorted(sides[0] + sides[1]) == sorted(self.LINES)
        assert packed.train.dtype == np.uint16 and packed.vocab_size == 3

    def test_an_epoch_is_every_row_once_and_nothing_else(self, packed: TokenData) -> None:
        rows = len(packed.train)
        sampler = packed.batches(batch=1, context=2, seed=5)
        drawn = [tuple(sampler.batch(step)[0].tolist()) for step in range(2 * rows)]
        for epoch in (drawn[:rows], drawn[rows:]):
            assert sorted(epoch) == sorted(map(tuple, packed.train.tolist()))
        assert drawn[:rows] != drawn[rows:]

    def test_windows_are_the_rows(self, packed: TokenData) -> None:
        assert windows(packed.train, 2).tolist() == packed.train.tolist()
        assert windows(packed.train, 7, limit=2).tolist() == packed.train[:2].tolist()

    @given(rows=st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=9))
    def test_in_memory_as_packed(self, rows: list[list[int]]) -> None:
        data = TokenData.from_arrays(np.array(rows), vocab_size=7)
        assert Counter(
            map(tuple, Sampler(data.train, batch=len(rows), context=3, seed=0).batch(0).tolist())
        ) == Counter(map(tuple, rows))

    def test_bad_input(self, packed: TokenData, letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="context: got 3, but the sequences have 3 tokens; allowed is 2"):
            packed.batches(batch=1, context=3, seed=0)
        with pytest.raises(ValueError, match="context: got 1, but the sequences have 3 tokens; allowed are 2 and more"):
            windows(packed.train, 1)
        for text, message in (("ABC\nAB\n", "tokens, .* allowed is one length"), ("A\nB\n", "2 and more")):
            (tmp_path / "bad.txt").write_text(text)
            corpus = read_corpus([f"lines:{tmp_path / 'bad.txt'}"])
            with pytest.raises(ValueError, match=message):
                pack(corpus, letters, tmp_path / "bad")
            assert not (tmp_path / "bad").exists()
        manifest = (packed.folder or tmp_path) / "manifest.json"
        content = json.loads(manifest.read_text().replace('"length": 3', '"length": 5'))
        manifest.write_text(json.dumps({name: value for name, value in content.items() if name != "seal"}))
        with pytest.raises(ArtifactError, match="no sequences of 5 tokens"):
            TokenData.load(manifest.parent)

"""Streams: nothing twice, nothing left out, the same whatever the number of processes, and resumed to the token."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.data.corpus import side_of
from distill.data.stream import Stream, StreamBatches, open_reader, prepare_stream

T = 6


def encode(texts: Any) -> list[np.ndarray]:
    """Texts are numbers; 0 stands at their end."""
    return [np.array([*map(int, text.split()), 0], np.uint16) for text in texts]


def rows_of(folder: Path, kind: str, first: int = 1, number: int = 60) -> str:
    """Documents of 1 to 7 numbers that nowhere else occur, as a source."""
    folder.mkdir(parents=True)
    texts, at = [], first
    for i in range(number):
        texts.append(" ".join(str(at + j) for j in range(1 + i % 7)))
        at += 1 + i % 7
    if kind == "folder":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
        return str(folder)
    if kind == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    else:
        from datasets import Dataset

        for part in range(2):
            piece = Dataset.from_dict({"text": texts[part * number // 2 :][: number // 2]})
            piece.to_parquet(folder / f"train-{part:05}-of-00002.parquet")
    return f"hf:{folder}"


def stream(*sources: str, weights: tuple[float, ...] = (1.0,), **more: Any) -> Stream:
    settings: dict[str, Any] = {"heldout_fraction": 0.0, "shards": 4, "buffer": 7, "heldout": np.zeros(0, np.uint16)}
    return Stream(
        sources=sources,
        weights=weights,
        encode=encode,
        dtype=np.dtype(np.uint16),
        seed=3,
        vocab_size=2**16,
        fingerprint="",
        record={},
        folder=Path(),
        **(settings | more),
    )


def batches(s: Stream, batch: int = 4) -> StreamBatches:
    return s.batches(batch=batch, context=T, seed=5)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_documents_are_packed_across_their_borders(tmp_path: Path) -> None:
    source = rows_of(tmp_path / "a", "folder")
    mine = batches(stream(source, shards=1, buffer=60), batch=2)
    # 60 documents of 1 to 7 tokens and an end each: one pass holds 50 windows, of 6 inputs.
    tokens = sum(1 + i % 7 for i in range(60)) + 60
    windows = [row for step in range(tokens // T // 2) for row in mine.rows(step, 0, 1).tolist()]
    inputs = Counter(token for window in windows for token in window[:-1] if token)
    assert max(inputs.values()) == 1
    assert len(inputs) > 0.95 * (tokens - 60)
    border = [pair for window in windows for pair in zip(window, window[1:], strict=False) if 0 in pair]
    assert len(border) > 60  # documents end within windows, and others begin there
    for window in windows:
        for one, other in zip(window, window[1:], strict=False):
            assert other == one + 1 or 0 in (one, other)
    firsts = [window[0] for window in windows]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_processes_share_a_batch_and_see_nothing_twice(tmp_path: Path, kind: str) -> None:
    s = stream(rows_of(tmp_path / kind, kind))
    whole = batches(s, 8)
    for parts in (2, 4):
        shares = [batches(s, 8) for _ in range(parts)]
        whole = batches(s, 8)
        seen: list[set[int]] = [set() for _ in range(parts)]
        for step in range(4):
            rows = [share.rows(step, part, parts) for part, share in enumerate(shares)]
            assert np.array_equal(np.concatenate(rows), whole.rows(step, 0, 1))
            for tokens, part in zip(seen, rows, strict=True):
                tokens |= set(part.flatten().tolist()) - {0}
        assert all(not one & other for i, one in enumerate(seen) for other in seen[:i])


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
@pytest.mark.parametrize("after", [0, 1, 5, 17])
def test_a_position_is_gone_on_from_by_any_number_of_processes(tmp_path: Path, kind: str, after: int) -> None:
    s = stream(rows_of(tmp_path / kind, kind), rows_of(tmp_path / "b", "folder", 1000), weights=(0.5, 0.5))
    whole = batches(s)
    two = [batches(s) for _ in range(2)]
    for step in range(after):
        whole.rows(step, 0, 1)
        for part, share in enumerate(two):
            share.rows(step, part, 2)
    saved = json.loads(json.dumps([share.position() for share in two]))
    resumed = batches(s)
    resumed.restore(saved)
    for step in range(after, after + 12):  # past the end of a pass
        expected = whole.rows(step, 0, 1)
        assert np.array_equal(resumed.rows(step, 0, 1), expected), step
    again = batches(s)
    again.restore(json.loads(json.dumps([resumed.position()])))
    assert np.array_equal(again.rows(after + 12, 0, 1), whole.rows(after + 12, 0, 1))


def test_the_mixture_keeps_to_its_weights(tmp_path: Path) -> None:
    sources = [rows_of(tmp_path / str(i), "folder", 1 + 1000 * i) for i in range(3)]
    mine = batches(stream(*sources, weights=(0.6, 0.4, 0.0)))
    counts = Counter()
    for step in range(50):
        for row in mine.rows(step, 0, 1):
            counts[int(row.max()) // 1000] += 1
    assert counts[0] == pytest.approx(120, abs=4)
    assert counts[1] == pytest.approx(80, abs=4)
    assert counts[2] == 0


def test_seeds_and_blocks_give_other_orders(tmp_path: Path) -> None:
    s = stream(rows_of(tmp_path / "a", "folder"))
    one, same, other = (s.batches(batch=4, context=T, seed=seed).rows(0, 0, 1).tolist() for seed in (5, 5, 6))
    assert one == same != other


def test_idioms_never_end_nor_come_twice() -> None:
    readers = [open_reader("idioms", 3, shard, 2) for shard in range(2)]
    texts = [reader.read() for _ in range(50) for reader in readers]
    assert len(set(texts)) > 98
    saved = readers[0].position()
    following = readers[0].read()
    fresh = open_reader("idioms", 3, 0, 2)
    fresh.restore(saved)
    assert fresh.read() == following


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    source = rows_of(tmp_path / "a", "folder")
    s = stream(source, heldout_fraction=0.4, shards=1)
    texts = [path.read_text() for path in Path(source).iterdir()]
    held = {int(token) for text in texts if side_of(text, 3) < 0.4 for token in text.split()}
    assert 20 < len(held) < 200
    mine = batches(s)
    seen = {token for step in range(40) for token in mine.rows(step, 0, 1).flatten().tolist()}
    assert not seen & held and len(seen) > 60


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    s = stream(rows_of(tmp_path / "a", "folder"))
    mine = batches(s, 6)  # in 2 shards, what divides both 4 and 6
    with pytest.raises(ValueError, match="2 shards cannot be divided among 4 processes"):
        mine.rows(0, 0, 4)
    with pytest.raises(ValueError, match="step: got 1, a stream goes on with 0"):
        mine.rows(1, 0, 1)
    for name, settings in {"batch": (0, 4, 0), "context": (1, 0, 0), "seed": (1, 1, -1)}.items():
        with pytest.raises(ValueError, match=f"{name}: got"):
            StreamBatches(s, batch=settings[0], context=settings[1], seed=settings[2])
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match="no text in one of its 4 shards"):
        batches(stream(str(tmp_path / "one"))).rows(0, 0, 1)
    with pytest.raises(ValueError, match="leaves no text"):
        stream_of_nothing = stream(str(tmp_path / "one"), heldout_fraction=0.999999, shards=1)
        batches(stream_of_nothing).rows(0, 0, 1)


class TestPrepared:
    """A described stream: tokenizer, held-out ids, and the settings it was made with."""

    def prepared(self, tmp_path: Path, **more: Any) -> Stream:
        texts = tmp_path / "texts"
        if not texts.exists():
            texts.mkdir()
            for i in range(40):
                (texts / f"{i}.py").write_text(f"def function_{i}(value):\n    return value + {i}\n" * 3)
        settings: dict[str, Any] = {"weights": (1.0, 3.0), "vocab_size": 300, "heldout_fraction": 0.2}
        return prepare_stream([str(texts), "idioms"], tmp_path / "out", **(settings | more))

    def test_it_is_found_again_and_gives_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("distill.data.stream.TOKENIZER_BYTES", 2**14)
        made = self.prepared(tmp_path, heldout_tokens=2000)
        assert made.weights == (0.25, 0.75) and made.vocab_size == 300
        assert 1500 < len(made.heldout) < 4000
        again = self.prepared(tmp_path, heldout_tokens=2000)
        assert again.fingerprint == made.fingerprint
        tokenizer = again.tokenizer()
        few = [replace(s, buffer=8, shards=2) for s in (made, again)]
        rows = [s.batches(batch=8, context=64, seed=0).rows(0, 0, 1) for s in few]
        assert np.array_equal(*rows)
        text = tokenizer.decode(rows[0].flatten().tolist())
        assert "function_" in text and "return" in text and "<|endoftext|>" in text
        with pytest.raises(ValueError, match=r"out: .* holds tokens of weights \[0.25, 0.75\]"):
            self.prepared(tmp_path, weights=(1.0, 1.0))
        other = self.prepared(tmp_path, weights=(1.0, 1.0), replace=True)
        assert other.weights == (0.5, 0.5) and other.fingerprint != made.fingerprint

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"weights": (1.0,)}, "weights: got .*each of 2 sources"),
            ({"weights": (1.0, -1.0)}, "weights"),
            ({"weights": (0.0, 0.0)}, "weights"),
            ({"heldout_fraction": 0.0}, "heldout_fraction"),
        ],
    )
    def test_impossible_settings(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.prepared(tmp_path, **change)
        assert not (tmp_path / "out").exists()

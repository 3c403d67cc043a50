"""Text that is too much to pack, or has no end: read, shuffled, encoded and mixed while the training goes on.

A stream is split into logical shards, and each gives the same share of every batch, whatever the number of processes:
several processes take some shards each, see no document twice, and train on the batches that one process would see.
Within a shard each source has a lane. It reads a block of documents, shuffles them, encodes and packs them across
their borders into windows of T + 1 tokens, shuffles these, and hands them out; the mixture says which lane is next.
A position is where the block began and how much of it is used up, so that a resumed run goes on exactly.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import ArtifactError, Provenance, fingerprint, fresh_folder, read_manifest
from distill.data import idioms
from distill.data.corpus import open_dataset, reading, side_of, text_of
from distill.data.tokens import (
    encoder_of,
    ids_type,
    mapped,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from distill.model.inspection import open_tokenizer

SHARDS = 8
"""Logical shards, as far as the batch can be divided by them: the most processes that can share a stream."""
BUFFER = 256
"""Documents of a block; each shard has one of each source at a time."""
TOKENIZER_BYTES = 2**25
"""Text that a tokenizer is trained on, from the start of the sources in proportion to their weights."""
HELDOUT_TOKENS = 2**17
"""Tokens held out."""
_MOST_LOOKED_AT = 400_000  # documents of a source in search of held-out ones
_HELDOUT = "heldout.bin"


@runtime_checkable
class Reader(Protocol):
    """The documents of one shard of a source, one pass after the other."""

    passes: int
    """How often it has begun anew."""

    def read(self) -> str:
        """The next document, never blank."""
        ...

    def position(self) -> dict[str, Any]:
        """What `restore` needs to go on after the last document that was read."""
        ...

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on where `position` was taken."""
        ...


class _Endless:
    """Generated idioms, by their number: there is no last one, and none comes twice."""

    def __init__(self, seed: int, shard: int, shards: int) -> None:
        self.seed, self.shard, self.shards, self.number = seed, shard, shards, 0
        self.passes = 0

    def read(self) -> str:
        self.number += 1
        return idioms.document((self.number - 1) * self.shards + self.shard, self.seed)

    def position(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, position: Mapping[str, Any]) -> None:
        self.number = position["number"]


class _Listed:
    """A source that is listed anew in each pass: every `shards`-th document."""

    def __init__(self, source: str, seed: int, shard: int, shards: int) -> None:
        self.source, self.seed, self.shard, self.shards = source, seed, shard, shards
        self.number = self.passes = 0
        self.rows = self._open()

    def _open(self) -> Iterator[str | None]:
        texts = (text for _, text in reading(self.source, self.seed))
        return itertools.islice(texts, self.shard, None, self.shards)

    def read(self) -> str:
        for _ in range(2):
            for text in self.rows:
                self.number += 1
                if text is not None and text.strip():
                    return text
            self.rows, self.number = self._open(), 0
            self.passes += 1
        raise _too_few(self.source, self.shards)

    def position(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, position: Mapping[str, Any]) -> None:
        self.number = position["number"]
        self.rows = itertools.islice(self._open(), self.number, None)


class _Dataset:
    """A dataset of Hugging Face, streamed: its files are shared out where their number allows, else its rows."""

    def __init__(self, source: str, shard: int, shards: int) -> None:
        self.source, self.shard, self.shards = source, shard, shards
        self.data, self.column = self._open()
        self.rows, self.passes = iter(self.data), 0
        self.at: Any = None
        """The position as long as nothing was read; none: the start."""
        self.moved = False

    def _open(self) -> tuple[Any, str]:
        from datasets.distributed import split_dataset_by_node

        data, column, _ = open_dataset(self.source, streaming=True)
        return split_dataset_by_node(data, rank=self.shard, world_size=self.shards), column

    def read(self) -> str:
        for _ in range(2):
            for row in self.rows:
                text, self.moved = text_of(row, self.column, self.source), True
                if text.strip():
                    return text
            self.data, self.column = self._open()
            self.rows = iter(self.data)
            self.passes += 1
        raise _too_few(self.source, self.shards)

    def position(self) -> dict[str, Any]:
        return {"dataset": self.data.state_dict() if self.moved else self.at}

    def restore(self, position: Mapping[str, Any]) -> None:
        self.data, self.column = self._open()
        self.at, self.moved = position["dataset"], False
        if self.at is not None:
            self.data.load_state_dict(self.at)
        self.rows = iter(self.data)


def _too_few(source: str, shards: int) -> ValueError:
    return ValueError(f"source {source!r}: has no text in one of its {shards} shards, needed is a document in each")


def open_reader(source: str, seed: int, shard: int, shards: int) -> Reader:
    """The reader of one shard of a source: `idioms` without a size has no end, others are as in `read_corpus`."""
    if source == "idioms":
        return _Endless(seed, shard, shards)
    if source.startswith("hf:"):
        return _Dataset(source, shard, shards)
    return _Listed(source, seed, shard, shards)


class _Lane:
    """One source in one shard: windows of training text, block by block."""

    def __init__(self, reader: Reader, stream: "Stream", context: int, seed: Sequence[int]) -> None:
        self.reader, self.stream, self.context, self.seed = reader, stream, context, seed
        self.block = 0
        self.began: dict[str, Any] = {"reader": reader.position(), "rest": []}
        self.rest = np.zeros(0, stream.dtype)
        self.windows: list[np.ndarray] = []
        self.place = 0

    def take(self) -> np.ndarray:
        """The next window, T + 1 ids."""
        if self.place == len(self.windows):
            self.block += 1
            self._fill()
        self.place += 1
        return self.windows[self.place - 1]

    def _fill(self) -> None:
        """Reads blocks until there is a window at least."""
        self.began = {"reader": self.reader.position(), "rest": self.rest.tolist()}
        self.place, self.windows = 0, []
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([*self.seed, self.block])))
        while not self.windows:
            texts = self._documents()
            encoded = self.stream.encode([texts[i] for i in random.permutation(len(texts))])
            ids = np.concatenate([self.rest, *encoded])
            number = max(0, (len(ids) - 1) // self.context)
            windows = [ids[i * self.context : (i + 1) * self.context + 1] for i in range(number)]
            # The last token of the last window is the first input of the next one.
            self.rest = ids[number * self.context :]
            self.windows = [windows[i] for i in random.permutation(number)]

    def _documents(self) -> list[str]:
        """Those of a block: as many as are shuffled at once, or what is left of a pass."""
        texts: list[str] = []
        begun = self.reader.passes
        for _ in range(_MOST_LOOKED_AT):
            text = self.reader.read()
            if not self.stream.held_out(text):
                texts.append(text)
            passed = self.reader.passes - begun
            if len(texts) == self.stream.buffer or passed > 1 or (texts and passed):
                break
        if not texts:
            raise ValueError(f"heldout_fraction: got {self.stream.heldout_fraction}, which leaves no text to train on")
        return texts

    def position(self) -> dict[str, Any]:
        return {**self.began, "block": self.block, "place": self.place}

    def restore(self, position: Mapping[str, Any]) -> None:
        self.reader.restore(position["reader"])
        self.rest = np.array(position["rest"], self.stream.dtype)
        self.block = position["block"]
        if self.block:
            self._fill()
            self.place = position["place"]


class _Shard:
    """One logical shard: the lanes of all sources, mixed."""

    def __init__(self, stream: "Stream", shard: int, shards: int, context: int, seed: int) -> None:
        readers = [open_reader(source, stream.seed, shard, shards) for source in stream.sources]
        self.lanes = [_Lane(r, stream, context, (seed, shard, number)) for number, r in enumerate(readers)]
        self.weights = np.array(stream.weights)
        self.counts = np.zeros(len(readers), np.int64)
        # Where in its turn each source begins, so that the shards do not all take the same one at once.
        self.offsets = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, shard]))).rand(
            len(readers)
        )

    def take(self) -> np.ndarray:
        """A window of the source that lags furthest behind its weight: no count is ever off by more than a few."""
        due = self.weights * (self.counts.sum() + 1) + self.offsets - self.counts
        chosen = int(np.where(self.weights > 0, due, -np.inf).argmax())
        self.counts[chosen] += 1
        return self.lanes[chosen].take()

    def position(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist(), "lanes": [lane.position() for lane in self.lanes]}

    def restore(self, position: Mapping[str, Any]) -> None:
        self.counts = np.array(position["counts"], np.int64)
        for lane, where in zip(self.lanes, position["lanes"], strict=True):
            lane.restore(where)


class StreamBatches:
    """The batches of one training; see `Batches`."""

    def __init__(self, stream: "Stream", *, batch: int, context: int, seed: int) -> None:
        """`ValueError` for settings below 1, a seed below 0."""
        for name, value, least in (("batch", batch, 1), ("context", context, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, allowed are {least} and above")
        self.stream, self.batch_size, self.context, self.seed = stream, batch, context, seed
        self.shards = math.gcd(batch, stream.shards)
        self.step = 0
        self._open: dict[int, _Shard] = {}
        self._saved: dict[str, Any] = {}

    def rows(self, step: int, part: int, parts: int) -> Int[Tensor, "rows T1"]:
        """As `Batches`; ValueError where the shards cannot be divided among that many parts, or a step is left out."""
        if self.shards % parts:
            raise ValueError(f"batch: a stream in {self.shards} shards cannot be divided among {parts} processes")
        if step != self.step:
            raise ValueError(f"step: got {step}, a stream goes on with {self.step}")
        share = self.shards // parts
        rows = [
            self._shard(part * share + n).take() for n in range(share) for _ in range(self.batch_size // self.shards)
        ]
        self.step += 1
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            shard = _Shard(self.stream, number, self.shards, self.context, self.seed)
            if str(number) in self._saved:
                shard.restore(self._saved[str(number)])
            self._open[number] = shard
        return self._open[number]

    def position(self) -> dict[str, Any]:
        """As `Batches`: of the shards that this process has opened."""
        return {"step": self.step, "shards": {str(number): shard.position() for number, shard in self._open.items()}}

    def restore(self, positions: Sequence[Mapping[str, Any]]) -> None:
        """As `Batches`; the processes may be others than those that took the positions."""
        self._open, self._saved = {}, {}
        for position in positions:
            self.step = position["step"]
            self._saved.update(position["shards"])


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Sources that are read on the way, with all that decides which tokens come out; stands in for `TokenData`."""

    sources: tuple[str, ...]
    """As of `read_corpus`, and `idioms` without a size."""
    weights: tuple[float, ...]
    """Share of each source in the windows, adding up to 1."""
    encode: Callable[[Sequence[str]], list[np.ndarray]]
    """Texts to ids, each with the end of the document."""
    dtype: np.dtype
    """Of the ids."""
    seed: int
    """Of what is held out, and of generated text."""
    heldout_fraction: float
    """Share of the texts that is held out, by a hash of the text, in [0, 1)."""
    heldout: np.ndarray
    """Ids of held-out texts from the start of the sources."""
    vocab_size: int
    """Every id is below it."""
    fingerprint: str
    """sha256 (hex) of sources, weights, seed, tokenizer and held-out ids."""
    record: Mapping[str, Any]
    """What is known of the text."""
    folder: Path
    """Where the tokenizer and the held-out ids lie."""
    shards: int = SHARDS
    """Logical shards, at most."""
    buffer: int = BUFFER
    """Documents of a block that is shuffled."""

    def held_out(self, text: str) -> bool:
        """Whether a text is held out."""
        return side_of(text, self.seed) < self.heldout_fraction

    def batches(self, *, batch: int, context: int, seed: int) -> StreamBatches:
        """The batches of a training from its start."""
        return StreamBatches(self, batch=batch, context=context, seed=seed)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that makes the ids."""
        return open_tokenizer(self.folder / "tokenizer")

    @classmethod
    def load(cls, folder: str | Path) -> "Stream":
        """A stream that `prepare_stream` described; ArtifactError for another folder."""
        folder = Path(folder)
        manifest = read_manifest(folder, "tokens")
        try:
            extra = dict(manifest["provenance"]["extra"])
            tokenizer = open_tokenizer(folder / "tokenizer")
            dtype = ids_type(extra["vocab_size"])
            return cls(
                sources=tuple(extra["sources"]),
                weights=tuple(extra["weights"]),
                encode=_encoding(encoder_of(tokenizer), tokenizer.eos_token_id, dtype),
                dtype=dtype,
                seed=manifest["provenance"]["seed"],
                heldout_fraction=extra["heldout_fraction"],
                heldout=mapped(folder / _HELDOUT, dtype),
                vocab_size=extra["vocab_size"],
                fingerprint=extra["fingerprint"],
                record=extra["corpus"],
                folder=folder,
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{folder}: its manifest does not describe a stream: {error}") from None


def _encoding(encoder: Tokenizer, end: int, dtype: np.dtype) -> Callable[[Sequence[str]], list[np.ndarray]]:
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*encoding.ids, end], dtype) for encoding in found]

    return encode


def prepare_stream(
    sources: Sequence[str],
    out: Path,
    *,
    weights: Sequence[float] = (),
    vocab_size: int = 2048,
    tokenizer: PreTrainedTokenizerFast | None = None,
    heldout_fraction: float = 0.05,
    heldout_tokens: int | None = None,
    seed: int = 0,
    command: str = "distill.data.prepare_stream",
    replace: bool = False,
) -> Stream:
    """Describes a stream in the folder `out`, or loads what an earlier call with the same settings left there.

    Arguments:
        sources: as of `read_corpus`, and `idioms` without a size, which has no end.
        out: gets the tokenizer and the held-out ids.
        weights: share of each source in the tokens, of any sum; none: equal shares.
        vocab_size: of the tokenizer that is trained on the start of the sources, where none is given.
        tokenizer: encodes the text instead of a new one.
        heldout_fraction: share of the texts held out, above 0 and below 1.
        heldout_tokens: how many of their tokens are kept, those from the start of the sources; none: `HELDOUT_TOKENS`.
        seed: of what is held out, and of generated text.
        command: recorded as what made the folder.
        replace: describe anew where `out` holds a stream of other settings.

    Raises ValueError for sources that cannot be read, weights that do not fit them, and an `out` of other settings.
    """
    shares = _shares(sources, weights)
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction: got {heldout_fraction}, allowed is above 0, below 1")
    asked = {"sources": list(sources), "weights": list(shares), "heldout_fraction": heldout_fraction, "seed": seed}
    asked["vocabulary"] = vocab_size if tokenizer is None else tokenizer_fingerprint(tokenizer)
    if (out / "manifest.json").is_file():
        made = read_manifest(out, "tokens", verify=False)["provenance"]["config"]
        if made == asked:
            return Stream.load(out)
        if not replace:
            other = next(name for name in asked if made.get(name) != asked[name])
            raise ValueError(f"out: {out} holds tokens of {other} {made.get(other)!r}, asked for is {asked[other]!r}")
    side = {"seed": seed, "fraction": heldout_fraction}
    limit = HELDOUT_TOKENS if heldout_tokens is None else heldout_tokens
    if tokenizer is None:
        wanted = [max(1, round(share * TOKENIZER_BYTES)) for share in shares]
        texts = (t for s, n in zip(sources, wanted, strict=True) for t in _beginning(s, n, heldout=False, **side))
        tokenizer = train_tokenizer(texts, vocab_size)
    size = vocabulary_size(tokenizer)
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("tokenizer: has no end-of-text token (eos_token), which must stand between documents")
    encode = _encoding(encoder_of(tokenizer), tokenizer.eos_token_id, ids_type(size))
    held = [
        ids
        for source, share in zip(sources, shares, strict=True)
        for ids in _held(encode, source, round(share * limit), **side)
    ]
    ids = np.concatenate(held) if held else np.zeros(0, ids_type(size))
    own = fingerprint({**{k: str(v) for k, v in asked.items()}, "tokens": tokenizer_fingerprint(tokenizer), "ids": ids})
    extra = {**asked, "vocab_size": size, "fingerprint": own, "corpus": {"streamed": True, **asked}}
    provenance = Provenance(kind="tokens", command=command, config=asked, seed=seed, data=own, extra=extra)
    with fresh_folder(out, provenance, replace=replace) as folder:
        ids.tofile(folder / _HELDOUT)
        tokenizer.save_pretrained(folder / "tokenizer")
    return Stream.load(out)


def _shares(sources: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """The weights of the sources, adding up to 1."""
    if isinstance(sources, str) or not sources:
        raise ValueError(f"sources: got {sources!r}, needed is a list of one or more")
    weights = tuple(weights) or (1.0,) * len(sources)
    if len(weights) != len(sources) or not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0:
        raise ValueError(f"weights: got {list(weights)}, needed is a number from 0 for each of {len(sources)} sources")
    return tuple(weight / sum(weights) for weight in weights)


def _beginning(source: str, size: int, *, heldout: bool, seed: int, fraction: float) -> Iterator[str]:
    """Texts of one side from the start of a source, until they hold so many bytes; one pass at most."""
    reader, taken = open_reader(source, seed, 0, 1), 0
    for _ in range(_MOST_LOOKED_AT):
        text = reader.read()
        if reader.passes:
            return
        if (side_of(text, seed) < fraction) == heldout:
            yield text
            taken += len(text.encode())
            if taken >= size:
                return


def _held(
    encode: Callable[[Sequence[str]], list[np.ndarray]], source: str, number: int, *, seed: int, fraction: float
) -> Iterator[np.ndarray]:
    """Held-out ids of a source, about so many."""
    taken = 0
    if number == 0:
        return
    for text in _beginning(source, 2**62, heldout=True, seed=seed, fraction=fraction):
        (ids,) = encode([text])
        yield ids
        taken += len(ids)
        if taken >= number:
            return

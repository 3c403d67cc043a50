"""Tokens: a byte-level BPE tokenizer trained on the corpus, ids packed on disk, and windows drawn from them.

`train_tokenizer` -> `pack` -> `TokenData` -> `Sampler` (training) and `windows` (evaluation). On disk a document is
its tokens and then one end-of-text token; all documents of one side lie in one file of 16-bit ids (32-bit for
vocabularies above 65,536), which is mapped, not read. A corpus of separate sequences, all of one length, has no
end-of-text tokens; its ids have two axes, a row for each sequence, and every window is a whole row. Batches are a
function of seed and step alone, so that a resumed run needs no state to go on with the windows that an uninterrupted
one would see.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.artifact import (
    ArtifactError,
    Provenance,
    fingerprint,
    fresh_folder,
    load_tensors,
    read_manifest,
    save_tensors,
)
from distill.data.corpus import Corpus, Document
from distill.model.inspection import open_tokenizer

END_OF_TEXT = "<|endoftext|>"
# Letters may take one character before them (`.add`, `=None`), digits go by threes, line ends stay with punctuation.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIDES = ("train", "heldout")
_IDS_KIND = "ids"
_BATCH_CHARACTERS = 2**20


# --- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which any text survives encoding and decoding unchanged.

    Arguments:
        texts: what to learn merges from.
        vocab_size: number of ids; 256 bytes, then merges, and `<|endoftext|>` as the last id. At least 257.

    Returns a Hugging Face tokenizer; `save_pretrained` and `AutoTokenizer` work on it.
    Raises ValueError for a vocabulary below 257 or larger than the text has merges for, and for a bare string.
    """
    if isinstance(texts, str):
        raise ValueError("texts: got one string, needed are several texts, such as a list of documents")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size: got {vocab_size}, allowed are {len(alphabet) + 1} and above")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt < vocab_size - 1:
        raise ValueError(f"vocab_size: got {vocab_size}, the text has merges for {learnt + 1} at most")
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id, added tokens included: the smallest vocabulary that a model needs."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of all tokens with their ids: equal where equal ids mean equal text."""
    return fingerprint(tokenizer.get_vocab())


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """Token ids of a corpus, train and held-out."""

    train: np.ndarray
    """Ids to train on, unsigned, one axis, or (n, T + 1) for separate sequences; mapped from disk where they came from
    a folder."""
    heldout: np.ndarray
    """Ids held out, alike; empty when nothing was."""
    vocab_size: int
    """Every id is below it."""
    fingerprint: str
    """sha256 (hex) of both sides and of the tokenizer."""
    record: Mapping[str, Any]
    """What is known of the text, see `Corpus.record`; empty for ids without a corpus."""
    folder: Path | None = None
    """Where the ids and the tokenizer lie, None for ids in memory."""

    @classmethod
    def load(cls, folder: str | Path) -> "TokenData":
        """Map a folder that `pack` made, after checking its manifest, sizes and hashes.

        Raises ArtifactError (a ValueError) for anything that is not such a folder, whole and unchanged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "tokens")
        try:
            extra = manifest["provenance"]["extra"]
            vocab_size, record, own = extra["vocab_size"], extra["corpus"], extra["fingerprint"]
            dtype = np.dtype(extra["dtype"])
            length = extra.get("length")
            files = [manifest["files"][f"{side}.bin"]["bytes"] for side in SIDES]
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ArtifactError(f"{folder}: its manifest does not describe token ids: {error}") from None
        if dtype not in (np.uint16, np.uint32) or any(size % dtype.itemsize for size in files):
            raise ArtifactError(f"{folder}: dtype {dtype} does not fit files of {files} bytes")
        if type(vocab_size) is not int or not isinstance(record, dict) or not isinstance(own, str):
            raise ArtifactError(f"{folder}: its manifest does not describe token ids")
        train, heldout = (mapped(folder / f"{side}.bin", dtype) for side in SIDES)
        for side, ids in zip(SIDES, (train, heldout), strict=True):
            if ids.size and int(ids.max()) >= vocab_size:
                raise ArtifactError(f"{folder / side}.bin: holds id {ids.max()}, allowed are 0 to {vocab_size - 1}")
        if length is not None:
            if type(length) is not int or length < 2 or len(train) % length or len(heldout) % length:
                raise ArtifactError(f"{folder}: its ids are no sequences of {length!r} tokens")
            train, heldout = train.reshape(-1, length), heldout.reshape(-1, length)
        return cls(train=train, heldout=heldout, vocab_size=vocab_size, fingerprint=own, record=record, folder=folder)

    @classmethod
    def from_arrays(
        cls, train: Sequence[int] | np.ndarray, heldout: Sequence[int] | np.ndarray = (), *, vocab_size: int
    ) -> "TokenData":
        """Ids that lie in memory, for tests and for text that needs no tokenizer.

        Raises ValueError for ids that are not whole numbers from 0 to below vocab_size, on one axis, or on two for
        separate sequences.
        """
        dtype = ids_type(vocab_size)
        sides: dict[str, np.ndarray] = dict(zip(SIDES, (np.asarray(train), np.asarray(heldout)), strict=True))
        for side, ids in sides.items():
            _check_ids(ids, vocab_size, side, rows=True)
            sides[side] = ids.astype(dtype)
        own = _fingerprint(sides, vocab_size)
        return cls(train=sides["train"], heldout=sides["heldout"], vocab_size=vocab_size, fingerprint=own, record={})

    def batches(self, *, batch: int, context: int, seed: int) -> "Sampler":
        """The batches of a training."""
        return Sampler(self.train, batch=batch, context=context, seed=seed)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the ids. Raises ValueError for ids in memory, which have none."""
        if self.folder is None:
            raise ValueError("tokenizer: these ids were made in memory, allowed are ids loaded from a folder")
        return open_tokenizer(self.folder / "tokenizer")


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    out: str | Path,
    *,
    replace: bool = False,
    command: str = "distill.data.pack",
) -> TokenData:
    """Encode a corpus into a folder: `train.bin`, `heldout.bin`, `tokenizer/` and the manifest.

    Arguments:
        tokenizer: any fast Hugging Face tokenizer with an end-of-text token, or without one for separate sequences.
            Text that spells a special token is encoded as plain text, so that only the ends of documents are ends of
            text.
        out: the folder to make. replace: whether an earlier one there is replaced.
        command: what to record as the command that made it.

    Returns the ids, loaded from the folder.
    Raises ValueError for a tokenizer without an end-of-text token or with more ids than 32 bits hold, separate
    sequences of different lengths, ArtifactError for a folder that exists.
    """
    eos = tokenizer.eos_token_id
    end = eos if isinstance(eos, int) and not corpus.separate else None
    if end is None and not corpus.separate:
        raise ValueError("tokenizer: has no end-of-text token (eos_token), which must stand between documents")
    vocab_size = vocabulary_size(tokenizer)
    dtype = ids_type(vocab_size)
    record = corpus.record()
    # The manifest is written when the folder closes, and takes what was counted until then from this dict.
    extra: dict[str, Any] = {"vocab_size": vocab_size, "dtype": dtype.name, "end_of_text": end, "corpus": record}
    provenance = Provenance(
        kind="tokens",
        command=command,
        config={"sources": [source["source"] for source in record["sources"]], "vocab_size": vocab_size},
        seed=corpus.seed,
        data=record["fingerprint"],
        extra=extra,
    )
    encoder = encoder_of(tokenizer)
    with fresh_folder(out, provenance, replace=replace) as folder:
        lengths: dict[int, str] = {}
        for side, documents in zip(SIDES, (corpus.train, corpus.heldout), strict=True):
            with open(folder / f"{side}.bin", "wb") as file:
                for document, ids in zip(documents, _encoded(encoder, documents, end, dtype, side), strict=True):
                    ids.tofile(file)
                    lengths.setdefault(len(ids), document.name)
        if corpus.separate:
            extra["length"] = _one_length(lengths)
        tokenizer.save_pretrained(folder / "tokenizer")
        sides: dict[str, np.ndarray] = {side: mapped(folder / f"{side}.bin", dtype) for side in SIDES}
        extra["tokens"] = {side: len(ids) for side, ids in sides.items()}
        extra["tokenizer"] = tokenizer_fingerprint(tokenizer)
        extra["fingerprint"] = _fingerprint(sides, extra["tokenizer"])
        del sides
    return TokenData.load(out)


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """What encodes whole documents; text that spells a special token is plain text to it."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _encoded(
    encoder: Tokenizer, documents: Sequence[Document], end: int | None, dtype: np.dtype, side: str
) -> Iterator[np.ndarray]:
    """Ids of one document after the other, each followed by its end, where there is such; encoded in batches."""
    ends = [] if end is None else [end]
    characters = sum(len(document.text) for document in documents)
    with tqdm(total=characters, desc=f"encode {side}", unit="ch", unit_scale=True, delay=2, disable=None) as bar:
        for batch in _batches(documents):
            for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array([*encoding.ids, *ends], dtype)
            bar.update(sum(map(len, batch)))


def _one_length(lengths: Mapping[int, str]) -> int:
    """The length that all sequences have; ValueError naming two that differ, by length, where they do not."""
    if len(lengths) > 1:
        (one, first), (two, second) = list(lengths.items())[:2]
        raise ValueError(f"sequences: {first} has {one} tokens, {second} has {two}; allowed is one length for all")
    ((length, name),) = lengths.items()
    if length < 2:
        raise ValueError(f"sequences: {name} has {length} tokens; allowed are 2 and more")
    return length


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ids_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type, of 16 or 32 bits, that holds the ids of a vocabulary; ValueError where none does."""
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed are 1 to {2**32}")
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _fingerprint(sides: Mapping[str, np.ndarray], vocabulary: str | int) -> str:
    """sha256 of the sides that hold ids, and of the vocabulary."""
    return fingerprint({"vocabulary": vocabulary, **{side: ids for side, ids in sides.items() if len(ids)}})


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file of ids, not read but mapped."""
    if path.stat().st_size == 0:  # nothing to map
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _check_ids(ids: np.ndarray, vocab_size: int, what: str, *, rows: bool = False) -> None:
    shaped = ids.ndim == 1 or (rows and ids.ndim == 2 and ids.shape[1] > 1)
    if not shaped or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        allowed = "on one axis, or rows of two and more" if rows else "on one axis"
        raise ValueError(f"{what}: got {ids.dtype} of shape {ids.shape}, allowed are whole numbers {allowed}")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"{what}: ids from {ids.min()} to {ids.max()}, allowed are 0 to {vocab_size - 1} (vocab_size - 1)"
        )


# --- one small file of ids -------------------------------------------------------------------------------------------


def save_ids(path: str | Path, ids: np.ndarray, *, vocab_size: int, record: Mapping[str, Any] | None = None) -> None:
    """Write ids to one safetensors file, 16 bits each where the vocabulary allows, 32 otherwise.

    Arguments:
        ids: one axis, each from 0 to below vocab_size.
        record: what to remember beside them, JSON values, such as `TokenData.record`.

    Raises ValueError for ids out of range.
    """
    _check_ids(np.asarray(ids), vocab_size, "ids")
    tensor = torch.from_numpy(np.array(ids, ids_type(vocab_size)))
    save_tensors(path, {"ids": tensor}, {"kind": _IDS_KIND, "vocab_size": vocab_size, "record": dict(record or {})})


def load_ids(path: str | Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids of a file by `save_ids`, and its metadata: vocab_size and record among it.

    Raises ArtifactError for a file that is no such file, damaged, or holds ids outside its vocabulary.
    """
    tensors, metadata = load_tensors(path, kind=_IDS_KIND)
    vocab_size = metadata.get("vocab_size")
    if "ids" not in tensors or type(vocab_size) is not int:
        raise ArtifactError(f"{path}: holds no 'ids' with a 'vocab_size'")
    ids = tensors["ids"].numpy()
    try:
        _check_ids(ids, vocab_size, "ids")
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return ids, metadata


# --- windows ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class Batches(Protocol):
    """Where the batches of a training come from; several processes share each of them."""

    def rows(self, step: int, part: int, parts: int) -> Int[Tensor, "rows T1"]:
        """Token ids (int64) of the `part`-th of `parts` equal shares of the batch of `step`; steps come in order."""
        ...

    def position(self) -> dict[str, Any]:
        """Where this process has got to, as JSON values."""
        ...

    def restore(self, positions: Sequence[Mapping[str, Any]]) -> None:
        """Goes on where all processes had got to, each by its `position`."""
        ...


class Sampler:
    """Shuffled windows of T inputs and their targets, the batch of a step a function of seed and step alone.

    The ids are cut into windows of T + 1 tokens that share one token with the next, so that every token is a target
    once; separate sequences are the windows as they are. An epoch is a random order of all windows, no window twice;
    where the first one starts is drawn anew for each epoch (at most T - 1 tokens of either end stay unseen in it), so
    that borders between windows move.
    """

    def __init__(self, ids: np.ndarray, *, batch: int, context: int, seed: int) -> None:
        """
        Arguments:
            ids: token ids, such as `TokenData.train`.
            batch: windows per step (B). context: input tokens per window (T). seed: 0 or above.

        Raises ValueError for settings out of range, for fewer than context + 1 tokens, and for separate sequences that
        have another length than context + 1.
        """
        for name, value, least in (("batch", batch, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, allowed are {least} and above")
        _check_enough(ids, context)
        self.ids, self.batch_size, self.context, self.seed = ids, batch, context, seed
        self.separate = ids.ndim == 2
        if self.separate and ids.shape[1] != context + 1:
            raise ValueError(
                f"context: got {context}, but the sequences have {ids.shape[1]} tokens; allowed is {ids.shape[1] - 1}"
            )
        self.epoch_windows = len(ids) if self.separate else max(1, (len(ids) - context) // context)
        self._starts = 1 if self.separate else min(context, len(ids) - self.epoch_windows * context)

    def rows(self, step: int, part: int, parts: int) -> Int[Tensor, "rows T1"]:
        """As `Batches`; the whole batch is `batch`."""
        share = self.batch_size // parts
        return self.batch(step)[part * share :][:share]

    def position(self) -> dict[str, Any]:
        """Nothing: a batch follows from its step."""
        return {}

    def restore(self, positions: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def batch(self, step: int) -> Int[Tensor, "{self.batch_size} {self.context}+1"]:
        """Token ids (int64) of a step, counted from 0; column t + 1 is the target of column t.

        Raises ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step: got {step}, allowed are 0 and above")
        rows = np.empty((self.batch_size, self.context + 1), np.int64)
        first = step * self.batch_size
        for row in range(self.batch_size):
            epoch, place = divmod(first + row, self.epoch_windows)
            order, start = _epoch(self.seed, epoch, self.epoch_windows, self._starts)
            begin = start + int(order[place]) * (1 if self.separate else self.context)
            rows[row] = self.ids[begin] if self.separate else self.ids[begin : begin + self.context + 1]
        return torch.from_numpy(rows)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, number: int, starts: int) -> tuple[np.ndarray, int]:
    """The order of an epoch's windows and the token its first window starts at.

    RandomState, for numpy promises that its numbers never change: a run resumed under a later numpy goes on alike.
    """
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch))))
    start = int(random.randint(starts))
    return random.permutation(number).astype(np.uint32), start


def batch_at(ids: np.ndarray, step: int, *, batch: int, context: int, seed: int) -> Int[Tensor, "{batch} {context}+1"]:
    """`Sampler(ids, batch=batch, context=context, seed=seed).batch(step)`: as fast, for epochs are remembered."""
    return Sampler(ids, batch=batch, context=context, seed=seed).batch(step)


def windows(ids: np.ndarray, context: int, limit: int | None = None) -> Int[Tensor, "n T1"]:
    """Consecutive windows from the start, the same at every call: every token but the first is a target once.

    Arguments:
        context: input tokens per window (T). Separate sequences may be shorter, and are taken as they are.
        limit: at most this many windows, the first ones (held-out documents lie in random order); None for all.

    Returns int64 ids; each window's last token is the next one's first, unless they are separate sequences. Tokens that
    fill no window are left out.
    Raises ValueError for fewer than context + 1 tokens, longer sequences, and a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, allowed are 1 and above")
    if ids.ndim == 2:
        _check_enough(ids, ids.shape[1] - 1)
        if ids.shape[1] > context + 1:
            raise ValueError(
                f"context: got {context}, but the sequences have {ids.shape[1]} tokens; allowed are "
                f"{ids.shape[1] - 1} and more"
            )
        return torch.from_numpy(np.array(ids[:limit], np.int64))
    _check_enough(ids, context)
    number = (len(ids) - 1) // context
    number = number if limit is None else min(number, limit)
    whole = np.array(ids[: number * context + 1], np.int64)
    return torch.from_numpy(np.lib.stride_tricks.sliding_window_view(whole, context + 1)[::context].copy())


def _check_enough(ids: np.ndarray, context: int) -> None:
    if context < 1:
        raise ValueError(f"context: got {context}, allowed are 1 and above")
    if ids.size < context + 1:
        raise ValueError(f"context: got {context}, which needs {context + 1} tokens, but there are {ids.size} tokens")

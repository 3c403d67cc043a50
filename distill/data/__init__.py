"""Text in, token windows out: corpora, generated idioms, tokenizers and packed ids."""

from distill.data.corpus import Corpus, Document, read_corpus
from distill.data.prepare import prepare
from distill.data.sample import load_sample, save_sample, spread_windows
from distill.data.stream import Stream, prepare_stream
from distill.data.tokens import (
    Batches,
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

__all__ = [
    "Batches",
    "Corpus",
    "Document",
    "Sampler",
    "Stream",
    "TokenData",
    "batch_at",
    "load_ids",
    "load_sample",
    "pack",
    "prepare",
    "prepare_stream",
    "read_corpus",
    "save_ids",
    "save_sample",
    "spread_windows",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "vocabulary_size",
    "windows",
]

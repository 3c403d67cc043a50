"""Text in, token windows out: corpora, generated idioms, tokenizers and packed ids."""

from distill.data.corpus import Corpus, Document, read_corpus
from distill.data.prepare import prepare
from distill.data.tokens import (
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
    "Corpus",
    "Document",
    "Sampler",
    "TokenData",
    "batch_at",
    "load_ids",
    "pack",
    "prepare",
    "read_corpus",
    "save_ids",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "vocabulary_size",
    "windows",
]

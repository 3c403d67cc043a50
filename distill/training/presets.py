"""Sizes of trainings of sparse models by name, as defaults for the command line."""

from collections.abc import Mapping
from typing import Any

LAPTOP: Mapping[str, Any] = {
    "architecture.context": 128,
    "architecture.n_layer": 3,
    "config.context": 128,
    "config.batch": 16,
    "config.kept": 0.0625,
    "config.steps": 2500,
    "config.learning_rate": 0.03,
}
# Width, depth, context, vocabulary and fraction are those of most experiments of the source; batch and steps, on which
# it depends how many tokens are seen, are ours.
_PAPER: Mapping[str, Any] = {
    "vocab_size": 2048,
    "architecture.context": 256,
    "architecture.n_layer": 8,
    "architecture.d_model": 2048,
    "config.context": 256,
    "config.batch": 256,
    "config.accumulate": 8,
    "config.steps": 100_000,
    "config.kept": 1 / 64,
    "config.learning_rate": 0.03,
    "config.eval_every": 1000,
    "config.save_every": 1000,
}
_PAPER_SMALL: Mapping[str, Any] = {
    "architecture.n_layer": 4,
    "architecture.d_model": 512,
    "config.batch": 64,
    "config.accumulate": 1,
    "config.steps": 20_000,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        **LAPTOP,
        "architecture.d_model": 32,
        "architecture.n_layer": 1,
        "config.steps": 20,
        "config.batch": 4,
    },
    "laptop": LAPTOP,
    "paper-small": {**_PAPER, **_PAPER_SMALL},
    "paper": _PAPER,
}
"""tiny: for tests; laptop: two cores, under an hour; paper-small: a quarter of the paper's width and half its depth;
paper: [G 2.1, A.1], for accelerators (`accelerate launch --mixed_precision bf16`)."""

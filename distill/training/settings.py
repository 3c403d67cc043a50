"""How a training is made: every mechanism of the source as a setting, with its default [G A.2]."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from distill.command import no_type_check
from distill.training.candidates import CandidateConfig
from distill.training.optim import GradRms, rate_factor, sharkfin_factor
from distill.training.sparsity import Anneal, kept_fraction

Precision = Literal["float32", "bfloat16"]

# What a run may be resumed with in another way: nothing here changes the weights that come out.
MAY_CHANGE = (
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "trackers",
)


@no_type_check
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what, how sparse and how fast; every value is checked when it is made."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 16
    """Sequences per step, over all processes together."""
    context: int = 256
    """Tokens per sequence."""
    learning_rate: float = 0.03
    """Peak rate, at the target fraction; belongs to grad_rms and eps."""
    dense_rate: float = 1.0
    """Rate of what is not projected (bridges, bigram table, norms, sinks), as a share of learning_rate, above 0."""
    kept: float = 1.0
    """Target fraction of weights that stay, in (0, 1]; 1 trains densely."""
    floor: int | None = None
    """Non-zeros that each neuron and head channel keeps at least; none: min(4, kept * width / 4), 0: no floor."""
    anneal: Anneal = "linear"
    """Course of the kept fraction from 1 to the target; fast gets there within 5% of the steps."""
    anneal_fraction: float = 0.5
    """Share of the steps after which the target is reached, in [0, 1] (not with anneal=fast)."""
    jump: bool = False
    """Whether embeddings and biases keep all entries while the others anneal, and drop to the target at its end."""
    reseed_every: int = 0
    """Steps between re-seedings of dead neurons and head channels, before the end of annealing; 0: never."""
    sharkfin: bool = True
    """Whether the rate of sparse parameters is scaled by sqrt(target fraction / fraction now)."""
    grad_rms: GradRms = "normalize"
    """What is done to the gradient's root mean square: brought to 1, clipped at 1, left."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments per step, each in [0, 1)."""
    eps: float = 0.1
    """AdamW's epsilon; 0.1 belongs to gradients of root mean square 1."""
    weight_decay: float = 0.1
    """AdamW's decay per step and unit of rate; norm gains, sinks and the bigram table are exempt."""
    warmup_fraction: float = 0.01
    """Share of the steps in which the rate rises from 0, in [0, 1]; then it falls linearly to 0."""
    candidate_mode: bool = False
    """Whether gradients and moments are kept for the kept entries and some candidates only, see `candidates`."""
    candidates: CandidateConfig = CandidateConfig()
    """Which candidates, with candidate_mode."""
    accumulate: int = 1
    """Parts that a process' share of the batch is cut into, one after the other: less memory, the same step."""
    precision: Precision = "float32"
    """Arithmetic of the forward and backward pass; weights, moments and projection are float32 in any case."""
    seed: int = 0
    """Seed of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between held-out evaluations; 0: at the end only."""
    save_every: int = 500
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the newest."""
    keep_best: bool = True
    """Whether the one of lowest held-out loss is kept besides, among those at the target fraction; the held-out loss
    is then measured at every checkpoint."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate that get every line, where installed: tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "log_every", "keep_checkpoints", "accumulate"):
            self._require(name, getattr(self, name) >= 1, "whole numbers from 1")
        for name in ("eval_every", "save_every", "reseed_every"):
            self._require(name, getattr(self, name) >= 0, "whole numbers from 0")
        self._require("floor", self.floor is None or self.floor >= 0, "none, or whole numbers from 0")
        self._require("kept", 0 < self.kept <= 1, "above 0, up to 1")
        for name in ("anneal_fraction", "warmup_fraction"):
            self._require(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("learning_rate", "dense_rate", "eps"):
            self._require(name, 0 < getattr(self, name) < math.inf, "finite numbers above 0")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "finite numbers from 0")
        self._require("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._require("anneal", self.anneal in ("linear", "exponential", "fast"), "linear, exponential, fast")
        self._require("grad_rms", self.grad_rms in ("normalize", "clip", "off"), "normalize, clip, off")
        self._require("seed", self.seed >= 0, "whole numbers from 0")
        self._require("precision", self.precision in get_args(Precision), ", ".join(get_args(Precision)))
        if self.candidate_mode:
            alone = "with candidate_mode"
            self._require("jump", not self.jump, f"false {alone}")
            self._require("reseed_every", self.reseed_every == 0, f"0 {alone}")
            self._require("precision", self.precision == "float32", f"float32 {alone}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {allowed}")

    def kept_after(self, step: int) -> float:
        """The fraction of entries that stays after `step` optimiser steps."""
        return kept_fraction(
            step, steps=self.steps, kept=self.kept, anneal=self.anneal, anneal_fraction=self.anneal_fraction
        )

    def late_after(self, step: int) -> float:
        """The same fraction of embeddings and biases: with `jump` they keep all until the others are at the target."""
        kept = self.kept_after(step)
        return 1.0 if self.jump and kept > self.kept else kept

    def rate_at(self, step: int) -> tuple[float, float]:
        """The rate of update `step` (0 first), and the sharkfin factor that sparse parameters get on top."""
        factor = sharkfin_factor(self.kept_after(step + 1), self.kept) if self.sharkfin else 1.0
        return self.learning_rate * rate_factor(step, steps=self.steps, warmup_fraction=self.warmup_fraction), factor

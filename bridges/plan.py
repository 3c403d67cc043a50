"""What fitting a student with bridges comes to before it starts, from shapes alone: no weights are read, no hub needed.

The time is arithmetic, not a measurement: the operations of a step, partial passes among them, over what a GPU
does of them, an assumption that stands beside the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from bridges.objective import BridgeConfig
from distill.circuits.tasks import load_task
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.model.load import model_folder
from distill.model.run import Runnable
from distill.training import TrainConfig, sparse_parameters
from distill.training.estimate import STATE_BYTES, duration_of, kept_numbers, laid_out, size_of

PEAK: Mapping[str, float] = {"bfloat16": 989e12, "float32": 67e12}
"""Floating-point operations a second of an H100 or H200 (SXM), as its maker states them, dense."""
UTILISATION = 0.35
"""Share of the peak that is assumed to be reached."""
BANDWIDTH = 3.35e12
"""Bytes a second of an H100's memory, as its maker states them."""
UPDATE_BYTES = 60
"""Moved per trained parameter by gradient norm, AdamW and projection, about."""
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {},
    "distilgpt2": {"n_layer": 6},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""Models whose shape is known here, by what differs from the default of transformers, which is that of gpt2."""

PRESET: Mapping[str, Any] = {
    "corpus": ("hf:Skylion007/openwebtext",),
    "stream": True,
    "task": ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement"),
    "student.d_model": 3072,
    "bridge.kl_top": 256,
    "bridge.recompute": True,
    "config.context": 512,
    "config.batch": 64,
    "config.accumulate": 8,
    "config.steps": 30_000,
    "config.kept": 1 / 64,
    "config.learning_rate": 0.03,
    "config.precision": "bfloat16",
    "config.eval_every": 1000,
    "config.save_every": 1000,
    "config.keep_checkpoints": 1,
    "config.keep_best": False,
}
"""A student of GPT-2 small for one GPU of 80 GB, four times as wide; a place to start from, its rate untried."""


def dense_shape(name: str) -> Runnable:
    """A dense model without weights: its tensors have shapes and no memory.

    `name` is a folder, a shipped model, one of `KNOWN` (which needs no network), or another name of the hub. Raises
    `ValueError` where there is no such configuration or the hub cannot be reached, and for an architecture that cannot
    be wrapped.
    """
    folder = model_folder(name)
    known = name.removeprefix("openai-community/").removeprefix("distilbert/")
    if folder is None and known in KNOWN:
        config: Any = GPT2Config(**KNOWN[known])
    else:
        try:
            config = AutoConfig.from_pretrained(name if folder is None else folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"dense: the configuration of {name} cannot be read; allowed without a network are a folder with "
                f"config.json, and {', '.join(KNOWN)} ({str(error).strip().splitlines()[0]})"
            ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model if isinstance(model, SparseTransformer) else DenseModel(model)


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What a fit comes to."""

    dense: int
    """Parameters of the dense model, which are frozen."""
    student: int
    """Parameters of the student."""
    projected: int
    """Of them in projected tensors."""
    nonzeros: int
    """Of these that stay at the target fraction."""
    bridges: int
    """Parameters of encoders and decoders, all kept."""
    sites: int
    """Residual sites."""
    bytes: Mapping[str, int]
    """Memory by what it is for, activations about."""
    disk: int
    """Bytes of a checkpoint."""
    tokens: int
    """Seen, over all steps."""
    steps: int
    """Optimiser steps."""
    step_operations: float
    """Floating-point operations of a step; a multiply-add counts twice."""
    seconds: float
    """Of the whole training on the GPU that is assumed."""
    precision: str
    """Of the passes."""

    def describe(self) -> str:
        """For people, in a few lines."""
        total = sum(self.bytes.values())
        split = ", ".join(f"{what} {size_of(count)}" for what, count in self.bytes.items())
        assumed = f"{UTILISATION:.0%} of {PEAK[self.precision] / 1e12:,.0f} TFLOP/s ({self.precision}, H100 or H200)"
        return "\n".join(
            [
                f"dense model: {self.dense:,} parameters, frozen; student: {self.student:,}, {self.projected:,} of "
                f"them projected, of which {self.nonzeros:,} stay; bridges at {self.sites} sites: {self.bridges:,}",
                f"{self.tokens:,} tokens in {self.steps:,} steps",
                f"memory: about {size_of(total)} ({split}); disk: {size_of(self.disk)} a checkpoint",
                f"time: about {duration_of(self.seconds)} on one GPU, {self.step_operations / 1e12:.3g} TFLOP a step, "
                f"if it reaches {assumed}; small models do not",
            ]
        )


def plan_fit(
    dense: Runnable, architecture: Architecture, config: BridgeConfig, training: TrainConfig, *, targets: bool = False
) -> FitPlan:
    """What fitting a student of that shape to a dense model comes to.

    Arguments:
        dense: with or without weights (`dense_shape`).
        targets: whether its whole passes are read from files (`bridges.targets`).
    """
    student = laid_out(architecture)
    projected = sparse_parameters(student)
    shape = config.shape(dense, student)
    sites = 2 * shape.n_layer + 1
    maps = sites * (2 * shape.d_dense * shape.d_sparse + shape.d_dense + shape.d_sparse)
    counts = [_parameters(model) for model in (dense, student)]
    tokens = training.batch * training.context
    operations = tokens * _operations(dense, student, config, training.context, targets)
    trained = counts[1] + maps
    seconds = operations / (UTILISATION * PEAK[training.precision]) + UPDATE_BYTES * trained / BANDWIDTH
    return FitPlan(
        dense=counts[0],
        student=counts[1],
        projected=sum(p.numel() for p in projected.values()),
        nonzeros=sum(round(training.kept * p.numel()) for p in projected.values()),
        bridges=maps,
        sites=sites,
        bytes={
            "student with gradients and moments": STATE_BYTES * counts[1],
            "bridges likewise": STATE_BYTES * maps,
            "dense model": 4 * counts[0],
            "activations": tokens // training.accumulate * _activation_bytes(dense, architecture, config),
        },
        disk=12 * trained,
        tokens=training.steps * tokens,
        steps=training.steps,
        step_operations=operations,
        seconds=training.steps * seconds,
        precision=training.precision,
    )


def next_steps(corpus: Sequence[str], stream: bool, out: str, tasks: Sequence[str]) -> str:
    """What the text is, and the commands that the fitted student in `out` is looked at with.

    Raises `ValueError` for a task that there is none of.
    """
    words = " ".join(load_task(name).name for name in tasks)
    lines = [
        f"corpus: {' '.join(corpus)}, {'read as a stream' if stream else 'packed before the training'}",
        "then:",
        f"  python recipes/measure_bridges.py --bridge {out} --corpus {' '.join(corpus)}",
        f"  python recipes/prune_circuit.py --model {out} --task {words}",
        f"  python recipes/steer.py --bridge {out} --task {words}",
    ]
    return "\n".join(lines)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _forward(model: Runnable, context: int, share: float) -> float:
    """Operations a token of a pass through the last `share` of a model's layers, and its unembedding."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    maps = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "bigram" and id(p) not in tables]
    unembedding = model.unembedding().shape
    layers = sum(p.numel() for p in maps if p.shape != unembedding)
    attention = 2 * context * model.n_layer * model.n_head * model.d_head  # scores and mixtures, half of them masked
    return 2 * (layers * share + unembedding.numel()) + attention * share


def _operations(dense: Runnable, student: Runnable, config: BridgeConfig, context: int, targets: bool) -> float:
    """A token and step, forward and backward."""
    last = 2 * dense.n_layer
    # Sampled sites cost on average what a pass from the middle does.
    shares = [1 - site / last for site in range(last + 1)] if config.sites == "all" else [0.5]
    again = int(config.recompute)
    total = 3 * _forward(student, context, 1.0) + (0 if targets else _forward(dense, context, 1.0))
    for share in shares:
        if config.kl_d2s:
            total += (3 + again) * _forward(student, context, share)
        if config.kl_s2d:  # frozen weights have no gradient
            total += (2 + again) * _forward(dense, context, share)
    maps = (last + 1 if config.nmse_sites == "all" else 1) if config.nmse else 0
    return total + 3 * 2 * (2 * maps + 2 * len(shares)) * dense.d_model * student.d_model


def _activation_bytes(dense: Runnable, architecture: Architecture, config: BridgeConfig) -> int:
    """A token: what passes keep, of four bytes each, at the site that keeps most."""
    student, one = kept_numbers(architecture), replace(architecture, d_model=dense.d_model, n_head=None, d_mlp=None)
    other = kept_numbers(replace(one, d_head=dense.d_head)) if config.kl_s2d else 0
    streams = (2 * dense.n_layer + 1) * (dense.d_model + architecture.d_model)
    through = dense.n_layer + 0.5 if config.sites == "all" else 1  # whole passes' worth of partial ones
    if config.recompute:
        partial, logits = max(student * bool(config.kl_d2s), other), 6
    else:
        passes = bool(config.kl_d2s) + bool(config.kl_s2d)
        number = 2 * dense.n_layer + 1 if config.sites == "all" else 1
        partial, logits = int(through * (student * bool(config.kl_d2s) + other)), 4 + 2 * passes * number
    return 4 * (student + partial + streams + logits * architecture.vocab_size)

"""Pretraining of one model on next tokens: sparse, the same code kept dense, or a plain Hugging Face GPT-2."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import Provenance, fresh_folder, make_way, write_manifest
from distill.data.sample import save_sample, spread_windows
from distill.data.tokens import TokenData
from distill.model import DenseModel, SparseTransformer
from distill.training.evaluate import heldout_loss
from distill.training.sparsity import sparse_parameters, sparsity_report
from distill.training.trainer import Objective, TrainConfig, train

EVALUATION_WINDOWS = 64
"""Held-out windows looked at during training, spread over all of them."""
COMPACT_BELOW = 0.4
"""Share of non-zeros under which weights are stored without their zeros."""
SAMPLE_WINDOWS = 512
"""Held-out windows that the final loss is measured on and that are kept beside the model."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What came out of a training."""

    folder: Path
    """The model folder."""
    heldout_loss: float
    """Nats per token, mean over all held-out windows looked at."""
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Wall time of this process, a resumed training counted from the resumption."""


def plan(model: SparseTransformer | DenseModel, config: TrainConfig) -> str:
    """What a training is going to make and see, in two lines for people."""
    total = sum(parameter.numel() for parameter in model.parameters())
    projected = sum(parameter.numel() for parameter in sparse_parameters(model).values())
    nonzeros = round(config.kept * projected)
    tokens = config.steps * config.batch * config.context
    return (
        f"{total:,} parameters, {projected:,} of them projected, of which {nonzeros:,} stay at kept {config.kept:g}\n"
        f"{config.steps:,} steps of {config.batch} x {config.context} tokens, {tokens:,} tokens; "
        f"weights, gradients and moments: {16 * total / 2**20:,.0f} MiB"
    )


def next_token_loss(model: SparseTransformer | DenseModel) -> Objective:
    """The usual objective: mean cross-entropy of each next token, in nats per token."""

    def objective(tokens: Int[Tensor, "B T1"], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        logits = model.run(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}

    return objective


def pretrain(
    model: SparseTransformer | DenseModel,
    data: TokenData,
    config: TrainConfig,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
) -> Pretrained:
    """Trains `model` in place and saves it with its tokenizer under `folder/model`.

    Every weight matrix, bias and embedding is projected where `config.kept` is below 1 (SparseTransformer only).
    `folder` also gets metrics.jsonl and checkpoints. ValueError for a folder that is in use, settings that do not fit
    the model, and a training that breaks.
    """
    if config.context > model.context:
        raise ValueError(f"context: {config.context} tokens per sequence; this model takes {model.context} at most")
    if data.vocab_size > model.vocab_size:
        raise ValueError(f"vocab_size: {model.vocab_size}; the tokens need {data.vocab_size}")
    sparse = {}
    if config.kept < 1:
        if not isinstance(model, SparseTransformer):
            raise ValueError(f"kept: {config.kept}; a GPT-2 is trained dense, allowed is 1")
        sparse = sparse_parameters(model)
    settings = {"train": asdict(config), "model": dict(model.describe())}
    provenance = Provenance(kind="run", command=command, config=settings, seed=config.seed, data=data.fingerprint)
    make_way(folder, "run", resume=resume, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, provenance)
    watched = spread_windows(data.heldout, config.context, EVALUATION_WINDOWS)
    began = time.perf_counter()
    train(
        model,
        next_token_loss(model),
        data.train,
        config,
        folder,
        sparse=sparse,
        evaluate=lambda: {"heldout_loss": heldout_loss(model, watched)},
        resume=resume,
        provenance=provenance,
    )
    seconds = time.perf_counter() - began
    sample = spread_windows(data.heldout, config.context, SAMPLE_WINDOWS)
    loss = heldout_loss(model, sample)
    tokens = config.steps * config.batch * config.context
    report = sparsity_report(sparse) if sparse else {}
    extra = {"heldout_loss": loss, "tokens": tokens, "seconds": round(seconds, 1), "sparsity": report}
    extra["corpus"] = dict(data.record)
    save_model(model, tokenizer, folder / "model", replace(provenance, kind="model", extra=extra), sample)
    write_manifest(folder, provenance)
    return Pretrained(folder=folder / "model", heldout_loss=loss, tokens=tokens, seconds=seconds)


def save_model(
    model: SparseTransformer | DenseModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    provenance: Provenance,
    sample: Int[Tensor, "n T1"],
) -> None:
    """Writes a model folder: Hugging Face format, tokenizer, and a sample of held-out windows.

    Weights with many zeros are stored without them (`SparseTransformer.save_compact`).
    """
    with fresh_folder(folder, provenance, replace=True) as place:
        if isinstance(model, DenseModel):
            model.hf.save_pretrained(place)
        elif _mostly_zero(model.state_dict()):
            model.save_compact(place)
        else:
            model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        save_sample(place, sample, vocab_size=model.vocab_size)


def _mostly_zero(state: Mapping[str, Tensor]) -> bool:
    matrices = [value for name, value in state.items() if value.dim() == 2 and name != "bigram"]
    return sum(int(m.count_nonzero()) for m in matrices) < COMPACT_BELOW * sum(m.numel() for m in matrices)

"""Pretraining of one model on next tokens: sparse, the same code kept dense, or a plain Hugging Face GPT-2."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import (
    MANIFEST,
    ArtifactError,
    Provenance,
    check_room,
    fresh_folder,
    lock,
    read_head,
    remove_folder,
    write_manifest,
)
from distill.data.sample import save_sample, spread_windows
from distill.data.stream import Stream
from distill.data.tokens import TokenData
from distill.lock import check_unlocked
from distill.model import DenseModel, SparseTransformer
from distill.model.linear_path import fixed as fixed
from distill.training.evaluate import continuation, heldout_loss
from distill.training.log import make_engine
from distill.training.objective import next_token_loss
from distill.training.plot import PICTURE, plot_run
from distill.training.process import hardware
from distill.training.settings import TrainConfig
from distill.training.sparsity import sparse_parameters, sparsity_report
from distill.training.trainer import Evaluate, train

EVALUATION_WINDOWS = 64
"""Held-out windows looked at during training, spread over all of them."""
COMPACT_BELOW = 0.4
"""Share of non-zeros under which weights are stored without their zeros."""
SAMPLE_WINDOWS = 512
"""Held-out windows that the final loss is measured on and that are kept beside the model."""
PROMPT_TOKENS, CONTINUED_TOKENS = 16, 32
"""Lengths of a sample of text: the start of a held-out window, and what the model makes of it."""


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


def check_way(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses what `make_way` would refuse a run for, and deletes nothing: to be called before the work begins.

    ValueError for a folder that another process works in, one that is neither to be gone on with nor to be replaced,
    and for both together.
    """
    if resume and overwrite:
        raise ValueError("resume: given together with overwrite; allowed is one of them")
    check_room(folder)
    check_unlocked(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"out: {folder} is a file; allowed are a new folder, --resume or --overwrite")
    if not (resume or overwrite) and folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"out: {folder} is there already; allowed are a new folder, --resume or --overwrite")


def make_way(folder: Path, kind: str, *, resume: bool, overwrite: bool) -> None:
    """Sees to it that a run may write into `folder`: new, to be gone on with, or with `overwrite` deleted first.

    Only an earlier folder of this kind is deleted. ValueError as `check_way`, ArtifactError for a folder of others.
    """
    check_way(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        remove_folder(folder, kind)


def check_resumed(folder: Path, kind: str, model: Mapping[str, Any], *, field: str = "model") -> None:
    """Refuses to go on with the run in `folder`, where there is one, if it trains another architecture.

    `model` is what the model says of itself (`describe`), `field` where the manifest's configuration holds the same.
    ValueError that names the field which differs, ArtifactError for a folder of another kind.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    # Not `read_manifest`: the files of a run that was interrupted are others than the manifest lists.
    manifest = read_head(folder, kind)
    try:
        was = dict(manifest["provenance"]["config"][field])
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path}: does not say which model the run trains") from None
    now = json.loads(json.dumps(model))
    # Fields that only one of them knows come from another version, not from another model.
    for name in sorted(was.keys() & now.keys(), key=lambda name: (name != "model_type", name)):
        if was[name] != now[name]:
            raise ValueError(f"{name}: got {now[name]!r}, to resume {folder} allowed is {was[name]!r}")


def pretrain(
    model: SparseTransformer | DenseModel,
    data: TokenData | Stream,
    config: TrainConfig,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    linear_path: str = "auto",
    engine: Accelerator | None = None,
) -> Pretrained:
    """Trains `model` in place and saves it with its tokenizer under `folder/model`.

    Every weight matrix, bias and embedding is projected where `config.kept` is below 1 (SparseTransformer only).
    `folder` also gets what `train` writes, and a picture of the course, `training.png`; each evaluation adds a sample
    of text, the start of a held-out window and, behind the sign », how the model goes on, greedily. Nothing is written,
    nor an earlier run deleted, before the settings have passed. `linear_path` and `engine` as in `train`; of several
    processes the main one writes.
    ValueError for a folder that is in use, settings that do not fit the model or the data, another architecture than
    that of the run to be resumed, and a training that breaks.
    """
    engine = engine or make_engine(config, folder)
    if engine.is_main_process:
        check_way(folder, resume=resume, overwrite=overwrite)
    if linear_path != "auto":
        fixed(linear_path)  # refuses a file that is none
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
    watched = spread_windows(data.heldout, config.context, EVALUATION_WINDOWS)
    sample = spread_windows(data.heldout, config.context, SAMPLE_WINDOWS)
    batches = data.batches(batch=config.batch, context=config.context, seed=config.seed)  # refuses too little text
    if engine.is_main_process:
        if resume:
            check_resumed(folder, "run", settings["model"])
        make_way(folder, "run", resume=resume, overwrite=overwrite)
    with lock(folder) if engine.is_main_process else nullcontext():
        if engine.is_main_process:
            start_folder(folder, provenance)
        engine.wait_for_everyone()
        began = time.perf_counter()
        history = train(
            model,
            next_token_loss(model),
            batches,
            config,
            folder,
            sparse=sparse,
            evaluate=_looks(model, tokenizer, watched),
            resume=resume,
            provenance=provenance,
            linear_path=linear_path,
            engine=engine,
        )
        seconds = time.perf_counter() - began
        loss = heldout_loss(model, sample)
        tokens = config.steps * config.batch * config.context
        report = sparsity_report(sparse) if sparse else {}
        extra = {"heldout_loss": loss, "tokens": tokens, "seconds": round(seconds, 1), "sparsity": report}
        extra["hardware"] = hardware(next(model.parameters()).device, engine.num_processes)
        extra["corpus"] = dict(data.record)
        if engine.is_main_process:
            plot_run(history, folder / PICTURE)
            save_model(model, tokenizer, folder / "model", replace(provenance, kind="model", extra=extra), sample)
            write_manifest(folder, provenance)
        engine.wait_for_everyone()
    return Pretrained(folder=folder / "model", heldout_loss=loss, tokens=tokens, seconds=seconds)


def _looks(
    model: SparseTransformer | DenseModel, tokenizer: PreTrainedTokenizerFast, watched: Int[Tensor, "n T1"]
) -> Evaluate:
    """What is looked at on the way: the loss on some held-out windows, and how the first of them is gone on with."""
    prompt = watched[0, : min(PROMPT_TOKENS, watched.shape[1] - 1)]

    def looks() -> dict[str, float | str]:
        found = continuation(model, prompt, CONTINUED_TOKENS)
        texts = [str(tokenizer.decode(ids.tolist())) for ids in (prompt, found)]
        return {"heldout_loss": heldout_loss(model, watched), "sample": "»".join(texts)}

    return looks


def start_folder(folder: Path, provenance: Provenance) -> None:
    """Makes the folder of a run with a manifest, by which it is known as one; that of a resumed run stays."""
    folder.mkdir(parents=True, exist_ok=True)
    # A resumed run may still be refused for its settings, and those of the manifest are the ones it was made with.
    if not (folder / MANIFEST).is_file():
        write_manifest(folder, provenance)


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

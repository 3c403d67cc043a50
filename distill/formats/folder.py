"""Whole folders: OpenAI's checkpoint to a model folder of this package, and back.

What their configuration says beyond what a model computes is kept in the manifest, under `openai`, and written again
on the way back; every tensor comes back with the bits it had.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import MANIFEST, Provenance, check_free, fresh_folder, read_json, read_manifest
from distill.formats.tokenizer import ENCODER_FILE, read_tokenizer, write_tokenizer
from distill.model import SparseTransformer, check_tokenizer, load_model, load_tokenizer
from distill.model.architecture import Architecture
from distill.model.compact import DENSE_ABOVE, save_compact
from distill.model.load import model_folder
from distill.model.openai import (
    CONFIG_FILE,
    LAYER_EPS,
    MAX_CONFIG_BYTES,
    RMS_EPS,
    config_of,
    read_config,
    write_checkpoint,
)
from distill.model.transformer import COMPACT_FILE

RECORD = "openai"
"""Where the manifest of a converted model keeps what it was converted from."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What came out of a conversion."""

    folder: Path
    """The folder that was written."""
    parameters: int
    """Entries of all tensors, a tied one counted once."""
    nonzeros: int
    """Those of them that are not zero."""
    notes: tuple[str, ...]
    """What a person should know, a sentence each."""

    def lines(self) -> str:
        """All of it, for people."""
        head = f"{self.parameters:,} parameters, {self.nonzeros:,} of them not zero, in {self.folder}"
        return "\n".join([head, *self.notes])


def import_checkpoint(
    source: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, command: str, overwrite: bool = False
) -> Converted:
    """A model folder out of a checkpoint folder of OpenAI's.

    Arguments:
        source: folder with `beeg_config.json` and `final_model.pt`.
        out: the folder to make; with `overwrite` an earlier model there is replaced.
        tokenizer: folder with `encoder.json` and `vocab.bpe`; none: `source`, where it has them.
        command: what to record as the command that made it.

    ArtifactError, a ValueError, naming what is wrong with a file; nothing is written then.
    """
    source, out = Path(source), Path(out)
    check_free(out, "model", replace=overwrite)
    model = SparseTransformer.from_openai(source)
    config = read_config(read_json(source / CONFIG_FILE, what="configuration", max_bytes=MAX_CONFIG_BYTES))
    words = _tokenizer_of(source, tokenizer)
    notes = []
    if words is None:
        notes.append(f"no tokenizer: neither given nor beside the checkpoint ({ENCODER_FILE}); circuits need one")
    else:
        check_tokenizer(words, model)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, words.eos_token_id)
    total, nonzeros, exact = _counts(model)
    compact = exact and nonzeros < DENSE_ABOVE * total
    notes.append("weights stored without their zeros" if compact else "weights stored whole")
    provenance = Provenance(
        kind="model",
        command=command,
        config={"model": dict(model.describe())},
        seed=None,
        data=None,
        extra={RECORD: {"config": config, "folder": source.name}, "parameters": total, "nonzeros": nonzeros},
    )
    with fresh_folder(out, provenance, replace=overwrite) as place:
        _store(model, place, compact=compact)
        if words is not None:
            words.save_pretrained(place)
    return Converted(folder=out, parameters=total, nonzeros=nonzeros, notes=tuple(notes))


def _tokenizer_of(source: Path, given: str | Path | None) -> PreTrainedTokenizerFast | None:
    if given is not None:
        return read_tokenizer(given)
    return read_tokenizer(source) if (source / ENCODER_FILE).is_file() else None


def _counts(model: SparseTransformer) -> tuple[int, int, bool]:
    """Entries, those that are not zero, and whether leaving out zeros is exact: a negative zero would lose its sign."""
    total = nonzeros = 0
    exact = True
    for parameter in model.parameters():
        value = parameter.detach()
        total += value.numel()
        nonzeros += int(value.count_nonzero())
        exact = exact and not bool((value.signbit() & (value == 0)).any())
    return total, nonzeros, exact


def _store(model: SparseTransformer, place: Path, *, compact: bool) -> None:
    if not compact:
        model.save_pretrained(place)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(place)
    model.generation_config.save_pretrained(place)
    save_compact(place / COMPACT_FILE, model.state_dict(), rounded={})


def write_openai(
    source: str | Path, out: str | Path, *, nearest: bool = False, command: str, overwrite: bool = False
) -> Converted:
    """A checkpoint folder of OpenAI's out of a model of this package, with its tokenizer's files where these can be.

    Arguments:
        source: a sparse model: folder, run folder or short name.
        out: the folder to make; with `overwrite` an earlier one there is replaced.
        nearest: write a model whose norms add another eps than theirs do with their eps; the largest change of a
            logit on random tokens is among the notes.
        command: what to record as the command that made it.

    ValueError naming the field that their format has no place for; nothing is written then.
    """
    out = Path(out)
    check_free(out, "model", replace=overwrite)
    model = load_model(source)
    if not isinstance(model, SparseTransformer):
        raise ValueError(f"model: {source} is no sparse transformer of this package; allowed are those")
    architecture, notes = model.architecture, []
    if nearest:
        architecture = replace(architecture, norm_eps=RMS_EPS if architecture.norm == "rms" else LAYER_EPS)
        change = _largest_change(model, architecture)
        notes.append(f"eps of the norms {model.architecture.norm_eps} written as {architecture.norm_eps:.3g}: "
                     f"logits change by up to {change:.2g} on random tokens")  # fmt: skip
    like = _remembered(source)
    config_of(architecture, like)
    total, nonzeros, _ = _counts(model)
    if architecture.position == "none":
        notes.append("no positions: written as a table of zeros, which is the same")
    provenance = Provenance(
        kind="model",
        command=command,
        config={"model": dict(model.describe()), "nearest": nearest},
        seed=None,
        data=None,
        extra={"format": "openai/circuit_sparsity", "source": str(source), "fingerprint": model.fingerprint()},
    )
    with fresh_folder(out, provenance, replace=overwrite) as place:
        write_checkpoint(place, architecture, model.state_dict(), like=like)
        notes.append(_write_words(source, place))
    return Converted(folder=out, parameters=total, nonzeros=nonzeros, notes=tuple(notes))


def _write_words(source: str | Path, place: Path) -> str:
    folder = model_folder(source)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return "no tokenizer beside the model, none written"
    try:
        write_tokenizer(place, load_tokenizer(source))
    except ValueError as error:
        return f"no tokenizer written; {error}"
    return "tokenizer written as encoder.json and vocab.bpe"


def _remembered(source: str | Path) -> dict[str, Any] | None:
    """The configuration that a model was converted from, where it was."""
    folder = model_folder(source)
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    record = read_manifest(folder, verify=False)["provenance"]["extra"].get(RECORD)
    return read_config(record["config"], folder / MANIFEST) if isinstance(record, dict) else None


@torch.no_grad()
def _largest_change(model: SparseTransformer, architecture: Architecture) -> float:
    with torch.device("meta"):
        other = SparseTransformer(type(model.config)(**asdict(architecture)))
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    generator = torch.Generator().manual_seed(0)
    tokens: Tensor = torch.randint(model.vocab_size, (4, min(model.context, 64)), generator=generator)
    return float((other.eval().run(tokens) - model.run(tokens)).abs().max())

"""Training a sparse student of a frozen dense model together with its bridges [G 2.3, A.4].

The loss is `BridgeObjective`, the loop is that of `distill.training`: sparsity, rate, checkpoints and resuming are the
same as for a model that is trained alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bridges.baselines import bigram_loss, least_squares_bridges
from bridges.folder import DenseRecord, check_place, save_bridged
from bridges.maps import Bridges
from bridges.metrics import Metrics, bridge_metrics, plot_metrics, recorded
from bridges.objective import BridgeConfig, BridgeObjective, check_pair
from distill.artifact import ArtifactError, Provenance, read_json, write_json, write_manifest
from distill.circuits.ablation import SINK_RATIO
from distill.command import no_type_check
from distill.data.sample import spread_windows
from distill.data.tokens import Sampler, TokenData, windows
from distill.model.run import Runnable
from distill.model.transformer import LARGEST_BIGRAM, Architecture, SparseTransformer
from distill.training.plot import PICTURE, plot_run
from distill.training.pretrain import COMPACT_BELOW, SAMPLE_WINDOWS, check_way, make_way, start_folder
from distill.training.sparsity import sparse_parameters, sparsity_report
from distill.training.trainer import TrainConfig, train

SETTINGS_FILE = "settings.json"
PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": {"kl": 0.0, "first_position": "in"}}
"""Values of `BridgeConfig` by name; `paper` has the terms of [G A.3] only."""


@no_type_check
@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The numbers of a sparse student that its dense model does not decide."""

    d_model: int = 512
    """Width of the residual stream, in channels (S)."""
    d_head: int = 16
    """Width of an attention head, in channels (H)."""
    d_mlp: int | None = None
    """Neurons per layer; by default 4 * d_model."""
    context: int | None = None
    """Longest sequence in tokens; by default the dense model's."""
    topk_fraction: float | None = 0.25
    """Share of channels that AbsTopK keeps at a node location, in (0, 1]; none switches it off."""
    position: Literal["auto", "none", "added"] = "auto"
    """Learned positions: added where the dense model has learned ones (auto), never, always."""
    bigram: Literal["auto", "on", "off"] = "auto"
    """Dense (V, V) bigram table: where the vocabulary is 8192 at most (auto), yes (refused above that), no."""

    def architecture(self, dense: Runnable) -> Architecture:
        """The whole architecture, with the depth, vocabulary and context of the dense model. `ValueError` as there."""
        context = dense.context if self.context is None else self.context
        if context > dense.context:
            raise ValueError(f"context: got {context}, allowed are 1 to {dense.context} (the dense model's)")
        added = dense.has_positions if self.position == "auto" else self.position == "added"
        table = dense.vocab_size <= LARGEST_BIGRAM if self.bigram == "auto" else self.bigram == "on"
        return Architecture(
            vocab_size=dense.vocab_size,
            context=context,
            n_layer=dense.n_layer,
            d_model=self.d_model,
            d_head=self.d_head,
            d_mlp=self.d_mlp,
            topk_fraction=self.topk_fraction,
            position="added" if added else "none",
            bigram=table,
        )


@torch.no_grad()
def has_sink(model: Runnable, tokens: Int[Tensor, "B T"]) -> bool:
    """Whether the mean residual norm at position 0 exceeds 10 times the median over positions, at any site."""
    _, streams = recorded(model, tokens.to(next(model.parameters()).device))
    norms = (stream.float().norm(dim=-1).mean(0) for stream in streams.values())
    return any(float(norm[0]) > SINK_RATIO * float(norm.median()) for norm in norms)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `fit_bridges` made."""

    student: SparseTransformer
    bridges: Bridges
    metrics: Metrics
    """Of `bridge_metrics`, as in `bridges.json`."""
    history: list[dict[str, Any]]
    """Lines of `metrics.jsonl`."""


def line_of(metrics: Metrics) -> str:
    """What a fit came to, in two lines for people; means are over the sites that have a value."""
    means = {}
    for name in ("nmse_d2s", "nmse_s2d", "hybrid_ce_d2s", "hybrid_ce_s2d"):
        mean = _mean(metrics, name)
        means[name] = "not defined" if mean is None else f"{mean:.3f}"
    return (
        f"held-out loss, nats per token: dense {metrics['dense_ce']:.3f}, student {metrics['student_ce']:.3f}, "
        f"bigram {metrics['bigram_ce']:.3f}\n"
        f"means over sites: NMSE {means['nmse_d2s']} dense to sparse, {means['nmse_s2d']} back; "
        f"hybrid loss {means['hybrid_ce_d2s']} dense to sparse, {means['hybrid_ce_s2d']} back"
    )


def _mean(metrics: Metrics, name: str) -> float | None:
    """Mean over sites; a site whose stream does not vary has no NMSE, and where all are so there is no mean."""
    values = [site[name] for site in metrics["sites"].values() if site[name] is not None]
    return sum(values) / len(values) if values else None


def fit_bridges(
    dense: Runnable,
    student: SparseTransformer,
    data: TokenData,
    config: BridgeConfig,
    training: TrainConfig,
    folder: str | Path,
    *,
    dense_name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "bridges.fit_bridges",
    judged: int = 32,
    batch: int = 8,
) -> Fit:
    """Train a student of a dense model with its bridges, and write a folder that loads by its path.

    The folder gets `model/` (the student, with the tokenizer where one is given), `bridges/`, `dense.json` (which dense
    model), `bridges.json` (metrics), `bridges.png`, `settings.json`, the trainer's `metrics.jsonl` and `checkpoints/`,
    and a manifest. `load_bridged` reads it. Nothing is written, nor an earlier run deleted, before the input has
    passed.

    Arguments:
        dense: the dense model, on the student's device; it is frozen for good.
        student: trained in place; its weights are kept sparse as `training` says.
        data: tokens of the dense model's own tokenizer, some of them held out.
        config: terms of the loss. training: steps, batch, rate, sparsity.
        dense_name: path or hub name of the dense model, to be loaded by later.
        tokenizer: saved beside the student.
        resume: go on from the newest checkpoint in the folder.
        overwrite: delete an earlier run in the folder.
        command: recorded as the command that made it.
        judged: held-out windows that the final metrics are measured on; those on the way use at most 8 of them.
        batch: windows per pass in these measurements.

    Raises `ValueError` for models that do not fit each other or the data, too little text, a folder in use, and
    settings that are not those of the run to be resumed; `TrainingError` where the training breaks down.
    """
    folder = Path(folder)
    check_way(folder, resume=resume, overwrite=overwrite)
    check_pair(dense, student, context=training.context)
    if data.vocab_size > dense.vocab_size:
        raise ValueError(f"data: has ids up to {data.vocab_size - 1}, the models' vocabulary is {dense.vocab_size}")
    heldout = windows(data.heldout, training.context, judged)
    sample = spread_windows(data.heldout, training.context, SAMPLE_WINDOWS)
    Sampler(data.train, batch=training.batch, context=training.context, seed=training.seed)  # refuses too little text
    record = DenseRecord.of(dense, dense_name)
    settings = {"dense": record.stored(folder), "bridge": asdict(config), "student": dict(student.describe())}
    if resume:
        _check_settings(folder, settings)
        check_place(folder)
    bridges, objective = _prepare(dense, student, data, config, training, batch)

    def evaluate() -> dict[str, float]:
        return _brief(bridge_metrics(dense, student, bridges, heldout[:8], batch=batch))

    provenance = Provenance(
        kind="bridge",
        command=command,
        config={**settings, "training": asdict(training)},
        seed=training.seed,
        data=data.fingerprint,
        extra={"data": dict(data.record)},
    )
    sparse = {f"student.{name}": parameter for name, parameter in sparse_parameters(student).items()}
    modules = nn.ModuleDict({"student": student, "bridges": bridges})
    make_way(folder, "bridge", resume=resume, overwrite=overwrite)
    start_folder(folder, provenance)
    if not (folder / SETTINGS_FILE).is_file():
        write_json(folder / SETTINGS_FILE, settings)
    history = train(
        modules,
        objective,
        data.train,
        training,
        folder,
        sparse=sparse,
        evaluate=evaluate,
        resume=resume,
        provenance=provenance,
    )
    bigram = bigram_loss(data.train, heldout, vocab_size=dense.vocab_size)
    metrics = bridge_metrics(dense, student, bridges, heldout, batch=batch, bigram_ce=bigram, mixtures=4)
    facts = {
        "heldout_loss": metrics["student_ce"],
        "tokens": training.steps * training.batch * training.context,
        "sparsity": sparsity_report(sparse) if training.kept < 1 else {},
        "corpus": dict(data.record),
    }
    save_bridged(
        folder,
        student,
        bridges,
        record,
        metrics,
        tokenizer=tokenizer,
        compact=training.kept < COMPACT_BELOW,
        sample=sample,
        provenance=replace(provenance, kind="model", extra=facts),
    )
    plot_metrics(metrics, folder / "bridges.png")
    plot_run(history, folder / PICTURE)
    write_manifest(folder, provenance)
    return Fit(student=student.eval(), bridges=bridges.eval(), metrics=metrics, history=history)


def _prepare(
    dense: Runnable,
    student: SparseTransformer,
    data: TokenData,
    config: BridgeConfig,
    training: TrainConfig,
    batch: int,
) -> tuple[Bridges, BridgeObjective]:
    """Bridges as they are at the start, and the objective."""
    sample = windows(data.train, training.context, 64)
    skip = has_sink(dense, sample[:batch, :-1]) if config.first_position == "auto" else config.first_position == "out"
    shape = config.shape(dense, student)
    if config.initial == "least_squares":
        bridges = least_squares_bridges(dense, student, sample, k=shape.k, batch=batch, skip_first=skip)
    else:
        bridges = Bridges(shape, seed=config.seed)
    bridges = bridges.to(next(student.parameters()).device)
    return bridges, BridgeObjective(dense, student, bridges, config, skip_first=skip)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume the run in `folder`, where there is one, under other settings than it was made with."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return
    saved = read_json(path, what="settings")
    if not isinstance(saved, dict) or not all(isinstance(part, dict) for part in saved.values()):
        raise ArtifactError(f"{path}: does not hold the settings of a run")
    for name, was in saved.items():
        now = json.loads(json.dumps(settings.get(name, {})))
        # The fingerprint says which dense model it is; its name is only where it lies today.
        keys = {*was, *now} - ({"name"} if name == "dense" else set())
        changed = sorted(key for key in keys if was.get(key) != now.get(key))
        if changed:
            key = changed[0]
            raise ValueError(f"{name}.{key}: got {now.get(key)!r}, to resume {folder} allowed is {was.get(key)!r}")


def _brief(metrics: Metrics) -> dict[str, float]:
    """Held-out values for the log: the models' losses, and means over sites."""
    found = {f"heldout_{name}": metrics[name] for name in ("student_ce", "student_kl", "dense_ce")}
    found["heldout_loss"] = metrics["student_ce"]  # the name by which the trainer knows its best checkpoint
    for name in ("nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d"):
        mean = _mean(metrics, name)
        if mean is not None:
            found[f"heldout_{name}"] = mean
    return found

"""Training a sparse student of a frozen dense model together with its bridges [G 2.3, A.4].

The loss is `BridgeObjective`, the loop is that of `distill.training`: sparsity, rate, checkpoints and resuming are the
same as for a model that is trained alone.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bridges.baselines import bigram_loss, least_squares_bridges, measure
from bridges.folder import DenseRecord, check_place, save_bridged
from bridges.maps import Bridges
from bridges.metrics import Metrics, bridge_metrics, plot_metrics, recorded
from bridges.objective import BridgeConfig, BridgeObjective, check_pair
from bridges.tables import site_mean
from bridges.targets import StoredTeacher, TargetPlan, write_targets
from distill.artifact import ArtifactError, Provenance, read_json, write_json, write_manifest
from distill.circuits.ablation import SINK_RATIO
from distill.command import no_type_check
from distill.data.sample import spread_windows
from distill.data.stream import Stream
from distill.data.tokens import Batches, TokenData, windows
from distill.lock import lock
from distill.model.run import Runnable
from distill.model.sites import residual_sites
from distill.model.transformer import LARGEST_BIGRAM, Architecture, SparseTransformer
from distill.training.log import make_engine
from distill.training.plot import PICTURE, plot_run
from distill.training.pretrain import COMPACT_BELOW, SAMPLE_WINDOWS, check_way, make_way, start_folder
from distill.training.process import hardware
from distill.training.sparsity import sparse_parameters, sparsity_report
from distill.training.trainer import TrainConfig, train

SETTINGS_FILE = "settings.json"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"kl": 0.0, "first_position": "in"},
    "kl-only": {"ce": 0.0, "nmse": 0.0, "kl_d2s": 0.0, "kl_s2d": 0.0},
}
"""Values of `BridgeConfig` by name; `paper` has the terms of [G A.3] only, `kl-only` makes the baseline of a student
that learns to answer like the dense model, without bridges."""
FITTED_WINDOWS = 64
"""Training windows that least-squares bridges are fitted on, at least."""
BIGRAM_WINDOWS = 4096
"""Training windows of streamed text that the bigram model is counted on."""


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
    position: Literal["auto", "none", "added", "concat"] = "auto"
    """Learned positions: added where the dense model has learned ones (auto), none, added to the embedding, or
    read-only channels beside every read."""
    d_position: int = 0
    """Position channels (P), with position=concat only."""
    bigram: Literal["auto", "on", "off"] = "auto"
    """Dense (V, V) bigram table: where the vocabulary is 8192 at most (auto), yes (refused above that), no."""

    def architecture(self, dense: Runnable) -> Architecture:
        """The whole architecture, with the depth, vocabulary and context of the dense model. `ValueError` as there."""
        context = dense.context if self.context is None else self.context
        if context > dense.context:
            raise ValueError(f"context: got {context}, allowed are 1 to {dense.context} (the dense model's)")
        position = self.position
        if position == "auto":
            position = "added" if dense.has_positions else "none"
        table = dense.vocab_size <= LARGEST_BIGRAM if self.bigram == "auto" else self.bigram == "on"
        return Architecture(
            vocab_size=dense.vocab_size,
            context=context,
            n_layer=dense.n_layer,
            d_model=self.d_model,
            d_head=self.d_head,
            d_mlp=self.d_mlp,
            topk_fraction=self.topk_fraction,
            position=position,
            d_position=self.d_position,
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
    """What a fit came to, in a few lines for people; means are over the sites that have a value."""
    means = {}
    for name in ("nmse_d2s", "nmse_s2d", "hybrid_ce_d2s", "hybrid_ce_s2d", "recovered_d2s", "recovered_s2d"):
        mean = site_mean(metrics["sites"], name)
        means[name] = "not defined" if mean is None else f"{mean:.3f}"
    lines = [
        f"held-out loss, nats per token: dense {metrics['dense_ce']:.3f}, student {metrics['student_ce']:.3f}, "
        f"bigram {metrics['bigram_ce']:.3f}",
        f"means over sites: NMSE {means['nmse_d2s']} dense to sparse, {means['nmse_s2d']} back; "
        f"hybrid loss {means['hybrid_ce_d2s']} dense to sparse, {means['hybrid_ce_s2d']} back; "
        f"share of the dense model's gain over bigrams {means['recovered_d2s']}, {means['recovered_s2d']} back",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in metrics.get("warnings", []))])


def fit_bridges(
    dense: Runnable,
    student: SparseTransformer,
    data: TokenData | Stream,
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
    targets: str | Path | None = None,
    rivals: Mapping[str, Runnable] | None = None,
    engine: Accelerator | None = None,
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
        dense_name: path or hub name of the dense model, to be loaded by later. tokenizer: saved beside the student.
        resume: go on from the newest checkpoint in the folder. overwrite: delete an earlier run in it.
        command: recorded as the command that made it.
        judged: held-out windows that the final metrics are measured on; those on the way use at most 8 of them.
        batch: windows per pass in these measurements.
        targets: folder of what the dense model says of the text, which is written there first where it is not there
            (`bridges.targets`); None: the dense model is run in every step.
        rivals: other sparse models to measure beside the student (`bridges.baselines.load_rivals`).
        engine: accelerate's, as in `distill.training.train`; of several processes the main one writes.

    Raises `ValueError` for models that do not fit each other or the data, too little text, a folder in use, targets of
    another training, and settings that are not those of the run to be resumed; `TrainingError` where the training
    breaks down.
    """
    folder = Path(folder)
    engine = engine or make_engine(training, folder)
    if engine.is_main_process:
        check_way(folder, resume=resume, overwrite=overwrite)
    check_pair(dense, student, context=training.context)
    _check_data(data, dense)
    heldout = windows(data.heldout, training.context, judged)
    sample = spread_windows(data.heldout, training.context, SAMPLE_WINDOWS)
    batches = _batches(data, training)  # refuses too little text
    record = DenseRecord.of(dense, dense_name)
    settings = {"dense": record.stored(folder), "bridge": asdict(config), "student": dict(student.describe())}
    if resume:
        _check_settings(folder, settings)
        check_place(folder)
    fitted = training_windows(data, training, FITTED_WINDOWS)
    bridges, skip_first = _prepare(dense, student, fitted, config, batch)
    teacher = None
    if targets is not None:
        if engine.mixed_precision != "no" and training.precision != "bfloat16":
            raise ValueError("targets: launched with mixed precision, which they do not follow; use --config.precision")
        teacher = _stored(Path(targets), dense, data, config, training, record, engine)

    def evaluate() -> dict[str, float]:
        return _brief(bridge_metrics(dense, student, bridges, heldout[:8], batch=batch))

    provenance = Provenance(
        kind="bridge",
        command=command,
        config={**settings, "training": asdict(training)},
        seed=training.seed,
        data=data.fingerprint,
        extra={
            "data": dict(data.record),
            "hardware": hardware(next(student.parameters()).device, engine.num_processes),
        },
    )
    sparse = {f"student.{name}": parameter for name, parameter in sparse_parameters(student).items()}
    modules = nn.ModuleDict({"student": student, "bridges": bridges})
    if engine.is_main_process:
        make_way(folder, "bridge", resume=resume, overwrite=overwrite)
    with lock(folder) if engine.is_main_process else nullcontext():
        if engine.is_main_process:
            _begin(folder, provenance, settings)
        engine.wait_for_everyone()
        objective = BridgeObjective(dense, student, bridges, config, skip_first=skip_first, teacher=teacher)
        loop: dict[str, Any] = {"evaluate": evaluate, "resume": resume, "provenance": provenance, "engine": engine}
        history = train(modules, objective, batches, training, folder, sparse=sparse, **loop)
        options: dict[str, Any] = {"train": fitted, "rivals": rivals, "skip_first": skip_first, "batch": batch}
        bigram = bigram_loss(counted(data, training), heldout, vocab_size=dense.vocab_size)
        metrics = measure(dense, student, bridges, heldout, bigram_ce=bigram, **options)
        made = Fit(student=student.eval(), bridges=bridges.eval(), metrics=metrics, history=history)
        if engine.is_main_process:
            _write(folder, made, record, provenance, sparse, training, tokenizer=tokenizer, sample=sample)
        engine.wait_for_everyone()
    return made


def _begin(folder: Path, provenance: Provenance, settings: Mapping[str, Any]) -> None:
    start_folder(folder, provenance)
    if not (folder / SETTINGS_FILE).is_file():
        write_json(folder / SETTINGS_FILE, settings)


def _write(
    folder: Path,
    made: Fit,
    record: DenseRecord,
    provenance: Provenance,
    sparse: Mapping[str, nn.Parameter],
    training: TrainConfig,
    **options: Any,
) -> None:
    """The folder of a fit; `options` of `save_bridged`."""
    facts = {
        "heldout_loss": made.metrics["student_ce"],
        "tokens": training.steps * training.batch * training.context,
        "sparsity": sparsity_report(sparse) if training.kept < 1 else {},
        "corpus": provenance.extra["data"],
        "hardware": provenance.extra["hardware"],
    }
    known, compact = replace(provenance, kind="model", extra=facts), training.kept < COMPACT_BELOW
    save_bridged(folder, made.student, made.bridges, record, made.metrics, provenance=known, compact=compact, **options)
    plot_metrics(made.metrics, folder / "bridges.png")
    plot_run(made.history, folder / PICTURE)
    write_manifest(folder, provenance)


def _check_data(data: TokenData | Stream, dense: Runnable) -> None:
    if data.vocab_size > dense.vocab_size:
        raise ValueError(f"data: has ids up to {data.vocab_size - 1}, the models' vocabulary is {dense.vocab_size}")


def _batches(data: TokenData | Stream, training: TrainConfig) -> Batches:
    return data.batches(batch=training.batch, context=training.context, seed=training.seed)


def training_windows(data: TokenData | Stream, training: TrainConfig, number: int) -> Int[Tensor, "n T1"]:
    """Windows to train on, from the start: at most so many of packed text, at least so many of streamed text."""
    if isinstance(data, TokenData):
        return windows(data.train, training.context, number)
    batches = _batches(data, training)
    steps = -(-number // training.batch)
    return torch.cat([batches.rows(step, 0, 1) for step in range(steps)])


def counted(data: TokenData | Stream, training: TrainConfig) -> np.ndarray:
    """What a bigram model is counted on: packed text, or the start of a stream, windows of it as rows."""
    return data.train if isinstance(data, TokenData) else training_windows(data, training, BIGRAM_WINDOWS).numpy()


def _stored(
    folder: Path,
    dense: Runnable,
    data: TokenData | Stream,
    config: BridgeConfig,
    training: TrainConfig,
    record: DenseRecord,
    engine: Accelerator,
) -> StoredTeacher:
    """What the dense model says of the text, out of files that are written first where they are not there."""
    plan = _target_plan(record, data, config, training)
    sites_of = partial(config.read_sites, sites=residual_sites(dense.n_layer))
    if engine.is_main_process:
        write_targets(folder, dense.eval(), _batches(data, training), plan, sites_of)
    engine.wait_for_everyone()
    return StoredTeacher(folder, plan)


def _prepare(
    dense: Runnable, student: SparseTransformer, sample: Int[Tensor, "n T1"], config: BridgeConfig, batch: int
) -> tuple[Bridges, bool]:
    """Bridges as they are at the start, and whether position 0 is left out of the NMSE."""
    skip = has_sink(dense, sample[:batch, :-1]) if config.first_position == "auto" else config.first_position == "out"
    shape = config.shape(dense, student)
    if config.initial == "least_squares":
        bridges = least_squares_bridges(dense, student, sample, k=shape.k, batch=batch, skip_first=skip)
    else:
        bridges = Bridges(shape, seed=config.seed)
    return bridges.to(next(student.parameters()).device), skip


def _target_plan(
    record: DenseRecord, data: TokenData | Stream, config: BridgeConfig, training: TrainConfig
) -> TargetPlan:
    """Which targets a training needs."""
    precision = training.precision if config.dense_precision == "training" else config.dense_precision
    return TargetPlan(
        dense=record.fingerprint,
        data=data.fingerprint,
        order=training.seed,
        batch=training.batch,
        context=training.context,
        accumulate=training.accumulate,
        precision=precision,
        top=config.kl_top,
        sites=config.reads,
        deal=config.seed if config.reads == "sample" else None,
        n_layer=record.n_layer,
        d_model=record.d_model,
        vocab_size=record.vocab_size,
        steps=training.steps,
    )


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume the run in `folder`, where there is one, under other settings than it was made with."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return
    saved = read_json(path, what="settings")
    if not isinstance(saved, dict) or not all(isinstance(part, dict) for part in saved.values()):
        raise ArtifactError(f"{path}: does not hold the settings of a run")
    for name, was in saved.items():
        if name == "bridge":
            # A setting that the run does not know came later, and has been at its default.
            was = {**json.loads(json.dumps(asdict(BridgeConfig()))), **was}
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
        mean = site_mean(metrics["sites"], name)
        if mean is not None:
            found[f"heldout_{name}"] = mean
    return found

"""The training loop: one for sparse models, dense models, and students with their bridges [G A.2].

A step draws the batch of that step, asks the objective for a loss, brings the gradient's root mean square to 1, takes
an AdamW step at the scheduled rate, and projects the sparse parameters to the scheduled fraction. Packed data are a
function of the step, streamed data save their position, so that a resumed run ends bit for bit where an uninterrupted
one does (same machine, same number of threads). Processes share a batch; parameters may be spread over them by
`fully_shard`, for the projection counts over all of them.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from distill.artifact import Provenance, clear_leftovers, lock
from distill.data.tokens import Batches, Sampler
from distill.model import linear_path as paths
from distill.model import operations
from distill.training.candidates import CandidateTraining
from distill.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    whole,
    whole_tensors,
)
from distill.training.dead import reseed_
from distill.training.log import METRICS, Log, in_short, make_engine
from distill.training.objective import Objective, Terms
from distill.training.optim import gradient_norm, gradient_scale, make_optimizer, set_rate, total_norm
from distill.training.process import deferred_interrupt, tune_malloc
from distill.training.settings import MAY_CHANGE, TrainConfig
from distill.training.sparsity import automatic_floor, late_parameters, sparsity_report, unit_axis

LINEAR_PATH = "linear_path.json"


class TrainingError(ValueError):
    """The training cannot go on; the message names the step, the tensor and the last checkpoint."""


Evaluate = Callable[[], Mapping[str, float | str]]
"""Held-out measurements by name (`heldout_loss` decides on the best checkpoint), and samples of text."""


def train(
    modules: nn.Module,
    objective: Objective,
    data: np.ndarray | Batches,
    config: TrainConfig,
    folder: Path,
    *,
    sparse: Mapping[str, nn.Parameter],
    evaluate: Evaluate | None = None,
    resume: bool = False,
    provenance: Provenance,
    engine: Accelerator | None = None,
    linear_path: str = "auto",
) -> list[dict[str, Any]]:
    """Train `modules` in place on `objective`.

    Arguments:
        modules: what is trained (for a student, a `ModuleDict` of student and bridges), on its device.
        objective: gives the loss to minimise, a mean over the batch, and terms to log.
        data: token ids, one long row, or what gives batches by itself, such as a stream.
        config: the settings.
        folder: the run; gets `metrics.jsonl`, `tensors.jsonl` (entries kept and norm of each projected tensor, at
            evaluations) and `checkpoints/`.
        sparse: the parameters that are projected, by name (`sparse_parameters(model)`); they get the sharkfin rate.
        evaluate: held-out measurements and samples of text by name, called in evaluation mode.
        resume: go on from the newest checkpoint in `folder` (from the start where there is none yet).
        provenance: recorded in the checkpoints.
        engine: accelerate's; by default a new one, with the trackers of the settings. Processes share the batch.
        linear_path: which products leave out the zeros of sparse weights: "auto" (what the run to be resumed did, else
            what is faster here, timed now: roundings may differ from run to run), "sparse", "dense", or a file that
            another run saved as `LINEAR_PATH`.

    Returns the lines of `metrics.jsonl`: step, loss and terms (means over the steps since the line before, and over the
    processes), kept fraction, non-zeros,
    rates, the gradient's root mean square and norm, the norm of all that is trained, units re-seeded since the line
    before, tokens seen, tokens per second; with an evaluation also its values and the shares of dead units.

    The first Ctrl-C ends the step, saves a checkpoint and raises KeyboardInterrupt, a second one stops at once.
    Raises `TrainingError` for a loss or gradient that is not finite; `ValueError` for a folder that holds a run when
    `resume` is off, or one of other settings when it is on.
    """
    engine = engine or make_engine(config, Path(folder))
    run = _Run(modules, data, config, Path(folder), sparse, provenance, engine)
    if run.main:
        with lock(run.folder):
            _loop(run, objective, evaluate, resume, linear_path)
    else:
        _loop(run, objective, evaluate, resume, linear_path)
    return run.log.history


class _Run:
    """A training under way."""

    def __init__(
        self,
        modules: nn.Module,
        data: np.ndarray | Batches,
        config: TrainConfig,
        folder: Path,
        sparse: Mapping[str, nn.Parameter],
        provenance: Provenance,
        engine: Accelerator,
    ) -> None:
        parts = engine.num_processes * config.accumulate
        if config.batch % parts:
            what = f"{engine.num_processes} processes x accumulate {config.accumulate}"
            raise ValueError(f"batch: got {config.batch}, allowed are multiples of {parts} ({what})")
        self.modules, self.config, self.folder, self.sparse = modules, config, folder, sparse
        self.data = data if not isinstance(data, np.ndarray) else _sampler(data, config)
        self.provenance, self.engine, self.main = provenance, engine, engine.is_main_process
        self.log = Log(folder, engine)
        floors = {name: _floor(name, p, config) for name, p in sparse.items()}
        self.optimizer = make_optimizer(
            modules,
            sparse,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            floors=floors,
            late=late_parameters(sparse),
        )
        self.candidates = CandidateTraining(
            sparse if config.candidate_mode and config.kept < 1 else {},
            self.optimizer,
            config.candidates,
            steps=config.steps,
            kept_after=config.kept_after,
            floors=floors,
            seed=config.seed,
        )
        self.parameters = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.numel = sum(p.numel() for p in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device
        self.bfloat16 = _bfloat16(config, engine)
        self.step = 0
        self.sums: dict[str, float | Tensor] = {}
        self.summed = 0
        self.seconds = 0.0
        self.reseeded = 0
        self.heldout: float | None = None
        """The held-out loss after this step, where it was measured."""
        self.now: dict[str, float] = {}


def _sampler(ids: np.ndarray, config: TrainConfig) -> Sampler:
    return Sampler(ids, batch=config.batch, context=config.context, seed=config.seed)


def _bfloat16(config: TrainConfig, engine: Accelerator) -> bool:
    """Whether the passes are made in bfloat16: by the settings, or as the processes were launched."""
    if engine.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"precision: launched with {engine.mixed_precision}, allowed are no and bf16")
    return config.precision == "bfloat16" or engine.mixed_precision == "bf16"


def _floor(name: str, weight: Tensor, config: TrainConfig) -> tuple[int, int | None]:
    """Floor and axis of a sparse parameter; (0, None) where it has no neurons or head channels."""
    axis = unit_axis(name)
    if axis is None:
        return 0, None
    width = weight.shape[1 - axis]
    return (automatic_floor(config.kept, width) if config.floor is None else min(config.floor, width)), axis


def _loop(run: _Run, objective: Objective, evaluate: Evaluate | None, resume: bool, linear_path: str) -> None:
    config = run.config
    _start(run, resume)
    run.log.start(config)
    if run.device.type == "cpu":
        tune_malloc()
    path = _linear_path(run, linear_path)
    run.modules.train()
    pace = 0.5 if sys.stderr.isatty() else 20.0  # a log file needs few lines
    bar = tqdm(total=config.steps, initial=run.step, desc="train", unit="step", disable=not run.main, mininterval=pace)
    with paths.use(path), closing(run.log), bar, deferred_interrupt() as interrupted, closing(run.candidates):
        while run.step < config.steps:
            begun = time.perf_counter()
            _update(run, objective)
            run.seconds += time.perf_counter() - begun
            bar.update()
            last = run.step == config.steps
            saves = last or _due(run.step, config.save_every)
            looks = last or _due(run.step, config.eval_every) or (saves and config.keep_best)
            found, tensors = _evaluate(run, evaluate) if evaluate is not None and looks else ({}, None)
            if found or last or _due(run.step, config.log_every):
                line = _summary(run) | found
                run.log.write(line, tensors)
                bar.set_postfix_str(in_short(line), refresh=False)
            stop = interrupted() and not last
            if saves or stop:
                _save(run)
            if stop:
                note = f"stopped after step {run.step} of {config.steps}, resume from {run.folder}"
                bar.write(note, file=sys.stderr)
                raise KeyboardInterrupt(note)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _start(run: _Run, resume: bool) -> None:
    """Refuse or restore what the folder holds."""
    metrics = run.folder / METRICS
    if run.main:
        for place in (run.folder, run.folder / "checkpoints"):
            clear_leftovers(place)
    saved = newest_checkpoint(run.folder)
    if not resume:
        if run.main and (saved is not None or metrics.exists()):
            raise ValueError(f"folder: {run.folder} holds a run already, allowed are a new folder, or to resume it")
        return
    if saved is not None:
        state, candidates = load_checkpoint(saved, run.modules, run.optimizer)
        _check_same(run, state, saved)
        run.candidates.restore(candidates)
        run.data.restore(state.get("position", []))
        run.step, run.sums, run.summed = state["step"], dict(state["sums"]), state["summed"]
        run.seconds, run.reseeded = state["seconds"], state.get("reseeded", 0)
    run.engine.wait_for_everyone()
    run.log.go_back(run.step)


def _linear_path(run: _Run, choice: str) -> paths.LinearPath:
    """Which products leave out zeros: as the user says, as the run has done so far, or as is faster here."""
    if any(isinstance(p, DTensor) for p in run.parameters.values()):
        return paths.FIXED["dense"]  # lists of non-zeros would be made anew for each pass
    file = run.folder / LINEAR_PATH
    if run.main and (choice != "auto" or not file.exists()):
        found = _measured(run) if choice == "auto" else paths.fixed(choice)
        if found != paths.GENERAL:
            found.save(file)
            tqdm.write(found.describe(), file=sys.stderr)
    run.engine.wait_for_everyone()
    return paths.LinearPath.load(file) if file.exists() else paths.GENERAL


def _measured(run: _Run) -> paths.LinearPath:
    """For the projected weights of linear maps, at a process' share of a batch."""
    projected = {id(p) for p in run.sparse.values() if run.config.kept < 1 and operations.native(p)}
    weights = [m.weight for m in run.modules.modules() if isinstance(m, nn.Linear)]
    tokens = run.config.batch * run.config.context // run.engine.num_processes
    return paths.measure({(w.shape[0], w.shape[1]) for w in weights if id(w) in projected}, tokens, operations.linear)


def _check_same(run: _Run, state: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on under settings or data that would make another run of it."""
    saved = state.get("config")
    ours = json.loads(json.dumps(asdict(run.config)))
    # A setting that the checkpoint does not know came later, and has been at its default.
    defaults = json.loads(json.dumps(asdict(TrainConfig())))
    for name, value in ours.items():
        was = saved.get(name, defaults[name]) if isinstance(saved, dict) else None
        if name not in MAY_CHANGE and was != value:
            raise ValueError(f"{name}: got {value!r}, to resume {path} allowed is {was!r}")
    if state.get("data") != run.provenance.data:
        raise ValueError(f"data: got {run.provenance.data!r}, to resume {path} allowed is {state.get('data')!r}")
    if state.get("sparse") != list(run.sparse):
        raise ValueError(f"sparse: got other parameters than {path} was made with")


def _update(run: _Run, objective: Objective) -> None:
    """One optimiser step, and the projection after it."""
    config, step, run.heldout = run.config, run.step, None
    if _due(step, config.reseed_every) and step > 0 and config.kept_after(step) > config.kept:
        run.reseeded += reseed_(run.sparse, run.optimizer, seed=config.seed * 1_000_003 + step)
    run.candidates.begin(step)
    run.optimizer.zero_grad()
    loss, terms = _passes(run, objective)
    rms = _gradient_rms(run, loss)
    rate, sharkfin = config.rate_at(step)
    set_rate(run.optimizer, rate, sharkfin, config.dense_rate)
    run.step += 1
    kept, sparse = config.kept_after(run.step), config.kept < 1
    scale, sampled = gradient_scale(rms, config.grad_rms), run.candidates.parameters
    run.optimizer.step(
        scale=scale,
        fraction=kept if sparse else None,
        late=config.late_after(run.step) if sparse else None,
        without=sampled,
    )
    nonzeros = run.optimizer.nonzeros + run.candidates.step(scale, kept)
    run.now = {
        "kept": kept,
        "nonzeros": nonzeros,
        "rate": rate,
        "rate_sparse": rate * sharkfin,
        "gradient_rms": rms,
        "gradient_norm": rms * math.sqrt(run.numel),
    }
    run.summed += 1
    for name, value in {**terms, "loss": loss}.items():
        run.sums[name] = run.sums.get(name, 0.0) + (value.detach().double() if isinstance(value, Tensor) else value)


def _passes(run: _Run, objective: Objective) -> tuple[Tensor, Terms]:
    """Forward and backward over this process' share of the batch, part by part; the means of loss and terms."""
    parts = run.config.accumulate
    mine = run.data.rows(run.step, run.engine.process_index, run.engine.num_processes)
    loss, sums = torch.zeros((), device=run.device), {}
    for tokens in mine.chunk(parts):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
            one, terms = objective(tokens.to(run.device), run.step)
        (one if parts == 1 else one / parts).backward()
        loss = loss + one.detach() / parts
        for name, value in terms.items():
            value = value.detach() if isinstance(value, Tensor) else value
            sums[name] = sums.get(name, 0.0) + value / parts
    return loss, sums


def _gradient_rms(run: _Run, loss: Tensor) -> float:
    """Root mean square of the gradient over all trainable parameters (one without a gradient counts as zeros).

    Raises `TrainingError` where the loss or a gradient is not finite; both are read in one transfer from the device.
    """
    loss = loss.detach().float()
    if run.engine.num_processes > 1:
        for parameter in run.parameters.values():
            # The gradient of a parameter that is spread over processes is their mean already.
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                parameter.grad = _mean(run.engine, parameter.grad)
        for gradient in run.candidates.gradients():
            gradient.copy_(_mean(run.engine, gradient))
        loss = _mean(run.engine, loss)
    value, length = torch.stack([loss, gradient_norm(run.parameters.values()).to(loss)]).tolist()
    length = math.sqrt(length**2 + run.candidates.squares())
    if not math.isfinite(value):
        raise _broken(run, f"loss is {value}")
    if not math.isfinite(length):
        grads = [(name, whole(p.grad)) for name, p in run.parameters.items() if p.grad is not None]
        grads += zip(run.candidates.names, run.candidates.gradients(), strict=True)
        wrong = (name for name, grad in grads if not grad.isfinite().all())
        raise _broken(run, f"gradient of {next(wrong, 'all parameters together')} is not finite")
    return length / math.sqrt(run.numel)


def _broken(run: _Run, what: str) -> TrainingError:
    saved = checkpoints(run.folder)
    return TrainingError(
        f"step {run.step}: {what}, allowed are finite numbers; try a lower learning_rate than "
        f"{run.config.learning_rate}; last checkpoint: {saved[-1] if saved else 'none yet'}"
    )


def _mean(engine: Accelerator, tensor: Tensor) -> Tensor:
    reduced = engine.reduce(tensor, reduction="mean")
    assert isinstance(reduced, Tensor)
    return reduced


def _share_sums(run: _Run) -> None:
    """What was summed for the log, from now on the mean over the processes in each of them."""
    if run.engine.num_processes > 1 and run.sums:
        local = torch.tensor([float(total) for total in run.sums.values()], dtype=torch.float64, device=run.device)
        run.sums = dict(zip(run.sums, _mean(run.engine, local).tolist(), strict=True))


def _summary(run: _Run) -> dict[str, Any]:
    """A line for metrics.jsonl; the means start anew."""
    _share_sums(run)
    means = {name: float(total) / run.summed for name, total in run.sums.items()}
    for name, value in means.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name}: got {value} in the steps up to {run.step}, allowed are finite numbers")
    per_step = run.config.batch * run.config.context
    speed = {"tokens": run.step * per_step, "tokens_per_second": round(run.summed * per_step / run.seconds, 1)}
    length = {"weight_norm": float(total_norm([p.detach() for p in run.parameters.values()]))}
    again = {"reseeded": run.reseeded} if run.config.reseed_every else {}
    run.sums, run.summed, run.seconds, run.reseeded = {}, 0, 0.0, 0
    return {"step": run.step, "loss": means.pop("loss"), **means, **run.now, **length, **again, **speed}


def _evaluate(run: _Run, evaluate: Evaluate) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out values with the shares of dead units, and what there is to say of each projected tensor."""
    run.modules.eval()
    values = evaluate()
    run.modules.train()
    found = values.get("heldout_loss")
    run.heldout = found if isinstance(found, float) else None
    entire = {name: whole(p.detach()) for name, p in run.sparse.items()}
    report = sparsity_report(entire)
    norms = {name: float(tensor.norm()) for name, tensor in entire.items()}
    tensors = {name: {**entry, "norm": norms[name]} for name, entry in report["tensors"].items()}
    return {**values, **{name: value for name, value in report.items() if name.startswith("dead_")}}, tensors


def _save(run: _Run) -> None:
    config = run.config
    # What is spread over processes is put together by all of them.
    tensors = whole_tensors(run.modules, run.optimizer)
    _share_sums(run)
    position = run.data.position()
    positions = gather_object([position]) if run.engine.num_processes > 1 else [position]
    if run.main:
        state = {
            "config": asdict(config),
            "data": run.provenance.data,
            "position": positions,
            "sparse": list(run.sparse),
            "sums": {name: float(total) for name, total in run.sums.items()},
            "summed": run.summed,
            "seconds": run.seconds,
            "reseeded": run.reseeded,
            "heldout_loss": run.heldout,
            "at_target": config.kept_after(run.step) == config.kept,
        }
        save_checkpoint(
            run.folder,
            run.step,
            tensors,
            candidates=run.candidates.tensors(),
            state=state,
            provenance=run.provenance,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
        )
    run.engine.wait_for_everyone()

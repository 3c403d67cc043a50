"""What the candidate mode costs in loss: exact training against candidates, at equal tokens, on one small model.

    python tests/benchmarks/study_candidates.py --tokens runs/sparse.tokens --out candidates.json
    python tests/benchmarks/study_candidates.py --tokens runs/sparse.tokens --out candidates.json --only exact factor

Each line trains the same model on the same batches; it differs in one setting from "base". Prints the held-out loss,
and the excess over the exact line of the same seed, rate and annealing, and writes every run as it ends; runs that are
in the file already are not done again. A run takes half a minute at the default size on one thread.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from distill import command
from distill.artifact import read_json, write_json
from distill.data.sample import spread_windows
from distill.data.tokens import Sampler, TokenData
from distill.model import SparseTransformer
from distill.model.transformer import Architecture
from distill.training import TrainConfig, heldout_loss, make_optimizer, sparse_parameters, tune_malloc
from distill.training.candidates import CandidateConfig, CandidateTraining
from distill.training.optim import gradient_norm, gradient_scale, set_rate
from distill.training.sparsity import automatic_floor, unit_axis

BASE = CandidateConfig(factor=3)
HELDOUT_WINDOWS = 256


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of study_candidates."""

    tokens: Path = Path("runs/sparse.tokens")
    """Folder of packed tokens."""
    out: Path | None = None
    """JSON file of the runs; those it holds are not done again."""
    only: tuple[str, ...] = ()
    """Groups of lines to run (exact, base, factor, refresh, ...); none: all."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and batches."""
    anneals: tuple[str, ...] = ("fast", "linear")
    """Courses of the kept fraction: fast reaches it within 5% of the steps, linear within half."""
    d_model: int = 256
    """Width of the model, in channels."""
    n_layer: int = 2
    """Layers of the model."""
    train: TrainConfig = TrainConfig(steps=400, batch=8, context=128, kept=0.02, learning_rate=0.03)
    """Length, sparsity and rate; anneal and seed are set per line."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One setting."""

    group: str
    name: str
    candidates: CandidateConfig | None
    """None: exact."""
    rate: float = 1.0
    """Share of the learning rate."""


def lines() -> list[Line]:
    """Exact training, the base, and one change of it at a time."""
    found = [Line(group="exact", name="exact", candidates=None), Line(group="base", name="base", candidates=BASE)]
    few = {"factor": 1, "refresh": 50}
    changes: dict[str, dict[str, Any]] = {
        "factor": {f"factor {f}": {"factor": f} for f in (0, 1, 2, 7)},
        "refresh": {f"R {r}": {"refresh": r} for r in (10, 25, 50)},
        "window": {"W 10": {"window": 10}},
        "choice": {"by update": {"choice": "update"}, "random": {"choice": "random"}},
        "newcomers": {"new zero": {"newcomers": "zero"}, "new mean": {"newcomers": "mean"}},
        "last": {f"last {p}%": {"exact_last": p / 100} for p in (10, 25, 50)},
        "few": {
            "factor 1, R 50": few,
            "factor 1, R 10": few | {"refresh": 10},
            "factor 1, R 25": few | {"refresh": 25},
            "factor 1, R 50, by update": few | {"choice": "update"},
            "factor 1, R 50, random": few | {"choice": "random"},
        },
    }
    for group, settings in changes.items():
        found += [Line(group=group, name=name, candidates=replace(BASE, **s)) for name, s in settings.items()]
    for rate in (0.5, 2.0, 4.0):
        found.append(Line(group="rate", name=f"exact, rate x{rate:g}", candidates=None, rate=rate))
        found.append(Line(group="rate", name=f"base, rate x{rate:g}", candidates=BASE, rate=rate))
    return found


def train(options: Options, line: Line, data: TokenData, config: TrainConfig) -> dict[str, Any]:
    """One training; the loss in nats per token, the share of sampled steps, entries that came into the pattern."""
    a = Architecture(
        vocab_size=data.vocab_size, context=config.context, n_layer=options.n_layer, d_model=options.d_model
    )
    model = SparseTransformer.build(a, seed=config.seed)
    sparse = sparse_parameters(model)
    floors = {name: _floor(name, p, config.kept) for name, p in sparse.items()}
    optimizer = make_optimizer(
        model, sparse, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, floors=floors
    )
    candidates = CandidateTraining(
        sparse,
        optimizer,
        line.candidates or replace(BASE, exact_last=1),
        steps=config.steps,
        kept_after=config.kept_after,
        floors=floors,
        seed=config.seed,
    )
    parameters = list(model.parameters())
    numel = sum(p.numel() for p in parameters)
    sampler = Sampler(data.train, batch=config.batch, context=config.context, seed=config.seed)
    sampled, began = 0, time.process_time()
    for step in range(config.steps):
        candidates.begin(step)
        optimizer.zero_grad()
        tokens = sampler.batch(step)
        loss = F.cross_entropy(model.run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        rms = math.sqrt((float(gradient_norm(parameters).detach()) ** 2 + candidates.squares()) / numel)
        set_rate(optimizer, *config.rate_at(step), config.dense_rate)
        scale, kept = gradient_scale(rms, config.grad_rms), config.kept_after(step + 1)
        sampled += bool(candidates.names)
        optimizer.step(scale=scale, fraction=kept, without=candidates.parameters)
        candidates.step(scale, kept)
    candidates.close()
    seconds = time.process_time() - began
    windows = spread_windows(data.heldout, config.context, HELDOUT_WINDOWS)
    return {"loss": heldout_loss(model, windows), "sampled": sampled / config.steps, "cpu_seconds": round(seconds, 1)}


def _floor(name: str, weight: torch.Tensor, kept: float) -> tuple[int, int | None]:
    axis = unit_axis(name)
    return (0, None) if axis is None else (automatic_floor(kept, weight.shape[1 - axis]), axis)


def study(options: Options) -> None:
    """Run the lines, print the table, save."""
    torch.set_num_threads(1)
    tune_malloc()
    data = TokenData.load(options.tokens)
    known: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        known = read_json(options.out, what="study")["runs"]
    chosen = [line for line in lines() if not options.only or line.group in options.only]
    for anneal in options.anneals:
        for seed in options.seeds:
            for line in chosen:
                config = replace(
                    options.train, anneal=anneal, seed=seed, learning_rate=line.rate * options.train.learning_rate
                )
                key = f"{anneal} | {line.name} | {seed}"
                settings = {
                    "candidates": asdict(line.candidates) if line.candidates else None,
                    "train": asdict(config),
                    "d_model": options.d_model,
                    "n_layer": options.n_layer,
                }
                if known.get(key, {}).get("settings") == _as_json(settings):
                    continue
                known[key] = {**train(options, line, data, config), "settings": _as_json(settings)}
                print(f"{key}: {known[key]['loss']:.4f} ({known[key]['cpu_seconds']} s)", flush=True)
                if options.out is not None:
                    write_json(options.out, {"tokens": data.fingerprint, "runs": known})
    print(table(known))


def _as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return [_as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def table(runs: dict[str, Any]) -> str:
    """Markdown: per line the mean loss over seeds, and the mean excess over the exact run of the same seed and rate."""
    rows = [
        "| annealing | line | seeds | loss | excess over exact, % | sampled steps, % |",
        "|---|---|---|---|---|---|",
    ]
    grouped: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for key, run in runs.items():
        anneal, name, seed = key.split(" | ")
        grouped.setdefault((anneal, name), []).append((seed, run))
    for (anneal, name), found in grouped.items():
        rate = name.partition(", rate ")[2]
        partner = f"exact, rate {rate}" if rate else "exact"
        pairs = [(run["loss"], runs.get(f"{anneal} | {partner} | {seed}")) for seed, run in found]
        excess = [100 * (loss / exact["loss"] - 1) for loss, exact in pairs if exact is not None]
        loss, sampled = (fmean(run[key] for _, run in found) for key in ("loss", "sampled"))
        said = f"{fmean(excess):+.2f}" if excess else "-"
        rows.append(f"| {anneal} | {name} | {len(found)} | {loss:.4f} | {said} | {100 * sampled:.0f} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study on a command line; returns the exit status."""
    return command.run(study, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

"""What each mechanism of the training is worth: one small model, one change at a time, the same batches throughout.

    python tests/benchmarks/study_ablations.py --tokens runs/sparse.tokens --out runs/ablations.json
    python tests/benchmarks/study_ablations.py --tokens runs/sparse.tokens --out runs/ablations.json --only sharkfin j

Each variant trains for as many tokens as the base, on the same windows in the same order, and differs from it in the
settings that the table names. Prints the held-out loss of each seed and the excess over the base of the same seed, and
writes every run as it ends; runs that are in the file already are not done again. A run takes about half a minute of
one core at the default size.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from distill import command
from distill.artifact import Provenance, read_json, write_json
from distill.data.sample import spread_windows
from distill.data.tokens import TokenData
from distill.model import Architecture, SparseTransformer
from distill.training import TrainConfig, heldout_loss, next_token_loss, sparse_parameters, sparsity_report, train

HELDOUT_WINDOWS = 512
# Without normalised gradients an epsilon of 0.1 drowns them, and the rate belongs to the epsilon.
RETUNED = {"train.eps": 1e-8, "train.learning_rate": 0.003}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "no annealing (target from the start)": {"train.anneal_fraction": 0.0},
    "exponential annealing": {"train.anneal": "exponential"},
    "fast annealing": {"train.anneal": "fast"},
    "embeddings and biases drop at its end": {"train.jump": True},
    "no sharkfin": {"train.sharkfin": False},
    "gradient clipped": {"train.grad_rms": "clip"},
    "gradient left": {"train.grad_rms": "off"},
    "gradient clipped, eps 1e-8, rate 0.003": {"train.grad_rms": "clip", **RETUNED},
    "gradient left, eps 1e-8, rate 0.003": {"train.grad_rms": "off", **RETUNED},
    "no bigram table": {"architecture.bigram": False},
    "no AbsTopK": {"architecture.topk_fraction": None},
    "no attention sinks": {"architecture.sink": False},
    "floor j = 0": {"train.floor": 0},
    "floor j = 4": {"train.floor": 4},
    "rate x 0.5": {"train.learning_rate": 0.015},
    "rate x 2": {"train.learning_rate": 0.06},
    "no sharkfin, rate x 0.5": {"train.sharkfin": False, "train.learning_rate": 0.015},
    "gradient clipped, eps 1e-8, rate 0.01": {
        "train.grad_rms": "clip",
        "train.eps": 1e-8,
        "train.learning_rate": 0.01,
    },
    "dense (kept 1)": {"train.kept": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of study_ablations."""

    tokens: Path = Path("runs/sparse.tokens")
    """Folder of packed tokens."""
    out: Path | None = None
    """JSON file of the runs; those it holds are not done again."""
    known: tuple[Path, ...] = ()
    """More such files, of other processes that took other seeds; their runs are in the table too."""
    only: tuple[str, ...] = ()
    """Variants to run beside the base, by parts of their names; none: all."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and batches."""
    architecture: Architecture = Architecture(context=128, n_layer=2, d_model=128)
    """Shape of the model; its vocabulary is that of the tokens."""
    train: TrainConfig = TrainConfig(
        steps=600, batch=8, context=128, kept=1 / 16, learning_rate=0.03, eval_every=0, save_every=0
    )
    """Length, sparsity and rate of the base; the seed is set per run."""


def varied(options: Options, changes: Mapping[str, Any], seed: int) -> tuple[Architecture, TrainConfig]:
    """The settings of one run."""
    parts: dict[str, dict[str, Any]] = {"architecture": {}, "train": {"seed": seed}}
    for name, value in changes.items():
        part, field = name.split(".")
        parts[part][field] = value
    return replace(options.architecture, **parts["architecture"]), replace(options.train, **parts["train"])


def trained(architecture: Architecture, config: TrainConfig, data: TokenData) -> dict[str, Any]:
    """One training: held-out loss in nats per token, share of entries that stayed, seconds of processor time."""
    model = SparseTransformer.build(replace(architecture, vocab_size=data.vocab_size), seed=config.seed)
    sparse = sparse_parameters(model) if config.kept < 1 else {}
    provenance = Provenance(kind="run", command="study_ablations", config={}, seed=config.seed, data=data.fingerprint)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(model, next_token_loss(model), data.train, config, Path(folder), sparse=sparse, provenance=provenance)
    seconds = time.process_time() - began
    report = sparsity_report(sparse)
    windows = spread_windows(data.heldout, config.context, HELDOUT_WINDOWS)
    return {
        "loss": heldout_loss(model, windows),
        "kept": report["fraction"] if sparse else 1.0,
        "dead_neurons": report.get("dead_neurons", 0.0),
        "cpu_seconds": round(seconds, 1),
    }


def study(options: Options) -> None:
    """Run the variants, print the table, save."""
    torch.set_num_threads(1)
    data = TokenData.load(options.tokens)
    own: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        own = read_json(options.out, what="study")["runs"]
    known = {key: run for path in options.known for key, run in read_json(path, what="study")["runs"].items()} | own
    chosen = [n for n in VARIANTS if n == "base" or not options.only or any(part in n for part in options.only)]
    for seed in options.seeds:
        for name in chosen:
            architecture, config = varied(options, VARIANTS[name], seed)
            settings = _as_json({"architecture": asdict(architecture), "train": asdict(config)})
            key = f"{name} | {seed}"
            if _same(known.get(key, {}).get("settings"), settings):
                continue
            own[key] = known[key] = {**trained(architecture, config, data), "settings": settings}
            print(f"{key}: {known[key]['loss']:.4f} ({known[key]['cpu_seconds']} s)", flush=True)
            if options.out is not None:
                write_json(options.out, {"tokens": data.fingerprint, "runs": own})
    print(table(known))


def _same(was: Any, now: Mapping[str, Any]) -> bool:
    """Whether a run was made with these settings; one that only one of both knows came later, with its default."""
    return isinstance(was, dict) and all(
        was[part][name] == value for part in now for name, value in now[part].items() if name in was[part]
    )


def _as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return [_as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def table(runs: Mapping[str, Any]) -> str:
    """Markdown: per variant the loss of each seed, and the mean excess over the base of the same seed."""
    seeds = sorted({key.split(" | ")[1] for key in runs}, key=int)
    rows = [
        f"| variant | {' | '.join(f'loss, seed {seed}' for seed in seeds)} | mean over base | kept | dead neurons |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for name in dict.fromkeys(key.split(" | ")[0] for key in runs):
        found = {seed: runs[f"{name} | {seed}"] for seed in seeds if f"{name} | {seed}" in runs}
        excess = [
            run["loss"] - runs[f"base | {seed}"]["loss"] for seed, run in found.items() if f"base | {seed}" in runs
        ]
        losses = " | ".join(f"{found[seed]['loss']:.4f}" if seed in found else "-" for seed in seeds)
        over = f"{fmean(excess):+.4f}" if excess else "-"
        kept, dead = (fmean(run[key] for run in found.values()) for key in ("kept", "dead_neurons"))
        rows.append(f"| {name} | {losses} | {over} | {kept:.4f} | {dead:.3f} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study on a command line; returns the exit status."""
    return command.run(study, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

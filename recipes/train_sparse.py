"""Train a weight-sparse transformer from scratch.

    python recipes/train_sparse.py --corpus stdlib --out runs/sparse
    python recipes/train_sparse.py --corpus folder:my_texts --architecture.d-model 512 --config.kept 0.02

Without arguments it trains on the Python standard library, at a size for two cores. The packed corpus and
its tokenizer lie beside the run folder, in {out}.tokens, for other trainings to take. The run folder gets
metrics.jsonl, checkpoints/ and at the end model/, a Hugging Face model folder whose zeros are not stored. Ctrl-C saves
a checkpoint; the same command with --resume goes on from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill import command
from distill.artifact import default_out
from distill.data import prepare
from distill.model import Architecture, SparseTransformer
from distill.training import TrainConfig, plan, pretrain
from distill.training.pretrain import check_way

LAPTOP = {
    "architecture.context": 128,
    "architecture.n_layer": 3,
    "config.context": 128,
    "config.batch": 16,
    "config.kept": 0.0625,
    "config.steps": 2500,
    "config.learning_rate": 0.03,
}
PRESETS = {
    "laptop": LAPTOP,
    "tiny": LAPTOP | {"architecture.d_model": 32, "architecture.n_layer": 1, "config.steps": 20, "config.batch": 4},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of train_sparse."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Texts: stdlib, package:NAME, idioms:MEGABYTES, a folder, hf:NAME, or one folder of packed tokens."""
    vocab_size: int = 2048
    """Size of the BPE tokenizer trained on the corpus."""
    architecture: Architecture = Architecture(context=128, n_layer=3)
    """Shape of the model; its vocabulary is that of the tokenizer."""
    config: TrainConfig = TrainConfig(context=128, kept=1 / 16, steps=2500, learning_rate=0.03)
    """Length, sparsity and rate of the training."""
    out: Path = default_out("sparse")
    """Run folder."""
    seed: int = 0
    """Seed of weights, of the held-out files and of the order of the data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    linear_path: str = "auto"
    """Which products leave out zeros: auto (timed at the start), sparse, dense, or a run's linear_path.json."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    overwrite: bool = False
    """Replace an earlier run in the folder, and its packed corpus where that is another one."""
    dry_run: bool = False
    """Print the plan and stop."""


def train_sparse(options: Options) -> None:
    """Prepare the data, build the model, train."""
    architecture = replace(options.architecture, vocab_size=options.vocab_size)
    model = SparseTransformer.build(architecture, seed=options.seed).to(command.pick_device(options.device))
    config = replace(options.config, seed=options.seed)
    print(plan(model, config))
    if options.dry_run:
        return
    tokens = options.out.with_name(options.out.name + ".tokens")
    check_way(options.out, resume=options.resume, overwrite=options.overwrite)
    data = prepare(options.corpus, tokens, vocab_size=options.vocab_size, seed=options.seed, replace=options.overwrite)
    done = pretrain(
        model,
        data,
        config,
        options.out,
        tokenizer=data.tokenizer(),
        command="recipes/train_sparse.py",
        resume=options.resume,
        overwrite=options.overwrite,
        linear_path=options.linear_path,
    )
    print(f"held-out loss {done.heldout_loss:.3f} nats per token after {done.tokens:,} tokens; model in {done.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(train_sparse, Options, argv, description=__doc__ or "", presets=PRESETS)


if __name__ == "__main__":
    raise SystemExit(main())

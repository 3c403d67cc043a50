"""Train a dense model on the same corpus and tokenizer as a sparse one.

    python recipes/train_dense.py --corpus runs/sparse.tokens --out runs/dense
    python recipes/train_dense.py --preset gpt2 --corpus runs/sparse.tokens --out runs/dense_gpt2

The kind `same` is the code of the sparse model at kept fraction 1: the counterpart for comparisons of circuits, whose
width is to be chosen so that the held-out losses match. The kind `gpt2` is a plain Hugging Face GPT-2, which the
preset of that name also gives the rate and optimiser that it wants. Folders and --resume are as in train_sparse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distill import command
from distill.artifact import default_out
from distill.data import prepare
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.training import TrainConfig, make_engine, plan, pretrain
from distill.training.pretrain import check_way

GPT2 = {"kind": "gpt2", "architecture.d_model": 128, "config.grad_rms": "clip", "config.eps": 1e-8}
PRESETS = {
    "gpt2": GPT2 | {"config.learning_rate": 3e-3},
    "tiny": {"architecture.d_model": 32, "architecture.n_layer": 1, "config.steps": 20, "config.batch": 4},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of train_dense."""

    kind: Literal["same", "gpt2"] = "same"
    """same: the sparse model's code at kept fraction 1; gpt2: Hugging Face's GPT-2."""
    corpus: tuple[str, ...] = ("stdlib",)
    """Texts: stdlib, package:NAME, idioms:MEGABYTES, a folder, lines:FILE, hf:NAME, or one folder of packed tokens."""
    vocab_size: int = 2048
    """Size of the BPE tokenizer trained on the corpus."""
    architecture: Architecture = Architecture(context=128, n_layer=3, d_model=64)
    """Shape of the model; GPT-2 takes its layers, widths, heads and context from it."""
    config: TrainConfig = TrainConfig(context=128, steps=2500, learning_rate=0.03)
    """Length and rate of the training; kept stays 1."""
    out: Path = default_out("dense")
    """Run folder."""
    seed: int = 0
    """Seed of weights, of the held-out files and of the order of the data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    overwrite: bool = False
    """Replace an earlier run in the folder, and its packed corpus where that is another one."""
    dry_run: bool = False
    """Print the plan and stop."""


def train_dense(options: Options) -> None:
    """Prepare the data, build the model, train."""
    if options.config.kept != 1:
        raise ValueError(f"config.kept: {options.config.kept}; a dense model keeps 1, train_sparse takes other values")
    # A GPT-2 has no bigram table, so its vocabulary may be larger than one would go with.
    bigram = options.architecture.bigram and options.kind == "same"
    architecture = replace(options.architecture, vocab_size=options.vocab_size, bigram=bigram)
    build = DenseModel.build_gpt2 if options.kind == "gpt2" else SparseTransformer.build
    config = replace(options.config, seed=options.seed)
    engine = make_engine(config, options.out)
    device = command.pick_device(options.device) if engine.num_processes == 1 else engine.device
    model = build(architecture, seed=options.seed).to(device)
    engine.print(plan(model, config))
    if options.dry_run:
        return
    tokens = options.out.with_name(options.out.name + ".tokens")
    if engine.is_main_process:
        check_way(options.out, resume=options.resume, overwrite=options.overwrite)
    settings = {"vocab_size": options.vocab_size, "seed": options.seed, "replace": options.overwrite}
    with engine.main_process_first():
        data = prepare(options.corpus, tokens, **settings)
    done = pretrain(
        model,
        data,
        config,
        options.out,
        tokenizer=data.tokenizer(),
        command="recipes/train_dense.py",
        resume=options.resume,
        overwrite=options.overwrite,
        engine=engine,
    )
    engine.print(f"held-out loss {done.heldout_loss:.3f} nats a token, {done.tokens:,} tokens; model in {done.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(train_dense, Options, argv, description=__doc__ or "", presets=PRESETS)


if __name__ == "__main__":
    raise SystemExit(main())

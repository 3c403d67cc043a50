"""Train a weight-sparse transformer from scratch.

    python recipes/train_sparse.py --corpus stdlib --out runs/sparse
    python recipes/train_sparse.py --preset paper --dry-run
    torchrun --nproc_per_node 2 recipes/train_sparse.py --stream --corpus hf:NAME#content idioms --weights 0.7 0.3

Without arguments it trains on the Python standard library, at a size for two cores. The packed corpus and its tokenizer
lie beside the run folder, in {out}.tokens, for other trainings to take; with --stream the text is read on the way, and
only the tokenizer and held-out text lie there. The run folder gets metrics.jsonl, training.png, checkpoints/ and at the
end model/, a Hugging Face model folder whose zeros are not stored. Ctrl-C saves a checkpoint; the same command with
--resume goes on from it. --dry-run prints parameters, non-zeros, bytes, tokens and time, and stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill import command
from distill.artifact import default_out
from distill.data import prepare, prepare_stream
from distill.model import Architecture, SparseTransformer
from distill.training import TrainConfig, estimate_run, make_engine, pretrain
from distill.training.presets import PRESETS
from distill.training.pretrain import check_way, fixed


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of train_sparse."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Texts: stdlib, package:NAME, idioms:MEGABYTES, a folder, lines:FILE, hf:NAME, or one folder of packed tokens."""
    stream: bool = False
    """Read, shuffle and encode the texts while training; `idioms` without a size has no end then."""
    weights: tuple[float, ...] = ()
    """With stream: share of each corpus in the tokens; none: equal shares."""
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
    """Print the plan, the time measured on this machine in it, and stop."""


def train_sparse(options: Options) -> None:
    """Prepare the data, build the model, train."""
    architecture = replace(options.architecture, vocab_size=options.vocab_size)
    config = replace(options.config, seed=options.seed)
    if options.weights and not options.stream:
        raise ValueError(f"weights: got {options.weights}, allowed with --stream only")
    fixed(options.linear_path)
    engine = make_engine(config, options.out)
    device = command.pick_device(options.device) if engine.num_processes == 1 else engine.device
    engine.print(estimate_run(architecture, config, device=device, timed=options.dry_run).describe())
    if options.dry_run:
        return
    tokens = options.out.with_name(options.out.name + ".tokens")
    if engine.is_main_process:
        check_way(options.out, resume=options.resume, overwrite=options.overwrite)
    source = {"vocab_size": options.vocab_size, "seed": options.seed, "replace": options.overwrite}
    with engine.main_process_first():
        mixed = {"weights": options.weights} if options.stream else {}
        data = (prepare_stream if options.stream else prepare)(options.corpus, tokens, **mixed, **source)
    done = pretrain(
        SparseTransformer.build(architecture, seed=options.seed).to(device),
        data,
        config,
        options.out,
        tokenizer=data.tokenizer(),
        command="recipes/train_sparse.py",
        resume=options.resume,
        overwrite=options.overwrite,
        linear_path=options.linear_path,
        engine=engine,
    )
    engine.print(f"held-out loss {done.heldout_loss:.3f} nats a token, {done.tokens:,} tokens; model in {done.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(train_sparse, Options, argv, description=__doc__ or "", presets=PRESETS)


if __name__ == "__main__":
    raise SystemExit(main())

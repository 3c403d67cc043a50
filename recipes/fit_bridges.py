"""Fit a weight-sparse student with bridges to a dense Hugging Face model.

    python recipes/fit_bridges.py --dense my_gpt2_folder --corpus folder:my_texts --out runs/student
    python recipes/fit_bridges.py --dense gpt2 --corpus hf:NAME --student.d-model 3072 --dry-run

The dense model is frozen; the student has its depth and vocabulary and learns to be switched with it at every residual
site. The output loads by its path: model/ (the student, a Hugging Face folder), bridges/, dense.json (which dense
model), bridges.json (what the bridges are worth, by site) and bridges.png. --resume goes on after Ctrl-C.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bridges import PRESETS as BRIDGE_PRESETS
from bridges import BridgeConfig, StudentConfig, fit_bridges, line_of
from distill import command, load_model, load_tokenizer, prepare
from distill.artifact import default_out
from distill.model import SparseTransformer, check_tokenizer
from distill.training import TrainConfig, plan
from distill.training.pretrain import check_way

LAPTOP = TrainConfig(context=128, batch=8, kept=1 / 16, steps=4000, learning_rate=0.04, dense_rate=0.05)
PRESETS = {
    "paper": {f"bridge.{name}": value for name, value in BRIDGE_PRESETS["paper"].items()},
    "tiny": {"student.d_model": 32, "config.steps": 20, "config.batch": 4, "config.context": 32},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of fit_bridges."""

    dense: str = "dense_gpt2"
    """Dense model: folder, hub name, or a shipped model's short name."""
    corpus: tuple[str, ...] = ("stdlib",)
    """Texts: stdlib, package:NAME, idioms:MEGABYTES, a folder, hf:NAME, or one folder of packed tokens."""
    student: StudentConfig = field(default_factory=lambda: StudentConfig(d_model=256))
    """Shape of the student."""
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    """Terms of the loss."""
    config: TrainConfig = LAPTOP
    """Length, sparsity and rate of the training."""
    out: Path = default_out("student")
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


def fit(options: Options) -> None:
    """Load the dense model, pack the corpus with its tokenizer, train student and bridges."""
    device = command.pick_device(options.device)
    dense, tokenizer = load_model(options.dense).to(device), load_tokenizer(options.dense)
    check_tokenizer(tokenizer, dense)
    student = SparseTransformer.build(options.student.architecture(dense), seed=options.seed).to(device)
    config = replace(options.config, seed=options.seed)
    print(plan(student, config))
    if options.dry_run:
        return
    check_way(options.out, resume=options.resume, overwrite=options.overwrite)
    tokens = options.out.with_name(options.out.name + ".tokens")
    data = prepare(options.corpus, tokens, tokenizer=tokenizer, seed=options.seed, replace=options.overwrite)
    done = fit_bridges(
        dense,
        student,
        data,
        replace(options.bridge, seed=options.seed),
        config,
        options.out,
        dense_name=options.dense,
        tokenizer=tokenizer,
        resume=options.resume,
        overwrite=options.overwrite,
        command="recipes/fit_bridges.py",
    )
    print(line_of(done.metrics))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(fit, Options, argv, description=__doc__ or "", presets=PRESETS)


if __name__ == "__main__":
    raise SystemExit(main())

"""Fit a weight-sparse student with bridges to a dense Hugging Face model.

    python recipes/fit_bridges.py --dense my_gpt2_folder --corpus folder:my_texts --out runs/student
    python recipes/fit_bridges.py --dense gpt2 --preset gpt2-small --dry-run

The dense model is frozen; the student has its depth and vocabulary and learns to be switched with it at every residual
site. The output loads by its path: model/ (the student, a Hugging Face folder), bridges/, dense.json, bridges.json
(what the bridges are worth, by site) and bridges.png. --resume goes on after Ctrl-C. --dry-run prints parameters,
memory, tokens and hours on a GPU, from the dense model's configuration alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridges import PRESETS as BRIDGE_PRESETS
from bridges import BridgeConfig, StudentConfig, fit_bridges, line_of
from bridges.baselines import load_rivals
from bridges.plan import PRESET, dense_shape, next_steps, plan_fit
from distill import command, load_model, load_tokenizer
from distill.artifact import default_out
from distill.data import prepare, prepare_stream
from distill.model import SparseTransformer, check_tokenizer
from distill.training import TrainConfig, make_engine
from distill.training.pretrain import check_way

LAPTOP = TrainConfig(context=128, batch=8, kept=1 / 16, steps=4000, learning_rate=0.04, dense_rate=0.05)
TINY = {"student.d_model": 32, "config.steps": 20, "config.batch": 4, "config.context": 32}
TERMS = {name: {f"bridge.{key}": value for key, value in one.items()} for name, one in BRIDGE_PRESETS.items()}
PRESETS = {**TERMS, "tiny": TINY, "gpt2-small": PRESET}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of fit_bridges."""

    dense: str = "dense_gpt2"
    """Dense model: folder, hub name, or a shipped model's short name."""
    corpus: tuple[str, ...] = ("stdlib",)
    """Texts: stdlib, package:NAME, idioms:MEGABYTES, a folder, lines:FILE, hf:NAME, or one folder of packed tokens."""
    stream: bool = False
    """Read, shuffle and encode the texts while training."""
    student: StudentConfig = field(default_factory=lambda: StudentConfig(d_model=256))
    """Shape of the student."""
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    """Terms of the loss."""
    config: TrainConfig = LAPTOP
    """Length, sparsity and rate of the training."""
    targets: Path | None = None
    """Folder of what the dense model says of the text: written at first, read by later trainings on the same text."""
    task: tuple[str, ...] = ("single_double_quote",)
    """Tasks that the plan names for afterwards."""
    judged: int = 32
    """Held-out windows that the final metrics are measured on: some four partial passes per window and site."""
    out: Path = default_out("student")
    """Run folder."""
    seed: int = 0
    """Seed of weights, held-out files and order of the data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    overwrite: bool = False
    """Replace an earlier run in the folder, and its packed corpus where that is another one."""
    dry_run: bool = False
    """Print the plan and stop."""


def fit(options: Options) -> None:
    """Print the plan, load the dense model, prepare the corpus with its tokenizer, train student and bridges."""
    config, bridge = replace(options.config, seed=options.seed), replace(options.bridge, seed=options.seed)
    out, engine = options.out, make_engine(config, options.out)
    way: dict[str, Any] = {"resume": options.resume, "overwrite": options.overwrite}
    architecture = options.student.architecture(shape := dense_shape(options.dense))
    engine.print(plan_fit(shape, architecture, bridge, config, targets=options.targets is not None).describe())
    if options.dry_run:
        return engine.print(next_steps(options.corpus, options.stream, str(out), options.task))
    device = command.pick_device(options.device) if engine.num_processes == 1 else engine.device
    dense, tokenizer = load_model(options.dense).to(device), load_tokenizer(options.dense)
    check_tokenizer(tokenizer, dense)
    if engine.is_main_process:
        check_way(out, **way)
    with engine.main_process_first():
        read, tokens = prepare_stream if options.stream else prepare, out.with_name(out.name + ".tokens")
        data = read(options.corpus, tokens, tokenizer=tokenizer, seed=options.seed, replace=options.overwrite)
    student = SparseTransformer.build(architecture, seed=options.seed).to(device)
    way |= {"dense_name": options.dense, "tokenizer": tokenizer, "command": "recipes/fit_bridges.py"}
    way |= {"targets": options.targets, "rivals": load_rivals(dense, tokenizer), "engine": engine}
    engine.print(line_of(fit_bridges(dense, student, data, bridge, config, out, **way).metrics))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(fit, Options, argv, description=__doc__ or "", presets=PRESETS)


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure what a student and its bridges are worth, site by site, beside what would be had without them.

    python recipes/measure_bridges.py --bridge student --corpus stdlib package:networkx idioms:24
    python recipes/measure_bridges.py --bridge runs/student --corpus runs/student.tokens --kl-only runs/student_kl

Prints two tables and writes bridges.json and bridges.png: errors and divergences of both directions, losses of hybrid
passes with a switch at every site and of random mixtures, and the same for bridges that say the mean, least-squares
bridges of this student, of a sparse model that never saw the dense one, and of a student trained with KL alone (made by
fit_bridges --preset kl-only). Expect a minute for the shipped pair, and some more to pack its corpus.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from bridges.baselines import bigram_loss, load_rivals, measure
from bridges.fit import FITTED_WINDOWS, counted, has_sink, training_windows
from bridges.folder import load_bridged
from bridges.lineup import bridge_folder
from bridges.metrics import plot_metrics
from bridges.tables import metrics_table
from distill import TrainConfig, command, load_tokenizer
from distill.artifact import Provenance, check_free, default_out, fresh_folder, write_json
from distill.data import prepare, prepare_stream, windows


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of measure_bridges."""

    bridge: str = "student"
    """Student with bridges: folder of fit_bridges, or a shipped one's short name."""
    corpus: tuple[str, ...] = ("stdlib",)
    """Text that it was fitted on, as for fit_bridges, or the folder of packed tokens; its held-out part is judged."""
    stream: bool = False
    """Read the corpus as a stream, as fit_bridges --stream did."""
    unrelated: str = "auto"
    """A sparse model that never saw the dense one; auto: the shipped one where depth and tokenizer agree; none."""
    kl_only: str = "none"
    """A student of the same size made with fit_bridges --preset kl-only; none."""
    windows: int = 32
    """Held-out windows that all are judged on."""
    context: int = 128
    """Tokens of a window."""
    mixtures: int = 16
    """Random passes with any number of switches."""
    out: Path = default_out("bridges")
    """Folder for the results; an earlier result there is replaced."""
    seed: int = 0
    """Seed of what is held out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def run(options: Options) -> None:
    """Load the pair and its rivals, measure, save, print."""
    check_free(options.out, "report", replace=True)
    folder = bridge_folder(options.bridge)
    student, bridges, info = load_bridged(folder)
    device = command.pick_device(options.device)
    dense, bridges = info.dense.load().to(device), bridges.to(device)
    nn.Module.to(student, device)
    tokenizer = load_tokenizer(folder)
    rivals = load_rivals(dense, tokenizer, unrelated=options.unrelated, kl_only=options.kl_only)
    tokens = options.out.with_name(options.out.name + ".tokens")
    read, text = prepare_stream if options.stream else prepare, TrainConfig(context=options.context, seed=options.seed)
    data = read(options.corpus, tokens, tokenizer=tokenizer, seed=options.seed, replace=True)
    train = training_windows(data, text, FITTED_WINDOWS)
    heldout = windows(data.heldout, options.context, options.windows)
    metrics = measure(
        dense,
        student,
        bridges,
        heldout,
        train=train,
        bigram_ce=bigram_loss(counted(data, text), heldout, vocab_size=dense.vocab_size),
        rivals=rivals,
        skip_first=has_sink(dense, train[:8, :-1]),
        mixtures=options.mixtures,
    )
    provenance = Provenance(kind="report", command="recipes/measure_bridges.py", config=asdict(options),
                            seed=options.seed, data=data.fingerprint)  # fmt: skip
    with fresh_folder(options.out, provenance, replace=True) as place:
        write_json(place / "bridges.json", metrics)
        plot_metrics(metrics, place / "bridges.png")
    print(f"{metrics_table(metrics)}\n\nin {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(run, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

"""Compare the circuits of tasks in a sparse model, its dense counterpart, and a dense model with its bridged student.

    python recipes/compare_circuits.py --task single_double_quote for_while
    python recipes/compare_circuits.py --model runs/sparse --dense runs/dense --bridge runs/student --out runs/mine

Without arguments it takes the shipped models. --model and --dense are the pair whose circuit sizes are put in ratio;
--bridge adds a student and the dense model it was fitted to, the test of the bridged subspace, interchange through the
bridge and node correspondence, with their controls; --config.targets 0.5 0.25 0.15 0.1 0.05 adds curves of size against
loss. --circuits takes circuits that were found before instead of searching again. The folder gets comparison.json (see
bridges/COMPARISON.md), figures, index.html and one circuit file per task and model; recipes/view.py shows these.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bridges import (
    CompareConfig,
    add_crossings,
    add_subspaces,
    compare,
    known_circuits,
    load_lineup,
    table,
    write_report,
)
from bridges.basis import add_rotated
from distill import command, load_task
from distill.artifact import Provenance, check_free, default_out


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of compare_circuits."""

    model: str = "sparse"
    """Sparse model: folder or short name of a shipped one."""
    dense: str = "dense"
    """Its dense counterpart of matched held-out loss."""
    bridge: str = "student"
    """Folder of a student with bridges, or none."""
    task: tuple[str, ...] = ("single_double_quote", "for_while", "if_equals", "while_return_true")
    """Tasks by name, or JSONL files."""
    target: float = 0.15
    """Task loss to meet, in nats; where a full model is above it, the relative target of the source's."""
    corpus: tuple[str, ...] = ()
    """Text to measure ablation values on, for models that bring none (see train_sparse)."""
    circuits: Path | None = None
    """Folder of an earlier comparison, whose circuits are taken where they are of these models and this target."""
    rotated: bool = False
    """Also the bridged dense model with its heads in the basis of their singular vectors: is sparse simpler, or only
    better aligned?"""
    config: CompareConfig = field(default_factory=CompareConfig)
    """Pruning and judging; --target and --seed go before its own."""
    out: Path = default_out("comparison")
    """Folder of the report; an earlier one there is replaced."""
    seed: int = 0
    """Seed of masks, prompts and controls."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def compare_circuits(options: Options) -> None:
    """Load the models, prune, judge, print, save."""
    check_free(options.out, "report", replace=True)
    tasks = [load_task(name) for name in options.task]
    config = replace(options.config, prune=replace(options.config.prune, target=options.target, seed=options.seed))
    lineup = load_lineup(options.model, options.dense, options.bridge, corpus=options.corpus, device=options.device)
    lineup = add_rotated(lineup) if options.rotated else lineup
    known = None if options.circuits is None else known_circuits(options.circuits)
    comparison = compare(lineup.subjects, tasks, config, known=known)
    for add in (add_subspaces, add_crossings):
        comparison = add(comparison, lineup, tasks, config)
    provenance = Provenance(
        kind="report", command="recipes/compare_circuits.py", config=asdict(options), seed=options.seed, data=None
    )
    write_report(comparison, lineup.subjects, options.out, provenance, "Circuits, sparse and dense")
    print(table(comparison.record))
    print(f"comparison.json, figures, index.html and the circuits are in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(compare_circuits, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

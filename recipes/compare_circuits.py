"""Compare the circuits of tasks in a sparse model, its dense counterpart, and a dense model with its bridged student.

    python recipes/compare_circuits.py --task single_double_quote for_while
    python recipes/compare_circuits.py --model runs/sparse --dense runs/dense --bridge runs/student --out runs/mine
    python recipes/compare_circuits.py --circuits runs/quickstart --check-budget --rotated

Without arguments it takes the shipped models. --model and --dense are the pair whose circuit sizes are put in ratio,
each one or several seeds; --bridge adds a student and the dense model it was fitted to, the test of the bridged
subspace, interchange through the bridge and node correspondence, with their controls; --config.targets 0.5 0.25 0.15
0.1 0.05 adds curves of size against loss. --circuits takes circuits found before instead of searching again. The folder
gets comparison.json (see bridges/COMPARISON.md), figures, index.html and one circuit file per task and model;
recipes/view.py shows these. Expect about 5 minutes for the shipped models, 2 with --circuits.
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
from bridges.basis import add_basis, add_rotated
from bridges.budget import add_budget
from distill import command, load_subject, load_task
from distill.artifact import Provenance, check_free, default_out


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of compare_circuits."""

    model: tuple[str, ...] = ("sparse",)
    """Sparse model, or several seeds of one: folders or short names of shipped ones."""
    dense: tuple[str, ...] = ("dense",)
    """Its dense counterpart of matched held-out loss, or several seeds."""
    second_dense: str | None = None
    """Another seed of the dense model, for the agreement of losses token by token only."""
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
    check_budget: bool = False
    """Search for the pair's circuits once more at twice the budget: edges should move by less than 10%."""
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
    seconds = () if options.second_dense is None else (options.second_dense,)
    beside = [load_subject(one, name="second_dense", corpus=options.corpus, device=options.device) for one in seconds]
    comparison = compare(lineup.subjects, tasks, config, known=known, beside=beside)
    comparison = add_budget(comparison, lineup.subjects, tasks) if options.check_budget else comparison
    for add in (add_subspaces, add_crossings):
        comparison = add(comparison, lineup, tasks, config)
    comparison = add_basis(comparison)
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

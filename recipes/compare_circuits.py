"""Compare the circuits of tasks in a sparse model, its dense counterpart, and a dense model with its bridged student.

    python recipes/compare_circuits.py --task single_double_quote for_while
    python recipes/compare_circuits.py --model runs/sparse --dense runs/dense --bridge runs/student --out runs/mine

Without arguments it takes the shipped models. --model and --dense are the pair whose circuit sizes are put in ratio;
--bridge adds a student and the dense model it was fitted to, and the test of the bridged subspace. The folder gets
comparison.json, comparison.png, index.html and one circuit file per task and model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bridges import CompareConfig, add_subspaces, compare, load_lineup, table, write_report
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
    comparison = add_subspaces(compare(lineup.subjects, tasks, config), lineup, tasks, config)
    provenance = Provenance(
        kind="report", command="recipes/compare_circuits.py", config=asdict(options), seed=options.seed, data=None
    )
    write_report(comparison, lineup.subjects, options.out, provenance, "Circuits, sparse and dense")
    print(table(comparison.record))
    print(f"comparison.json, comparison.png, index.html and the circuits are in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(compare_circuits, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

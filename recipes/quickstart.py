"""From shipped models to circuits, and what they are worth, in under five minutes on two cores.

    python recipes/quickstart.py
    python recipes/quickstart.py --from-scratch

Prunes four small models of Python code on a few tasks: a sparse transformer, the same code trained dense to the same
held-out loss, a GPT-2, and a sparse student with bridges to that GPT-2. Prints one table with what it comes to, and
writes runs/quickstart/: comparison.json, figures, index.html (opens from disk) and one circuit per task and model, all
of which `python recipes/view.py runs/quickstart --bridge student` puts into one page to look at. With --from-scratch
all four models are trained first, smaller, in under an hour; run it again to go on after Ctrl-C.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bridges import (
    CompareConfig,
    add_crossings,
    add_subspaces,
    compare,
    load_lineup,
    table,
    train_lineup,
    write_report,
)
from distill import command, load_task
from distill.artifact import Provenance, check_free, default_out
from distill.model.load import SHIPPED


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of quickstart."""

    task: tuple[str, ...] = ("single_double_quote", "for_while", "if_equals", "while_return_true")
    """Tasks by name, or JSONL files."""
    from_scratch: bool = False
    """Train all models here instead of taking the shipped ones."""
    steps: int = 4000
    """Optimiser steps of each training, with --from-scratch; 1,000 take about 8 minutes in all, and so on."""
    target: float = 0.15
    """Task loss to meet, in nats; where a full model is above it, the relative target of the source's."""
    config: CompareConfig = field(default_factory=CompareConfig)
    """Pruning and judging; --target and --seed go before its own."""
    out: Path = default_out("quickstart")
    """Folder of the report; an earlier one there is replaced."""
    seed: int = 0
    """Seed of masks, prompts and controls, and of trainings."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:1."""


def quickstart(options: Options) -> None:
    """Get the models, prune, judge, print, save."""
    check_free(options.out, "report", replace=True)
    tasks = [load_task(name) for name in options.task]
    config = replace(options.config, prune=replace(options.config.prune, target=options.target, seed=options.seed))
    if options.from_scratch:
        lineup = train_lineup(
            options.out.with_name(options.out.name + ".models"), steps=options.steps, seed=options.seed
        )
    else:
        # By their paths: a folder that happens to be called sparse must not come in between.
        lineup = load_lineup(*(str(SHIPPED / name) for name in ("sparse", "dense", "student")), device=options.device)
    comparison = compare(lineup.subjects, tasks, config)
    for add in (add_subspaces, add_crossings):
        comparison = add(comparison, lineup, tasks, config)
    provenance = Provenance(
        kind="report", command="recipes/quickstart.py", config=asdict(options), seed=options.seed, data=None
    )
    write_report(comparison, lineup.subjects, options.out, provenance, "Quickstart: circuits, sparse and dense")
    print(table(comparison.record))
    print(f"comparison.json, figures, index.html and the circuits are in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(quickstart, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

"""Circuits for many models, tasks, seeds and targets: a table, or Pareto curves.

    python recipes/sweep_circuits.py --model sparse dense --task single_double_quote if_equals --seeds 0 1 2
    torchrun --nproc_per_node 2 recipes/sweep_circuits.py --model sparse dense --seeds 0 1 2 3 4
    python recipes/sweep_circuits.py --task while_return_true --targets 0.5 0.25 0.15 0.1 0.05 0.02 0.01 0.005 0.002

Writes {task}.{model}.{seed}.circuit.safetensors with its scorecard, and sweep.json. Run it again to go on where it was
broken off. With --targets each model and task gets one search for all target losses instead, with the first seed:
{task}.{model}.pareto.json and .png. Expect some 30 seconds a circuit on two cores for the shipped models, half of them
for the scorecard, and about a minute a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from distill import command
from distill.artifact import default_out
from distill.circuits import PruneConfig, load_subject, load_task
from distill.circuits.pareto import pareto
from distill.circuits.sweep import SweepConfig, sweep, table


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of sweep_circuits."""

    model: tuple[str, ...] = ("sparse", "dense")
    """Models: folders, short names of shipped ones, or hub names."""
    task: tuple[str, ...] = ("single_double_quote", "if_equals", "while_return_true", "var_if")
    """Tasks by name, or JSONL files."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of masks and prompts."""
    target: float = 0.15
    """Task loss to meet, in nats."""
    targets: tuple[float, ...] = ()
    """Several target losses: a Pareto curve for each model and task."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """How circuits are searched for; --target and --seeds go before its own."""
    checks: bool = True
    """Whether each circuit of a sweep gets its scorecard."""
    corpus: tuple[str, ...] = ()
    """Text to measure ablation values on, for models that bring none (see train_sparse)."""
    out: Path = default_out("sweep")
    """Folder of the results; finished circuits that lie there are taken."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def sweep_circuits(options: Options) -> None:
    """Prune, judge, save, print."""
    prune = replace(options.prune, target=options.target)
    config = SweepConfig(
        models=options.model,
        tasks=options.task,
        seeds=options.seeds,
        prune=prune,
        checks=options.checks,
        corpus=options.corpus,
        device=options.device,
    )
    if not options.targets:
        print(table(sweep(config, options.out)))
    for name in options.model if options.targets else ():
        subject = load_subject(name, corpus=options.corpus, device=options.device)
        parts = subject.tokenizer, subject.means, options.targets, replace(prune, seed=options.seeds[0])
        named = {"model_name": subject.name, "corpus": subject.sample[:, :-1]}
        for task in options.task:
            curve = pareto(subject.model, load_task(task), *parts, **named)
            curve.save(options.out)
            print(curve.table())
    print(f"in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(sweep_circuits, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

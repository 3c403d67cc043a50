"""Prune a model to the circuit of a task.

    python recipes/prune_circuit.py --model sparse --task single_double_quote
    python recipes/prune_circuit.py --model runs/sparse --task bracket_counting my_task.jsonl --target 0.1

The model is a folder, a shipped model's short name (sparse, dense, dense_gpt2, student) or a hub name. Each task gives
a file {task}.{model}.circuit.safetensors and its scorecard, how far to believe it, as {task}.{model}.scorecard.json
(--no-checks leaves that out; recipes/check_circuit.py makes one later, with more checks); comparison.json and
index.html list losses, nodes and edges. A task is a built-in one or a JSONL file of pairs. Expect some 10 seconds a
circuit on two cores for the shipped models, less than half of them for the scorecard.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bridges import CompareConfig, compare, table, write_report
from distill import command
from distill.artifact import Provenance, check_free, default_out, write_manifest
from distill.circuits import PruneConfig, load_subject, load_task
from distill.circuits.scorecard import scorecard


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of prune_circuit."""

    model: str = "sparse"
    """Model folder, short name of a shipped model, or hub name."""
    task: tuple[str, ...] = ("single_double_quote",)
    """Tasks by name, or JSONL files."""
    target: float = 0.15
    """Task loss to meet, in nats."""
    relative: bool = True
    """Whether a model that is above the target itself gets the source's relative one; without, a circuit that is better
    than the model is labelled so, and to find none at all is an error."""
    checks: bool = True
    """Whether each circuit gets its scorecard, from the checks that take seconds."""
    corpus: tuple[str, ...] = ()
    """Text to measure ablation values on, for models that bring none (see train_sparse)."""
    test_pairs: int = 64
    """Pairs of prompts, unseen by pruning, that each circuit is judged on."""
    random_sets: int = 20
    """Random node sets that necessity is read against."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """How the circuit is searched for; --target and --seed go before its own."""
    out: Path = default_out("circuits")
    """Folder for the circuits; an earlier result there is replaced."""
    seed: int = 0
    """Seed of masks and prompts."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def prune_circuit(options: Options) -> None:
    """Load, prune, judge, save, print."""
    check_free(options.out, "report", replace=True)
    tasks = [load_task(name) for name in options.task]
    subject = load_subject(options.model, corpus=options.corpus, device=options.device)
    prune = replace(options.prune, target=options.target, seed=options.seed)
    config = CompareConfig(
        prune=prune, relative=options.relative, test_pairs=options.test_pairs, random_sets=options.random_sets
    )
    comparison = compare([subject], tasks, config)
    if not (options.relative or comparison.circuits):
        raise ValueError("; ".join(str(row[subject.name]["reason"]) for row in comparison.record["tasks"].values()))
    provenance = Provenance(
        kind="report", command="recipes/prune_circuit.py", config=asdict(options), seed=options.seed, data=None
    )
    write_report(comparison, [subject], options.out, provenance, f"Circuits of {subject.name}")
    print(table(comparison.record))
    named = {task.name: task for task in tasks}
    for (task, model), circuit in comparison.circuits.items() if options.checks else ():
        card = scorecard(subject, named[task], circuit, seed=options.seed, name=f"{task}.{model}")
        card.save(options.out / f"{task}.{model}.scorecard.json")
        print(f"\n{card.table()}")
    write_manifest(options.out, provenance)
    print(f"circuits and page in {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(prune_circuit, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

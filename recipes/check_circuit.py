"""Is a circuit what the model does, or an artefact of pruning? The scorecard of any saved circuit.

    python recipes/check_circuit.py --circuit runs/circuits/single_double_quote.sparse.circuit.safetensors
    python recipes/check_circuit.py --circuit FILE --full --out runs/check
    python recipes/check_circuit.py --circuit FILE --against OTHER

Prints one table (check, value, control, threshold, p, prompts, verdict) and a verdict in words, and writes it all as
JSON: scorecard.json in the folder --out, else {name}.scorecard.json beside the circuit; for several circuits
{name}.scorecard.json each, and a table of sizes and flags. The model is found by what stands beside the circuit, or is
named with --model; a user's own task with --task. Expect some 10 seconds a circuit on two cores for the shipped models,
with --full (curves, attacks, controls that are pruned again, other seeds) up to 3 minutes. --against puts another
circuit beside the first: shared nodes and edges, each on the other's prompts, both scorecards; versus.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill import command
from distill.artifact import write_record
from distill.circuits import Circuit
from distill.circuits.faithfulness import Limits
from distill.circuits.origin import find_subjects, find_task, labels
from distill.circuits.scorecard import check_free, scorecard, summary, test_prompts
from distill.circuits.versus import versus


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of check_circuit."""

    circuit: tuple[Path, ...]
    """Files of circuits (*.circuit.safetensors)."""
    against: Path | None = None
    """Another circuit, to put beside the (one) circuit."""
    model: tuple[str, ...] = ()
    """Models of the circuits: folders or short names; none: found by what the files and the folders around them say."""
    task: str | None = None
    """Task by name, or a JSONL file of pairs; none: the built-in one that the circuit names."""
    full: bool = False
    """Also the checks that differentiate or prune again."""
    limits: Limits = field(default_factory=Limits)
    """Thresholds and sample sizes of the checks; they are written beside the results."""
    corpus: tuple[str, ...] = ()
    """Text to measure on, for models that bring none (see train_sparse)."""
    out: Path | None = None
    """Folder for the scorecards, where an earlier one of the same circuit is replaced; none: beside each circuit."""
    seed: int = 0
    """Seed of prompts, random circuits and draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def check_circuit(options: Options) -> None:
    """Load, check, save, print."""
    files = [*options.circuit, *([options.against] if options.against else [])]
    if options.against and len(options.circuit) > 1:
        raise ValueError(f"circuit: got {len(options.circuit)} files; allowed is one with --against")
    circuits = [Circuit.load(file) for file in files]
    tasks = [find_task(circuit, options.task) for circuit in circuits]
    subjects = find_subjects(circuits, files, models=options.model, corpus=options.corpus, device=options.device)
    whole = options.out is not None and len(files) == 1
    names, places = labels(files), []
    for file, name, circuit in zip(files, names, circuits, strict=True):
        folder = options.out or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        places.append(folder / ("scorecard.json" if whole else f"{name}.scorecard.json"))
        check_free(places[-1], circuit)
    cards, setting = [], {"limits": options.limits, "seed": options.seed}
    for place, name, circuit, task in zip(places, names, circuits, tasks, strict=True):
        card = scorecard(subjects[circuit.model], task, circuit, full=options.full, name=name, **setting)
        print(f"{card.table()}\nin {card.save(place)}\n")
        cards.append(card)
    if options.against:
        models = [subjects[circuit.model].model for circuit in circuits]
        prompts = [
            test_prompts(subjects[one.model], task, **setting) for one, task in zip(circuits, tasks, strict=True)
        ]
        both = versus(cards, models, circuits, prompts)
        write_record((options.out or files[0].parent) / "versus.json", both.to_json())
        print(both.table())
    elif len(cards) > 1:
        print(summary(cards))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(check_circuit, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

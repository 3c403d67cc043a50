"""How many checks of faithfulness speak against circuits of either objective, on the shipped models.

    python tests/benchmarks/study_faithfulness.py --out runs/faithfulness
    python tests/benchmarks/study_faithfulness.py --out runs/faithfulness --task var_if --full

Prunes every task in every model under the paper's objective and under the faithful one, and judges each circuit on
prompts that pruning never saw. Where the model misses the target with all of its nodes on these prompts, circuits have
to meet the relative one (settings.RELATIVE), and where none is found that meets the target on the validation prompts,
the relative one of those: see the column.
Writes {task}.{model}.{objective} + .circuit.safetensors and .scorecard.json (.missed.json where no circuit meets the
target), and prints the table; what lies there is taken, so run it again to go on, and delete scorecards to judge anew.
Expect 10 to 30 seconds of one core for a circuit and its scorecard, with --full some three minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from distill import command
from distill.artifact import read_json, write_json
from distill.circuits import Circuit, PruneConfig, load_subject, load_task
from distill.circuits.answers import CHANCE, answer_difference, two_way_loss
from distill.circuits.circuit import SUFFIX
from distill.circuits.faithfulness import Limits
from distill.circuits.prune import prune
from distill.circuits.scorecard import CHECKS, FAST, scorecard, test_prompts
from distill.circuits.selection import TargetError
from distill.circuits.settings import RELATIVE
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task

OBJECTIVES = ("paper", "faithful")
COLUMNS = ("task", "model", "target", "model's loss", "objective", "nodes", "edges induced", "edges pruned",
           "test loss", "flags", "which")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of study_faithfulness."""

    model: tuple[str, ...] = ("sparse", "dense")
    """Models: folders or short names."""
    task: tuple[str, ...] = ("single_double_quote", "var_if", "while_return_true", "bracket_brace", "if_equals",
                             "for_while", "fstring_brace", "indent_for")  # fmt: skip
    """Tasks by name."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """How circuits are searched for; the objective is set per run."""
    full: bool = False
    """All twelve checks, not only those that take seconds."""
    out: Path = Path("runs/faithfulness")
    """Folder of circuits and scorecards."""


def reachable(config: PruneConfig, full: float) -> PruneConfig:
    """The settings, with the relative target where the full model's loss is above the target."""
    if full <= config.target:
        return config
    target = CHANCE - RELATIVE * (CHANCE - full)
    # The room on validation prompts lies between the model's loss and the target.
    return replace(config, target=target, goal=target - config.headroom * (target - full))


def found_circuit(subject: Subject, task: Task, config: PruneConfig, file: Path) -> Circuit | None:
    """The circuit in a file, pruned now where there is none; None, and a note of the reason, where none is found.

    The target of `config` is tried first unless it is relative, then the relative one.
    """
    missed = file.with_name(file.name.removesuffix(SUFFIX) + ".missed.json")
    if missed.is_file():
        return None
    if not file.is_file():
        named = {"model_name": subject.name, "corpus": subject.sample[:, :-1]}
        try:
            prune(subject.model, task, subject.tokenizer, subject.means, config, **named).save(file)
        except TargetError as error:
            if not config.relative:
                return found_circuit(subject, task, replace(config, relative=True, goal=None), file)
            write_json(missed, {"reason": str(error)})
            return None
    circuit = Circuit.load(file)
    circuit.check(subject.model)
    return circuit


def judged(subject: Subject, task: Task, circuit: Circuit, name: str, options: Options) -> dict[str, Any]:
    """The scorecard of a circuit as its file has it, made now where there is none with all the checks asked for."""
    file = options.out / f"{name}.scorecard.json"
    wanted = CHECKS if options.full else FAST
    if file.is_file():
        card = read_json(file, what="scorecard")
        if {check["name"] for check in card["checks"]} >= set(wanted):
            return card
    scorecard(subject, task, circuit, full=options.full, name=name).save(file)
    return read_json(file, what="scorecard")


def row(card: dict[str, Any]) -> list[str]:
    """Cells of the table about one circuit."""
    counts, checks = card["about"]["counts"], {check["name"]: check for check in card["checks"]}
    enough = checks["sufficiency"]
    asked = sum(check["verdict"] != "skipped" for check in checks.values())
    sizes = [f"{counts[size]:,.0f}" for size in ("nodes", "edges_induced", "edges_pruned")]
    losses = [f"{card['about']['target']:.3f}", f"{enough['details']['loss_full']:.3f}"]
    flags = [f"{name} (artefact)" if checks[name]["verdict"] == "artefact" else name for name in card["flags"]]
    return [card["task"], card["model"], *losses, card["about"]["objective"], *sizes, f"{enough['value']:.3f}",
            f"{len(flags)} of {asked}", ", ".join(flags) or "none"]  # fmt: skip


def study(options: Options) -> None:
    """Prune, judge, print the table."""
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    subjects = {name: load_subject(name) for name in options.model}
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for task, subject, objective in product(map(load_task, options.task), subjects.values(), OBJECTIVES):
        name = f"{task.name}.{subject.name}.{objective}"
        with torch.no_grad():
            full = float(two_way_loss(answer_difference(subject.model, test_prompts(subject, task, Limits()))))
        config = replace(reachable(options.prune, full), objective=objective)
        circuit = found_circuit(subject, task, config, options.out / f"{name}{SUFFIX}")
        if circuit is None:
            none = ["-"] * (len(COLUMNS) - 6)
            rows.append([task.name, subject.name, "-", f"{full:.3f}", objective, *none, "no circuit meets the target"])
        else:
            rows.append(row(judged(subject, task, circuit, name, options)))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nin {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study on a command line; returns the exit status."""
    return command.run(study, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

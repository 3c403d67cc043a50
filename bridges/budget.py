"""Would a longer search have found smaller circuits? Doubling the pruning budget must move edges by less than 10%, or a
ratio of sizes is one of budgets (METHODS 6.7).

Doubled are the optimiser steps, the validation runs of the clean-up of nodes and of edges, and the seconds where they
are limited; target, goal, prompts and seed stay.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from tqdm import tqdm

from bridges.compare import Comparison
from bridges.ratios import DENSE, SPARSE, arm_of, arms
from distill.circuits.circuit import Circuit
from distill.circuits.prune import PruneConfig, prune
from distill.circuits.selection import TargetError
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task

LIMIT = 0.1
"""Largest relative change of the number of edges on doubling the budget."""
COUNTED = ("nodes", "edges_induced", "edges_pruned")
DOUBLED = ("steps", "clean_up", "edge_clean_up", "time_budget")
"""Settings of pruning that are its budget."""


def add_budget(comparison: Comparison, subjects: Sequence[Subject], tasks: Sequence[Task]) -> Comparison:
    """Prunes every circuit of the pair again at twice its budget.

    Adds `tasks.{task}.{model}.doubled`: what was found and how far the edges moved; and `budget`, see `budget_check`.
    """
    by_name = {subject.name: subject for subject in subjects}
    rows = {name: dict(row) for name, row in comparison.record["tasks"].items()}
    chosen = [
        (task, name, comparison.circuits[task.name, name])
        for task in tasks
        for name in by_name
        if arm_of(name) is not None and (task.name, name) in comparison.circuits
    ]
    for task, name, circuit in tqdm(chosen, desc="twice the budget", unit="circuit"):
        rows[task.name][name] = {**rows[task.name][name], "doubled": again(by_name[name], task, circuit)}
    record: dict[str, Any] = {**comparison.record, "tasks": rows}
    return replace(comparison, record={**record, "budget": budget_check(rows, record["tasks_counted"])})


def again(subject: Subject, task: Task, circuit: Circuit) -> dict[str, Any]:
    """A circuit searched for once more, with twice the budget that it was found with.

    Its sizes, `moved` and `moved_pruned` (relative change of edges between kept nodes, and of kept edges), or with
    `reason` why there is none.
    """
    settings = doubled(circuit)
    one: dict[str, Any] = {"steps": settings.steps, "reason": None}
    one |= dict.fromkeys((*COUNTED, "moved", "moved_pruned"))
    try:
        found = prune(subject.model, task, subject.tokenizer, subject.means, settings, model_name=subject.name)
    except TargetError as error:
        return {**one, "reason": str(error)}
    before, after = circuit.counts(subject.model), found.counts(subject.model)
    moved = [_moved(before[size], after[size]) for size in COUNTED[1:]]
    return {**one, **{size: after[size] for size in COUNTED}, "moved": moved[0], "moved_pruned": moved[1]}


def doubled(circuit: Circuit) -> PruneConfig:
    """The settings that a circuit was found with, at twice the budget."""
    known = {one.name for one in fields(PruneConfig)}
    settings = PruneConfig(**{name: value for name, value in circuit.provenance["config"].items() if name in known})
    budget = {name: getattr(settings, name) for name in DOUBLED}
    return replace(settings, **{name: None if value is None else 2 * value for name, value in budget.items()})


def budget_check(rows: Mapping[str, Mapping[str, Any]], counted: Sequence[str]) -> dict[str, Any]:
    """Whether edges stay within 10% on doubling the budget.

    `models`: for each model of the pair `moved` and `moved_pruned`, the geometric mean over its circuits of edges at
    twice the budget over edges, less 1; `typical`, the same of moves taken as rises, so that none makes up for another;
    and `worst`, the `moved` of the circuit that moved most. `holds`: whether all `typical` are within `limit`.
    `edge_ratio_geomean`: the ratio dense over sparse at twice the budget, over the tasks that count and have circuits
    there. None where there is nothing to tell from.
    """
    found: dict[str, Any] = {"limit": LIMIT, "models": {}}
    names = list(dict.fromkeys(name for row in rows.values() for name in row if arm_of(name) is not None))
    for name in names:
        done = [
            row[name]["doubled"] for row in rows.values() if (row[name].get("doubled") or {}).get("nodes") is not None
        ]
        if done:
            found["models"][name] = {
                **{key: _mean_move([one[key] for one in done]) for key in ("moved", "moved_pruned")},
                "typical": _mean_move([math.exp(abs(math.log1p(one["moved"]))) - 1 for one in done]),
                "worst": max((one["moved"] for one in done), key=abs),
                "circuits": len(done),
            }
    moves = [one["typical"] for one in found["models"].values()]
    found["holds"] = all(move < LIMIT for move in moves) if moves else None
    ratios = [ratio for task in counted if (ratio := _ratio(rows[task])) is not None]
    found["edge_ratio_geomean"] = math.exp(sum(ratios) / len(ratios)) if ratios else None
    return found


def _ratio(row: Mapping[str, Any]) -> float | None:
    """Logarithm of the edges at twice the budget, dense over sparse; None where a circuit is missing."""
    logs: dict[str, float] = {}
    for arm, names in arms(list(row)).items():
        sizes = [(row[name].get("doubled") or {}).get("edges_induced") for name in names]
        if not sizes or None in sizes:
            return None
        logs[arm] = sum(math.log(max(size, 1)) for size in sizes if size is not None) / len(sizes)
    return logs[DENSE] - logs[SPARSE]


def _moved(before: int | float, after: int | float) -> float:
    return max(after, 1) / max(before, 1) - 1


def _mean_move(moves: Sequence[float]) -> float:
    return math.exp(sum(math.log1p(move) for move in moves) / len(moves)) - 1

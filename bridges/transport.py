"""A student's circuit carried across the bridge: does the dense model do the task in the subspace it points to?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bridges.compare import CompareConfig, Comparison
from bridges.lineup import STUDENT, TEACHER, Lineup
from bridges.subspace import bridged_subspace, live_channels, random_subspaces, residual_means, subspace_test
from distill.circuits.tasks import Task, encode

PAIRS = 32
"""Pairs of prompts that the test looks at."""


def add_subspaces(comparison: Comparison, lineup: Lineup, tasks: Sequence[Task], config: CompareConfig) -> Comparison:
    """Adds `tasks.{task}.bridge`, the bridged subspace test (METHODS 6.3), for each task with a student's circuit.

    A list with one entry per test and site, "all" sites last (`SubspaceTest.to_json`); None where there is no bridge,
    no circuit of the student, or the dense model cannot do the task. Controls are random subspaces of equal dimension
    and variance, as many as `config.random_sets`.
    """
    teacher, student = lineup.subject(TEACHER), lineup.subject(STUDENT)
    rows = {name: {**row, "bridge": None} for name, row in comparison.record["tasks"].items()}
    if lineup.bridges is not None and teacher is not None and student is not None:
        means = residual_means(teacher.model, teacher.sample[:PAIRS, :-1])
        for task in tasks:
            circuit = comparison.circuits.get((task.name, STUDENT))
            if circuit is None or rows[task.name][TEACHER]["loss_full"] >= config.able:
                continue
            live = live_channels(circuit.nodes, n_layer=student.model.n_layer, d_model=student.model.d_model)
            bases = bridged_subspace(lineup.bridges, live)
            pairs = min(PAIRS, task.size("test"))
            batch = encode(task, teacher.tokenizer, "test", pairs, config.prune.seed, context=teacher.model.context)
            controls = random_subspaces(bases, means, config.random_sets, seed=config.prune.seed)
            found = subspace_test(teacher.model, batch, bases, means, controls=controls)
            rows[task.name]["bridge"] = [test.to_json() for test in found]
    record: dict[str, Any] = {**comparison.record, "tasks": rows}
    return replace(comparison, record=record)

"""How much larger the dense circuits are than the sparse ones, over tasks and model seeds (METHODS 6.1, 6.7).

The two arms of a comparison are sparse and dense models of matched held-out loss, each of one or several seeds, named
`sparse`, `sparse_2`, ... and `dense`, `dense_2`, ...
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SPARSE, DENSE = "sparse", "dense"
"""Names of the arms, and of the first model of each."""
RATIOS = {
    "edge_ratio": "edges_induced",
    "pruned_edge_ratio": "edges_pruned",
    "node_ratio": "nodes",
    "null_ratio": "edges_null",
}
"""Ratios dense over sparse, and the size that each is of."""
MATCHED = 0.01
"""Largest relative difference of held-out losses within which two arms count as matched."""
DRAWS = 2000
"""Draws of a bootstrap."""


def arm_name(arm: str, index: int) -> str:
    """What a comparison calls the model of an arm, counted from 0: `sparse`, `sparse_2`, ..."""
    return arm if index == 0 else f"{arm}_{index + 1}"


def arm_of(name: str) -> str | None:
    """The arm that a model belongs to by its name, None for one beside the pair."""
    found = re.fullmatch(rf"({SPARSE}|{DENSE})(_\d+)?", name)
    return None if found is None else found[1]


def arms(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of the models of either arm."""
    return {arm: [name for name in names if arm_of(name) == arm] for arm in (SPARSE, DENSE)}


def matched(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """How far the arms' mean held-out losses are apart; matched means within 1%. None without a pair."""
    losses = {arm: [models[name]["heldout_loss"] for name in names] for arm, names in arms(list(models)).items()}
    if not all(losses.values()):
        return None
    gap = float(np.mean(losses[DENSE]) / np.mean(losses[SPARSE])) - 1
    return {"gap": gap, "within": MATCHED, "holds": abs(gap) <= MATCHED}


def ratios(rows: Mapping[str, Mapping[str, Any]], empty: float, *, seed: int = 0) -> dict[str, Any]:
    """Dense over sparse, geometric means over the tasks that count and over the seeds of each arm.

    Which tasks are eligible is settled before pruning: all full models of the pair reach the target, and none does the
    task with all nodes ablated (loss_empty, and calibrated, above `empty`). Of these a task counts where all circuits
    meet the target on prompts that pruning never saw; `left_out` says why the others do not. Beside the ratio of edges
    stand that of nodes and the null: what the ratio of edges would be if as many nodes had been drawn blindly. Each has
    a 95% interval by bootstrap over tasks and, where an arm has several models, over these; `interval_over` counts
    them. None where no task counts.
    """
    reasons = {name: left_out(row, empty) for name, row in rows.items()}
    counted = [name for name, (_, reason) in reasons.items() if not reason]
    found: dict[str, Any] = {
        "tasks_eligible": [name for name, (eligible, _) in reasons.items() if eligible],
        "tasks_counted": counted,
        "left_out": {name: reason for name, (_, reason) in reasons.items() if reason},
        "interval_over": {"tasks": len(counted), **seeds(rows)},
    }
    for name, size in RATIOS.items():
        logs = {arm: log_sizes(rows, counted, arm, size) for arm in (SPARSE, DENSE)}
        ratio = float((logs[DENSE].mean(1) - logs[SPARSE].mean(1)).mean()) if counted else None
        found[f"{name}_geomean"] = None if ratio is None else math.exp(ratio)
        found[f"{name}_interval"] = interval(logs[SPARSE], logs[DENSE], seed=seed)
    return found


def seeds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Models in each arm."""
    names = next((list(row) for row in rows.values()), [])
    return {arm: len(found) for arm, found in arms(names).items()}


def log_sizes(rows: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], arm: str, size: str) -> np.ndarray:
    """Logarithms of a size, (tasks, models of the arm)."""
    # A circuit without edges (all in the embeddings) would make the ratio infinite: it counts as one edge.
    return np.array([
        [math.log(max(rows[task][name][size], 1)) for name in arms(list(rows[task]))[arm]] for task in tasks
    ])  # fmt: skip


def interval(sparse: np.ndarray, dense: np.ndarray, *, seed: int, draws: int = DRAWS) -> tuple[float, float] | None:
    """95% interval of a geometric mean of ratios dense over sparse, by bootstrap over tasks and models.

    Arguments:
        sparse, dense: logarithms of sizes, (tasks, models); the tasks are the same, the models drawn apart.

    None where there is nothing to draw from: no task, or one task and one model in each arm.
    """
    if not len(sparse) or max(len(sparse), sparse.shape[1], dense.shape[1]) < 2:
        return None
    generator = np.random.default_rng(seed)
    tasks = generator.integers(len(sparse), size=(draws, len(sparse)))
    means = []
    for logs in (dense, sparse):
        models = generator.integers(logs.shape[1], size=(draws, logs.shape[1]))
        means.append(logs[tasks[:, :, None], models[:, None, :]].mean((1, 2)))
    low, high = np.exp(np.quantile(means[0] - means[1], (0.025, 0.975)))
    return float(low), float(high)


def left_out(row: Mapping[str, Any], empty: float) -> tuple[bool, str]:
    """Whether a task is eligible, and why it does not count ("" where it does)."""
    pair = {name: row[name] for name in row if arm_of(name) is not None}
    if not all(arms(list(pair)).values()):
        return False, "there is no pair of a sparse and a dense model"
    for name, one in pair.items():
        if one["loss_full"] > row["target"]:
            return False, f"{name} misses the target with all its nodes ({one['loss_full']:.3f} > {row['target']:.3f})"
    for name, one in pair.items():
        calibrated = one.get("loss_empty_calibrated")
        alone = one["loss_empty"] if calibrated is None else min(one["loss_empty"], calibrated)
        if alone <= empty:
            return False, f"{name} does it without any node (loss_empty {alone:.3f}): it needs no circuit"
    for name, one in pair.items():
        if one["nodes"] is None:
            return True, f"{name} has no circuit: {one['reason']}"
        if not one["meets_target"]:
            loss = one["loss_circuit"]
            return True, f"{name}'s circuit misses the target on unseen prompts ({loss:.3f} > {row['target']:.3f})"
    return True, ""

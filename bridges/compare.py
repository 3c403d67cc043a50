"""Circuits of one task in several models, side by side [G Fig. 2], with what a fair comparison needs (METHODS 6.7).

In the order of the code: losses of the models on held-out text; per task the losses of the full models, and from them
one target for all; a circuit per model that can do the task; size, sufficiency and necessity of each on prompts that
pruning never saw; and the ratio of sizes, dense over sparse, as a geometric mean over tasks.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distill.artifact import versions
from distill.circuits.answers import CHANCE, answer_difference, frozen, two_way_loss
from distill.circuits.circuit import SUFFIX, Circuit
from distill.circuits.faithfulness.necessity import necessity
from distill.circuits.faithfulness.sufficiency import loss_empty, sufficiency
from distill.circuits.prune import RELATIVE, PruneConfig, prune
from distill.circuits.selection import TargetError
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.command import no_type_check
from distill.training.evaluate import heldout_loss

SPARSE, DENSE = "sparse", "dense"
"""Names of the pair that the ratio is about."""
SIZES = ("nodes", "edges_induced", "edges_embed", "edges_null")
CIRCUIT_FIELDS = ("loss_circuit", "loss_calibrated", *SIZES, "loss_without_circuit", "loss_without_random_median")


@no_type_check
@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared, and how carefully; every value is checked when it is made."""

    prune: PruneConfig = field(default_factory=PruneConfig)
    """How each circuit is searched for; its target is the task loss, in nats, for all models alike."""
    test_pairs: int = 64
    """Pairs of prompts, unseen by pruning, that sizes are judged on."""
    random_sets: int = 20
    """Random node sets that necessity is read against."""
    able: float = 0.6
    """Task loss in nats above which a model is said not to do a task (chance is 0.693)."""
    empty: float = 0.5
    """Task loss with all nodes ablated below which a task needs no circuit, and does not count in the mean."""
    heldout_windows: int = 128
    """Held-out windows that the models' losses are measured on."""

    def __post_init__(self) -> None:
        for name in ("test_pairs", "random_sets", "heldout_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed are 1 and more")
        for name in ("able", "empty"):
            if not 0 < getattr(self, name) <= CHANCE:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed are numbers above 0, up to {CHANCE:.3f}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was found."""

    record: Mapping[str, Any]
    """What `comparison.json` holds."""
    circuits: Mapping[tuple[str, str], Circuit]
    """Circuits by (task, name of the model)."""

    def save(self, folder: Path) -> None:
        """Writes one circuit file per task and model."""
        for (task, name), circuit in self.circuits.items():
            circuit.save(folder / f"{task}.{name}{SUFFIX}")


def compare(subjects: Sequence[Subject], tasks: Sequence[Task], config: CompareConfig) -> Comparison:
    """Prunes every subject on every task and puts the circuits side by side.

    Subjects named `sparse` and `dense` are the pair of the ratio. A task that a model cannot do keeps its row with a
    reason. ValueError for subjects with the same name, and where a task does not fit a tokenizer.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"model: the names {names} are not all different; give each model a name of its own")
    rows: dict[str, dict[str, Any]] = {}
    circuits: dict[tuple[str, str], Circuit] = {}
    with tqdm(total=len(tasks) * len(subjects), desc="circuits", unit="circuit") as bar:
        for task in tasks:
            rows[task.name], found = _compare_task(subjects, task, config, bar)
            circuits.update({(task.name, name): circuit for name, circuit in found.items()})
    record = {
        "models": {subject.name: _describe(subject, config) for subject in subjects},
        "tasks": rows,
        **ratios(rows, config.empty),
        "objective": config.prune.objective,
        "seed": config.prune.seed,
        "config": asdict(config),
        "versions": versions(),
    }
    return Comparison(record=record, circuits=circuits)


def _describe(subject: Subject, config: CompareConfig) -> dict[str, Any]:
    sample = subject.sample
    chosen = sample[:: max(1, len(sample) // config.heldout_windows)][: config.heldout_windows]
    matrices = list(subject.model.matrices().values())
    nonzeros, numel = sum(int(m.count_nonzero()) for m in matrices), sum(m.numel() for m in matrices)
    return {
        "heldout_loss": heldout_loss(subject.model, chosen),
        "heldout_tokens": chosen[:, 1:].numel(),
        "fingerprint": subject.model.fingerprint(),
        "nodes": sum(subject.model.widths.values()),
        "weights": numel,
        "density": nonzeros / numel,
    }


def _compare_task(
    subjects: Sequence[Subject], task: Task, config: CompareConfig, bar: tqdm
) -> tuple[dict[str, Any], dict[str, Circuit]]:
    tests = {subject.name: _test_batch(subject, task, config) for subject in subjects}
    losses = {subject.name: _full_loss(subject, tests[subject.name]) for subject in subjects}
    pair = [losses[name] for name in (SPARSE, DENSE) if name in losses] or list(losses.values())
    target = common_target(config.prune.target, [loss for loss in pair if loss < config.able])
    row: dict[str, Any] = {"target": target}
    circuits: dict[str, Circuit] = {}
    for subject in subjects:
        bar.set_postfix_str(f"{task.name}, {subject.name}")
        empty = loss_empty(subject.model, subject.means, tests[subject.name])
        row[subject.name] = {"loss_full": losses[subject.name], "loss_empty": empty, "reason": None}
        row[subject.name] |= dict.fromkeys(CIRCUIT_FIELDS)
        if losses[subject.name] >= config.able:
            row[subject.name]["reason"] = f"the full model cannot do the task (able: under {config.able} nats)"
        else:
            own = common_target(target, [losses[subject.name]])
            circuit = _circuit(subject, task, config, own, row[subject.name])
            if circuit is not None:
                circuits[subject.name] = circuit
                row[subject.name] |= judge(subject, circuit, tests[subject.name], config)
        bar.update()
    return row, circuits


def common_target(target: float, losses: Sequence[float]) -> float:
    """`target`, or where a full model's loss is above that, ln 2 - 0.83 (ln 2 - worst loss): METHODS 6.7."""
    worst = max(losses, default=0.0)
    return target if worst <= target else CHANCE - RELATIVE * (CHANCE - worst)


def _test_batch(subject: Subject, task: Task, config: CompareConfig) -> TaskBatch:
    pairs = min(config.test_pairs, task.size("test"))
    return encode(task, subject.tokenizer, "test", pairs, config.prune.seed, context=subject.model.context)


def _full_loss(subject: Subject, batch: TaskBatch) -> float:
    with frozen(subject.model), torch.no_grad():
        return float(two_way_loss(answer_difference(subject.model, batch)))


def _circuit(subject: Subject, task: Task, config: CompareConfig, target: float, row: dict[str, Any]) -> Circuit | None:
    """The pruned circuit; where none meets the target, None and the reason in the row."""
    settings = replace(config.prune, target=target, relative=False)
    began = time.perf_counter()
    try:
        circuit = prune(subject.model, task, subject.tokenizer, subject.means, settings, model_name=subject.name)
    except TargetError as error:
        row["reason"] = str(error)
        return None
    row["seconds"] = round(time.perf_counter() - began, 2)
    row["target"] = target
    row["label"] = circuit.provenance["label"]
    return circuit


def judge(subject: Subject, circuit: Circuit, batch: TaskBatch, config: CompareConfig) -> dict[str, Any]:
    """Sizes, sufficiency and necessity of one circuit on prompts that pruning never saw."""
    began = time.perf_counter()
    enough = sufficiency(subject.model, circuit, batch)
    needed = necessity(subject.model, circuit, batch, sets=config.random_sets, seed=config.prune.seed)
    return {
        "loss_circuit": enough.value,
        "loss_calibrated": enough.details["loss_calibrated"],
        **circuit.counts(subject.model),
        "loss_without_circuit": needed.value,
        "loss_without_random_median": float(torch.tensor(needed.control).median()),
        "meets_target": (enough.details["loss_calibrated"] if config.prune.calibrated else enough.value)
        <= circuit.target,
        "checks": {check.name: {"verdict": check.verdict, "reason": check.reason} for check in (enough, needed)},
        "seconds_checks": round(time.perf_counter() - began, 2),
    }


def ratios(rows: Mapping[str, Mapping[str, Any]], empty: float) -> dict[str, Any]:
    """Dense over sparse, geometric means over the tasks that count.

    A task counts where both circuits meet the target and neither model does it with all nodes ablated (loss_empty
    above `empty`). Beside the ratio of edges stand that of nodes and the null: what the ratio of edges would be if
    as many nodes had been drawn blindly. None where no task counts.
    """
    counted = [name for name, row in rows.items() if _counts(row, empty)]
    found: dict[str, Any] = {"tasks_counted": counted}
    for name, size in (("edge_ratio", "edges_induced"), ("node_ratio", "nodes"), ("null_ratio", "edges_null")):
        # A circuit without edges (all in the embeddings) would make the ratio infinite: it counts as one edge.
        logs = [math.log(max(rows[t][DENSE][size], 1) / max(rows[t][SPARSE][size], 1)) for t in counted]
        found[f"{name}_geomean"] = math.exp(sum(logs) / len(logs)) if logs else None
    return found


def _counts(row: Mapping[str, Any], empty: float) -> bool:
    pair = [row.get(SPARSE), row.get(DENSE)]
    return all(one is not None and one.get("meets_target") and one["loss_empty"] > empty for one in pair)

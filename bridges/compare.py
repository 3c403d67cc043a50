"""Circuits of one task in several models, side by side [G Fig. 2], with what a fair comparison needs (METHODS 6.7).

In the order of the code: losses of the models on held-out text; per task the losses of the full models, and from them
one target for all; a circuit per model that can do the task; size, sufficiency and necessity of each on prompts that
pruning never saw; and the ratio of sizes, dense over sparse, as a geometric mean over tasks.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from bridges.agreement import agreements
from bridges.ratios import arm_of, matched, ratios
from distill.artifact import versions
from distill.circuits.answers import CHANCE, answer_difference, calibrate, frozen, two_way_loss
from distill.circuits.circuit import SUFFIX, Circuit
from distill.circuits.faithfulness.necessity import necessity
from distill.circuits.faithfulness.sufficiency import loss_empty, sufficiency
from distill.circuits.pareto import pareto
from distill.circuits.prune import RELATIVE, PruneConfig, prune
from distill.circuits.selection import TargetError
from distill.circuits.subject import Subject
from distill.circuits.task_table import empty_difference
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.command import no_type_check
from distill.training.evaluate import heldout_loss

SIZES = ("nodes", "edges_induced", "edges_pruned", "edges_embed", "edges_null")
CORPUS_WINDOWS = 16
"""Windows of held-out text on which the damage of losing a circuit is measured."""
RESERVED = frozenset({"target", "asked", "bridge", "interchange", "correspondence", "curves"})
"""What a task's row holds beside the models."""
FROM_TARGET = frozenset({"target", "goal", "relative"})
"""Settings of pruning that the comparison works out of the models' losses."""
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
    relative: bool = True
    """Where a full model misses the target, take ln 2 - 0.83 (ln 2 - its loss) instead; else circuits are labelled."""
    subspaces: int = 100
    """Control subspaces of each kind in the test of the bridged subspace."""
    empty: float = 0.5
    """Task loss with all nodes ablated, as it is or calibrated, below which a task needs no circuit, and does not count
    in the mean."""
    targets: tuple[float, ...] = ()
    """Target losses, in nats, of the pair's curves of size against loss; none: no curves."""
    heldout_windows: int = 512
    """Held-out windows that the models' losses are measured on."""

    def __post_init__(self) -> None:
        for name in ("test_pairs", "random_sets", "subspaces", "heldout_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed are 1 and more")
        if len(set(self.targets)) < len(self.targets) or any(not target > 0 for target in self.targets):
            raise ValueError(f"targets: got {self.targets}; allowed are different numbers above 0")
        if self.prune.relative or self.prune.goal is not None:
            raise ValueError("prune: relative and goal are set for all models alike, by the comparison's own relative")
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


def compare(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    config: CompareConfig,
    *,
    known: Mapping[tuple[str, str], Sequence[Circuit]] | None = None,
    keep: Callable[[Circuit], object] | None = None,
    beside: Sequence[Subject] = (),
) -> Comparison:
    """Prunes every subject on every task and puts the circuits side by side.

    `known` are circuits by (task, name of the model), as an earlier comparison saved them (`known_circuits`): one that
    belongs to the model and was searched for alike, to the same target, is taken instead of being searched for again.
    `keep` is handed every circuit as soon as a search has found it. `beside` are models whose losses token by token are
    looked at, and nothing else: another seed of the dense model says what agreement to expect.

    Subjects named `sparse`, `sparse_2`, ... and `dense`, `dense_2`, ... are the pair of the ratio. A task that a model
    cannot do keeps its row with a reason. ValueError for names that stand twice or mean something else, and where a
    task does not fit a tokenizer.
    """
    for field_name, names in (
        ("model", [one.name for one in (*subjects, *beside)]),
        ("task", [task.name for task in tasks]),
    ):
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"{field_name}: got {names}; allowed are one or more, each with a name of its own")
    if taken := {subject.name for subject in subjects} & RESERVED:
        raise ValueError(f"model: a model cannot be called {taken.pop()!r} in a comparison; rename its folder")
    models = {one.name: _describe(one, sample_for(one, subjects, config)) for one in subjects}
    trials = {one.name: _trials(one, tasks, config) for one in subjects}
    rows: dict[str, dict[str, Any]] = {}
    circuits: dict[tuple[str, str], Circuit] = {}
    with tqdm(total=len(tasks) * len(subjects), desc="circuits", unit="circuit") as bar:
        for task in tasks:
            rows[task.name], found = _compare_task(subjects, task, config, bar, known or {}, keep, trials)
            circuits.update({(task.name, name): circuit for name, circuit in found.items()})
    record = {
        "models": models,
        "matched": matched(models),
        "agreement": agreements([*subjects, *beside], sample_for(subjects[0], [*subjects, *beside], config)),
        "tasks": rows,
        **ratios(rows, config.empty, seed=config.prune.seed),
        "objective": config.prune.objective,
        "seed": config.prune.seed,
        "config": asdict(config),
        "versions": versions(),
    }
    return Comparison(record=record, circuits=circuits)


def sample_for(subject: Subject, subjects: Sequence[Subject], config: CompareConfig) -> Int[Tensor, "n T1"]:
    """Held-out windows to judge a model on: the same tokens for all models with the same vocabulary."""
    alike = [one for one in subjects if one.tokenizer.get_vocab() == subject.tokenizer.get_vocab()]
    length = min(one.sample.shape[1] for one in alike)
    every = alike[0].sample[:, :length]
    return every[torch.linspace(0, len(every) - 1, min(config.heldout_windows, len(every))).long()]


def _describe(subject: Subject, chosen: Int[Tensor, "n T1"]) -> dict[str, Any]:
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
    subjects: Sequence[Subject],
    task: Task,
    config: CompareConfig,
    bar: tqdm,
    known: Mapping[tuple[str, str], Sequence[Circuit]],
    keep: Callable[[Circuit], object] | None,
    trials: Mapping[str, Mapping[str, tuple[TaskBatch, float]]],
) -> tuple[dict[str, Any], dict[str, Circuit]]:
    tests = {subject.name: trials[subject.name][task.name][0] for subject in subjects}
    losses = {subject.name: trials[subject.name][task.name][1] for subject in subjects}
    pair = [loss for name, loss in losses.items() if arm_of(name) is not None] or list(losses.values())
    able = [loss for loss in pair if loss < config.able]
    target = common_target(config.prune.target, able) if config.relative else config.prune.target
    row: dict[str, Any] = {"target": target, "asked": config.prune.target}
    circuits: dict[str, Circuit] = {}
    for subject in subjects:
        bar.set_postfix_str(f"{task.name}, {subject.name}")
        empty = empty_losses(subject, task, tests[subject.name], config)
        row[subject.name] = {"loss_full": losses[subject.name], **empty, "reason": None}
        row[subject.name] |= dict.fromkeys(CIRCUIT_FIELDS)
        if losses[subject.name] >= config.able:
            row[subject.name]["reason"] = f"the full model cannot do the task (able: under {config.able} nats)"
        else:
            settings = _settings(config, target, able, losses[subject.name])
            earlier = known.get((task.name, subject.name), ())
            circuit = _circuit(subject, task, settings, row[subject.name], earlier, keep)
            if circuit is not None:
                circuits[subject.name] = circuit
                others = {
                    name: batch
                    for name, (batch, loss) in trials[subject.name].items()
                    if name != task.name and loss < config.able
                }
                row[subject.name] |= judge(subject, circuit, tests[subject.name], config, others)
                if config.targets and arm_of(subject.name) is not None:
                    row.setdefault("curves", {})[subject.name] = curve(subject, task, config)
        bar.update()
    return row, circuits


def _trials(subject: Subject, tasks: Sequence[Task], config: CompareConfig) -> dict[str, tuple[TaskBatch, float]]:
    """Test prompts of every task, by its name, with the full model's loss on them."""
    batches = {task.name: _test_batch(subject, task, config) for task in tasks}
    return {name: (batch, _full_loss(subject, batch)) for name, batch in batches.items()}


def common_target(target: float, losses: Sequence[float]) -> float:
    """`target`, or where a full model's loss is above that, ln 2 - 0.83 (ln 2 - worst loss): METHODS 6.7."""
    worst = max(losses, default=0.0)
    return target if worst <= target else CHANCE - RELATIVE * (CHANCE - worst)


def _test_batch(subject: Subject, task: Task, config: CompareConfig) -> TaskBatch:
    pairs = min(config.test_pairs, task.size("test"))
    return encode(task, subject.tokenizer, "test", pairs, config.prune.seed, context=subject.model.context)


def curve(subject: Subject, task: Task, config: CompareConfig) -> list[dict[str, Any]]:
    """Sizes along the targets, as `pareto` finds them: one row for each, the largest target first."""
    found = pareto(
        subject.model,
        task,
        subject.tokenizer,
        subject.means,
        config.targets,
        config.prune,
        model_name=subject.name,
        corpus=subject.sample[:, :-1],
    )
    return list(found.rows)


def empty_losses(subject: Subject, task: Task, batch: TaskBatch, config: CompareConfig) -> dict[str, float | None]:
    """Task loss with every node ablated, in nats: as it is, and calibrated on training prompts (None without any).

    A model whose embeddings lean to one answer looks as if it could not do a task that its bigram table does alone;
    the calibrated loss tells.
    """
    after = None
    if task.splits.get("train"):
        pairs = min(config.prune.train_pairs, task.size("train"))
        train = encode(task, subject.tokenizer, "train", pairs, config.prune.seed, context=subject.model.context)
        calibration = calibrate(empty_difference(subject.model, train, subject.means), train.orientation)
        alone = empty_difference(subject.model, batch, subject.means)
        after = float(two_way_loss(calibration(alone, batch.orientation.double())))
    return {"loss_empty": loss_empty(subject.model, subject.means, batch), "loss_empty_calibrated": after}


def known_circuits(folder: Path) -> dict[tuple[str, str], list[Circuit]]:
    """The circuits of an earlier comparison, by task and name of the model. ArtifactError for a damaged one."""
    found: dict[tuple[str, str], list[Circuit]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        circuit = Circuit.load(path)
        found.setdefault((circuit.task, circuit.model_name), []).append(circuit)
    return found


def _full_loss(subject: Subject, batch: TaskBatch) -> float:
    with frozen(subject.model), torch.no_grad():
        return float(two_way_loss(answer_difference(subject.model, batch)))


def _settings(config: CompareConfig, target: float, able: Sequence[float], full: float) -> PruneConfig:
    """How one model is pruned: to the common target, and to one goal on validation prompts for the whole pair.

    A model beside the pair (the student, its dense model) that misses the common target gets a relative one of its own.
    """
    own = common_target(target, [full]) if config.relative else target
    worst = max(able, default=full) if own == target else full
    # A relative target lies just above the model's own loss: only that much can be left free.
    room = own - worst if own > config.prune.target else own
    return replace(config.prune, target=own, relative=False, goal=own - config.prune.headroom * room)


def _circuit(
    subject: Subject,
    task: Task,
    settings: PruneConfig,
    one: dict[str, Any],
    known: Sequence[Circuit],
    keep: Callable[[Circuit], object] | None,
) -> Circuit | None:
    """The pruned circuit; where none meets the target, None and the reason among the model's entries."""
    one["target"] = settings.target
    began = time.perf_counter()
    try:
        circuit = next((old for old in known if _is_wanted(old, subject, settings)), None)
        if circuit is None:
            circuit = prune(subject.model, task, subject.tokenizer, subject.means, settings, model_name=subject.name)
            if keep is not None:
                keep(circuit)
    except TargetError as error:
        one["reason"] = str(error)
        return None
    one["seconds"] = round(time.perf_counter() - began, 2)
    one["goal"] = circuit.provenance["goal"]
    one["label"] = circuit.provenance["label"]
    return circuit


def _is_wanted(known: Circuit, subject: Subject, settings: PruneConfig) -> bool:
    """Whether a circuit found earlier is of this model, met this target, and was searched for by these settings.

    One from before there was a setting was made by its default.
    """
    if known.model != subject.model.fingerprint():
        return False
    if settings.ablation == "mean" and known.means.data != subject.means.data:
        return False
    if not math.isclose(known.target, settings.target, rel_tol=1e-6):
        return False
    wanted, made = asdict(settings), {**asdict(PruneConfig()), **known.provenance["config"]}
    return all(made[name] == wanted[name] for name in wanted.keys() - FROM_TARGET)


def judge(
    subject: Subject, circuit: Circuit, batch: TaskBatch, config: CompareConfig, others: Mapping[str, TaskBatch]
) -> dict[str, Any]:
    """Sizes, sufficiency, necessity and specificity of one circuit on prompts that pruning never saw.

    `others` are prompts of other tasks that the model can do, by name: what losing the circuit does to them.
    """
    began = time.perf_counter()
    enough = sufficiency(subject.model, circuit, batch)
    corpus = subject.sample[:CORPUS_WINDOWS]
    needed = necessity(
        subject.model,
        circuit,
        batch,
        sets=config.random_sets,
        others=others or None,
        corpus=corpus,
        seed=config.prune.seed,
    )
    return {
        "loss_circuit": enough.value,
        "loss_calibrated": enough.details["loss_calibrated"],
        **circuit.counts(subject.model),
        "loss_without_circuit": needed.value,
        "loss_without_random_median": float(np.median(needed.control)),
        "damage": {name: value for name, value in needed.details.items() if name.startswith("damage")},
        "p_specific": needed.details.get("p_specific"),
        "meets_target": (enough.details["loss_calibrated"] if config.prune.calibrated else enough.value)
        <= circuit.target,
        "checks": {check.name: {"verdict": check.verdict, "reason": check.reason} for check in (enough, needed)},
        "seconds_checks": round(time.perf_counter() - began, 2),
    }

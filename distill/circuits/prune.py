"""Pruning: from a model and a task to a small circuit in one run [G 2.2, A.5].

The steps, each in the file that is named:

1. *Screen* (`attribution`): rank the nodes by gradients, and start near the smallest circuit that this ranking gives.
2. *Learn* (`search`) a mask per node (`estimators`): minimise what the circuit has to do (`objectives`) + the price of
   a node * (number of kept nodes). The price is fixed, as in the source, or is found on the way (`controllers`): it
   rises while the loss is under the target and falls while it is above, so that there is nothing to tune. Half-way
   nodes that are far from being needed are taken out, and the rest is learned on a module of the others (`standalone`).
3. *Discretise* (`selection`): rank the nodes by what was learned and find, on one fixed batch of validation prompts
   (`judge`), the smallest number of nodes that meets the goal: a grid first, as the loss is not monotone in the number
   kept, then bisection. From here on pruned channels do not compete for AbsTopK slots.
4. *Clean up* (`thinning`): remove further nodes, those first of which the gradient says that they matter least, in
   batches that grow while the goal is still met and halve where it is not, down to single nodes; then edges in the same
   way.
5. *Verify* on prompts that had no part in this, going back along the clean-up where it went too far.
6. *Calibrate*: fit scale and shift of the answers' logit difference on the validation prompts.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.circuits.ablation import Means, MeansMismatchError
from distill.circuits.answers import frozen, joined, take
from distill.circuits.circuit import Circuit
from distill.circuits.estimators import as_nodes
from distill.circuits.memory import out_of_memory
from distill.circuits.search import Found, Search, Spent
from distill.circuits.selection import TargetError
from distill.circuits.settings import RELATIVE, Goal, PruneConfig, goal_for, require, target_for
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.model.anatomy import anatomy
from distill.model.run import Runnable

LABEL_BETTER = "better than the model: not faithful"

__all__ = ["LABEL_BETTER", "RELATIVE", "PruneConfig", "Split", "prune", "prune_batches", "split_prompts", "target_for"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The prompts of one search."""

    train: TaskBatch
    """Masks are learned on these."""
    val: TaskBatch
    """These decide which nodes stay."""
    verify: TaskBatch | None = None
    """What is found is verified on these; none: it is not."""


def prune(
    model: Runnable,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    means: Means,
    config: PruneConfig,
    *,
    model_name: str = "",
    corpus: Int[Tensor, "n T"] | None = None,
) -> Circuit:
    """Finds a small circuit of `model` for `task` whose loss meets `config.target` [G 2.2, A.5].

    Learns on the task's training split, decides on its validation split; the test split is left for judging. `means`
    are the ablation values (`node_means`), `model_name` is for people, `corpus` the windows that resample draws from.
    The model's weights are left untouched. See `prune_batches` for what is raised.
    """
    split = split_prompts(task, tokenizer, config, context=model.context)
    return prune_batches(
        model,
        task.name,
        split.train,
        split.val,
        means,
        config,
        verify=split.verify,
        model_name=model_name,
        corpus=corpus,
    )


def split_prompts(
    task: Task, tokenizer: PreTrainedTokenizerBase, config: PruneConfig, *, context: int | None = None
) -> Split:
    """Prompts to learn on, to decide on and to verify on.

    Deciding and verifying take half of their pairs from the validation split and half, at most a sixth of all, from the
    training split: a circuit that is cut down on the templates of the validation split alone forgets those it was
    learned on, and does worse on further ones. The three share no pair.
    """
    wanted = config.val_pairs + config.verify_pairs
    train, val = (
        encode(task, tokenizer, split, min(pairs, task.size(split)), config.seed, context=context)
        for split, pairs in (("train", config.train_pairs + wanted), ("val", wanted))
    )
    pairs, held = len(train) // 2, len(val) // 2
    judging = max(1, min(config.val_pairs, held // 2 if held < wanted else config.val_pairs))
    moved = min(judging, pairs // 6)
    second = min(held - judging, config.verify_pairs, pairs // 6)
    rest = pairs - moved - second

    def of(batch: TaskBatch, start: int, stop: int) -> TaskBatch:
        return take(batch, torch.arange(start, stop))

    decide = joined(of(val, 0, judging), of(train, rest, rest + moved)) if moved else of(val, 0, judging)
    if second < 1:
        return Split(train=of(train, 0, rest), val=decide)
    check = joined(of(val, judging, judging + second), of(train, rest + moved, pairs))
    return Split(train=of(train, 0, rest), val=decide, verify=check)


def prune_batches(
    model: Runnable,
    task_name: str,
    train: TaskBatch,
    val: TaskBatch,
    means: Means,
    config: PruneConfig,
    *,
    verify: TaskBatch | None = None,
    model_name: str = "",
    corpus: Int[Tensor, "n T"] | None = None,
) -> Circuit:
    """`prune` on prompts that are encoded already.

    MeansMismatchError where `means` belong to another model; NonFiniteError naming the place where an activation is not
    finite; TargetError where nothing that was found meets the target, or, under the faithful objective, where the model
    itself does not; DeviceMemoryError, saying how many prompts fit; ValueError for an empty batch, and for
    `edge_clean_up` on a model whose edges cannot be cut one by one.
    """
    fingerprint = check_inputs(model, task_name, train, val, means)
    uncut = " and ".join(anatomy(model).uncut)
    require(not (uncut and config.edge_clean_up), "edge_clean_up", config.edge_clean_up,
            f"0, as the model has {uncut} and no single edge of it can be cut")  # fmt: skip
    clock = Clock(config.time_budget)
    with frozen(model), guarded(model, Split(train=train, val=val), means, config, corpus):
        search = Search(model, train, val, verify, means, config, corpus)
        target, goals = aims(search, config)
        if config.screen:
            search.screen(goals[0])
        clock.lap("screen")
        search.learn(goals[0], config.steps, clock.share(0.7))
        clock.lap("learn")
        found = search.find(goals, target, clock.share(1.0), clock.lap)
        return as_circuit(search, found, target, model_name, task_name, fingerprint, clock.seconds)


def guarded(
    model: Runnable, split: Split, means: Means, config: PruneConfig, corpus: Int[Tensor, "n T"] | None
) -> AbstractContextManager[None]:
    """Within it, running out of a device's memory is a DeviceMemoryError that says how many prompts fit."""

    def attempt(pairs: int) -> None:
        """One step of learning and one run of the judge with so many pairs at once."""
        few = replace(config, rows=2 * pairs, pairs=min(config.pairs, pairs), shrink=0.0)
        val = take(split.val, torch.arange(min(pairs, len(split.val) // 2)))
        trial = Search(model, split.train, val, None, means, few, corpus)
        trial.learn(Goal(task=config.target, faithful=trial.limit), 1)

    return out_of_memory(max(config.pairs, config.rows // 2), attempt)


def check_inputs(model: Runnable, task_name: str, train: TaskBatch, val: TaskBatch, means: Means) -> str:
    """The model's fingerprint; raises as `prune_batches`."""
    require(min(len(train), len(val)) > 0, "task", task_name, "tasks with at least one pair per split")
    fingerprint = model.fingerprint()
    if means.model != fingerprint:
        raise MeansMismatchError(f"means: measured on model {means.model[:12]}, but {fingerprint[:12]} is to be pruned")
    return fingerprint


def aims(search: Search, config: PruneConfig) -> tuple[float, list[Goal]]:
    """The target, and the goals to try for on validation prompts: with headroom, then without.

    TargetError for a target below the full model's own loss under the faithful objective, which asks for its answers.
    """
    full = search.judge.full()
    target = target_for(config, full)
    if config.objective == "faithful" and target < full:
        raise TargetError(
            f"target: {target:.4g} nats is below what the full model reaches, {full:.4g}; a circuit that is to be "
            f"faithful cannot do better: give {full:.4g} or more, a relative target, or the paper objective, which "
            "allows it"
        )
    losses = [goal_for(config, target, full), target]
    return target, [Goal(task=loss, faithful=search.limit) for loss in losses]


def as_circuit(
    search: Search,
    found: Found,
    target: float,
    model_name: str,
    task_name: str,
    fingerprint: str,
    seconds: dict[str, float],
) -> Circuit:
    """What a search found, with all that is reported with it."""
    judge, masks, config = search.judge, search.masks, search.config
    full = judge.full()
    empty = judge.task_alone(torch.zeros_like(found.kept))
    losses = {"full": full, "empty": empty} | judge.report(found.kept, found.edges)
    if search.second is not None:
        losses["verify"] = search.second.task_alone(found.kept, found.edges)
        if config.objective == "faithful":
            losses["verify_faithful"] = search.second.faithful(found.kept, found.edges)
    return Circuit(
        model=fingerprint,
        model_name=model_name,
        task=task_name,
        nodes=as_nodes(masks, found.kept),
        scores={location: score.cpu() for location, score in masks.spread(search.scores).items()},
        means=search.means.to("cpu"),
        calibration=judge.calibration(judge.difference(found.kept, found.edges)),
        losses=losses,
        target=target,
        kept_edges=found.edges,
        provenance={
            "config": asdict(config),
            "seed": config.seed,
            "goal": found.goal.task,
            "label": LABEL_BETTER if target < full else "",
            "ablation": {"mean": "mean", "task": "mean over the task"}.get(config.ablation, config.ablation)
            + (" per position" if search.means.per_position and config.ablation != "zero" else ""),
            "norms": "frozen" if config.freeze_norms else "free",
            "verified": found.verified,
            "nodes_before_clean_up": found.nodes_before,
            "validation_runs": judge.runs,
            "seconds": dict(seconds),
        },
    )


@dataclass
class Clock:
    """Seconds since the start, by stage, against a budget."""

    budget: float | None
    start: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def lap(self, stage: str) -> None:
        """Ends a stage: the seconds since the last one, to a hundredth."""
        now = time.monotonic()
        self.seconds[stage], self.last = round(self.seconds.get(stage, 0.0) + now - self.last, 2), now

    def share(self, part: float) -> Spent:
        """How much of `part` of the budget is spent; always 0 without a budget."""
        budget = self.budget
        return (lambda: 0.0) if budget is None else (lambda: (time.monotonic() - self.start) / (part * budget))

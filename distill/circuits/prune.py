"""Pruning: from a model and a task to a small circuit in one run [G 2.2, A.5].

In the order of the code:

1. *Screen*: rank the nodes by attribution, and start near the smallest circuit that this ranking gives.
2. *Learn* a mask per node: minimise task loss + coefficient * (number of kept nodes). The coefficient is fixed, as in
   the source, or is found on the way: the constraint controller raises the price of a node while the loss is under the
   target and lowers it while the loss is above, so that there is nothing to tune.
3. *Discretise*: rank the nodes by tau and find, on one fixed batch of validation prompts, the smallest number of
   nodes whose task loss meets the target: a grid first, as the loss is not monotone in the number kept, then bisection.
   From here on pruned channels do not compete for AbsTopK slots.
4. *Clean up*: remove further nodes, those first of which the gradient says that they matter least, in batches that grow
   while the target still holds and halve where it does not, down to single nodes.
5. *Calibrate*: fit scale and shift of the answers' logit difference on training prompts.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.circuits.ablation import Means, MeansMismatchError
from distill.circuits.answers import CHANCE, answer_difference, check_finite, frozen, joined, take, two_way_loss
from distill.circuits.attribution import attribute
from distill.circuits.circuit import Circuit
from distill.circuits.masks import MaskTap, NodeMasks, all_nodes
from distill.circuits.selection import Judge, as_nodes, clean_up, discretise, smallest
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.model.run import Runnable

OBJECTIVES = ("paper",)
CONTROLLERS = ("constraint", "coefficient")
RELATIVE = 0.83
"""Share of the way from chance to the full model that a circuit has to keep under a relative target."""
LABEL_BETTER = "better than the model: not faithful"


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a circuit is searched for [G A.5]; every value is checked when it is made."""

    target: float = 0.15
    """Task loss that the circuit has to meet, in nats per prompt (chance is 0.693)."""
    goal: float | None = None
    """Loss to be met on validation prompts, in nats; none: worked out of target and headroom."""
    headroom: float = 0.3
    """Share of the target that is left free on validation prompts, in [0, 1): prompts that pruning never saw are of
    other templates, on which a circuit that just meets the target misses it."""
    relative: bool = False
    """Take ln 2 - 0.83 (ln 2 - loss of the full model) as the target instead, for models out of reach of `target`."""
    objective: str = "paper"
    """What has to hold: paper (task loss with everything else ablated)."""
    controller: str = "constraint"
    """How a node is priced: constraint (the price follows the target) or coefficient (`k_coef`, as in the source)."""
    k_coef: float = 1e-4
    """Price of a node in nats: fixed under coefficient, the starting point under constraint."""
    price_rate: float = 0.1
    """Largest change of the logarithm of the price in one step, under constraint."""
    smoothing: float = 0.9
    """Decay of the running mean of the loss that the price follows, in [0, 1)."""
    steps: int = 120
    """Optimiser steps."""
    pairs: int = 8
    """Pairs of prompts per step; each pair is two prompts."""
    train_pairs: int = 256
    """Pairs of the training split to draw steps from."""
    val_pairs: int = 32
    """Pairs of the validation split that decide which nodes stay."""
    lr: float = 3e-2
    """Learning rate of tau at its peak; the source has 3e-3 and far more steps."""
    weight_decay: float = 1e-3
    """Weight decay of tau."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises; it falls linearly to 0 afterwards."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of tau."""
    screen: int = 8
    """Points of the attribution that chooses where learning starts; 0 starts with all nodes on, as the source."""
    start_room: float = 2.0
    """Nodes on at the start, as a multiple of the smallest screened circuit that meets the target."""
    start_spread: float = 0.3
    """tau of the first screened node at the start; it falls linearly along the ranking."""
    init_bias: float = 0.1
    """Mean of tau at the start without screening."""
    init_noise: float = 1e-2
    """Standard deviation of tau at the start without screening."""
    temperature: float = 1.0
    """Temperature of the surrogate gradient's sigmoid."""
    tie_qk: bool = True
    """Whether channel c of q and of k share one mask where the two are equally wide."""
    calibrated: bool = False
    """Whether the target is judged after calibration; both losses are reported either way."""
    margin: float = 1.0
    """Standard errors of the validation loss that have to fit under the target on top of the loss."""
    clean_up: int = 100
    """Most validation runs spent on removing nodes after discretising; 0 leaves the clean-up out."""
    time_budget: float | None = None
    """Seconds to stay within, by fewer steps and a shorter clean-up; results then depend on the machine's speed."""
    seed: int = 0
    """Seed of masks, prompts and their order."""

    def __post_init__(self) -> None:
        _require(self.objective in OBJECTIVES, "objective", self.objective, ", ".join(OBJECTIVES))
        _require(self.controller in CONTROLLERS, "controller", self.controller, ", ".join(CONTROLLERS))
        for name in ("target", "k_coef", "lr", "grad_clip", "temperature"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "numbers above 0")
        for name in ("price_rate", "weight_decay", "init_noise", "margin"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "0 and more")
        for name in ("headroom", "smoothing", "beta1", "beta2", "warmup"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "numbers in [0, 1)")
        for name in ("steps", "pairs", "train_pairs", "val_pairs"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 and more")
        for name in ("clean_up", "screen"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 and more")
        _require(self.start_room >= 1, "start_room", self.start_room, "1 and more")
        _require(0 < self.start_spread <= 1, "start_spread", self.start_spread, "numbers in (0, 1]")
        _require(-1 <= self.init_bias <= 1, "init_bias", self.init_bias, "numbers in [-1, 1]")
        goal = self.goal
        _require(goal is None or 0 < goal <= self.target, "goal", goal, "numbers above 0 up to target, or none")
        budget = self.time_budget
        _require(budget is None or budget > 0, "time_budget", budget, "numbers above 0, or none")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}")


def prune(
    model: Runnable,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    means: Means,
    config: PruneConfig,
    *,
    model_name: str = "",
) -> Circuit:
    """Finds a small circuit of `model` for `task` whose loss meets `config.target` [G 2.2, A.5].

    Learns and calibrates on the task's training split, decides on its validation split; the test split is left for
    judging. `means` are the ablation values (`node_means`), `model_name` is for people. The model's weights are left
    untouched. See `prune_batches` for what is raised.
    """
    train, val = (
        encode(task, tokenizer, split, min(pairs, task.size(split)), config.seed, context=model.context)
        for split, pairs in (("train", config.train_pairs + config.val_pairs), ("val", config.val_pairs))
    )
    train, val = hold_back(train, val)
    return prune_batches(model, task.name, train, val, means, config, model_name=model_name)


def hold_back(train: TaskBatch, val: TaskBatch) -> tuple[TaskBatch, TaskBatch]:
    """Moves as many pairs as `val` has, at most a third, from the end of the training to the validation prompts.

    A circuit that is cut down on the templates of the validation split alone forgets those it was learned on, and does
    worse on further ones.
    """
    pairs = len(train) // 2
    kept = torch.arange(pairs - min(len(val) // 2, pairs // 3))
    moved = torch.arange(len(kept), pairs)
    return take(train, kept), joined(val, take(train, moved))


def prune_batches(
    model: Runnable,
    task_name: str,
    train: TaskBatch,
    val: TaskBatch,
    means: Means,
    config: PruneConfig,
    *,
    model_name: str = "",
) -> Circuit:
    """`prune` on prompts that are encoded already.

    MeansMismatchError where `means` belong to another model; NonFiniteError naming the place where an activation is not
    finite; TargetError where nothing that was found meets the target; ValueError for an empty batch.
    """
    _require(min(len(train), len(val)) > 0, "task", task_name, "tasks with at least one pair per split")
    fingerprint = model.fingerprint()
    if means.model != fingerprint:
        raise MeansMismatchError(f"means: measured on model {means.model[:12]}, but {fingerprint[:12]} is to be pruned")
    clock = _Clock(config.time_budget)
    with frozen(model):
        check_finite(model, val)
        judge = Judge(model, means, train, val, calibrated=config.calibrated, margin=config.margin)
        full, empty = judge.loss(None), judge.loss(all_nodes(model.widths, keep=False))
        target = target_for(config, full)
        goal = goal_for(config, target, full)
        masks = new_masks(model, config)
        if config.screen:
            screen(masks, train, judge, config, goal)
        seconds = {"screen": clock.lap()}
        learn(model, train, means, config, goal, masks, clock.share(0.7))
        seconds["learn"] = clock.lap()
        kept, goal = discretise(masks, judge, (goal, target), full)
        kept_before = int(masks.count[kept].sum())
        seconds["discretise"] = clock.lap()
        kept = clean_up(masks, kept, judge, goal, config.clean_up, clock.share(1.0))
        seconds["clean_up"] = clock.lap()
        nodes = as_nodes(masks, kept)
        losses = {"full": full, "empty": empty} | judge.report(nodes)
        calibration = judge.calibration(nodes)
    return Circuit(
        model=fingerprint,
        model_name=model_name,
        task=task_name,
        nodes=nodes,
        scores={location: score.detach().cpu() for location, score in masks.spread(masks.tau).items()},
        means=means,
        calibration=calibration,
        losses=losses,
        target=target,
        provenance={
            "config": asdict(config),
            "seed": config.seed,
            "goal": goal,
            "label": LABEL_BETTER if target < full else "",
            "ablation": "mean per position" if means.per_position else "mean",
            "norms": "free",
            "nodes_before_clean_up": kept_before,
            "validation_runs": judge.runs,
            "seconds": seconds,
        },
    )


def target_for(config: PruneConfig, full: float) -> float:
    """The target in nats: `config.target`, or with `config.relative` ln 2 - 0.83 (ln 2 - full).

    ValueError for a relative target where the full model does no better than chance.
    """
    if not config.relative:
        return config.target
    _require(full < CHANCE, "relative", f"a full model at {full:.3f} nats", f"full models under chance, {CHANCE:.3f}")
    return CHANCE - RELATIVE * (CHANCE - full)


def goal_for(config: PruneConfig, target: float, full: float) -> float:
    """The loss in nats to be met on validation prompts: `config.goal`, or so much room under the target.

    The room is all of the target; under a relative one, which lies just above the full model's loss, what is between.
    """
    if config.goal is not None:
        return config.goal
    return target - config.headroom * (target - full if config.relative else target)


class Price:
    """Price of a node in nats: fixed, or following the target.

    Under constraint the objective is (number of nodes) + lambda * loss, and the price is 1 / lambda. Each step adds
    price_rate * clip(log(EMA(loss) / target), -1, 1) to log lambda.
    """

    def __init__(self, config: PruneConfig, target: float) -> None:
        self.config, self.target = config, target
        self.value = config.k_coef
        self.mean: float | None = None

    def update(self, loss: float) -> None:
        """Takes in the task loss of one step."""
        if self.config.controller == "coefficient":
            return
        decay = self.config.smoothing
        self.mean = loss if self.mean is None else decay * self.mean + (1 - decay) * loss
        excess = math.log(max(self.mean, 1e-12) / self.target)
        self.value *= math.exp(-self.config.price_rate * min(max(excess, -1.0), 1.0))


def new_masks(model: Runnable, config: PruneConfig) -> NodeMasks:
    """Masks at the source's start [G A.5]: all on, tau normal around `init_bias`."""
    return NodeMasks(
        model.widths,
        tie_qk=config.tie_qk,
        init_bias=config.init_bias,
        init_noise=config.init_noise,
        temperature=config.temperature,
        seed=config.seed,
    ).to(next(model.parameters()).device)


def screen(masks: NodeMasks, train: TaskBatch, judge: Judge, config: PruneConfig, target: float) -> None:
    """Starts the masks at `start_room` times the smallest circuit that attribution alone finds for the target."""
    order = _Order(len(train) // 2, config.pairs, config.seed)
    batches = [take(train, order.next()) for _ in range(config.screen)]
    scores = attribute(judge.model, batches, judge.means, masks)
    count, _ = smallest(masks, scores, judge, target, refine=False)
    on = len(scores) if count is None else min(len(scores), round(config.start_room * count))
    masks.start(scores, on, config.start_spread)


def learn(
    model: Runnable,
    train: TaskBatch,
    means: Means,
    config: PruneConfig,
    target: float,
    masks: NodeMasks,
    spent: Callable[[], float] = lambda: 0.0,
) -> None:
    """Learns the masks in place [G A.5]; pruned channels compete for AbsTopK slots here, as in the source.

    `spent` says which share of the time there is has passed; at 1 learning ends. Gradients to the weights should be
    off (`answers.frozen`). Without competition a dropped node would not know what it would be worth: its activation
    is zeroed before it is seen.
    """
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW([masks.tau], lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    price = Price(config, target)
    order = _Order(len(train) // 2, config.pairs, config.seed)
    means = means.to(masks.tau.device)
    for step in range(config.steps):
        progress = max(step / config.steps, spent())
        if progress >= 1:
            break
        optimizer.param_groups[0]["lr"] = config.lr * _rate(progress, config.warmup, 1 / config.steps)
        mask, count = masks()
        loss = two_way_loss(answer_difference(model, take(train, order.next()), MaskTap(mask, means, competition=True)))
        optimizer.zero_grad()
        (loss + price.value * count).backward()
        torch.nn.utils.clip_grad_norm_([masks.tau], config.grad_clip)
        optimizer.step()
        masks.clamp()
        price.update(float(loss.detach()))


def _rate(progress: float, warmup: float, step: float) -> float:
    """Share of the peak rate: up over `warmup`, then linearly down to 0 at the end."""
    if progress < warmup:
        return (progress + step) / (warmup + step)
    return (1 - progress) / (1 - warmup)


class _Order:
    """Pairs for one step after another: a shuffled pass over all of them, then another."""

    def __init__(self, total: int, batch: int, seed: int) -> None:
        self.total, self.batch = total, min(batch, total)
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.long)

    def next(self) -> Int[Tensor, "pairs"]:
        if len(self.left) < self.batch:
            self.left = torch.randperm(self.total, generator=self.generator)
        chosen, self.left = self.left[: self.batch], self.left[self.batch :]
        return chosen


@dataclass
class _Clock:
    """Seconds since the start, against a budget."""

    budget: float | None
    start: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def lap(self) -> float:
        """Seconds since the last call, to a hundredth."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return round(seconds, 2)

    def share(self, part: float) -> Callable[[], float]:
        """How much of `part` of the budget is spent; always 0 without a budget."""
        budget = self.budget
        return (lambda: 0.0) if budget is None else (lambda: (time.monotonic() - self.start) / (part * budget))

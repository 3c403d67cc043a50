"""How a circuit is searched for: every setting of pruning, with the goals that follow from them."""

import math
from dataclasses import dataclass

from distill.circuits.ablation import ABLATIONS
from distill.circuits.answers import CHANCE
from distill.command import no_type_check

OBJECTIVES = ("paper", "faithful")
CONTROLLERS = ("constraint", "coefficient", "lagrangian")
ESTIMATORS = ("heaviside", "hard_concrete", "attribution")
ATTRIBUTIONS = ("integrated", "gradient")
RELATIVE = 0.83
"""Share of the way from chance to the full model that a circuit has to keep under a relative target."""
PEAK_RATES = {"heaviside": 3e-2, "hard_concrete": 0.8, "attribution": 0.0}
"""Learning rates at their peak. The source has 3e-3 for heaviside and far more steps; 0.8 is Edge Pruning's."""


@no_type_check  # it checks its values itself, and says what is allowed
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
    """What has to hold: paper (task loss with everything else ablated), or faithful (that, and the answers of the model
    when what was pruned is restored in part)."""
    faithful_limit: float = 0.05
    """Under faithful: largest mean of the average and of the worst KL(model || circuit) on the two answers over partial
    restorations of what was pruned, in nats."""
    faithful_pairs: int = 16
    """Under faithful: pairs of validation prompts on which restorations are judged."""
    adversary_step: float = 0.1
    """Step of the gradient ascent towards the worst restoration, whose entries are in [0, 1]."""
    estimator: str = "heaviside"
    """How masks are learned: heaviside (0 or 1, with the gradient of a sigmoid), hard_concrete (random ones, as Edge
    Pruning), or attribution (not at all: nodes are ranked by gradients)."""
    attribution: str = "integrated"
    """Ranking by attribution: integrated (gradients at `screen` points between all nodes ablated and none), or gradient
    (gradient times activation difference, at the full model)."""
    controller: str = "constraint"
    """How a node is priced: constraint (the price follows the target), coefficient (`k_coef`, as in the source), or
    lagrangian (the price follows `density`, as in Edge Pruning)."""
    k_coef: float = 1e-4
    """Price of a node in nats: fixed under coefficient, the starting point under constraint."""
    density: float = 0.02
    """Share of nodes that lagrangian steers for, in (0, 1)."""
    price_rate: float = 0.03
    """Largest change of the logarithm of the price in one step, under constraint."""
    smoothing: float = 0.7
    """Decay of the running mean of the loss that the price follows, in [0, 1)."""
    ablation: str = "mean"
    """What other nodes are set to: mean (over the corpus), task (mean over the task's training prompts), resample (what
    they are at some token of the corpus), or zero."""
    freeze_norms: bool = False
    """Whether every norm keeps the scale that it has in the full model on the same prompt."""
    tie_qk: bool = True
    """Whether channel c of q and of k share one mask where the two are equally wide."""
    steps: int = 240
    """Optimiser steps."""
    shrink: float = 0.5
    """Share of the steps, in [0, 1), that come last and run a module of the nodes alone that are still in question; the
    others are out for good by then. Not under faithful, which brings them back, nor where ablation values differ from
    prompt to prompt."""
    candidates: float = 3.0
    """Nodes still in question then, as a multiple of the smallest circuit that meets the goal."""
    pairs: int = 8
    """Pairs of prompts per step; each pair is two prompts."""
    train_pairs: int = 256
    """Pairs of the training split to draw steps from."""
    val_pairs: int = 32
    """Pairs of the validation split that decide which nodes stay."""
    verify_pairs: int = 32
    """Further pairs of the validation split that a found circuit is verified on."""
    rows: int = 256
    """Prompts run at once when node sets are judged; changes memory and nothing else."""
    lr: float | None = None
    """Learning rate of tau at its peak; none: 0.03, or 0.8 under hard_concrete."""
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
    start_room: float = 4.0
    """Nodes on at the start, as a multiple of the smallest screened circuit that meets the target."""
    start_spread: float = 0.3
    """tau of the first screened node at the start; it falls linearly along the ranking."""
    init_bias: float = 0.1
    """Mean of tau at the start without screening."""
    init_noise: float = 1e-2
    """Standard deviation of tau at the start without screening."""
    temperature: float = 1.0
    """Temperature of the surrogate gradient's sigmoid."""
    calibrated: bool = False
    """Whether the target is judged after calibration; both losses are reported either way."""
    margin: float = 1.0
    """Standard errors of the validation loss that have to fit under the target on top of the loss."""
    clean_up: int = 400
    """Most validation runs spent on removing nodes after discretising; 0 leaves the clean-up out."""
    edge_clean_up: int = 400
    """Most validation runs spent on removing edges after that; 0 keeps every edge between kept nodes."""
    time_budget: float | None = None
    """Seconds to stay within, by fewer steps and a shorter clean-up; results then depend on the machine's speed."""
    seed: int = 0
    """Seed of masks, prompts and their order."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("controller", CONTROLLERS),
            ("estimator", ESTIMATORS),
            ("attribution", ATTRIBUTIONS),
            ("ablation", ABLATIONS),
        ):
            require(getattr(self, name) in allowed, name, getattr(self, name), ", ".join(allowed))
        for name in ("target", "k_coef", "grad_clip", "temperature", "faithful_limit", "adversary_step"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "numbers above 0")
        for name in ("price_rate", "weight_decay", "init_noise", "margin"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, value, "0 and more")
        for name in ("headroom", "smoothing", "beta1", "beta2", "warmup", "shrink"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "numbers in [0, 1)")
        for name in ("steps", "pairs", "train_pairs", "val_pairs", "verify_pairs", "faithful_pairs", "rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 and more")
        for name in ("clean_up", "edge_clean_up", "screen", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 and more")
        require(self.screen > 0 or self.estimator != "attribution", "screen", self.screen, "1 and more for attribution")
        for name in ("start_room", "candidates"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 and more")
        require(0 < self.start_spread <= 1, "start_spread", self.start_spread, "numbers in (0, 1]")
        require(0 < self.density < 1, "density", self.density, "numbers in (0, 1)")
        require(-1 <= self.init_bias <= 1, "init_bias", self.init_bias, "numbers in [-1, 1]")
        lr, goal, budget = self.lr, self.goal, self.time_budget
        require(lr is None or (math.isfinite(lr) and lr > 0), "lr", lr, "numbers above 0, or none")
        require(goal is None or 0 < goal <= self.target, "goal", goal, "numbers above 0 up to target, or none")
        require(budget is None or budget > 0, "time_budget", budget, "numbers above 0, or none")

    @property
    def rate(self) -> float:
        """Learning rate at its peak, where the default is worked out."""
        return PEAK_RATES[self.estimator] if self.lr is None else self.lr


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """ValueError naming the field, the value got, and what is allowed, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a circuit has to meet on prompts of a fixed batch."""

    task: float
    """Largest task loss, in nats per prompt."""
    faithful: float | None = None
    """Largest mean of average and worst KL under partial restoration, in nats; None where that is not asked."""


def target_for(config: PruneConfig, full: float) -> float:
    """The target in nats: `config.target`, or with `config.relative` ln 2 - 0.83 (ln 2 - full).

    ValueError for a relative target where the full model does no better than chance.
    """
    if not config.relative:
        return config.target
    require(full < CHANCE, "relative", f"a full model at {full:.3f} nats", f"full models under chance, {CHANCE:.3f}")
    return CHANCE - RELATIVE * (CHANCE - full)


def goal_for(config: PruneConfig, target: float, full: float) -> float:
    """The loss in nats to be met on validation prompts: `config.goal`, or so much room under the target.

    The room is all of the target; under a relative one, which lies just above the full model's loss, what is between.
    """
    if config.goal is not None:
        return config.goal
    return target - config.headroom * (target - full if config.relative else target)

"""Thresholds and sample sizes of the checks, in one place."""

from dataclasses import dataclass

from distill.command import no_type_check


@no_type_check
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the checks hold a circuit against, and how much they look at; every value is checked when it is made."""

    pairs: int = 64
    """Pairs of prompts, unseen by pruning, for checks of a few runs."""
    few_pairs: int = 16
    """Pairs for checks of hundreds of runs."""
    few_tokens: int = 640
    """Tokens that such a check runs at once, padding included: where prompts are long, pairs go, down to 8."""
    control_pairs: int = 8
    """Pairs for checks that run dozens of random node sets through the whole model."""
    tail_ratio: float = 10.0
    """Sufficiency: largest ratio of the 95th percentile to the median of KL(model || circuit) on the answers."""
    tail_floor: float = 1e-3
    """Sufficiency: 95th percentile of that KL, in nats, below which it is rounding and no tail."""
    ablation_ratio: float = 2.0
    """Ablations: loss under another ablation, as a multiple of the target."""
    random_circuits: int = 40
    """Ablations: random circuits that the circuit is read against; half as many for adversarial and completeness."""
    better: float = 10.0
    """Ablations, adversarial: percentile of the random circuits' losses that a circuit has to stay below."""
    curve_most: float = 1.1
    """Curve: largest share of the model's logit difference."""
    curve_shares: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Curve: sizes, as shares of the model's edges."""
    curve_edges: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10000)
    """Curve: sizes, in edges."""
    sets: int = 100
    """Necessity: random node sets."""
    percentile: float = 90.0
    """Necessity: percentile of the random sets' losses that the circuit's has to reach."""
    bins: int = 10
    """Bins of activity within which random nodes are matched."""
    other_tasks: int = 4
    """Necessity: other tasks that specificity is judged on, at most."""
    draws: int = 32
    """Stochastic: draws of restored nodes for each share."""
    draw_pairs: int = 2
    """Stochastic: pairs of prompts that one draw is run on; all get their turn."""
    shares: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    """Stochastic: shares of the pruned nodes that are restored."""
    stochastic_ratio: float = 2.0
    """Stochastic: largest loss over the shares, as a multiple of that at both ends."""
    stochastic_floor: float = 0.05
    """Stochastic: loss in nats at which that ratio starts."""
    ascent_steps: int = 20
    """Adversarial: steps of gradient ascent."""
    ascent_step: float = 0.1
    """Adversarial: length of a step."""
    role_correlation: float = 0.5
    """Role: correlation below which a node has another role in the circuit."""
    role_constant: float = 0.05
    """Role: spread on the task, in standard deviations on the corpus, below which a node is constant."""
    role_shift: float = 1.0
    """Role: largest shift of a constant node's mean, in standard deviations on the corpus."""
    role_share: float = 0.1
    """Role: largest share of such nodes, by effect."""
    uniform: float = 0.1
    """Role: Jensen-Shannon distance from uniform attention below which a head is uniform (at most 0.83)."""
    sharp: float = 0.2
    """Role: that distance above which a head is not uniform."""
    head_share: float = 0.01
    """Role: share of all effect that passes through a head from which on the head counts."""
    interchange_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Role: shares of the circuit's nodes that take the model's values."""
    interchange_draws: int = 4
    """Role: draws for each share."""
    subsets: int = 50
    """Completeness: random subsets of the circuit."""
    incomplete: float = 0.2
    """Completeness: largest difference that taking a subset out makes, as a share of the model's logit difference."""
    worst_steps: int = 8
    """Completeness: nodes that the worst subset grows to, one a step."""
    no_effect: float = 0.01
    """Minimality: change of the loss, as a share of the target, below which a node or edge has no effect."""
    single_nodes: int = 128
    """Minimality: nodes left out one at a time, at most."""
    single_edges: int = 64
    """Minimality: edges left out one at a time, at most."""
    control_suspicious: float = 5.0
    """Controls: edges of a control's circuit over those of the circuit, below which the circuit is suspicious."""
    control_artefact: float = 2.0
    """Controls: the same ratio, below which the circuit is an artefact."""
    seeds: int = 5
    """Stability: seeds, the circuit's own one included."""
    overlap: float = 0.3
    """Stability: Jaccard index of nodes below which the seeds' circuits are different ones."""
    transfer_ratio: float = 2.0
    """Stability: loss on another seed's prompts, as a multiple of the target."""
    agreement: float = 0.9
    """Shift: smallest share of shifted prompts on which circuit and model answer alike."""

    def __post_init__(self) -> None:
        counts = ("pairs", "few_pairs", "few_tokens", "control_pairs", "random_circuits", "sets", "bins", "draws",
                  "draw_pairs", "ascent_steps", "subsets", "interchange_draws", "single_nodes", "single_edges",
                  "worst_steps")  # fmt: skip
        for name in counts:
            self._require(getattr(self, name) >= 1, name, "1 and more")
        self._require(self.seeds >= 2, "seeds", "2 and more")
        self._require(self.other_tasks >= 0, "other_tasks", "0 and more")
        for name in ("tail_ratio", "tail_floor", "ablation_ratio", "curve_most", "stochastic_ratio", "no_effect",
                     "stochastic_floor", "ascent_step", "transfer_ratio", "control_artefact", "role_constant",
                     "role_shift"):  # fmt: skip
            self._require(0 <= getattr(self, name) < float("inf"), name, "finite numbers, 0 and more")
        for name in ("better", "percentile"):
            self._require(0 <= getattr(self, name) <= 100, name, "percentiles, 0 to 100")
        self._require(-1 <= self.role_correlation <= 1, "role_correlation", "correlations, -1 to 1")
        for name in ("role_share", "head_share", "agreement", "overlap", "incomplete"):
            self._require(0 <= getattr(self, name) <= 1, name, "shares, 0 to 1")
        for name in ("shares", "curve_shares", "interchange_shares"):
            values = getattr(self, name)
            self._require(bool(values) and all(0 <= value <= 1 for value in values), name, "shares, 0 to 1")
        self._require({0.0, 1.0} <= set(self.shares), "shares", "lists with both ends, 0 and 1")
        self._require(all(edges >= 1 for edges in self.curve_edges), "curve_edges", "1 and more")
        least = self.control_artefact
        self._require(self.control_suspicious >= least, "control_suspicious", f"control_artefact ({least}) and more")
        self._require(self.sharp >= self.uniform >= 0, "sharp", f"uniform ({self.uniform}) and more")

    def _require(self, holds: bool, name: str, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed are {allowed}")

"""Same role: do nodes and attention heads do in the circuit what they do in the model?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit, names_of
from distill.circuits.faithfulness.check import Check, skipped, verdict_of
from distill.circuits.faithfulness.effects import node_effects
from distill.circuits.faithfulness.heads import Heads, compare_heads
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import Tap, chain

TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Roles:
    """How each of N nodes behaves in the circuit against the model."""

    correlation: Float[Tensor, "N"]
    """Over tokens; 0 where one of the two does not vary, NaN for constant nodes."""
    unexplained: Float[Tensor, "N"]
    """Sum of squared differences over the sum of squared deviations from the mean in the model; NaN for constants."""
    shift: Float[Tensor, "N"]
    """Change of the mean, in standard deviations on the corpus."""
    constant: Bool[Tensor, "N"]
    """Whether the node hardly varies on the task in the model."""
    changed: Bool[Tensor, "N"]
    """Whether the role is another one."""


def role(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    corpus: Int[Tensor, "n T1"],
    *,
    seed: int = 0,
    limits: Limits | None = None,
    runs: Runs | None = None,
) -> Check:
    """The share of the circuit's nodes, weighted by effect, that have another role in it than in the model.

        value = sum of |effect_i| over changed nodes / sum of |effect_i| over all,  effects as in `node_effects`

    A node is changed (`compare_nodes`) where its activation over the prompts' tokens correlates by less than
    `role_correlation`, or its sign flips; one that is constant on the task, where its mean shifts, in standard
    deviations on `corpus`. A head is compared by its attention (`compare_heads`), at the queries that the answer rests
    on. Interchange, in the details: the task loss when a random share of the circuit's nodes takes the values it has in
    the model on the same prompt, mean over draws. Flagged where the value exceeds `role_share`, and where a head with
    at least `head_share` of all effect is uniform in the circuit and not in the model; skipped where no node has any
    effect. CircuitMismatchError for a circuit of another model.
    """
    limits, runs = limits or Limits(), runs or Runs(model, circuit)
    names = names_of(circuit.nodes)
    effects = node_effects(runs, batch, circuit.nodes)
    weight = torch.cat([effects[location][mask].abs() for location, mask in circuit.nodes.items()]).double()
    if float(weight.sum()) <= TINY:
        return skipped("role", f"none of its {len(names)} nodes has an effect on the answer", n=len(batch))
    tokens = (torch.arange(batch.tokens.shape[1]) <= batch.last.cpu()[:, None]).flatten()
    with torch.no_grad():
        theirs, ours = (_columns(runs, batch.tokens, tap) for tap in (None, runs.tap()))
        text = _columns(runs, corpus[:, :-1], None).flatten(0, 1)
    spread = (text - text.mean(0)).square().mean(0).sqrt()
    roles = compare_nodes(ours.flatten(0, 1)[tokens], theirs.flatten(0, 1)[tokens], spread, limits)
    share = float((weight * roles.changed).sum() / weight.sum())
    heads = compare_heads(runs, batch)
    with torch.no_grad():
        interchanged = _interchange(runs, batch, theirs, limits, seed)
    carried = _carried(runs, effects)
    gone = _gone_uniform(heads, carried, limits)
    complaints = []
    if share > limits.role_share:
        worst = names[int((weight * roles.changed).argmax())]
        complaints.append(f"nodes with {share:.0%} of the effect have another role in it than in the model ({worst})")
    if gone:
        complaints.append(f"head {', '.join(gone)} attends evenly in it and not in the model")
    praise = f"nodes with {1 - share:.0%} of the effect keep their role, and no head goes uniform"
    verdict, reason = verdict_of(complaints, praise)
    return Check(
        name="role",
        value=share,
        threshold=limits.role_share,
        verdict=verdict,
        reason=reason,
        n=len(batch),
        seed=seed,
        details={
            "changed_nodes": float(roles.changed.double().mean()),
            "constant_nodes": float(roles.constant.double().mean()),
            "correlation_median": _median(roles.correlation),
            "unexplained_median": _median(roles.unexplained),
            "shift_median": _median(roles.shift[roles.constant]),
            **{
                f"head_{name}": float(heads.distance[place])
                for place, name in enumerate(heads.names)
                if carried[place] > 0
            },
            **interchanged,
        },
    )


def compare_nodes(
    circuit: Float[Tensor, "tokens N"], model: Float[Tensor, "tokens N"], spread: Float[Tensor, "N"], limits: Limits
) -> Roles:
    """Roles from the activations of N nodes in circuit and model on the same tokens; `spread` is that on the corpus.

        correlation = cov(c, m) / (sd(c) sd(m)),  unexplained = sum (c - m)^2 / sum (m - mean m)^2
        shift       = |mean c - mean m| / spread

    Changed: correlation below `role_correlation` or sum c m < 0 (the sign flips); of a constant node (sd(m) at most
    `role_constant` spreads) shift above `role_shift`. A node without any spread shifts as soon as its mean moves.
    """
    c, m, spread = circuit.double(), model.double(), spread.double()
    deviation, centred = c - c.mean(0), m - m.mean(0)
    var_c, var_m = deviation.square().mean(0), centred.square().mean(0)
    # What rounding leaves is no variation.
    level = 1e-6 * torch.maximum(c.abs().mean(0), m.abs().mean(0)) + TINY
    constant = var_m.sqrt() <= torch.maximum(limits.role_constant * spread, level)
    moves = (var_c.sqrt() > level) & (var_m.sqrt() > level)
    covariance = (deviation * centred).mean(0)
    correlation = torch.where(moves, covariance / (var_c * var_m).sqrt().clamp_min(TINY**2), 0.0)
    flipped = (c * m).sum(0) < 0
    shift = (c.mean(0) - m.mean(0)).abs()
    shift = torch.where(shift <= level, 0.0, shift / spread.clamp_min(TINY))
    changed = torch.where(constant, shift > limits.role_shift, (correlation < limits.role_correlation) | flipped)
    unknown = torch.full_like(correlation, torch.nan)
    return Roles(
        correlation=torch.where(constant, unknown, correlation),
        unexplained=torch.where(constant, unknown, (c - m).square().mean(0) / var_m.clamp_min(TINY)),
        shift=shift,
        constant=constant,
        changed=changed,
    )


def _carried(runs: Runs, effects: Mapping[str, Tensor]) -> Float[Tensor, "heads"]:
    """Share of all effect that passes through the values of each head; with grouped queries heads share values."""
    total = sum(float(effect.abs().sum()) for effect in effects.values())
    width, heads = runs.model.d_head, runs.model.n_head
    values = [effects[f"{layer}.attn.v"].abs().view(-1, width).sum(1) for layer in range(runs.model.n_layer)]
    return torch.cat([value.repeat_interleave(heads // len(value)) for value in values]) / max(total, TINY)


def _gone_uniform(heads: Heads, carried: Float[Tensor, "heads"], limits: Limits) -> list[str]:
    """Heads that carry effect through their values and are uniform in the circuit only."""
    gone = (carried >= limits.head_share) & (carried > 0)
    gone &= (heads.uniform_circuit < limits.uniform) & (heads.uniform_model > limits.sharp)
    return [name for name, one in zip(heads.names, gone.tolist(), strict=True) if one]


def _median(values: Float[Tensor, "n"]) -> float:
    return float(values.nanmedian()) if len(values) else float("nan")


class _Columns:
    """A tap that keeps the activations of a circuit's nodes."""

    def __init__(self, nodes: Mapping[str, Tensor]) -> None:
        self.index = {location: mask.nonzero()[:, 0] for location, mask in nodes.items() if bool(mask.any())}
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.index:
            self.values[site] = x[..., self.index[site].to(x.device)].cpu()
        return x


def _columns(runs: Runs, tokens: Int[Tensor, "B T"], tap: Tap | None) -> Float[Tensor, "B T N"]:
    """Activations of the circuit's nodes, in the order of the run, in the model or under a tap."""
    keep = _Columns(runs.circuit.nodes)
    runs.model.run(tokens.to(runs.device), tap=keep if tap is None else chain(tap, keep), stop="final_resid")
    found = [keep.values[location].float() for location in keep.index]
    return torch.cat(found, -1) if found else torch.zeros(*tokens.shape, 0)


def _interchange(
    runs: Runs, batch: TaskBatch, theirs: Float[Tensor, "B T N"], limits: Limits, seed: int
) -> dict[str, float]:
    index = _Columns(runs.circuit.nodes).index
    parts = dict(zip(index, theirs.split([len(channels) for channels in index.values()], -1), strict=True))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for share in limits.interchange_shares:
        losses = []
        for _ in range(limits.interchange_draws if share < 1 else 1):
            chosen = {location: torch.rand(len(index[location]), generator=generator) < share for location in index}
            tap = chain(runs.tap(), _Interchange(index, parts, chosen))
            losses.append(float(two_way_loss(runs.difference(batch, runs.logits(batch, tap)))))
        found[f"interchange_{share:g}"] = sum(losses) / len(losses)
    return found


class _Interchange:
    """A tap that gives some nodes the values they had in another run."""

    def __init__(self, index: Mapping[str, Tensor], values: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> None:
        self.channels = {location: index[location][chosen[location]] for location in index}
        self.values = {location: values[location][..., chosen[location]] for location in index}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site not in self.channels:
            return x
        x = x.clone()
        x[..., self.channels[site].to(x.device)] = self.values[site].to(x)
        return x

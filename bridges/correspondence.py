"""Which parts of a dense model's circuit answer to which parts of its student's (METHODS 6.5, **ours**).

1. `subspace_overlap`: the channels of the residual stream that carry the dense circuit, against the images of those
   that carry the student's. The dense basis is largely arbitrary, so an overlap at chance disproves nothing.
2. `causal_map`: how much f_i(h_d)_c, what the bridge makes of the dense stream behind a sublayer, changes when a head
   or a neuron of that sublayer is ablated: which dense parts do what a channel of the student stands for.
3. `node_links`: both, for single nodes, as a page draws them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.maps import Bridges
from bridges.metrics import evaluating
from bridges.subspace import bridged_subspace, live_channels, recorded_streams
from distill.circuits.ablation import Means
from distill.circuits.circuit import names_of
from distill.circuits.masks import MaskTap, Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import node_name, residual_sites, split_node

DECODED, CAUSED = "decoder: moves the same stream", "ablation: moves what the encoder reads"
"""Kinds of links between nodes."""
LINKS = 200
"""Links of each kind that a page gets, the strongest."""
WEAKEST = 0.05
"""Strength below which there is no link."""


def overlap(one: Float[Tensor, "D p"], other: Float[Tensor, "D q"]) -> float | None:
    """(|A^T B|_F^2 - pq/D) / (min(p, q) - pq/D) for orthonormal bases: 1 where one holds the other, 0 at chance.

    None where p + q >= D, as two such subspaces meet in any case, and where one has no dimension.
    """
    width, p, q = len(one), one.shape[1], other.shape[1]
    if p + q >= width or not p * q:
        return None
    chance = p * q / width
    return (float((one.double().T @ other.double()).square().sum()) - chance) / (min(p, q) - chance)


def subspace_overlap(dense: Nodes, student: Nodes, bridges: Bridges) -> dict[str, float | None]:
    """`overlap` by residual site, of the dense circuit's live channels and the images of the student's."""
    shape = bridges.shape
    return live_overlap(dense, live_channels(student, n_layer=shape.n_layer, d_model=shape.d_sparse), bridges)


def live_overlap(dense: Nodes, live: Mapping[str, Bool[Tensor, " S"]], bridges: Bridges) -> dict[str, float | None]:
    """`subspace_overlap` with the student's live channels given, by site."""
    shape = bridges.shape
    theirs = live_channels(dense, n_layer=shape.n_layer, d_model=shape.d_dense)
    ours = bridged_subspace(bridges, live)
    unit = torch.eye(shape.d_dense)
    return {site: overlap(unit[:, mask.cpu()], ours[site].cpu()) for site, mask in theirs.items()}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of one sublayer that is ablated as one: a neuron, a head, a value channel."""

    name: str
    """`1.mlp.post_act.7`, or `1.attn.head.3`."""
    location: str
    """Where its nodes are: `{i}.mlp.post_act` or `{i}.attn.v`."""
    channels: tuple[int, ...]
    """Its nodes there."""

    @property
    def before(self) -> str:
        """The residual site that its sublayer reads."""
        layer, _, rest = self.location.partition(".")
        return f"{layer}.resid_in" if rest.startswith("attn") else f"{layer}.resid_mid"

    def after(self, n_layer: int) -> str:
        """The residual site behind its sublayer."""
        sites = residual_sites(n_layer)
        return sites[sites.index(self.before) + 1]


def heads_and_neurons(model: Runnable) -> list[Unit]:
    """Every head (its values) and every neuron of a model, in the order of the run."""
    found = []
    for layer in range(model.n_layer):
        values, neurons = f"{layer}.attn.v", f"{layer}.mlp.post_act"
        for head in range(model.widths[values] // model.d_head):
            channels = tuple(range(head * model.d_head, (head + 1) * model.d_head))
            found.append(Unit(name=f"{layer}.attn.head.{head}", location=values, channels=channels))
        found += [
            Unit(name=node_name(neurons, c), location=neurons, channels=(c,)) for c in range(model.widths[neurons])
        ]
    return found


def units_of(nodes: Nodes) -> list[Unit]:
    """The kept neurons and value channels of a circuit, one unit each."""
    places = [split_node(name) for name in names_of(nodes)]
    return [
        Unit(name=node_name(location, channel), location=location, channels=(channel,))
        for location, channel in places
        if location.endswith(("mlp.post_act", "attn.v"))
    ]


@torch.no_grad()
def causal_map(
    dense: Runnable, bridges: Bridges, batch: TaskBatch, means: Means, units: Iterable[Unit]
) -> Float[Tensor, "units S"]:
    """For each unit the change of f_i(h_d)_c behind its sublayer when it alone is ablated, for each channel c.

    Root mean square over the prompts' tokens, in standard deviations of f_i(h_d)_c over the same tokens; 0 for
    channels that do not vary. Everything before the sublayer is as in the model.

    Arguments:
        means: ablation values of the dense model.
    """
    device = next(dense.parameters()).device
    batch, means = batch.to(device), means.to(device)
    seen = torch.arange(batch.tokens.shape[1], device=device) <= batch.last[:, None]
    encoded: dict[str, tuple[Tensor, Tensor]] = {}
    found = []
    with evaluating(dense):
        streams = recorded_streams(dense, batch)
        for unit in units:
            after = unit.after(dense.n_layer)
            if after not in encoded:
                code = bridges.encode(after, streams[after])[seen]
                encoded[after] = code, code.std(0)
            mask = torch.ones(dense.widths[unit.location], device=device)
            mask[list(unit.channels)] = 0
            tap = MaskTap({unit.location: mask}, means)
            start = streams[unit.before]
            changed = dense.run(batch.tokens, tap=tap, start=unit.before, residual=start, stop=after)
            code, deviation = encoded[after]
            size = (bridges.encode(after, changed)[seen] - code).square().mean(0).sqrt()
            found.append(torch.where(deviation > 1e-9, size / deviation.clamp_min(1e-9), 0.0).cpu())
    return torch.stack(found) if found else torch.empty(0, bridges.shape.d_sparse)


@torch.no_grad()
def decoder_strength(
    bridges: Bridges, site: str, h_d: Float[Tensor, "*rows D"], h_s: Float[Tensor, "*rows S"]
) -> Float[Tensor, "D S"]:
    """G_i[d, c] sd(h_s,c) / sd(h_d,d): standard deviations of dense channel d that one of channel c is worth."""
    dense, student = (x.reshape(-1, x.shape[-1]).float().std(0) for x in (h_d, h_s))
    strength = bridges.decoder_matrix(site) * student / dense.clamp_min(1e-9)[:, None]
    return torch.where(dense[:, None] > 1e-9, strength, 0.0).cpu()


def node_links(
    dense: Runnable,
    student: Runnable,
    bridges: Bridges,
    batch: TaskBatch,
    means: Means,
    circuits: tuple[Mapping[str, Bool[Tensor, "width"]], Mapping[str, Bool[Tensor, "width"]]],
) -> list[dict[str, Any]]:
    """Links between the nodes of a dense model's circuit (the left one) and of its student's (the right one).

    A write or read of the dense model is linked with one of the student's at the same sublayer by the decoder there
    (`decoder_strength`); a neuron or value channel of the dense model with the student's writes of the same sublayer
    by `causal_map`. Strengths are cut to -1 to 1; those below 0.05 are left out, the 200 largest of each kind stay.

    Arguments:
        batch: prompts of the task, which both tokenize alike.
        means: ablation values of the dense model.
        circuits: kept nodes of both, the dense one's first.

    Returns entries for `distill.circuits.viewer.render`, with places in the order of `names_of`.
    """
    theirs, ours = ({name: place for place, name in enumerate(names_of(dict(nodes)))} for nodes in circuits)
    sites = residual_sites(dense.n_layer)
    with evaluating(dense, student), torch.no_grad():
        streams = recorded_streams(dense, batch), recorded_streams(student, batch)
    decoded: list[tuple[int, int, float]] = []
    for index in range(2 * dense.n_layer):
        sublayer = f"{index // 2}.{('attn', 'mlp')[index % 2]}"
        for kind, site in (("act_in", sites[index]), ("resid_delta", sites[index + 1])):
            strength = decoder_strength(bridges, site, streams[0][site], streams[1][site])
            decoded += _pairs(f"{sublayer}.{kind}", f"{sublayer}.{kind}", theirs, ours, strength)
    caused: list[tuple[int, int, float]] = []
    units = units_of(dict(circuits[0]))
    for unit, row in zip(units, causal_map(dense, bridges, batch, means, units), strict=True):
        written = unit.location.rpartition(".")[0] + ".resid_delta"
        one_row = torch.zeros(dense.widths[unit.location], len(row))
        one_row[unit.channels[0]] = row
        caused += _pairs(unit.location, written, {unit.name: theirs[unit.name]}, ours, one_row)
    return [
        {"left": 0, "right": 1, "kind": kind, "pairs": _strongest(pairs)}
        for kind, pairs in ((DECODED, decoded), (CAUSED, caused))
    ]


def _pairs(
    location: str, other: str, theirs: Mapping[str, int], ours: Mapping[str, int], strength: Float[Tensor, "left right"]
) -> list[tuple[int, int, float]]:
    """Links between all kept nodes at two locations; read-only position channels stand behind the stream's."""
    left, right = (
        [(place, split_node(name)[1]) for name, place in side.items() if split_node(name)[0] == where]
        for side, where in ((theirs, location), (ours, other))
    )
    return [
        (mine, yours, float(strength[c, d]))
        for mine, c in left
        for yours, d in right
        if c < strength.shape[0] and d < strength.shape[1]
    ]


def _strongest(pairs: list[tuple[int, int, float]]) -> list[list[float | int]]:
    kept = sorted((pair for pair in pairs if abs(pair[2]) >= WEAKEST), key=lambda pair: -abs(pair[2]))[:LINKS]
    return [[mine, yours, round(max(-1.0, min(1.0, value)), 3)] for mine, yours, value in kept]

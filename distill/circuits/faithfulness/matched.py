"""Random node sets like a circuit: as many nodes at every location, and as active ones.

The baseline of every check that reads a circuit against chance. A circuit of busy nodes does damage whatever they do,
so a random set is drawn within bins of mean |activation|.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.masks import Nodes

BINS = 10


def random_circuits(circuit: Circuit, sets: int, limits: Limits, generator: torch.Generator) -> list[Nodes]:
    """The battery that a check reads a circuit against: `random_sets` like its nodes."""
    return random_sets(circuit.nodes, circuit.means, sets, generator, bins=limits.bins)


def random_nodes(
    nodes: Mapping[str, Bool[Tensor, "width"]], means: Means, generator: torch.Generator, *, bins: int = BINS
) -> Nodes:
    """One set of `random_sets`."""
    return random_sets(nodes, means, 1, generator, bins=bins)[0]


def random_sets(
    nodes: Mapping[str, Bool[Tensor, "width"]],
    means: Means,
    sets: int,
    generator: torch.Generator,
    *,
    bins: int = BINS,
) -> list[Nodes]:
    """`sets` random node sets, each with as many nodes as `nodes` at every location and in every bin of activity.

    Bins hold equally many nodes of the location; there are `bins` of them, or so many fewer that no bin is drawn by
    more than half. Nodes outside `nodes` are drawn first; what these cannot fill is taken from `nodes` itself. Where
    q and k of a layer have the same channels, so have the draws: a channel of q does nothing without its k.
    """
    drawn: dict[str, Tensor] = {}
    for location, mask in nodes.items():
        query = location.removesuffix(".k") + ".q"
        if location.endswith(".attn.k") and query in drawn and torch.equal(mask, nodes[query]):
            drawn[location] = drawn[query]
        else:
            drawn[location] = _draw(mask.cpu(), means.magnitude[location].cpu(), sets, generator, bins)
    return [{location: masks[row] for location, masks in drawn.items()} for row in range(sets)]


def _draw(
    mask: Bool[Tensor, "width"], activity: Float[Tensor, "width"], sets: int, generator: torch.Generator, bins: int
) -> Bool[Tensor, "sets width"]:
    drawn = torch.zeros(sets, len(mask), dtype=torch.bool)
    if not bool(mask.any()):
        return drawn
    for members in _open_bins(activity, mask, bins):
        inside = mask[members]
        if count := int(inside.sum()):
            luck = torch.rand(sets, len(members), generator=generator) + inside
            drawn.scatter_(1, members[luck.argsort(1)[:, :count]], True)
    return drawn


def _open_bins(activity: Tensor, mask: Tensor, bins: int) -> list[Tensor]:
    """As many bins, up to `bins`, as leave a choice in each: a bin of one node would only give that node back."""
    found = activity_bins(activity, bins)
    while bins > 1 and any(2 * int(mask[members].sum()) > len(members) for members in found):
        bins //= 2
        found = activity_bins(activity, bins)
    return found


def activity_bins(activity: Float[Tensor, "width"], bins: int) -> list[Tensor]:
    """Channel indices in `bins` groups of equal size, from the least to the most active."""
    order = torch.argsort(activity, stable=True)
    return [part for part in torch.tensor_split(order, bins) if len(part)]

"""Necessity: is the task lost when just the circuit is taken out of the model?

A circuit of busy nodes does damage whatever they do, so the damage is read against random node sets of the same size
at every location and of the same activity.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.answers import answer_difference, calibrate, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness import Check
from distill.circuits.masks import MaskTap, Nodes
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable

PERCENTILE = 90.0
BINS = 10


@torch.no_grad()
def necessity(
    model: Runnable,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    sets: int = 20,
    percentile: float = PERCENTILE,
    bins: int = BINS,
    seed: int = 0,
) -> Check:
    """The task loss L(M without C) in nats per prompt, the circuit's nodes ablated and everything else running.

        L(M without C) = min over s >= 0 of mean log(1 + exp(-s d)),  d = right minus wrong logit of M without C

    The refitted scale s keeps a mere loss of contrast from counting as damage; the loss is in [0, ln 2]. Controls are
    `sets` random node sets (100 for a judgement to print, 20 for a quick one) drawn by `random_nodes`, scored alike.
    Flagged where the loss is below the `percentile` of the controls. `batch` holds prompts that pruning never saw.
    CircuitMismatchError for a circuit of another model; ValueError for fewer than one set.
    """
    circuit.check(model)
    if sets < 1:
        raise ValueError(f"sets: got {sets}; allowed are 1 and more")
    generator = torch.Generator().manual_seed(seed)
    value, scale = loss_without(model, circuit.nodes, circuit.means, batch)
    control = [
        loss_without(model, random_nodes(circuit.nodes, circuit.means, generator, bins=bins), circuit.means, batch)[0]
        for _ in range(sets)
    ]
    threshold = float(torch.quantile(torch.tensor(control, dtype=torch.float64), percentile / 100))
    flagged = value < threshold
    reason = (
        f"without the circuit the loss is {value:.3g}, the random sets' {percentile:.0f}th percentile {threshold:.3g}"
    )
    return Check(
        name="necessity",
        value=value,
        control=tuple(control),
        threshold=threshold,
        verdict="flag" if flagged else "pass",
        reason=reason + (": the model does as well without it" if flagged else ""),
        n=len(batch),
        seed=seed,
        details={"scale": scale, "share_of_random_below": sum(loss < value for loss in control) / sets},
    )


@torch.no_grad()
def loss_without(
    model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]], means: Means, batch: TaskBatch
) -> tuple[float, float]:
    """Task loss in nats per prompt with only `nodes` ablated, at the best scale >= 0, and that scale.

    The scale is fitted on the same prompts, for the circuit and its controls alike: it can only make the loss smaller.
    """
    tap = MaskTap({location: ~mask for location, mask in nodes.items()}, means)
    difference = answer_difference(model, batch, tap).double().cpu()
    fitted = calibrate(difference, torch.zeros_like(difference), shift=False)
    return float(two_way_loss(fitted.scale * difference)), fitted.scale


def random_nodes(
    nodes: Mapping[str, Bool[Tensor, "width"]], means: Means, generator: torch.Generator, *, bins: int = BINS
) -> Nodes:
    """A random node set that has, at every location and in every bin of mean |activation|, as many nodes as `nodes`.

    Bins hold equally many nodes of the location; there are `bins` of them, or so many fewer that no bin is drawn by
    more than half. Nodes outside `nodes` are drawn first; what these cannot fill is taken from `nodes` itself.
    """
    drawn: Nodes = {}
    for location, mask in nodes.items():
        activity = means.magnitude[location].cpu()
        drawn[location] = torch.zeros_like(mask)
        if not bool(mask.any()):
            continue
        for members in _open_bins(activity, mask, bins):
            inside = mask[members]
            luck = torch.rand(len(members), generator=generator) + inside
            drawn[location][members[luck.argsort()[: int(inside.sum())]]] = True
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

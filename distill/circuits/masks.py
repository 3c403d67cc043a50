"""Node masks: which nodes run, and how a mask is learned.

A mask is 0 or 1 per node, the same for all prompts and tokens; a node masked out takes its ablation value [G 2.2]:

    x = m z + (1 - m) mean

Masks are learned through one real number tau in [-1, 1] per node: m = Heaviside(tau) on the way forward, the derivative
of a sigmoid on the way back [G A.5].

z comes in two forms. *With competition* (the source's) z is the node after the model's own AbsTopK, so that a pruned
channel still takes one of the k slots: a causal path that no edge count shows. *Without*, the form a circuit is defined
in here, pruned channels are zeroed before AbsTopK, which then chooses among the kept ones. The two agree where
everything is kept and in models without AbsTopK.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.circuits.ablation import Means

Nodes = dict[str, Tensor]
"""A set of nodes: per location, in the order of the run, a bool per channel, (width,)."""


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(tau / ctx.temperature)
        return grad[0] * sigmoid * (1 - sigmoid) / ctx.temperature, None


def heaviside(tau: Float[Tensor, "n"], temperature: float = 1.0) -> Float[Tensor, "n"]:
    """1 where tau > 0, else 0; its gradient is that of sigmoid(tau / temperature) [G A.5]."""
    out = _Heaviside.apply(tau, temperature)
    assert isinstance(out, Tensor)
    return out


class NodeMasks(nn.Module):
    """The learned masks of one model: a parameter `tau` with one entry per group of nodes that share a mask.

    A group is a node, or channel c of q and of k of one layer where `tie_qk` holds and the two are equally wide (they
    only ever act as a product); a tied pair counts as two nodes. `init_bias` and `init_noise` are mean and standard
    deviation of tau at the start, `temperature` that of the surrogate gradient.
    """

    count: Tensor
    """Nodes per group."""
    open: Tensor
    """Which groups have not been closed."""

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        tie_qk: bool = True,
        init_bias: float = 0.1,
        init_noise: float = 1e-2,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.index = group_index(widths, tie_qk=tie_qk)
        groups = 1 + max(int(index.max()) for index in self.index.values())
        self.register_buffer("count", torch.zeros(groups))
        self.register_buffer("open", torch.ones(groups, dtype=torch.bool))
        for index in self.index.values():
            self.count += torch.bincount(index, minlength=groups)
        generator = torch.Generator().manual_seed(seed)
        tau = init_bias + init_noise * torch.randn(groups, generator=generator)
        self.tau = nn.Parameter(tau.clamp(-1, 1))

    def forward(self) -> tuple[dict[str, Tensor], Tensor]:
        """The masks by location, (width,) of 0 and 1, and the number of kept nodes, both with gradients to tau."""
        mask = heaviside(self.tau, self.temperature) * self.open
        return self.spread(mask), (mask * self.count).sum()

    def spread(self, groups: Tensor) -> dict[str, Tensor]:
        """One value per group -> one value per node, by location."""
        return {location: groups[index.to(groups.device)] for location, index in self.index.items()}

    @torch.no_grad()
    def start(self, scores: Float[Tensor, "groups"], on: int, top: float) -> None:
        """Starts with the `on` best-scored groups kept: tau falls linearly along the ranking, through 0 at rank `on`.

        The best group starts at `top`, the last one at its negative. Masks that all start alike also fall alike, and
        when every node of a path is off no gradient says that it was needed.
        """
        total = len(scores)
        rank = torch.empty_like(scores)
        order = torch.argsort(scores, descending=True, stable=True)
        rank[order] = torch.arange(total, device=scores.device, dtype=scores.dtype)
        below = -(rank - on + 1) / max(total - on, 1)
        self.tau.copy_(top * torch.where(rank < on, 1 - rank / on, below))

    def close(self, groups: Bool[Tensor, "groups"]) -> None:
        """Takes groups out for good: their masks are 0 from here on, and tau gets no gradient."""
        self.open = self.open & ~groups

    def ranked(self, scores: Float[Tensor, "groups"]) -> Float[Tensor, "groups"]:
        """Scores with those of closed groups moved below 0 and below all others, in the order they have."""
        below = scores - scores.max() + scores.min().clamp_max(0) - 1
        return torch.where(self.open, scores, below)

    @torch.no_grad()
    def clamp(self) -> None:
        """Brings tau back into [-1, 1]; to be called after each optimiser step."""
        self.tau.clamp_(-1, 1)


def group_index(widths: Mapping[str, int], *, tie_qk: bool = True) -> dict[str, Int[Tensor, "width"]]:
    """For each node the number of its group, by location; groups are numbered in the order of the run."""
    index: dict[str, Tensor] = {}
    start = 0
    for location, width in widths.items():
        query = location.removesuffix(".k") + ".q"
        if tie_qk and location.endswith(".attn.k") and widths.get(query) == width:
            index[location] = index[query]
            continue
        index[location] = torch.arange(start, start + width)
        start += width
    return index


class MaskTap:
    """A tap that runs only the kept nodes; all others take their ablation value.

    `masks` holds one tensor (width,) per location, 0 and 1 (bool or float; gradients pass to them, with competition
    for kept and dropped nodes alike). Locations without a mask run untouched. Where the means protect position 0,
    nothing is ablated there.
    """

    def __init__(self, masks: Mapping[str, Tensor], means: Means, *, competition: bool = False) -> None:
        self.masks = dict(masks)
        self.means = means
        self.wants: frozenset[str] = frozenset() if competition else frozenset({"pre"})

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        location = site.removesuffix(".pre")
        if location not in self.masks:
            return x
        mask = self.masks[location].to(x)
        if location == site:
            # Exact at masks of 0 and of 1.
            return self._protect(torch.lerp(self.means.at(site, x.shape[1]).to(x), x, mask), x)
        # The gradient to the mask passes at the node alone: through both places it would count the node twice.
        return self._protect(x * mask.detach(), x)

    def _protect(self, ablated: Tensor, x: Tensor) -> Tensor:
        if not self.means.protect_first:
            return ablated
        return torch.cat([x[:, :1], ablated[:, 1:]], dim=1)


def ablated(x: Float[Tensor, "B T width"], location: str, means: Means) -> Float[Tensor, "B T width"]:
    """What the nodes at a location would be if all of them were masked out of a run in which they are `x`."""
    value = means.at(location, x.shape[1]).to(x).expand_as(x)
    return torch.cat([x[:, :1], value[:, 1:]], 1) if means.protect_first else value


def all_nodes(widths: Mapping[str, int], keep: bool = True) -> Nodes:
    """Every node of a model, or with `keep` off none."""
    return {location: torch.full((width,), keep) for location, width in widths.items()}


def node_count(nodes: Mapping[str, Bool[Tensor, "width"]]) -> int:
    """Number of nodes in a set."""
    return sum(int(mask.sum()) for mask in nodes.values())

"""How a mask per node is learned: estimators behind one interface.

An estimator holds one number per group of nodes that share a mask (`masks.group_index`) and turns these numbers into
masks with gradients. `heaviside` is the source's [G A.5]: masks of 0 and 1, and the gradient of a sigmoid.
`hard_concrete` draws each mask at random from a distribution on [0, 1] with much of its weight on both ends, whose
logit log alpha is learned (Edge Pruning, arXiv 2406.16778). What is not learned at all, a ranking by gradients, is in
`attribution`.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.circuits.masks import NodeMasks, heaviside
from distill.circuits.settings import PruneConfig
from distill.model.run import Runnable

STRETCH = (-0.1, 1.1)
"""The interval that a concrete variable is stretched to before it is cut to [0, 1]."""
BETA = 2 / 3
"""Temperature of the concrete distribution."""
LOG_ALPHA = (10.0, 0.01)
"""Mean and standard deviation of log alpha at the start: all masks on."""


@runtime_checkable
class Estimator(Protocol):
    """Learned masks: the layout of `NodeMasks`, and these."""

    tau: nn.Parameter
    """What is learned, (groups,)."""
    count: Tensor
    """Nodes per group."""
    open: Tensor
    """Which groups have not been closed."""
    index: dict[str, Tensor]
    """For each node the number of its group, by location."""

    def sample(self) -> tuple[Float[Tensor, "groups"], Float[Tensor, ""]]:
        """The masks of one step, in [0, 1], and the (expected) number of kept nodes, both with gradients to tau."""
        ...

    def scores(self) -> Float[Tensor, "groups"]:
        """What groups are ranked by, higher kept first; above 0 where a mask is on."""
        ...

    def start(self, scores: Float[Tensor, "groups"], on: int, top: float) -> None:
        """Starts with the `on` best-scored groups on, the best one at `top`."""
        ...

    def clamp(self) -> None:
        """Brings tau back into its range; to be called after each optimiser step."""
        ...

    def close(self, groups: Bool[Tensor, "groups"]) -> None:
        """Takes groups out for good: their masks are 0 from here on, and they rank below all others."""
        ...

    def spread(self, groups: Tensor) -> dict[str, Tensor]:
        """One value per group -> one value per node, by location."""
        ...


class Heaviside(NodeMasks):
    """Masks of 0 and 1 by the sign of tau in [-1, 1]; the gradient is that of a sigmoid [G A.5]."""

    def sample(self) -> tuple[Float[Tensor, "groups"], Float[Tensor, ""]]:
        mask = heaviside(self.tau, self.temperature) * self.open
        return mask, (mask * self.count).sum()

    def scores(self) -> Float[Tensor, "groups"]:
        return self.ranked(self.tau.detach())


class HardConcrete(NodeMasks):
    """Masks drawn anew at each step: a logistic variable around log alpha, squashed, stretched, and cut to [0, 1].

        s = sigmoid((log u - log(1 - u) + log alpha) / beta),  u uniform in (0, 1)
        m = min(1, max(0, s (z - g) + g)),  (g, z) = (-0.1, 1.1), beta = 2/3

    P(m > 0) = sigmoid(log alpha - beta log(-g / z)); `tau` is log alpha. Noise comes from a generator of its own.
    """

    def __init__(self, widths: dict[str, int], *, tie_qk: bool = True, seed: int = 0) -> None:
        super().__init__(widths, tie_qk=tie_qk, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        mean, deviation = LOG_ALPHA
        with torch.no_grad():
            self.tau.copy_(mean + deviation * torch.randn(len(self.tau), generator=self.generator))

    def sample(self) -> tuple[Float[Tensor, "groups"], Float[Tensor, ""]]:
        noise = torch.rand(len(self.tau), generator=self.generator).clamp(1e-6, 1 - 1e-6).logit().to(self.tau)
        low, high = STRETCH
        mask = (torch.sigmoid((noise + self.tau) / BETA) * (high - low) + low).clamp(0, 1) * self.open
        return mask, (torch.sigmoid(self._logit()) * self.open * self.count).sum()

    def _logit(self) -> Tensor:
        low, high = STRETCH
        return self.tau - BETA * math.log(-low / high)

    def scores(self) -> Float[Tensor, "groups"]:
        """The logit of P(m > 0): above 0 where a mask is more likely on than off."""
        return self.ranked(self._logit().detach())

    @torch.no_grad()
    def start(self, scores: Float[Tensor, "groups"], on: int, top: float) -> None:
        """As `NodeMasks.start`, along log alpha from its usual start down to the negative of that."""
        super().start(scores, on, top)
        self.tau.mul_(LOG_ALPHA[0] / top)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps log alpha where a gradient still comes through."""
        self.tau.clamp_(-LOG_ALPHA[0], LOG_ALPHA[0])


def new_masks(model: Runnable, config: PruneConfig) -> Heaviside | HardConcrete:
    """The masks of `config.estimator` at their own start, all on; under attribution they are only ranked."""
    device = next(model.parameters()).device
    if config.estimator == "hard_concrete":
        return HardConcrete(model.widths, tie_qk=config.tie_qk, seed=config.seed).to(device)
    return Heaviside(
        model.widths,
        tie_qk=config.tie_qk,
        init_bias=config.init_bias,
        init_noise=config.init_noise,
        temperature=config.temperature,
        seed=config.seed,
    ).to(device)


def as_nodes(masks: Estimator, kept: Bool[Tensor, "groups"]) -> dict[str, Tensor]:
    """The node set of some groups."""
    return {location: mask.cpu() for location, mask in masks.spread(kept).items()}


def as_groups(masks: Estimator, values: dict[str, Tensor]) -> Float[Tensor, "groups"]:
    """One value per node, by location -> the sum over each group."""
    total = torch.zeros(len(masks.count))
    for location, index in masks.index.items():
        total.index_add_(0, index, values[location].float().cpu())
    return total

"""Dead units: those that no weight reaches, or from which none goes on, and giving them some again.

The share of dead neurons, head channels and residual channels is in `sparsity.sparsity_report`. Once a unit has lost
the last weight on one side, the gradient of the other side is zero: it comes back only if an entry of the empty side
grows by itself. Re-seeding (**ours**) draws a few entries for the empty side, as large as the median of those that
stay, so that they have a chance against them at the next projection.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PAIRS = (("mlp_in", "mlp_out"), ("attn_q", "attn_k"), ("attn_v", "attn_out"))
"""The two sides of a unit. A head channel of q and k reads on both, so both have a row each for it."""
ENTRIES = 4
"""Entries that an empty side gets, at most its width."""


@torch.no_grad()
def reseed_(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, seed: int) -> int:
    """Draws entries for each side of a neuron or head channel that has none; their first moments start from zero.

    Arguments:
        parameters: the projected parameters by name.
        optimizer: an AdamW of them.
        seed: of places and signs.

    Returns how many units were re-seeded. A unit without weights on both sides gets some on both. The next projection
    brings the count of entries back to what it is to be. `ValueError` for weights that are spread over processes.
    """
    generator = torch.Generator().manual_seed(seed)
    number = 0
    for one, other in PAIRS:
        for name in parameters:
            partner = f"{name.removesuffix(f'{one}.weight')}{other}.weight"
            if not name.endswith(f".{one}.weight") or partner not in parameters:
                continue
            sides = [parameters[name], parameters[partner]]
            if any(isinstance(side, DTensor) for side in sides):
                raise ValueError(f"reseed_every: {name} is spread over processes, allowed are whole matrices")
            rows = [sides[0], sides[1].T if other.endswith("out") else sides[1]]
            empty = [~(side != 0).any(1) for side in rows]
            for side, units, weight in zip(rows, empty, sides, strict=True):
                _fill_(side, units.nonzero().reshape(-1), weight, optimizer, generator)
            number += int((empty[0] | empty[1]).sum())
    return number


def _fill_(
    rows: Tensor, units: Tensor, weight: nn.Parameter, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Entries for the rows `units` of a view of `weight`."""
    kept = rows[rows != 0].abs()
    if len(units) == 0 or len(kept) == 0:
        return
    number = min(ENTRIES, rows.shape[1])
    at = torch.rand(len(units), rows.shape[1], generator=generator).topk(number).indices.to(rows.device)
    signs = (torch.randint(2, at.shape, generator=generator) * 2 - 1).to(rows)
    rows[units[:, None], at] = signs * kept.median()
    state = optimizer.state.get(weight, {})
    if "exp_avg" in state:
        moment = state["exp_avg"] if rows.shape == weight.shape and rows.stride() == weight.stride() else None
        (state["exp_avg"].T if moment is None else moment)[units[:, None], at] = 0.0

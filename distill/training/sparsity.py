"""Weight sparsity: how many entries stay, which ones, and what that leaves dead [G 2.1, A.2].

After every optimiser step each projected tensor keeps `round(fraction * numel)` entries, the largest in magnitude, and
the rest becomes zero: `kept_fraction` says the fraction of a step, `project_` does it to one tensor. A floor brings
back the largest entries of every neuron and head channel that the magnitude rule would leave with too few.
`sparse_parameters` says which tensors of a model take part, `sparsity_report` what is left of them.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.model import kernels
from distill.model.operations import native, plain
from distill.training.threshold import Cut, project_counted_

Anneal = Literal["linear", "exponential", "fast"]
FAST_FRACTION = 0.05
"""Share of the steps within which "fast" annealing reaches the target."""
MAX_AUTOMATIC_FLOOR = 4

_UNIT_AXIS = {"mlp_in": 0, "attn_q": 0, "attn_k": 0, "attn_v": 0, "mlp_out": 1, "attn_out": 1}
_EMBEDDINGS = ("embed_tokens", "embed_positions", "unembed")
_READERS = ("attn_q", "attn_k", "attn_v", "mlp_in")
_WRITERS = ("attn_out", "mlp_out")


def kept_fraction(
    step: int, *, steps: int, kept: float, anneal: Anneal = "linear", anneal_fraction: float = 0.5
) -> float:
    """The fraction of entries that stay after `step` optimiser steps: from 1 down to `kept` [G A.2].

    Arguments:
        step: optimiser steps done, 0 (nothing is projected yet) to `steps`.
        steps: length of the training.
        kept: target fraction, in (0, 1].
        anneal: "linear" in the step, "exponential" (the logarithm is linear), "fast" (linear, within the first
            `FAST_FRACTION` of the steps whatever `anneal_fraction` says).
        anneal_fraction: share of the steps after which the target holds, in [0, 1]; 0 is the target from the start.
    """
    share = FAST_FRACTION if anneal == "fast" else anneal_fraction
    progress = 1.0 if step >= share * steps else step / (share * steps)
    if progress == 1.0:
        return kept
    return kept**progress if anneal == "exponential" else 1.0 + (kept - 1.0) * progress


def sparse_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that are projected: every weight matrix, bias and embedding (positions too) [G A.2].

    Exempt (**ours**): the bigram table, norm gains and norm biases, sink logits, recognised by name (`bigram`,
    `attn_sink`, a module whose name ends in `norm`). Tied tensors appear once, under their first name.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not _exempt(name)}


def _exempt(name: str) -> bool:
    *modules, last = name.split(".")
    return last in ("bigram", "attn_sink") or (bool(modules) and modules[-1].endswith("norm"))


def late_parameters(names: Iterable[str]) -> list[str]:
    """Of projected parameters the embeddings (unembedding and positions among them) and biases: with the setting
    `jump` these are cut at the end of annealing only, and then all at once."""
    return [name for name in names if name.endswith(".bias") or _module(name) in _EMBEDDINGS]


def unit_axis(name: str) -> int | None:
    """The axis that counts neurons or head channels: 0 (a row each), 1 (a column each), None (no such tensor).

    Arguments:
        name: parameter name; `....mlp_in.weight`, attn_q, attn_k, attn_v have rows, mlp_out and attn_out columns.
    """
    *modules, last = name.split(".")
    return _UNIT_AXIS.get(modules[-1]) if modules and last == "weight" else None


def automatic_floor(kept: float, width: int) -> int:
    """The default floor j = min(4, floor(kept * width / 4)) (**ours**): at most a quarter of an average row.

    Arguments:
        kept: target fraction.
        width: entries in the row or column of one neuron or head channel.
    """
    return min(MAX_AUTOMATIC_FLOOR, math.floor(kept * width / 4))


@torch.no_grad()
def project_(weight: Tensor, fraction: float, *, floor: int = 0, axis: int | None = None) -> int:
    """Keep the entries of `weight` that are largest in magnitude, set the others to zero, in place [G A.2].

    Exactly round(fraction * numel) entries stay; of equal magnitudes the lowest flat index wins. Beyond these, every
    row or column keeps its own `floor` largest (ties as above).

    Arguments:
        weight: floating point tensor of any shape and device, or a parameter.
        fraction: share of the entries that stay, in [0, 1].
        floor: entries that each neuron or head channel keeps at least, as far as it has non-zero ones; 0 is off.
        axis: 0 when the rows of the (matrix) weight are the neurons or head channels, 1 for its columns.

    Returns the number of non-zero entries left (fewer than asked for where the tensor has not that many).
    Raises `ValueError` for a fraction, floor or axis that is not possible.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, allowed is 0 to 1")
    if floor and (axis not in (0, 1) or weight.dim() != 2 or not 0 < floor <= weight.shape[1 - axis]):
        raise ValueError(
            f"floor: got {floor} on axis {axis} of a tensor {tuple(weight.shape)}, "
            "allowed is 0 to the length of a row (axis 0) or column (axis 1) of a matrix"
        )
    if native(weight) and weight.is_contiguous():
        return kernels.project_(weight, fraction, floor=floor, axis=axis)
    if isinstance(weight, DTensor) or (weight.device.type != "cpu" and not plain()):
        return project_counted_(weight, fraction, floor=floor, axis=axis)
    data = weight.detach()
    magnitude = data.abs()
    kept = _largest(magnitude, round(fraction * data.numel()))
    if floor and axis is not None:
        kept = _with_floor(kept, magnitude, floor, axis)
    data.masked_fill_(~kept, 0.0)
    return int(torch.count_nonzero(data))


def magnitude_threshold(magnitude: Tensor, count: int) -> Cut:
    """The magnitude at which exactly `count` entries stay.

    Arguments:
        magnitude: absolute values, any shape.
        count: entries that stay, 0 to numel.
    """
    if count == 0:
        return Cut(math.inf, 0, 0)
    value = torch.topk(magnitude.reshape(-1), count, sorted=False).values.min()
    if value == 0:
        return Cut(0.0, 0, 0)
    above, equal = torch.stack([(magnitude > value).sum(), (magnitude == value).sum()]).tolist()
    return Cut(float(value), count - above, equal)


def _largest(magnitude: Tensor, count: int) -> Tensor:
    """Which entries are the `count` largest; of equal ones the first are."""
    cut = magnitude_threshold(magnitude, count)
    kept = magnitude > cut.value
    tied = torch.nonzero((magnitude == cut.value).reshape(-1)).reshape(-1)[: cut.stay]
    return kept.reshape(-1).index_fill(0, tied, True).view(kept.shape)


def _with_floor(kept: Tensor, magnitude: Tensor, floor: int, axis: int) -> Tensor:
    """`kept`, and the `floor` largest entries of each unit of which fewer are kept; of equal ones the first."""
    rows, units = (magnitude, kept) if axis == 0 else (magnitude.T, kept.T)
    short = torch.nonzero(units.sum(1) < floor).reshape(-1)
    # A stable sort would give the order of ties, but it sorts whole rows; the boundary value is enough.
    boundary = torch.topk(rows[short], floor, dim=1).values[:, -1:]
    above, equal = rows[short] > boundary, rows[short] == boundary
    largest: Bool[Tensor, "units width"] = above | (equal & (equal.cumsum(1) <= floor - above.sum(1, keepdim=True)))
    units = units.index_copy(0, short, largest)
    return units if axis == 0 else units.T


# --- what is left ----------------------------------------------------------------------------------------------------


def sparsity_report(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Exact counts per tensor, and the share of units that can no longer do anything.

    Arguments:
        parameters: names to tensors of one model (`sparse_parameters(model)`, or a state dict).

    Returns `tensors` (name to `kept` non-zeros, `numel`, `fraction`), the totals `kept`, `numel` and `fraction`, and
    where the model has such units the shares in [0, 1]
        `dead_neurons`: no weight in, or no weight out;
        `dead_head_channels`: of q-k pairs and v channels, those that one side leaves without a weight;
        `dead_residual_channels`: nothing writes them (embeddings, attn_out, mlp_out), or nothing reads them.
    Biases do not count: a unit that knows only its bias is dead.
    """
    used = {name: tensor.detach() != 0 for name, tensor in parameters.items()}
    tensors = {
        name: {"kept": int(mask.sum()), "numel": mask.numel(), "fraction": int(mask.sum()) / max(mask.numel(), 1)}
        for name, mask in used.items()
    }
    kept, numel = (sum(entry[key] for entry in tensors.values()) for key in ("kept", "numel"))
    report = {"tensors": tensors, "kept": kept, "numel": numel, "fraction": kept / max(numel, 1)}
    dead = {
        "dead_neurons": _dead_pairs(used, (("mlp_in", "mlp_out"),)),
        "dead_head_channels": _dead_pairs(used, (("attn_q", "attn_k"), ("attn_v", "attn_out"))),
        "dead_residual_channels": _dead_residual(used),
    }
    return report | {name: float(flags.float().mean()) for name, flags in dead.items() if flags.numel()}


def _alive(name: str, mask: Tensor) -> Tensor:
    """Which units of a matrix have a weight."""
    return mask.any(1 if unit_axis(name) == 0 else 0)


def _dead_pairs(used: Mapping[str, Tensor], pairs: tuple[tuple[str, str], ...]) -> Bool[Tensor, " units"]:
    """Units of all layers that have no weight on one of their two sides."""
    flags = [torch.zeros(0, dtype=torch.bool)]
    for one, other in pairs:
        for name in used:
            if name.endswith(f".{one}.weight"):
                partner = f"{name.removesuffix(f'{one}.weight')}{other}.weight"
                if partner in used:
                    flags.append(~(_alive(name, used[name]) & _alive(partner, used[partner])).cpu())
    return torch.cat(flags)


def _dead_residual(used: Mapping[str, Tensor]) -> Bool[Tensor, " D"]:
    """Residual channels that nothing writes or nothing reads."""
    embedding = next((mask for name, mask in used.items() if _module(name) == "embed_tokens"), None)
    if embedding is None:
        return torch.zeros(0, dtype=torch.bool)
    width = embedding.shape[1]
    written = torch.zeros(width, dtype=torch.bool, device=embedding.device)
    tied = not any(_module(name) == "unembed" for name in used)
    read = embedding.any(0) if tied else torch.zeros_like(written)
    for name, mask in used.items():
        module = _module(name)
        if module == "embed_tokens" or (module == "embed_positions" and mask.shape[1] == width):
            written = written | mask.any(0)
        elif module in _WRITERS and name.endswith(".weight"):
            written = written | mask.any(1)
        elif (module in _READERS or module == "unembed") and name.endswith(".weight"):
            # Concatenated positions are read behind the residual channels.
            read = read | mask.any(0)[:width]
    return ~(written & read).cpu()


def _module(name: str) -> str:
    return name.split(".")[-2] if "." in name else name

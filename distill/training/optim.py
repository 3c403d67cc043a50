"""The optimiser and its rate [G A.2]: AdamW on gradients of root mean square 1, warm-up, linear decay, sharkfin.

torch's AdamW is used, fused: 3.7 ms for 8M parameters on two cores where the foreach version takes 10.6. What decays:
every projected parameter, and of the others those with two or more axes except the bigram table (**ours**); norm gains,
sink logits and biases that are not projected do not.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

GradRms = Literal["normalize", "clip", "off"]


def rate_factor(step: int, *, steps: int, warmup_fraction: float = 0.01) -> float:
    """The share of the configured rate at update `step`: linear warm-up, then linear decay to 0 at `steps` [G A.2].

    Arguments:
        step: number of the update, 0 to `steps` - 1.
        steps: length of the training.
        warmup_fraction: share of the steps that warm up, in [0, 1]; update s of w takes (s + 1) / w.
    """
    warmup = round(warmup_fraction * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


def sharkfin_factor(fraction: float, kept: float) -> float:
    """sqrt(target fraction / fraction now): the configured rate is the one at the target [G A.2, Fig. 11]."""
    return math.sqrt(kept / fraction)


def make_optimizer(
    modules: nn.Module,
    sparse: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 0.1,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in groups named "sparse", "dense" and "plain" (no decay; see the module).

    Arguments:
        modules: everything that is trained.
        sparse: the projected parameters by name.
        betas: decay of the two moments per step.
        eps: added to the root of the second moment; 0.1 belongs to gradients of root mean square 1.
        weight_decay: per step and unit of rate.

    Raises `ValueError` when nothing is trainable, or a projected parameter is not among the trainable ones.
    """
    trainable = {id(p): (name, p) for name, p in modules.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("modules: no parameter is trainable, at least one must require a gradient")
    for name, parameter in sparse.items():
        if id(parameter) not in trainable:
            raise ValueError(f"sparse: got {name!r}, allowed are trainable parameters of the modules")
    groups: dict[str, list[nn.Parameter]] = {"sparse": list(sparse.values()), "dense": [], "plain": []}
    projected = {id(parameter) for parameter in sparse.values()}
    for name, parameter in trainable.values():
        if id(parameter) not in projected:
            decays = parameter.dim() >= 2 and name.split(".")[-1] != "bigram"
            groups["dense" if decays else "plain"].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "name": kind, "weight_decay": 0.0 if kind == "plain" else weight_decay}
            for kind, members in groups.items()
            if members
        ],
        lr=0.0,
        betas=betas,
        eps=eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float, sharkfin: float, dense_rate: float = 1.0) -> None:
    """Give the group of projected parameters `rate * sharkfin`, the others `rate * dense_rate`.

    Where nothing is projected, the share `dense_rate` is left out: it is for what stands beside projected parameters.
    """
    beside = any(group["name"] == "sparse" for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        share = sharkfin if group["name"] == "sparse" else dense_rate if beside else 1.0
        group["lr"] = rate * share


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on the device; a parameter without one counts as zeros."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def scale_gradients_(parameters: Iterable[nn.Parameter], rms: float, mode: GradRms) -> None:
    """Bring the root mean square of the gradient over all parameters to 1 ("normalize") or under 1 ("clip").

    The source speaks of clipping, but with a mean loss the root mean square is far below 1 and a clip never acts;
    normalising is what its results rest on. A gradient of zero stays zero.

    Arguments:
        parameters: all that are trained.
        rms: the root mean square of their gradient now.
        mode: "normalize", "clip" or "off".
    """
    if mode == "off" or rms == 0 or (mode == "clip" and rms <= 1):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(1.0 / rms)

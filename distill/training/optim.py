"""The optimiser and its rate [G A.2]: AdamW on gradients of root mean square 1, warm-up, linear decay, sharkfin.

`ProjectedAdamW` is torch's AdamW and, after its step, the projection of the sparse parameters. What decays: every
projected parameter, and of the others those with two or more axes except the bigram table (**ours**); norm gains, sink
logits and biases that are not projected do not.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.model import kernels
from distill.model.linear_path import chosen
from distill.model.operations import native
from distill.training.sparsity import project_
from distill.training.threshold import Thresholds

GradRms = Literal["normalize", "clip", "off"]
Floors = Mapping[str, tuple[int, int | None]]
"""Names of sparse parameters to the floor and the axis of their units, as `project_` takes them."""


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


class ProjectedAdamW(torch.optim.AdamW):
    """AdamW whose step ends with the projection of the parameters in the group named "sparse" [G A.2].

    There are two ways to make a step, which give the same but for rounding. The plain one is torch's own step, fused,
    and then `sparsity.project_`. The compiled one (float32 on a CPU) passes over gradient and moments once: a sparse
    weight is changed only where it is not zero before or after, and its pattern for the next forward falls out.
    The state (`exp_avg`, `exp_avg_sq`, `step`) is torch's either way.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        floors: Mapping[nn.Parameter, tuple[int, int | None]],
        late: Collection[nn.Parameter] = (),
    ) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self._floors = floors
        self._late = frozenset(late)
        self._owned: dict[nn.Parameter, kernels.Projected] = {}
        self._thresholds = Thresholds()
        self.nonzeros = sum(p.numel() for group in groups for p in group["params"] if group["name"] == "sparse")
        """Entries of the sparse parameters that are not zero after the last projection; all before the first."""

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        scale: float = 1.0,
        fraction: float | None = None,
        late: float | None = None,
        without: Collection[nn.Parameter] = (),
    ) -> None:
        """One step on the gradients times `scale`, after which they are used up.

        Arguments:
            closure: none: the loss is not evaluated again.
            scale: what each gradient is multiplied with first.
            fraction: share of entries that stay in each sparse parameter, in [0, 1]; none: nothing is projected.
            late: the same share for the parameters that are cut late; none: `fraction`.
            without: parameters that somebody else moves and projects; they have no gradient.
        """
        if closure is not None:
            raise ValueError("closure: got one, allowed is none")
        others = {id(parameter) for parameter in without}
        mine = [(group, p) for group in self.param_groups for p in group["params"] if id(p) not in others]
        if all(_compiled(p) for _, p in mine):
            left = [self._compiled_step(group, p, scale, self._share(p, fraction, late)) for group, p in mine]
        else:
            if scale != 1:
                for grad in (p.grad for _, p in mine if p.grad is not None):
                    grad.mul_(scale)
            super().step()
            projected = [p for group, p in mine if group["name"] == "sparse"]
            shares = ((p, self._share(p, fraction, late)) for p in projected)
            left = [self._project(p, share) for p, share in shares if share is not None]
        if fraction is not None:
            self.nonzeros = sum(left)

    def _share(self, parameter: nn.Parameter, fraction: float | None, late: float | None) -> float | None:
        return late if late is not None and parameter in self._late else fraction

    def _project(self, parameter: nn.Parameter, fraction: float) -> int:
        floor, axis = self._floors[parameter]
        if isinstance(parameter, DTensor) or parameter.device.type != "cpu":
            return self._thresholds.project_(parameter, parameter, fraction, floor=floor, axis=axis)
        return project_(parameter, fraction, floor=floor, axis=axis)

    def _compiled_step(
        self, group: Mapping[str, Any], parameter: nn.Parameter, scale: float, fraction: float | None
    ) -> int:
        """The step of one parameter; returns the non-zeros of a projected one, else 0."""
        share = fraction if group["name"] == "sparse" else None
        if parameter.grad is None:
            return 0 if share is None else self._project(parameter, share)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        adam = kernels.AdamStep(
            rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            scale=scale,
        )
        moving = parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], adam
        count = parameter.numel() if share is None else round(share * parameter.numel())
        if share is None or count == parameter.numel():
            kernels.adamw_(parameter, *moving)
            return 0 if share is None else int(torch.count_nonzero(parameter))
        if parameter not in self._owned:
            floor, axis = self._floors[parameter]
            self._owned[parameter] = kernels.Projected(parameter, floor=floor, axis=axis)
        lists = parameter.dim() == 2 and chosen(parameter.shape[0], parameter.shape[1], share)
        return self._owned[parameter].step(*moving, count, lists=lists)


def _compiled(parameter: nn.Parameter) -> bool:
    """Whether a parameter and its gradient are such as the compiled step takes."""
    dense = parameter.grad is None or parameter.grad.layout == torch.strided
    return native(parameter) and parameter.is_contiguous() and dense


def make_optimizer(
    modules: nn.Module,
    sparse: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 0.1,
    weight_decay: float = 0.1,
    floors: Floors | None = None,
    late: Collection[str] = (),
) -> ProjectedAdamW:
    """AdamW over the trainable parameters, in groups named "sparse", "dense" and "plain" (no decay; see the module).

    Arguments:
        modules: everything that is trained.
        sparse: the projected parameters by name.
        betas: decay of the two moments per step.
        eps: added to the root of the second moment; 0.1 belongs to gradients of root mean square 1.
        weight_decay: per step and unit of rate.
        floors: of the projected parameters that have one.
        late: names of projected parameters that are cut late, see `ProjectedAdamW.step`.

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
    return ProjectedAdamW(
        [
            {"params": members, "name": kind, "weight_decay": 0.0 if kind == "plain" else weight_decay}
            for kind, members in groups.items()
            if members
        ],
        betas=betas,
        eps=eps,
        floors={parameter: (floors or {}).get(name, (0, None)) for name, parameter in sparse.items()},
        late=[sparse[name] for name in late],
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
    return total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries of some tensors together, a scalar on their device.

    Of tensors that are spread over processes each process has to call it, and gets the norm of the whole ones.
    """
    if all(native(tensor) and tensor.is_contiguous() for tensor in tensors):
        return torch.tensor(math.sqrt(sum(kernels.sum_of_squares(tensor) for tensor in tensors)))
    spread = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    norms = [torch.nn.utils.get_total_norm(part) for part in (spread, plain) if part]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def gradient_scale(rms: float, mode: GradRms) -> float:
    """What brings the root mean square of the gradient over all parameters to 1 ("normalize") or under 1 ("clip").

    The source speaks of clipping, but with a mean loss the root mean square is far below 1 and a clip never acts;
    normalising is what its results rest on. A gradient of zero stays zero.

    Arguments:
        rms: the root mean square of the gradient now.
        mode: "normalize", "clip" or "off".
    """
    return 1.0 if mode == "off" or rms == 0 or (mode == "clip" and rms <= 1) else 1.0 / rms


def scale_gradients_(parameters: Iterable[nn.Parameter], rms: float, mode: GradRms) -> None:
    """Multiply the gradients by `gradient_scale`, for a step that is not told the scale."""
    scale = gradient_scale(rms, mode)
    for grad in (p.grad for p in parameters if p.grad is not None):
        if scale != 1:
            grad.mul_(scale)

"""The comparisons on a CUDA device: AbsTopK and projection over torch.topk, a bfloat16 step over the plain path."""

from collections.abc import Callable

import torch
from measure import in_turns
from work import Row, sparse_model, tokens

from distill.model import operations
from distill.model.kernels import cuda
from distill.model.topk import abs_topk
from distill.training.optim import gradient_norm, gradient_scale, make_optimizer, set_rate
from distill.training.sparsity import sparse_parameters
from distill.training.threshold import project_counted_


def by_sorting(x: torch.Tensor, k: int) -> torch.Tensor:
    """What `torch.topk` over rows makes of AbsTopK."""
    return torch.zeros_like(x).scatter_(-1, at := x.abs().topk(k, dim=-1).indices, x.gather(-1, at))


def device(turns: int) -> list[Row]:
    """Nothing where there is no CUDA device with Triton, and a line that says so."""
    if not torch.cuda.is_available() or not cuda.usable(torch.empty(1, device="cuda")):
        print("no CUDA device with Triton: nothing to compare")
        return []
    rows: list[Row] = []
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(16384, 8192, generator=generator, device="cuda")
    k = x.shape[1] // 4
    name = "CUDA: AbsTopK (16384, 8192), keep 1/4, over torch.topk"
    rows.append(
        in_turns(name, lambda: by_sorting(x, k), lambda: abs_topk(x, k), turns=turns, inner=5, least=10, stretch=20)
    )
    weight = torch.randn(8192, 8192, generator=generator, device="cuda")
    count = weight.numel() // 100

    def sort() -> None:
        flat = weight.view(-1)
        at = flat.abs().topk(count).indices
        torch.zeros_like(flat)[at] = flat[at]

    fast = weight.clone()

    def project() -> None:
        fast.copy_(weight)
        project_counted_(fast, 0.01)

    name = "CUDA: projection of 64M entries to 1%, over torch.topk"
    rows.append(in_turns(name, sort, project, turns=turns, inner=3, least=10, stretch=20))
    name = "CUDA: whole bfloat16 step, D=2048, L=8, 1%"
    rows.append(in_turns(name, _step(), _step(), turns=turns, warm=3, least=2.5, stretch=5))
    return rows


def _step() -> Callable[[], None]:
    """A whole step of 16,384 tokens under bfloat16 autocast, master weights in float32."""
    model = sparse_model(2048, 8, 0.01).cuda()
    sparse = sparse_parameters(model)
    optimizer = make_optimizer(model, sparse)
    set_rate(optimizer, 1e-3, 1.0)
    numel = sum(parameter.numel() for parameter in model.parameters())
    ids = tokens(1, shape=(64, 256)).to("cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model.run(ids[:, :-1])
        operations.cross_entropy(logits.float(), ids[:, 1:]).backward()
        rms = float(gradient_norm(model.parameters())) / numel**0.5
        optimizer.step(scale=gradient_scale(rms, "normalize"), fraction=0.01)

    return step


SECTIONS: dict[str, Callable[[int], list[Row]]] = {"cuda": device}

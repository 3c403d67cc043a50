"""How near the kernels come to what the machine can do: bytes and operations per second over a copy and a product."""

from collections.abc import Callable
from typing import Any

import torch
from measure import allocate, seconds_of

from distill.model import kernels


def roofline(turns: int) -> list[dict[str, Any]]:
    """Sparse product, weight gradient and AbsTopK against the machine's copy and dense product."""
    allocate(True)
    if not kernels.available():
        return []

    def best(work: Callable[[], object]) -> float:
        work()
        return min(seconds_of(work, 3) for _ in range(turns))

    source, target = torch.randn(1 << 26), torch.empty(1 << 26)
    bandwidth = 2 * 4 * source.numel() / best(lambda: target.copy_(source))
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    dense = 2 * 2048**3 / best(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    rows: list[dict[str, Any]] = [{"what": "copy", "bytes_per_second": bandwidth}]
    rows.append({"what": "dense product (oneDNN)", "operations_per_second": dense})
    n, o, i, density = 2048, 4096, 1024, 0.01
    weight = torch.randn(o, i) * (torch.rand(o, i) < density)
    x = kernels.abs_topk(torch.randn(n, i), i // 4)
    grad = kernels.abs_topk(torch.randn(n, o), o // 4)
    with torch.no_grad():
        seconds = best(lambda: kernels.sparse_linear(x, weight))
        rows.append(
            {
                "what": f"sparse product, {n} tokens, ({o}, {i}) at {density:.0%}",
                "bytes_share": 4 * n * (o + i) / seconds / bandwidth,
                "operations_share": 2 * n * int(weight.count_nonzero()) / seconds / dense,
            }
        )
        seconds = best(lambda: kernels.weight_gradient(grad, x))
        rows.append(
            {
                "what": f"weight gradient, {n} tokens, ({o}, {i}), gradient with 1/4 non-zeros",
                "operations_share": 2 * i * int(grad.count_nonzero()) / seconds / dense,
                "dense_operations_share": 2 * n * o * i / seconds / dense,
            }
        )
        wide = torch.randn(n, o)
        seconds = best(lambda: kernels.abs_topk(wide, o // 4))
        rows.append({"what": f"AbsTopK, {n} x {o}", "bytes_share": 2 * 4 * n * o / seconds / bandwidth})
    for row in rows:
        values = (
            f"{key} {value:.3g}" if key.endswith("second") else f"{key} {value:.0%}"
            for key, value in row.items()
            if key != "what"
        )
        print(f"{row['what']:58s} {', '.join(values)}")
    return rows


SECTIONS = {"roofline": roofline}

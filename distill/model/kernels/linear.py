"""Linear maps with what follows them, compiled: products without the zeros of a weight, activation, AbsTopK.

The gradient of a weight is dense: an entry that is zero now may enter the weight later [G A.2]. It costs less where the
gradient that comes in is mostly zero itself, as behind an AbsTopK.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.model.kernels.build import call, threads, workspace
from distill.model.kernels.pattern import Pattern
from distill.model.kernels.topk import ACTIVATIONS, expected_cut, finish, pass_back, record_of

DENSE_GRADIENT = 0.85
"""Share of non-zeros in the output's gradient from which on the weight gradient is a dense product, where the map
reads more than `NARROW` channels. Measured (2,048 tokens, AVX-512, two threads): at 0.6 the way without zeros takes two
thirds of the dense time; at 1 it takes 1.1 of it for 1,024 channels, and 0.9 for 256, where oneDNN has more to copy."""
NARROW = 512
CROSSOVER = 0.25
"""Density of a weight up to which its products are made without the zeros.

Measured (256 to 1024 wide, 960 tokens, against oneDNN on AVX-512, one thread): both take equal time at 1/2 for small
matrices and at 1/3 for large ones; at 1/4 the sparse way takes about three quarters of the dense time.
"""
LEAST_SIDE = 32
"""Matrices that are narrower than this gain nothing."""

Map = tuple[Tensor, Tensor | None]
"""Weight (o, i) and bias (o) of a linear map."""
Sink = Callable[["Gradient", Tensor], None]
"""Takes the gradient of a map's output and what the map read, (*rows, i), in place of a gradient of its weight."""

_BLOCK = 64


def worth_it(o: int, i: int, density: float) -> bool:
    """Whether products without the zeros are faster for a weight (o, i) of that share of non-zeros."""
    return density <= CROSSOVER and min(o, i) >= LEAST_SIDE


def linear_maps(
    x: Float[Tensor, "*rows i"],
    maps: Sequence[Map],
    *,
    sparse: Sequence[bool],
    keep: Sequence[int | None],
    activation: str = "identity",
    sinks: Sequence[Sink | None] | None = None,
) -> tuple[Tensor, ...]:
    """For each map AbsTopK(activation(x W^T + b)), for float32 on a CPU where `available()`.

    Exact but for the order of sums and rounding, and differentiable once. Where a dense product would make NaN of a
    zero weight and an infinite activation, a sparse one adds nothing.

    Arguments:
        x: what all of the maps read.
        maps: weight and bias of each.
        sparse: for each map whether its products are made without the zeros.
        keep: for each map how many entries AbsTopK keeps; None for all.
        activation: one of `ACTIVATIONS`.
        sinks: for each map perhaps who takes what the weight's gradient would be made from; the weight then gets none.
    """
    assert x.dtype == torch.float32 and x.device.type == "cpu", f"{x.dtype} on {x.device}"
    if x.numel() == 0:
        return tuple(F.linear(x, weight, bias) for weight, bias in maps)
    patterns = [Pattern.of(weight) if chosen else None for (weight, _), chosen in zip(maps, sparse, strict=True)]
    ks = [len(weight) if k is None else min(k, len(weight)) for (weight, _), k in zip(maps, keep, strict=True)]
    given = [part for pair in maps for part in pair]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given)):
        sinks = sinks or [None] * len(maps)
        return _Maps.apply(x, patterns, ks, activation, sinks, *given)  # pyright: ignore[reportReturnType]
    fixed = [(weight.detach(), None if bias is None else bias.detach()) for weight, bias in maps]
    return _outputs(x.detach().contiguous(), fixed, patterns, ks, activation, [(None, None)] * len(maps))


def sparse_linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*rows o"]:
    """x W^T + b without the zeros of W, see `linear_maps`."""
    return linear_maps(x, [(weight, bias)], sparse=[True], keep=[None])[0]


def weight_gradient(
    grad: Float[Tensor, "*rows o"], x: Float[Tensor, "*rows i"]
) -> tuple[Float[Tensor, "o i"], Float[Tensor, " o"]]:
    """Gradients of weight and bias of a linear map from that of its output, for float32 on a CPU where `available()`.

    grad^T x costs in proportion to the non-zeros of `grad`; a `grad` that is not mostly zeros is multiplied by oneDNN.
    """
    output = Gradient(grad, grad.shape[-1], None, None)
    _run([output], [None], [True], None)
    return output.weight(x.contiguous()), output.parts[3].sum(0)


def dense_product(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*rows o"]:
    """x W^T + b, zeros and all, by oneDNN where torch has it: on many CPUs it takes half of the default's time."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# --- forward ---------------------------------------------------------------------------------------------------------


class _Finish(ctypes.Structure):
    _fields_ = [("width", c_int64), ("keep", c_int64), ("activation", c_int64), ("cut", c_float), ("crowd", c_float)]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("start", "entries", "bias", "out", "mask", "slope")),
        ("finish", _Finish),
    ]


def _at(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous(), "a kernel reads tensors in order"
    return None if tensor is None else tensor.data_ptr()


def _outputs(
    x: Tensor,
    maps: Sequence[Map],
    patterns: Sequence[Pattern | None],
    ks: Sequence[int],
    activation: str,
    records: Sequence[tuple[Tensor | None, Tensor | None]],
) -> tuple[Tensor, ...]:
    """What the maps make of x (contiguous); fills the records."""
    columns = x.shape[-1]
    outs, jobs, alive = [], [], []
    for (weight, bias), pattern, k, (mask, slope) in zip(maps, patterns, ks, records, strict=True):
        rows = weight.shape[0]
        if pattern is None:
            out = dense_product(x, weight, bias)
            if out._is_view():  # one that is made in here could not be changed in place outside
                out = out.new_empty(0).set_(out.untyped_storage(), 0, out.shape, out.stride())
            if k < rows or activation != "identity":
                finish(out, k, activation, mask, slope, out)
        else:
            out = x.new_empty(*x.shape[:-1], rows)
            alive.append(None if bias is None else bias.contiguous())
            places = (pattern.row_start, pattern.by_row, alive[-1], out, mask, slope)
            after = _Finish(rows, k, ACTIVATIONS[activation], *expected_cut(k, rows))
            jobs.append(_Forward(*map(_at, places), after))
        outs.append(out)
    if jobs:
        n = threads(x.numel() + sum(out.numel() for out in outs))
        call("linear_forward", (_Forward * len(jobs))(*jobs), len(jobs), columns, x, x.numel() // columns, n)
    return tuple(outs)


# --- backward --------------------------------------------------------------------------------------------------------


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("start", "entries", "grad", "mask", "slope")),
        ("rows", c_int64),
        ("keep", c_int64),
        *((name, c_void_p) for name in ("blocks", "place", "bits", "sums", "filled")),
    ]


class Gradient:
    """The gradient of one map's output, (tokens, rows), on the way back.

    `parts` is what the gradient of the weight is made from: the gradient transposed, without its zeros, in blocks of 64
    tokens. See `Backward` in linear.cpp for its five tensors.
    """

    def __init__(self, grad: Tensor, k: int, mask: Tensor | None, slope: Tensor | None) -> None:
        self.grad, self.k, self.mask, self.slope = grad.contiguous(), k, mask, slope
        self.rows, self.tokens = grad.shape[-1], grad.numel() // grad.shape[-1]
        self.parts: tuple[Tensor, ...] = ()

    def pass_back(self) -> Tensor:
        """The gradient before activation and AbsTopK, which it is from now on."""
        self.grad = pass_back(self.grad, self.k, self.mask, self.slope)
        self.mask = self.slope = None
        return self.grad

    def job(self, pattern: Pattern | None, blocks: Tensor | None) -> _Backward:
        """What the kernel is to do: with `blocks`, room for the transposed gradient, to make `parts`."""
        if blocks is not None:
            count = -(-self.tokens // _BLOCK)
            types = (torch.int32, torch.int64, torch.float32)
            place, bits, sums = (torch.empty(count, self.rows, dtype=dtype) for dtype in types)
            self.parts = (blocks, place, bits, sums, torch.empty(count, dtype=torch.int64))
        entries = (None, None) if pattern is None else (pattern.column_start, pattern.by_column)
        places = map(_at, (*entries, self.grad, self.mask, self.slope))
        return _Backward(*places, self.rows, self.k, *map(_at, self.parts or (None,) * 5))

    def weight(self, x: Tensor) -> Tensor:
        """The gradient of the weight, from the parts."""
        columns = x.shape[-1]
        blocks, place, bits, _, filled = self.parts
        if columns > NARROW and int(filled.sum()) > DENSE_GRADIENT * self.grad.numel():
            return dense_product(self.pass_back().reshape(-1, self.rows).T, x.reshape(-1, columns).T)
        out = x.new_empty(self.rows, columns)
        n = threads(self.tokens * (self.rows + columns))
        call("linear_weight", blocks, place, bits, self.rows, columns, x, self.tokens, out, n)
        return out


def _run(
    outputs: Sequence[Gradient], patterns: Sequence[Pattern | None], learns: Sequence[bool], grad_x: Tensor | None
) -> None:
    """Fills `grad_x` where it is given, from the outputs with a pattern, and makes the parts of those that learn."""
    tokens = outputs[0].tokens
    span = -(-tokens // _BLOCK) * _BLOCK
    chosen = [m for m, pattern in enumerate(patterns) if learns[m] or (pattern is not None and grad_x is not None)]
    if not chosen:
        return
    chosen.sort(key=lambda m: patterns[m] is None)
    sizes = [span * outputs[m].rows if learns[m] else 0 for m in chosen]
    rooms = workspace(sum(sizes))[: sum(sizes)].split(sizes)
    jobs = [outputs[m].job(patterns[m], room if learns[m] else None) for m, room in zip(chosen, rooms, strict=True)]
    multiplied = sum(patterns[m] is not None for m in chosen) if grad_x is not None else 0
    columns = 0 if grad_x is None else grad_x.shape[-1]
    n = threads(tokens * (columns + sum(outputs[m].rows for m in chosen)))
    call("linear_backward", (_Backward * len(jobs))(*jobs), len(jobs), multiplied, columns, tokens, grad_x, n)


class _Maps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        patterns: Sequence[Pattern | None],
        ks: Sequence[int],
        activation: str,
        sinks: Sequence[Sink | None],
        *given: Any,
    ) -> tuple[Tensor, ...]:
        maps = list(zip(given[::2], given[1::2], strict=True))
        x = x.contiguous()
        tokens = x.numel() // x.shape[-1]
        records = [record_of(tokens, len(weight), k, activation) for (weight, _), k in zip(maps, ks, strict=True)]
        ctx.patterns, ctx.ks, ctx.sinks, ctx.columns = patterns, ks, sinks, x.shape[-1]
        weights = [weight if pattern is None else None for (weight, _), pattern in zip(maps, patterns, strict=True)]
        masks, slopes = zip(*records, strict=True)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[5:]) else None, *weights, *masks, *slopes)
        return _outputs(x, maps, patterns, ks, activation, records)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        assert not torch.is_grad_enabled(), "differentiable once: no create_graph"
        n = len(grads)
        x, *saved = ctx.saved_tensors
        outputs = [Gradient(grads[m], ctx.ks[m], saved[n + m], saved[2 * n + m]) for m in range(n)]
        needs = ctx.needs_input_grad[5:]
        learns = [needs[2 * m] or needs[2 * m + 1] for m in range(n)]
        shape, grad_x = (*grads[0].shape[:-1], ctx.columns), None
        if ctx.needs_input_grad[0] and any(ctx.patterns):
            grad_x = grads[0].new_empty(shape)
        _run(outputs, ctx.patterns, learns, grad_x)
        if ctx.needs_input_grad[0]:
            for output, weight in zip(outputs, saved[:n], strict=True):
                if weight is not None:
                    part = dense_product(output.pass_back(), weight.T)
                    grad_x = part if grad_x is None else grad_x.add_(part)
        found: list[Tensor | None] = []
        for m, (output, sink) in enumerate(zip(outputs, ctx.sinks, strict=True)):
            if sink is not None and needs[2 * m]:
                sink(output, x)
            found.append(output.weight(x) if sink is None and needs[2 * m] else None)
            found.append(output.parts[3].sum(0) if needs[2 * m + 1] else None)
        return grad_x, None, None, None, None, *found

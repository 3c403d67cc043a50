"""Fast exact CPU operations beside the plain ones of `distill.model`: compiled on first use, float32, token-major.

`available()` says whether this machine has them; each gives what the plain operation gives, which a test holds it to.
"""

from distill.model.kernels.attention import causal_attention
from distill.model.kernels.build import library
from distill.model.kernels.embedding import add_rows_, embedding
from distill.model.kernels.linear import linear_maps, sparse_linear, weight_gradient, worth_it
from distill.model.kernels.loss import cross_entropy
from distill.model.kernels.norm import norm_topk
from distill.model.kernels.optimizer import AdamStep, Projected, adamw_, sum_of_squares
from distill.model.kernels.pattern import Pattern, density
from distill.model.kernels.projection import keep_, magnitude_cut, project_, shrink_
from distill.model.kernels.topk import abs_topk

__all__ = [
    "AdamStep",
    "Pattern",
    "Projected",
    "abs_topk",
    "adamw_",
    "add_rows_",
    "available",
    "causal_attention",
    "cross_entropy",
    "density",
    "embedding",
    "keep_",
    "linear_maps",
    "magnitude_cut",
    "norm_topk",
    "project_",
    "shrink_",
    "sparse_linear",
    "sum_of_squares",
    "weight_gradient",
    "worth_it",
]


def available() -> bool:
    """Whether the compiled kernels can be used on this machine; the first call compiles them (seconds)."""
    return library() is not None

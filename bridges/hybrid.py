"""Hybrid passes: runs that begin in one model and go on in the other, across the bridges [G A.3].

A pass is a beginning and a list of switches. Between two switches it is an ordinary run of one model from one
residual site to the next; at a switch the stream goes through the encoder (dense to sparse) or the decoder.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from bridges.maps import Bridges, check_bridges
from distill.model.run import Runnable
from distill.model.sites import Tap, residual_sites, site_index

Side = Literal["dense", "sparse"]


def hybrid(
    dense: Runnable,
    student: Runnable,
    bridges: Bridges,
    tokens: Int[Tensor, "B T"],
    switches: Sequence[str] = (),
    *,
    begin: Side = "dense",
    attention_mask: Int[Tensor, "B T"] | None = None,
    dense_tap: Tap | None = None,
    student_tap: Tap | None = None,
) -> Float[Tensor, "B T V"]:
    """Logits of a pass that begins in one model and changes sides at every switch.

    Arguments:
        dense: the dense model.
        student: the sparse model, of the same depth.
        bridges: the maps between the two.
        tokens: token ids.
        switches: residual sites in the order of the run; the same one twice is a round trip there. None: the whole
            run of the model that it begins in.
        begin: the model that reads the tokens.
        attention_mask: 1 for tokens, 0 for padding.
        dense_tap: handed what the dense model passes; the site it starts from was handed to the other model's tap.
        student_tap: likewise for the student.

    Returns logits of the model that the pass ends in.
    Raises `ValueError` for switches that are no sites or not in the order of the run, and for a side that is none.
    """
    _check(dense, student, bridges, switches, begin)
    models: dict[str, tuple[Runnable, Tap | None]] = {"dense": (dense, dense_tap), "sparse": (student, student_tap)}
    side, start, residual = str(begin), None, None
    for site in switches:
        model, tap = models[side]
        residual = model.run(tokens, tap=tap, start=start, residual=residual, stop=site, attention_mask=attention_mask)
        side = "sparse" if side == "dense" else "dense"
        start, residual = site, cross(bridges, models[side][0], site, residual, to=side)
    model, tap = models[side]
    return model.run(tokens, tap=tap, start=start, residual=residual, attention_mask=attention_mask)


def cross(
    bridges: Bridges, model: Runnable, site: str, residual: Float[Tensor, "B T from"], *, to: str
) -> Float[Tensor, "B T to"]:
    """The stream of the other model taken to `model`, which is the student where `to` is "sparse", in its dtype."""
    crossed = bridges.encode(site, residual) if to == "sparse" else bridges.decode(site, residual)
    return crossed.to(next(model.parameters()).dtype)


def dense_to_sparse(
    dense: Runnable, student: Runnable, bridges: Bridges, tokens: Int[Tensor, "B T"], site: str
) -> Float[Tensor, "B T V"]:
    """Logits of the student run from `site` on f_i(h_d): one switch, beginning in the dense model."""
    return hybrid(dense, student, bridges, tokens, (site,), begin="dense")


def sparse_to_dense(
    dense: Runnable, student: Runnable, bridges: Bridges, tokens: Int[Tensor, "B T"], site: str
) -> Float[Tensor, "B T V"]:
    """Logits of the dense model run from `site` on g_i(h_s): one switch, beginning in the student."""
    return hybrid(dense, student, bridges, tokens, (site,), begin="sparse")


def random_passes(n_layer: int, n: int, *, seed: int) -> list[tuple[Side, tuple[str, ...]]]:
    """`n` mixtures (begin, switches): a coin per sublayer says which model runs it, one out of 2^(2L).

    No pass switches at `final_resid`, behind which there is no sublayer. Raises `ValueError` for n below 1.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, allowed are 1 and more")
    sites = residual_sites(n_layer)
    passes: list[tuple[Side, tuple[str, ...]]] = []
    for coins in np.random.default_rng(seed).integers(0, 2, (n, 2 * n_layer)):
        changes = np.flatnonzero(np.diff(coins)) + 1
        passes.append(("sparse" if coins[0] else "dense", tuple(sites[i] for i in changes)))
    return passes


def _check(dense: Runnable, student: Runnable, bridges: Bridges, switches: Sequence[str], begin: str) -> None:
    check_bridges(bridges, n_layer=dense.n_layer, d_dense=dense.d_model, d_sparse=student.d_model)
    if student.n_layer != dense.n_layer:
        raise ValueError(f"n_layer: the student has {student.n_layer}, the dense model {dense.n_layer}; allowed: equal")
    if begin not in ("dense", "sparse"):
        raise ValueError(f"begin: got {begin!r}, allowed are dense, sparse")
    order = [site_index(site, dense.n_layer, field="switches") for site in switches]
    if order != sorted(order):
        raise ValueError(f"switches: got {', '.join(switches)}; allowed are sites in the order of the run")

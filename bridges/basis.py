"""A control for "sparse is simpler" (METHODS 6.7): the dense model with its heads turned to their own axes.

Sparse weights align a head's channels with what they do; a dense model's channels are any basis of the same space, and
a circuit in it may be large for that alone. What a head computes depends on W_Q^T W_K and W_O W_V only, so each can be
written in the basis of its singular vectors:

    W_Q^T W_K = U S V^T:  q by S^1/2 U^T, k by S^1/2 V^T        W_O W_V = U S V^T:  v by S^1/2 V^T, o by U S^1/2

The model computes the same; its channels of q, k and v are as few and as apart as they can be made.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.compare import Comparison
from bridges.lineup import TEACHER, Lineup
from distill.circuits.ablation import node_means
from distill.circuits.subject import Subject
from distill.model.anatomy import anatomy
from distill.model.dense import DenseModel


@torch.no_grad()
def rotated(model: DenseModel) -> DenseModel:
    """A copy of a dense model with every head in the basis of its singular vectors; the logits are the same.

    ValueError for rotary positions and shared keys and values, which leave no free basis.
    """
    if model.family.rotary is not None or model.n_group > 1:
        raise ValueError(
            "model: has rotary positions or heads that share keys; allowed are heads with a basis to choose"
        )
    turned = copy.deepcopy(model)
    matrices, biases = turned.matrices(), anatomy(turned).biases
    for layer in range(turned.n_layer):
        site = f"{layer}.attn."
        q, k, v = (matrices[f"{site}act_in", f"{site}{name}"] for name in "qkv")
        write = matrices[f"{site}v", f"{site}resid_delta"]
        b_q, b_k, b_v = (biases[f"{site}{name}"] for name in "qkv")
        for head in range(turned.n_head):
            at = slice(head * turned.d_head, (head + 1) * turned.d_head)
            query, key = factors(q[at].T, k[at])
            _turn(q[at], b_q[at], query.T)
            _turn(k[at], b_k[at], key)
            out, value = factors(write[:, at], v[at])
            _turn(v[at], b_v[at], value)
            write[:, at].copy_(out)
    return turned


def factors(
    left: Float[Tensor, "D H"], right: Float[Tensor, "H D"]
) -> tuple[Float[Tensor, "D H"], Float[Tensor, "H D"]]:
    """U S^1/2 and S^1/2 V^T of left @ right, whose rank is at most H."""
    # By the small matrices: the product is D wide, its rank only H.
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T)
    root = s.sqrt()
    return (q_left @ u * root).to(left), ((root[:, None] * vt) @ q_right.T).to(right)


def _turn(weight: Float[Tensor, "H D"], bias: Float[Tensor, " H"], new: Float[Tensor, "H D"]) -> None:
    """Puts new weights in place, and turns the bias by the same map."""
    change = torch.linalg.lstsq(weight.double().T, new.double().T).solution.T
    bias.copy_((change @ bias.double()).to(bias))
    weight.copy_(new)


def rotated_subject(subject: Subject, name: str) -> Subject:
    """A subject with its heads turned, and the ablation values of its new nodes. ValueError as `rotated`."""
    if not isinstance(subject.model, DenseModel):
        raise ValueError(f"model: {subject.name} has AbsTopK at its heads; allowed are dense models of transformers")
    model = rotated(subject.model)
    means = node_means(model, subject.sample[:, :-1])
    return replace(subject, name=name, model=model, means=means)


ROTATED = f"{TEACHER}_rotated"
"""What a comparison calls the bridged dense model with its heads turned."""


def add_rotated(lineup: Lineup) -> Lineup:
    """The line-up with the bridged dense model once more, rotated. ValueError without one, and as `rotated_subject`."""
    teacher = lineup.subject(TEACHER)
    if teacher is None:
        raise ValueError(
            "bridge: none is given, so there is no dense model to rotate; allowed with rotated is a bridge"
        )
    return replace(lineup, subjects=[*lineup.subjects, rotated_subject(teacher, ROTATED)])


def add_basis(comparison: Comparison) -> Comparison:
    """Adds `basis`: how the circuits of the rotated model differ in size from those of the model as it is.

    `edge_ratio_geomean`, `pruned_edge_ratio_geomean` and `node_ratio_geomean`: sizes in the model as it is over sizes
    in the rotated one, geometric means over `tasks`, those with a circuit that meets the target on unseen prompts in
    both: well above 1, the model's own basis made its circuits look larger than they are. None without a rotated model.
    """
    rows = comparison.record["tasks"]
    record: dict[str, Any] = {**comparison.record, "basis": _basis(rows)}
    return replace(comparison, record=record)


def _basis(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    if not any(ROTATED in row for row in rows.values()):
        return None
    both = {name: (row[TEACHER], row[ROTATED]) for name, row in rows.items() if ROTATED in row}
    tasks = [
        name for name, pair in both.items() if all(one["nodes"] is not None and one["meets_target"] for one in pair)
    ]
    found: dict[str, Any] = {"tasks": tasks}
    for name, size in (("edge_ratio", "edges_induced"), ("pruned_edge_ratio", "edges_pruned"), ("node_ratio", "nodes")):
        logs = [math.log(max(both[task][0][size], 1) / max(both[task][1][size], 1)) for task in tasks]
        found[f"{name}_geomean"] = math.exp(sum(logs) / len(logs)) if logs else None
    return found

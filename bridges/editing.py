"""Editing a dense model where its sparse student's circuit points, in its weights.

    edit = carry("ablate", ["2.attn.resid_delta.145"], bridges, constants(dense_means))
    edit.apply(dense).hf.save_pretrained(folder)      # an ordinary GPT-2 checkpoint

A node of the student at a write or a read is one channel c of its residual stream at a site i, and the decoder says
what one unit of it is in the dense stream: the column G_i[:, c]. At every dense write d that the node stands for, the
part of d in the span U of these columns becomes

    d' = d + U U^T ((factor - 1) d + (1 - factor) m)

which is a change of the matrix that makes the write and of its bias, exact in models without AbsTopK. m is the mean of
the write (`ablate`, `scale`) or, in the last of a node's writes, sum_c value G_i[:, c] (`clamp`), so factor 0 takes the
direction out of the write, or holds it at the value; `add` puts value G_i[:, c] on top and takes nothing out. A write
`resid_delta` stands for the same write of the dense model, a read `act_in` for every write before it. What the
embedding writes is left alone, as its matrix is the unembedding too. Other nodes (q, k, v, neurons) have no counterpart
in the dense stream; nor have edges.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.maps import Bridges, check_bridges
from distill.circuits.circuit import Circuit, names_of
from distill.circuits.edit_account import AnyEdit
from distill.circuits.edit_run import EditConfig, Maker
from distill.circuits.editing import constants
from distill.circuits.faithfulness.matched import random_sets
from distill.circuits.masks import all_nodes
from distill.circuits.subject import Subject
from distill.model import DenseModel
from distill.model.run import Runnable
from distill.model.sites import Edit, Tap, kind_of, layer_of, residual_sites, split_node

Op = Literal["ablate", "scale", "clamp", "add"]
OPS: tuple[Op, ...] = get_args(Op)
POOL = 10
"""Random sets that are drawn for each that is taken."""


@dataclass(frozen=True, kw_only=True)
class DirectionEdit:
    """Directions taken out of, scaled in, or added to the writes of a dense model."""

    op: str
    """One of `OPS`."""
    names: tuple[str, ...]
    """Nodes of the student."""
    factor: float
    """What is left of the directions' part of a write; 1 leaves it."""
    value: float | None
    """What the nodes are held at or what of them is added, in units of the student's stream; None: the mean."""
    bases: Mapping[str, Float[Tensor, "D d"]]
    """Orthonormal directions by write, `{i}.attn.resid_delta`."""
    shifts: Mapping[str, Float[Tensor, "D"]]
    """What is added to each write."""

    @torch.no_grad()
    def apply(self, model: DenseModel) -> DenseModel:
        """A copy of the dense model with the edit in its weights. ValueError for writes without a bias."""
        edited = copy.deepcopy(model)
        for location, basis in self.bases.items():
            family, i = edited.family, layer_of(location)
            part = edited.part(family.attn_out if kind_of(location) == "attn.resid_delta" else family.mlp_out, i)
            weight, bias = part.get_parameter("weight").detach(), getattr(part, "bias", None)
            shift = self.shifts[location].to(weight)
            if self.factor != 1:
                basis = basis.to(weight)
                for one in (weight.T if not family.transposed else weight, *([] if bias is None else [bias.detach()])):
                    one += (self.factor - 1) * (one @ basis) @ basis.T
            if bool((shift != 0).any()):
                if bias is None:
                    raise ValueError(f"node: {location} of this model has no bias that a constant could go into")
                bias += shift
        return edited

    def tap(self, model: Runnable) -> Tap:
        """A tap under which the dense model computes what the edited one does."""

        def at(location: str) -> Any:
            return lambda x: (
                x
                + (self.factor - 1) * (x @ self.bases[location].to(x)) @ self.bases[location].to(x).T
                + self.shifts[location].to(x)
            )

        return Edit({location: at(location) for location in self.bases})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the directions follow from nodes and bridges."""
        return {
            "op": self.op,
            "nodes": list(self.names),
            "factor": self.factor,
            "value": self.value,
            "directions": {location: basis.shape[1] for location, basis in self.bases.items()},
        }


def node_place(node: str, n_layer: int) -> tuple[str, tuple[str, ...]]:
    """The residual site whose bridge carries a node, and the dense writes that it stands for.

    ValueError for a node that is neither read nor write, or stands in front of every write.
    """
    location, _ = split_node(node)
    kind, i = kind_of(location), layer_of(location)
    sites = residual_sites(n_layer)
    if kind.endswith("resid_delta"):
        own = f"{i}.resid_in" if kind.startswith("attn") else f"{i}.resid_mid"
        return sites[sites.index(own) + 1], (location,)
    if not kind.endswith("act_in"):
        raise ValueError(f"node: {node} has no counterpart in the dense stream; allowed are reads and writes")
    site = f"{i}.resid_in" if kind.startswith("attn") else f"{i}.resid_mid"
    writes = [f"{j}.{part}.resid_delta" for j in range(n_layer) for part in ("attn", "mlp")][: sites.index(site)]
    if not writes:
        raise ValueError(f"node: {node} reads the embedding alone, which an edit leaves as it is")
    return site, tuple(writes)


def carried(nodes: Sequence[str], bridges: Bridges) -> list[str]:
    """Those of the nodes that have a counterpart in the dense model's writes; channels of positions have none."""
    found = []
    for node in nodes:
        try:
            node_place(node, bridges.shape.n_layer)
        except ValueError:
            continue
        if split_node(node)[1] < bridges.shape.d_sparse:
            found.append(node)
    return found


def carry(
    op: str,
    nodes: Sequence[str],
    bridges: Bridges,
    means: Mapping[str, Float[Tensor, "D"]],
    *,
    factor: float | None = None,
    value: float | None = None,
) -> DirectionEdit:
    """The edit of a dense model that nodes of its student stand for.

    Arguments:
        op: one of `OPS`.
        nodes: reads and writes of the student.
        means: of the dense model's writes (`distill.circuits.editing.constants`).
        factor: for scale.
        value: for clamp and add, in units of the student's stream. What the embedding holds along the directions stays
            as it is.

    ValueError for what does not fit together, and for nodes without a counterpart.
    """
    columns: dict[str, list[Tensor]] = {}
    ends: dict[str, Tensor] = {}
    for node in nodes:
        site, writes = node_place(node, bridges.shape.n_layer)
        channel = split_node(node)[1]
        if channel >= bridges.shape.d_sparse:
            raise ValueError(f"node: {node} is none of the student's, whose stream has {bridges.shape.d_sparse}")
        column = bridges.decoder_matrix(site)[:, channel].double().cpu()
        # What is added or held shall be there once, behind the last write; what is taken out goes from every write.
        for write in writes[-1:] if op == "add" else writes:
            columns.setdefault(write, []).append(column)
        ends[writes[-1]] = ends.get(writes[-1], 0) + column
    return directed(op, nodes, columns, means, factor=factor, value=value, ends=ends)


def directed(
    op: str,
    names: Sequence[str],
    columns: Mapping[str, Sequence[Float[Tensor, "D"]]],
    means: Mapping[str, Float[Tensor, "D"]],
    *,
    factor: float | None = None,
    value: float | None = None,
    ends: Mapping[str, Float[Tensor, "D"]] | None = None,
) -> DirectionEdit:
    """An edit along given directions of each write; arguments otherwise as `carry`. Directions of length 0 are none.

    `ends` say which write gets how much of `value`; by default each gets its own directions once.

    ValueError for what does not fit together.
    """
    if op not in OPS:
        raise ValueError(
            f"op: got {op!r}, allowed over a bridge are {', '.join(OPS)}; a student's edge is no weight of the dense "
            "model"
        )
    if (factor is None) == (op == "scale"):
        raise ValueError(f"factor: got {factor} with op {op}; scale needs one, and no other op has any")
    if (value is None) == (op in ("clamp", "add")):
        raise ValueError(f"value: got {value} with op {op}; clamp and add need one, and no other op has any")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"nodes: got {list(names)}, allowed are one or more, each once")
    kept = {"ablate": 0.0, "clamp": 0.0, "add": 1.0}.get(op, factor)
    assert kept is not None
    bases: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    for write, found in columns.items() if kept != 1 or op == "add" else ():
        directions = torch.stack(list(found), 1)
        if not bool(directions.any()):
            continue
        basis = orthonormal(directions)
        own = directions.sum(1) if ends is None else ends.get(write, torch.zeros(len(directions)).double())
        held = means[write].double().cpu() if value is None else value * own
        bases[write] = basis.float()
        shifts[write] = (held if op == "add" else (1 - kept) * basis @ (basis.T @ held)).float()
    return DirectionEdit(op=op, names=tuple(names), factor=kept, value=value, bases=bases, shifts=shifts)


def orthonormal(columns: Float[Tensor, "D n"]) -> Float[Tensor, "D d"]:
    """An orthonormal basis of what the columns span; directions that are all but in the others' span do not count."""
    left, size, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, size > 1e-6 * size.max().clamp_min(1e-30)]


# --- random edits that move as much -----------------------------------------------------------------------------------


@torch.no_grad()
def write_moments(
    dense: Subject, writes: Sequence[str], *, windows: int = 32
) -> dict[str, tuple[Float[Tensor, "D"], Float[Tensor, "D D"]]]:
    """Mean and covariance of some writes of a dense model over windows of its held-out text, spread over it."""
    model, sums, squares, count = dense.model, {}, {}, 0

    def add(site: str, x: Tensor, /) -> Tensor:
        if site in writes:
            rows = x.detach().double().flatten(0, -2)
            sums[site] = sums.get(site, 0) + rows.sum(0).cpu()
            squares[site] = squares.get(site, 0) + (rows.T @ rows).cpu()
        return x

    device = next(model.parameters()).device
    rows = torch.linspace(0, len(dense.sample) - 1, min(windows, len(dense.sample))).round().long()
    for part in dense.sample[rows, :-1].split(16):
        model.run(part.to(device), tap=add, stop="final_resid")
        count += part.numel()
    means = {write: total / count for write, total in sums.items()}
    return {write: (mean, squares[write] / count - mean[:, None] * mean) for write, mean in means.items()}


def moved(edit: DirectionEdit, moments: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Root of the mean square of what an edit changes of the writes, over tokens, summed over writes: exactly that of
    (factor - 1) U U^T d + shift, d with these moments, and all other writes as they were."""
    total = 0.0
    for write, basis in edit.bases.items():
        (mean, covariance), u = moments[write], basis.double()
        steady = (edit.factor - 1) * u @ (u.T @ mean) + edit.shifts[write].double()
        total += (edit.factor - 1) ** 2 * float((u * (covariance @ u)).sum()) + float(steady @ steady)
    return max(total, 0.0) ** 0.5


def moving_alike(
    edit: DirectionEdit, pool: Sequence[DirectionEdit], moments: Mapping[str, tuple[Tensor, Tensor]], count: int
) -> list[DirectionEdit]:
    """The `count` edits of a pool that move most nearly as much as `edit`, by the ratio."""
    wanted = moved(edit, moments)

    def away(one: DirectionEdit) -> float:
        found = moved(one, moments)
        return abs(math.log(found / wanted)) if found > 0 and wanted > 0 else float("inf")

    return sorted(pool, key=away)[:count]


def check_config(config: EditConfig) -> None:
    """ValueError for settings of AbsTopK, which a dense model does not have."""
    if not config.competition:
        raise ValueError("competition: a dense model has no AbsTopK to compete for; leave it as it is over a bridge")
    if config.inexact:
        raise ValueError("inexact: every edit over a bridge is exact; leave it as it is")


def bridged_maker(dense: Subject, student: Subject, bridges: Bridges, circuit: Circuit, config: EditConfig) -> Maker:
    """Edits of a dense model by nodes of its student's circuit, and random ones.

    Of `POOL` times as many random sets, as many nodes at every location of the student and as active there, those are
    taken whose edits move the dense model's writes most nearly as much (`moved`): what is active in the student need
    not be so in the dense model.

    CircuitMismatchError unless the circuit is the student's; ValueError for what does not fit together.
    """
    circuit.check(student.model)
    check_config(config)
    check_bridges(bridges, n_layer=dense.model.n_layer, d_dense=dense.model.d_model, d_sparse=student.model.d_model)
    values = constants(dense.means)

    def make(names: Sequence[str]) -> DirectionEdit:
        return carry(config.op, names, bridges, values, factor=config.factor, value=config.value)

    def random(edit: AnyEdit, count: int) -> list[DirectionEdit]:
        nodes = all_nodes(student.model.widths, keep=False)
        for name in edit.names:
            location, channel = split_node(name)
            nodes[location][channel] = True
        assert isinstance(edit, DirectionEdit), edit
        generator = torch.Generator().manual_seed(config.seed)
        drawn = [names_of(one) for one in random_sets(nodes, student.means, POOL * count, generator)]
        # A channel of positions may be drawn, which stands for nothing in the dense model.
        pool = [make(names) for names in drawn if len(carried(names, bridges)) == len(names)]
        if len(pool) < count:
            raise ValueError(
                f"controls: got {count}, but of {len(drawn)} sets of random nodes only {len(pool)} have counterparts "
                f"in the dense model; allowed are up to {len(pool)}"
            )
        return moving_alike(edit, pool, write_moments(dense, list(edit.bases)), count)

    return Maker(candidates=carried(circuit.node_names, bridges), make=make, random=random)

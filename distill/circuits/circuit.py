"""A circuit: the nodes of one model that one task needs, with all that it takes to run, count and compare them.

An edge is a non-zero weight between two kept nodes [G 2.2]; the edges of q, k, v, of the attention output and of the
two MLP matrices make up `edges_induced`, the count that the source reports. Embedding and unembedding are never
masked; their entries that touch the circuit are counted apart, `edges_embed`: the non-zeros in embedding columns c that
a kept read `act_in.c` sees, and in unembedding columns c that a kept write `resid_delta.c` reaches.

A file `*.circuit.safetensors` holds everything, the ablation values included.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from scipy import sparse
from torch import Tensor

from distill.artifact import ArtifactError, load_tensors, save_tensors, versions
from distill.circuits.ablation import Means
from distill.circuits.answers import Calibration
from distill.circuits.masks import MaskTap, Nodes, node_count
from distill.model.run import Runnable
from distill.model.sites import node_name

SUFFIX = ".circuit.safetensors"

Edges = dict[tuple[str, str], sparse.csr_array]
"""Weights of the kept edges by (source location, target location), (n_target, n_source)."""


class CircuitMismatchError(ValueError):
    """A circuit and a model, or two circuits, that do not belong together."""


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """The nodes that a task needs in a model, what the others are set to, and how well it does."""

    model: str
    """Fingerprint of the model."""
    model_name: str
    """What a person calls the model."""
    task: str
    """Name of the task."""
    nodes: Nodes
    """Kept nodes: a bool per channel, by location in the order of the run."""
    scores: Mapping[str, Tensor]
    """Score of every node of the model, higher is kept first (tau after learning)."""
    means: Means
    """Ablation values of every node."""
    calibration: Calibration
    """Scale and shift of the answers' logit difference, fitted on training prompts."""
    losses: Mapping[str, float]
    """Task losses in nats on the validation prompts: full, empty, circuit, calibrated, competition."""
    target: float
    """Task loss that was asked for, in nats."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Configuration, seed, label, seconds, and library versions."""

    @property
    def n_nodes(self) -> int:
        """Number of kept nodes; q and k of one channel are two."""
        return node_count(self.nodes)

    @property
    def node_names(self) -> list[str]:
        """Names of the kept nodes, `3.attn.act_in.83`, in the order of the run."""
        return names_of(self.nodes)

    def check(self, model: Runnable) -> None:
        """CircuitMismatchError naming both fingerprints unless this is a circuit of `model`."""
        found = model.fingerprint()
        if found != self.model:
            raise CircuitMismatchError(
                f"circuit: made for model {self.model_name!r} with fingerprint {self.model[:12]}, "
                f"but the model given has {found[:12]}; load the model it was made for"
            )

    def tap(self, model: Runnable, *, competition: bool = False) -> MaskTap:
        """A tap under which `model` runs only this circuit. CircuitMismatchError for another model."""
        self.check(model)
        return MaskTap(self.nodes, self.means, competition=competition)

    def edges(self, model: Runnable) -> Edges:
        """Weights of `edges_induced`: every non-zero between two kept nodes. CircuitMismatchError for another model."""
        self.check(model)
        return induced_edges(model, self.nodes)

    def counts(self, model: Runnable) -> dict[str, int | float]:
        """nodes, edges_induced, edges_embed, and edges_null, the edges expected of as many nodes drawn blindly."""
        return {
            "nodes": self.n_nodes,
            "edges_induced": sum(matrix.nnz for matrix in self.edges(model).values()),
            "edges_embed": embed_edges(model, self.nodes),
            "edges_null": null_edges(model, self.nodes),
        }

    def union(self, other: "Circuit") -> Nodes:
        """Nodes in either circuit."""
        return self._joined(other, torch.logical_or)

    def intersection(self, other: "Circuit") -> Nodes:
        """Nodes in both circuits."""
        return self._joined(other, torch.logical_and)

    def difference(self, other: "Circuit") -> Nodes:
        """Nodes in this circuit and not in the other."""
        return self._joined(other, lambda mine, theirs: mine & ~theirs)

    def jaccard(self, other: "Circuit") -> float:
        """Shared nodes over nodes in either, in [0, 1]; 1 for two empty circuits."""
        either = node_count(self.union(other))
        return node_count(self.intersection(other)) / either if either else 1.0

    def with_nodes(self, nodes: Nodes) -> "Circuit":
        """The same model, task and ablation values with other nodes; losses and calibration are to be measured anew."""
        return replace(self, nodes=nodes, losses={}, calibration=Calibration())

    def _joined(self, other: "Circuit", join: Any) -> Nodes:
        if self.model != other.model:
            raise CircuitMismatchError(
                f"circuit: {self.model_name!r} ({self.model[:12]}) and {other.model_name!r} ({other.model[:12]}) are "
                "different models; nodes can only be compared within one"
            )
        return {location: join(mask, other.nodes[location]) for location, mask in self.nodes.items()}

    def save(self, path: str | Path) -> Path:
        """Writes one file; the name must end in `.circuit.safetensors`. Returns the path."""
        path = Path(path)
        if not path.name.endswith(SUFFIX):
            raise ValueError(f"path: {path.name!r} is no name for a circuit; allowed are names ending in {SUFFIX}")
        tensors = {f"nodes/{location}": mask for location, mask in self.nodes.items()}
        tensors |= {f"scores/{location}": score for location, score in self.scores.items()}
        tensors |= {f"mean/{location}": value for location, value in self.means.values.items()}
        tensors |= {f"magnitude/{location}": value for location, value in self.means.magnitude.items()}
        metadata = {"kind": "circuit", **self._head(), "means": self.means.head()}
        save_tensors(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Reads what `save` wrote. ArtifactError for a file that is damaged or no circuit."""
        tensors, head = load_tensors(Path(path), kind="circuit")
        groups: dict[str, Nodes] = {"nodes": {}, "scores": {}, "mean": {}, "magnitude": {}}
        try:
            # The file sorts its tensors by name; the order of the run is kept in the metadata.
            for location in head["locations"]:
                for what, group in groups.items():
                    if f"{what}/{location}" not in tensors:
                        raise ArtifactError(f"{path}: holds no {what} of {location}, so it is no whole circuit")
                    group[location] = tensors[f"{what}/{location}"]
            return cls(
                nodes=groups["nodes"],
                scores=groups["scores"],
                means=Means(values=groups["mean"], magnitude=groups["magnitude"], model=head["model"], **head["means"]),
                calibration=Calibration(**head["calibration"]),
                **{name: head[name] for name in ("model", "model_name", "task", "losses", "target", "provenance")},
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: is no whole circuit, {error} is missing or of the wrong kind") from error

    def to_json(self, model: Runnable | None = None) -> dict[str, Any]:
        """A readable summary; with the model also counts and every edge as [source, target, weight].

        Values are plain JSON. CircuitMismatchError for another model.
        """
        head = self._head()
        summary = {**head, "n_nodes": self.n_nodes, "nodes": self.node_names}
        if model is None:
            return summary
        return {**summary, "counts": self.counts(model), "edges": edge_list(self.edges(model))}

    def _head(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_name": self.model_name,
            "task": self.task,
            "target": self.target,
            "losses": dict(self.losses),
            "calibration": asdict(self.calibration),
            "locations": list(self.nodes),
            "provenance": {"versions": versions(), **self.provenance},
        }


def names_of(nodes: Nodes) -> list[str]:
    """Names of a set of nodes, in the order of the run."""
    return [node_name(location, int(c)) for location, mask in nodes.items() for c in mask.nonzero()[:, 0]]


def induced_edges(model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]]) -> Edges:
    """Every non-zero weight between two kept nodes, by (source location, target location) [G 2.2]."""
    found: Edges = {}
    for (source, target), weight in model.matrices().items():
        columns = nodes[source].nonzero()[:, 0].numpy()
        rows = nodes[target].nonzero()[:, 0].numpy()
        block = sparse.coo_array(weight[rows][:, columns].float().cpu().numpy())
        place = (rows[block.coords[0]], columns[block.coords[1]])
        found[source, target] = sparse.csr_array((block.data, place), shape=tuple(weight.shape))
    return found


def edge_list(edges: Edges) -> list[list[Any]]:
    """Every edge as [source node, target node, weight], in the order of the run."""
    listed: list[list[Any]] = []
    for (source, target), matrix in edges.items():
        entries = matrix.tocoo()
        listed += [
            [node_name(source, int(column)), node_name(target, int(row)), float(weight)]
            for row, column, weight in zip(*entries.coords, entries.data, strict=True)
        ]
    return listed


def embed_edges(model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]]) -> int:
    """Number of embedding and unembedding entries that touch the circuit; see the module's docstring."""
    read, written = _touched(model, nodes, "act_in"), _touched(model, nodes, "resid_delta")
    return int(model.embedding()[:, read].count_nonzero()) + int(model.unembedding()[:, written].count_nonzero())


def _touched(model: Runnable, nodes: Mapping[str, Tensor], kind: str) -> Tensor:
    # Cut to D: reads may have position channels behind the residual ones.
    masks = [mask[: model.d_model] for location, mask in nodes.items() if location.endswith(kind)]
    return torch.stack(masks).any(0).cpu()


def null_edges(model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]]) -> float:
    """Sum over matrices of n_in * n_out * density: the edges that as many nodes would have if weights were blind."""
    total = 0.0
    for (source, target), weight in model.matrices().items():
        density = int(weight.count_nonzero()) / weight.numel()
        total += int(nodes[source].sum()) * int(nodes[target].sum()) * density
    return total

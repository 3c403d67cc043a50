"""A circuit: the nodes of one model that one task needs, with all that it takes to run, count and compare them.

An edge is a non-zero weight between two kept nodes [G 2.2]; the edges of q, k, v, of the attention output and of the
two MLP matrices make up `edges_induced`, the count that the source reports. A circuit may keep only some of these
(`kept_edges`); their number is `edges_pruned`, and what a dropped one amounts to stands in `distill.circuits.edges`.
Embedding and unembedding are never masked; their entries that touch the circuit are counted apart, `edges_embed`: the
non-zeros in embedding columns c that a kept read `act_in.c` sees, and in unembedding columns c that a kept write
`resid_delta.c` reaches.

A file `*.circuit.safetensors` holds everything, the ablation values included.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from scipy import sparse
from torch import Tensor

from distill.artifact import ArtifactError, load_tensors, save_tensors, versions
from distill.circuits.ablation import ABLATIONS, Means, check_means
from distill.circuits.answers import Calibration
from distill.circuits.edges import (
    EdgeSet,
    checked_edges,
    circuit_tap,
    edge_difference,
    edge_intersection,
    edge_total,
    edge_union,
    induced_edge_set,
)
from distill.circuits.masks import Nodes, node_count
from distill.circuits.standalone import Standalone, standalone
from distill.fields import check_fields, check_numbers
from distill.model.run import Runnable
from distill.model.sites import KINDS, Tap, layer_of, node_name

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
    kept_edges: EdgeSet | None = None
    """Kept edges by (source location, target location), (2, n): target channels above source channels; none: all that
    join two kept nodes. Checked and sorted when a circuit is made."""

    def __post_init__(self) -> None:
        if self.kept_edges is not None:
            object.__setattr__(self, "kept_edges", checked_edges(self.kept_edges, self.nodes))

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

    def tap(self, model: Runnable, *, competition: bool = False) -> Tap:
        """A tap under which `model` runs only this circuit. CircuitMismatchError for another model."""
        return circuit_tap(model, self.nodes, self.means, self._edges_of(model), competition=competition)

    def to_module(self, model: Runnable, *, first_tokens: Int[Tensor, "F"] | None = None) -> Standalone:
        """The circuit without its model: a torch module with the same logits (`distill.circuits.standalone`).

        `first_tokens` are those that may stand at position 0 where that is protected from ablation; none: any.
        CircuitMismatchError for another model; ValueError for one whose circuits cannot stand alone.
        """
        return standalone(model, self.nodes, self.means, self._edges_of(model), first_tokens=first_tokens)

    def edge_set(self, model: Runnable) -> EdgeSet:
        """The kept edges by their channels, `edges_induced` where none were dropped. CircuitMismatchError likewise."""
        kept = self._edges_of(model)
        return induced_edge_set(model, self.nodes) if kept is None else kept

    def edges(self, model: Runnable) -> Edges:
        """Weights of the kept edges. CircuitMismatchError for another model."""
        return edge_weights(model, self.edge_set(model))

    def _edges_of(self, model: Runnable) -> EdgeSet | None:
        """`kept_edges`, each of which has to be a weight of the model."""
        self.check(model)
        if self.kept_edges is None:
            return None
        stray = edge_difference(self.kept_edges, induced_edge_set(model, self.nodes))
        for (source, target), index in stray.items():
            if index.shape[1]:
                ends = node_name(source, int(index[1, 0])), node_name(target, int(index[0, 0]))
                raise CircuitMismatchError(
                    f"circuit: keeps the edge {ends[0]} -> {ends[1]}, where the model has no weight"
                )
        return self.kept_edges

    def counts(self, model: Runnable) -> dict[str, int | float]:
        """nodes, edges_induced, edges_pruned, edges_embed, and edges_null.

        edges_induced counts all that join two kept nodes, edges_pruned those of them that are kept, edges_null those
        that are expected between as many nodes drawn blindly.
        """
        return {
            "nodes": self.n_nodes,
            "edges_induced": edge_total(induced_edge_set(model, self.nodes)),
            "edges_pruned": edge_total(self.edge_set(model)),
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

    def edge_union(self, other: "Circuit", model: Runnable) -> EdgeSet:
        """Edges in either circuit of `model`."""
        return edge_union(*self._edge_sets(other, model))

    def edge_intersection(self, other: "Circuit", model: Runnable) -> EdgeSet:
        """Edges in both circuits of `model`."""
        return edge_intersection(*self._edge_sets(other, model))

    def edge_difference(self, other: "Circuit", model: Runnable) -> EdgeSet:
        """Edges in this circuit of `model` and not in the other."""
        return edge_difference(*self._edge_sets(other, model))

    def edge_jaccard(self, other: "Circuit", model: Runnable) -> float:
        """Shared edges over edges in either, in [0, 1]; 1 for two circuits without an edge."""
        one, two = self._edge_sets(other, model)
        either = edge_total(edge_union(one, two))
        return edge_total(edge_intersection(one, two)) / either if either else 1.0

    def with_nodes(self, nodes: Nodes) -> "Circuit":
        """The same model, task and ablation values with other nodes and all edges between them.

        Losses and calibration are to be measured anew.
        """
        return replace(self, nodes=nodes, kept_edges=None, losses={}, calibration=Calibration())

    def with_edges(self, edges: EdgeSet | None) -> "Circuit":
        """The same nodes with other edges, none for all between them; losses and calibration are to be measured anew.

        ValueError for an edge that has an end outside the nodes.
        """
        return replace(self, kept_edges=edges, losses={}, calibration=Calibration())

    def _edge_sets(self, other: "Circuit", model: Runnable) -> tuple[EdgeSet, EdgeSet]:
        self._check_same(other)
        return self.edge_set(model), other.edge_set(model)

    def _joined(self, other: "Circuit", join: Any) -> Nodes:
        self._check_same(other)
        return {location: join(mask, other.nodes[location]) for location, mask in self.nodes.items()}

    def _check_same(self, other: "Circuit") -> None:
        if self.model != other.model:
            raise CircuitMismatchError(
                f"circuit: {self.model_name!r} ({self.model[:12]}) and {other.model_name!r} ({other.model[:12]}) are "
                "different models; nodes and edges can only be compared within one"
            )

    def save(self, path: str | Path) -> Path:
        """Writes one file; the name must end in `.circuit.safetensors`. Returns the path."""
        path = Path(path)
        if not path.name.endswith(SUFFIX):
            raise ValueError(f"path: {path.name!r} is no name for a circuit; allowed are names ending in {SUFFIX}")
        tensors = {f"nodes/{location}": mask for location, mask in self.nodes.items()}
        tensors |= {f"scores/{location}": score for location, score in self.scores.items()}
        tensors |= {f"mean/{location}": value for location, value in self.means.values.items()}
        tensors |= {f"magnitude/{location}": value for location, value in self.means.magnitude.items()}
        for (source, target), index in (self.kept_edges or {}).items():
            tensors[f"edges/{source}/{target}"] = index.to(torch.int32)
        metadata = {"kind": "circuit", **self._head(), "means": self.means.head(), "edges": self.kept_edges is not None}
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
            _check_head(path, head)
            nodes, edges = _read_nodes(path, groups), _read_edges(tensors) if head.get("edges") else None
            check_means(path, groups["mean"], groups["magnitude"])
            return cls(
                nodes=nodes,
                kept_edges=edges,
                scores=groups["scores"],
                means=Means(values=groups["mean"], magnitude=groups["magnitude"], model=head["model"], **head["means"]),
                calibration=Calibration(**head["calibration"]),
                **{name: head[name] for name in ("model", "model_name", "task", "losses", "target", "provenance")},
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: is no whole circuit, {error} is missing or of the wrong kind") from error
        except ArtifactError:
            raise
        except ValueError as error:
            raise ArtifactError(f"{path}: is no whole circuit; {error}") from error

    def to_json(self, model: Runnable | None = None) -> dict[str, Any]:
        """A readable summary; with the model also counts and every edge as [source, target, weight].

        Values are plain JSON. CircuitMismatchError for another model.
        """
        head = self._head()
        summary = {**head, "n_nodes": self.n_nodes, "nodes": self.node_names}
        if model is None:
            return summary
        return {**summary, "counts": self.counts(model), "edges": edge_list(self.edges(model))}

    def _repr_html_(self) -> str:
        """A summary for notebooks: losses, and kept nodes by layer and location. `viewer.view` shows all of it."""
        layers = sorted({layer_of(location) for location in self.nodes})
        head = "".join(f"<th>layer {layer}</th>" for layer in layers)
        rows = "".join(
            f"<tr><th style='text-align:left'>{kind}</th>"
            + "".join(f"<td>{int(self.nodes[f'{layer}.{kind}'].sum())}</td>" for layer in layers)
            + "</tr>"
            for kind in KINDS
        )
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        label = self.provenance.get("label") or ""
        return (
            f"<b>{escape(self.task)} in {escape(self.model_name)}</b>: {self.n_nodes} nodes, target {self.target:g}"
            f"<br>task losses: {escape(losses)} {escape(str(label))}<table><tr><th></th>{head}</tr>{rows}</table>"
        )

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


def _check_head(path: str | Path, head: Mapping[str, Any]) -> None:
    """What a file says beside its tensors, each of its kind."""
    texts = dict.fromkeys(("model", "model_name", "task"), str)
    objects = dict.fromkeys(("losses", "calibration", "provenance", "means"), dict)
    check_fields(path, head, {**texts, **objects, "target": float, "locations": list})
    check_fields(path, head["calibration"], {"scale": float, "shift": float})
    check_fields(path, head["means"], {"data": str, "tokens": int, "protect_first": bool})
    check_numbers(path, "losses", head["losses"])
    if head["means"].get("kind", "mean") not in ABLATIONS:
        raise ArtifactError(f"{path}: means.kind is {head['means']['kind']!r}, allowed are {', '.join(ABLATIONS)}")
    for location in head["locations"]:
        layer, _, kind = location.partition(".") if isinstance(location, str) else ("", "", "")
        if kind not in KINDS or not layer.isdecimal():
            raise ArtifactError(f"{path}: locations holds {location!r}; allowed are locations of nodes")
    if len(set(head["locations"])) < len(head["locations"]):
        raise ArtifactError(f"{path}: locations holds one twice")


def _read_nodes(path: str | Path, groups: Mapping[str, Nodes]) -> Nodes:
    """The nodes of a file, whose tensors have to fit each other."""
    for location, mask in groups["nodes"].items():
        shape = tuple(mask.shape)
        if mask.dtype != torch.bool or mask.dim() != 1:
            raise ArtifactError(
                f"{path}: nodes of {location} are {mask.dtype} of shape {shape}; allowed is one bool each"
            )
        for what in ("scores", "mean", "magnitude"):
            if groups[what][location].shape[-1:] != mask.shape or not groups[what][location].is_floating_point():
                found = tuple(groups[what][location].shape)
                raise ArtifactError(f"{path}: {what} of {location} has shape {found} for {len(mask)} nodes")
    return groups["nodes"]


def _read_edges(tensors: Mapping[str, Tensor]) -> EdgeSet:
    """The kept edges of a file; `Circuit` checks them against its nodes."""
    found: EdgeSet = {}
    for name, index in tensors.items():
        what, _, matrix = name.partition("/")
        if what == "edges":
            source, _, target = matrix.partition("/")
            found[source, target] = index
    return found


def edge_weights(model: Runnable, edges: EdgeSet) -> Edges:
    """Weights of some edges of a model, by (source location, target location)."""
    weights = model.matrices()
    found: Edges = {}
    for matrix, index in edges.items():
        weight = weights[matrix]
        at = index.to(weight.device)
        values = weight[at[0], at[1]].float().cpu().numpy()
        found[matrix] = sparse.csr_array((values, tuple(index.numpy())), shape=tuple(weight.shape))
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

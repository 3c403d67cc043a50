"""Circuits for other programs: networkx graphs, GraphML, edge lists, JSON, and the circuit files of the MIB benchmark.

In all but the last, which knows whole components only (`distill.circuits.mib`), a node is called as everywhere here,
`3.attn.act_in.83`, and an edge is a kept weight. Each form says its version: the JSON files and the graph as
`format_version`, the edge list by its first line.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.artifact import FORMAT_VERSION, write_json, write_text
from distill.circuits.circuit import Circuit, edge_list
from distill.circuits.mib import write_mib
from distill.model.run import Runnable
from distill.model.sites import kind_of, layer_of, node_name

if TYPE_CHECKING:
    import networkx

COLUMNS = ("source", "target", "weight")


def to_networkx(circuit: Circuit, model: Runnable) -> "networkx.DiGraph":
    """The circuit as a directed graph: kept nodes, and kept edges from source to target with their `weight`.

    Nodes carry `location`, `layer`, `kind`, `channel` and `score`; the graph carries model, task, target, losses and
    counts. Values are plain. ValueError where networkx is not installed; CircuitMismatchError for another model.
    """
    try:
        import networkx
    except ModuleNotFoundError as error:
        raise ValueError(
            "networkx: is not installed, and graphs and GraphML need it: pip install networkx; "
            "edge lists (.csv) and .json do without"
        ) from error
    head = {"format_version": FORMAT_VERSION, "model": circuit.model, "model_name": circuit.model_name}
    head |= {"task": circuit.task, "target": circuit.target}
    losses = {f"loss_{name}": value for name, value in circuit.losses.items()}
    graph = networkx.DiGraph()
    graph.graph |= head | losses | circuit.counts(model)
    for location, mask in circuit.nodes.items():
        for channel in mask.nonzero()[:, 0].tolist():
            graph.add_node(
                node_name(location, channel),
                location=location,
                layer=layer_of(location),
                kind=kind_of(location),
                channel=channel,
                score=float(circuit.scores[location][channel]),
            )
    for source, target, weight in edge_list(circuit.edges(model)):
        graph.add_edge(source, target, weight=weight)
    return graph


def write_graphml(circuit: Circuit, model: Runnable, path: str | Path) -> Path:
    """Writes `to_networkx` as GraphML, which Gephi, Cytoscape and yEd read. Returns the path."""
    graph = to_networkx(circuit, model)
    import networkx

    return _write(path, "\n".join(networkx.generate_graphml(graph)) + "\n")


def write_edge_list(circuit: Circuit, model: Runnable, path: str | Path) -> Path:
    """Writes the kept edges as CSV, one a line in the order of the run: source, target, weight. Returns the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(edge_list(circuit.edges(model)))
    return _write(path, text.getvalue())


def write_summary(circuit: Circuit, model: Runnable, path: str | Path) -> Path:
    """Writes `Circuit.to_json` with counts and kept edges. Returns the path."""
    write_json(path, {"format_version": FORMAT_VERSION, **circuit.to_json(model)})
    return Path(path)


WRITERS: Mapping[str, Any] = {
    ".graphml": write_graphml,
    ".csv": write_edge_list,
    ".mib.json": write_mib,
    ".json": write_summary,
}


def export(circuit: Circuit, model: Runnable, path: str | Path) -> Path:
    """Writes a circuit in the form that the name of the file asks for, one of `WRITERS`. Returns the path.

    ValueError for another name; see `to_networkx`, `distill.circuits.mib`.
    """
    for ending, write in WRITERS.items():
        if Path(path).name.endswith(ending):
            return write(circuit, model, path)
    raise ValueError(f"path: {Path(path).name!r} ends in no known form; allowed are {', '.join(WRITERS)}")


def _write(path: str | Path, text: str) -> Path:
    """Writes a text file whole or not at all."""
    write_text(path, text)
    return Path(path)

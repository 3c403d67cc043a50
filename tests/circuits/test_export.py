"""Exports: what another program reads back is the circuit."""

import csv
import json
import sys
from pathlib import Path

import networkx
import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.export import export, to_networkx, write_edge_list

OUT = ("0.attn.v", "0.attn.resid_delta")


@pytest.fixture
def model(make_planted):
    return make_planted(0, stray=0.1)


@pytest.fixture
def circuit(model, make_windows, choose):
    whole = Circuit(
        model=model.fingerprint(),
        model_name="planted <&>",
        task="opener",
        nodes=choose(model),
        scores={location: torch.arange(width).float() for location, width in model.widths.items()},
        means=node_means(model, make_windows()),
        calibration=Calibration(),
        losses={"circuit": 0.02},
        target=0.15,
    )
    edges = whole.edge_set(model)
    edges["0.attn.act_in", "0.attn.q"] = torch.tensor([[0], [1]])
    return whole.with_edges(edges)


def test_a_graph_has_the_kept_nodes_and_edges(circuit, model, planted_names):
    graph = to_networkx(circuit, model)
    assert set(graph.nodes) == set(planted_names) and graph.number_of_edges() == 8
    assert graph.edges["0.attn.v.0", "0.attn.resid_delta.3"]["weight"] == 1.0
    assert graph.nodes["0.attn.resid_delta.3"] == {
        "location": "0.attn.resid_delta", "layer": 0, "kind": "attn.resid_delta", "channel": 3, "score": 3.0,
    }  # fmt: skip
    assert graph.graph["edges_induced"] == 10 and graph.graph["edges_pruned"] == 8
    assert graph.graph["task"] == "opener" and graph.graph["model"] == circuit.model
    assert networkx.is_directed_acyclic_graph(graph)


def test_graphml_is_read_back(tmp_path, circuit, model):
    path = export(circuit, model, tmp_path / "new" / "a.graphml")
    back, graph = networkx.read_graphml(path), to_networkx(circuit, model)
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert {ends: back.edges[ends]["weight"] for ends in back.edges} == {
        ends: graph.edges[ends]["weight"] for ends in graph.edges
    }
    assert back.graph["model_name"] == "planted <&>"


def test_an_edge_list_has_a_line_for_each_edge(tmp_path, circuit, model):
    with export(circuit, model, tmp_path / "a.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["source", "target", "weight"] and len(lines) == 9
    assert ["0.attn.act_in.1", "0.attn.q.0", "1.2000000476837158"] in lines
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    none = circuit.with_edges({})
    assert write_edge_list(none, model, tmp_path / "a.csv").read_text() == "source,target,weight\n"


def test_json_has_the_edges_that_are_kept(tmp_path, circuit, model):
    summary = json.loads(export(circuit, model, tmp_path / "a.json").read_text())
    assert summary["counts"]["edges_pruned"] == len(summary["edges"]) == 8
    assert len(summary["nodes"]) == 7


def test_what_cannot_be_exported_is_refused_in_words(tmp_path, circuit, model, make_planted, monkeypatch):
    with pytest.raises(
        ValueError, match=r"'a\.dot' ends in no known form; allowed are \.graphml, \.csv, \.mib\.json, \.json"
    ):
        export(circuit, model, tmp_path / "a.dot")
    with pytest.raises(CircuitMismatchError):
        export(circuit, make_planted(1), tmp_path / "a.csv")
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ValueError, match="pip install networkx"):
        export(circuit, model, Path(tmp_path / "a.graphml"))
    assert list(tmp_path.iterdir()) == []

"""Circuit files of the MIB benchmark, on the model whose circuit is known."""

import json
from dataclasses import replace

import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.export import export
from distill.circuits.mib import LOST, mib_graph
from distill.model.transformer import Architecture, SparseTransformer


def circuit_of(model, nodes, make_windows=None):
    windows = make_windows() if make_windows else torch.randint(0, 7, (4, 6))
    return Circuit(
        model=model.fingerprint(),
        model_name="planted",
        task="opener",
        nodes=nodes,
        scores={location: torch.zeros(width) for location, width in model.widths.items()},
        means=node_means(model, windows),
        calibration=Calibration(),
        losses={},
        target=0.15,
    )


def test_the_planted_circuit_is_one_head(tmp_path, planted, make_windows, choose):
    circuit = circuit_of(planted, choose(planted), make_windows)
    graph = json.loads(export(circuit, planted, tmp_path / "a.mib.json").read_text())
    assert graph["cfg"] == {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 16}
    assert {name: node["in_graph"] for name, node in graph["nodes"].items()} == {
        "input": True, "a0.h0": True, "m0": False, "logits": True,
    }  # fmt: skip
    assert [n for n, on in enumerate(graph["nodes"]["a0.h0"]["neurons"]) if on] == [3]
    # The embedding has entries in channels 0 to 2; q reads 1, k reads 2, v reads 0; C and D read channel 3.
    assert graph["edges"] == {
        "input->a0.h0<q>": {"score": 1.0, "in_graph": True},
        "input->a0.h0<k>": {"score": 1.0, "in_graph": True},
        "input->a0.h0<v>": {"score": 1.0, "in_graph": True},
        "input->m0": {"score": 0.0, "in_graph": False},
        "a0.h0->m0": {"score": 0.0, "in_graph": False},
        "input->logits": graph["edges"]["input->logits"],
        "a0.h0->logits": {"score": 1.0, "in_graph": True},
        "m0->logits": {"score": 0.0, "in_graph": False},
    }
    assert graph["lost"] == list(LOST) and graph["format_version"] == 1


def test_a_dropped_edge_takes_its_component_along(planted, make_windows, choose):
    circuit = circuit_of(planted, choose(planted), make_windows)
    edges = circuit.edge_set(planted)
    edges["0.attn.v", "0.attn.resid_delta"] = torch.empty(2, 0, dtype=torch.long)
    graph = mib_graph(circuit.with_edges(edges), planted)
    assert not graph["nodes"]["a0.h0"]["in_graph"] and not graph["edges"]["a0.h0->logits"]["in_graph"]
    assert graph["edges"]["input->a0.h0<q>"]["in_graph"]


@pytest.mark.parametrize("position", ["none", "concat"])
def test_every_edge_of_the_form_is_there(position):
    """As many as `Graph.from_model` of the benchmark has, in their names; all of them in the whole model."""
    shape = Architecture(vocab_size=7, context=8, n_layer=2, d_model=8, d_head=4, bigram=False, norm_eps=1e-6)
    model = SparseTransformer.build(replace(shape, position=position, d_position=3 * (position == "concat")), seed=0)
    nodes = {location: torch.ones(width, dtype=torch.bool) for location, width in model.widths.items()}
    graph = mib_graph(circuit_of(model, nodes), model)
    order = ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    assert list(graph["nodes"]) == order
    expected = set()
    for child, before in (("a0.h0", 1), ("a0.h1", 1), ("m0", 3), ("a1.h0", 4), ("a1.h1", 4), ("m1", 6), ("logits", 7)):
        for parent in order[:before]:
            expected |= {f"{parent}->{child}{kind}" for kind in (("<q>", "<k>", "<v>") if child[0] == "a" else ("",))}
    assert graph["edges"].keys() == expected
    assert all(edge == {"score": 8.0, "in_graph": True} for edge in graph["edges"].values())
    assert all(len(node.get("neurons", [0] * 8)) == 8 for node in graph["nodes"].values())

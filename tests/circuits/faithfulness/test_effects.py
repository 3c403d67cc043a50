"""First-order effects: they add up, and they rank the planted nodes first."""

import pytest
import torch

from distill.circuits.edges import induced_edge_set
from distill.circuits.faithfulness import Runs
from distill.circuits.faithfulness.effects import edge_changes, loss_changes, node_effects
from distill.circuits.faithfulness.runs import PartTap
from distill.circuits.masks import MaskTap, all_nodes


def test_effects_add_up_to_the_difference_they_explain(make_planted, make_circuit, make_prompts):
    model = make_planted(0, None)  # without AbsTopK, whose switches have no gradient
    circuit, batch = make_circuit(model), make_prompts(8, 5)
    runs = Runs(model, circuit)
    effects = node_effects(runs, batch, circuit.nodes, points=64)
    total = float(sum(effect.sum() for effect in effects.values()))
    gained = float((runs.of(batch, circuit.nodes) - runs.difference(batch, runs.empty(batch))).mean())
    assert total == pytest.approx(gained, rel=0.02)
    assert all(float(effect[~circuit.nodes[location]].abs().sum()) == 0 for location, effect in effects.items())


def test_effects_leave_pruned_edges_out(make_planted, make_circuit, make_prompts, planted_names):
    model = make_planted(0, None)
    with torch.no_grad():  # a second way from the same value, over an edge that is pruned
        model.layers[0].attn_out.weight[4, 0] = 1.0
        model.unembed.weight[5, 4], model.unembed.weight[6, 4] = 3.0, -3.0
    whole = make_circuit(model, (*planted_names, "0.attn.resid_delta.4"))
    edges = induced_edge_set(model, whole.nodes)
    write = ("0.attn.v", "0.attn.resid_delta")
    cut, batch = whole.with_edges({**edges, write: edges[write][:, :1]}), make_prompts(8, 5)
    effect = {name: node_effects(Runs(model, one), batch, one.nodes, points=16)["0.attn.resid_delta"][3:5].tolist()
              for name, one in (("whole", whole), ("cut", cut))}  # fmt: skip
    assert effect["whole"][1] > 1 and effect["cut"][0] > 1
    assert effect["cut"][1] == pytest.approx(0, abs=0.02)


def test_planted_nodes_have_the_largest_effects(circuit, planted, make_prompts, planted_names):
    effects = node_effects(Runs(planted, circuit), make_prompts(8, 5), all_nodes(planted.widths))
    flat = torch.cat(list(effects.values())).abs()
    inside = torch.cat([circuit.nodes[location] for location in effects])
    assert float(flat[inside].min()) > float(flat[~inside].max())


def test_changes_point_where_single_runs_go(make_planted, make_circuit, make_prompts):
    model = make_planted(0, None)
    with torch.no_grad():
        model.unembed.weight *= 0.1  # far from saturation, where first order is nearly all
        model.layers[0].attn_out.weight[3, 0] = 0.3
    circuit, batch = make_circuit(model), make_prompts(8, 5)
    runs = Runs(model, circuit)
    changes = loss_changes(runs, batch, circuit.nodes)
    assert float(changes["0.attn.v"][0]) > 0 and float(changes["0.attn.v"][1]) == 0
    by_edge = edge_changes(runs, batch)
    assert len(by_edge) == 4
    # One value, one edge out of it: the edge is worth what its source is.
    source = [source for source, _ in runs.edges for _ in range(runs.edges[source, _].shape[1])]
    assert float(by_edge[source.index("0.attn.v")]) == pytest.approx(float(changes["0.attn.v"][0]), rel=1e-3)


def test_masks_of_zero_and_one_are_those_of_the_mask_tap(circuit, planted, make_prompts):
    runs, batch = Runs(planted, circuit), make_prompts(8, 5)
    masks = {location: mask.float() for location, mask in circuit.nodes.items()}
    part, whole = PartTap(masks, circuit.means), MaskTap(circuit.nodes, circuit.means)
    assert torch.equal(runs.logits(batch, part), runs.logits(batch, whole))


def test_half_a_node_is_halfway(planted, circuit):
    x = torch.randn(2, 3, planted.widths["0.attn.v"])
    tap = PartTap({"0.attn.v": torch.full((8,), 0.5)}, circuit.means)
    assert torch.equal(tap("0.attn.v.pre", x), x)
    assert torch.allclose(tap("0.attn.v", x), (x + circuit.means.values["0.attn.v"]) / 2)
    off = PartTap({"0.attn.v": torch.zeros(8)}, circuit.means)
    assert float(off("0.attn.v.pre", x).abs().max()) == 0

"""Circuits: counting by hand, set algebra, the file, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from distill.artifact import ArtifactError, load_tensors, save_tensors
from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration, answer_difference, two_way_loss
from distill.circuits.circuit import Circuit, CircuitMismatchError, edge_list
from distill.circuits.edges import edge_total

QK = ("0.attn.act_in", "0.attn.q")
OUT = ("0.attn.v", "0.attn.resid_delta")


@pytest.fixture
def circuit(planted, planted_means, choose):
    return Circuit(
        model=planted.fingerprint(),
        model_name="planted",
        task="opener",
        nodes=choose(planted),
        scores={location: torch.arange(width).float() for location, width in planted.widths.items()},
        means=planted_means,
        calibration=Calibration(scale=2.0, shift=-0.5),
        losses={"full": 0.01, "circuit": 0.02},
        target=0.15,
        provenance={"seed": 3},
    )


def test_names_and_counts_by_hand(circuit, planted, planted_names):
    assert set(circuit.node_names) == set(planted_names)
    counts = circuit.counts(planted)
    assert counts["nodes"] == 7
    assert counts["edges_induced"] == 4
    # Embedding columns 0, 1, 2 hold 4, 1 and 2 words; unembedding column 3 holds C and D.
    assert counts["edges_embed"] == 4 + 1 + 2 + 2
    weights = planted.matrices()
    density = {pair: int(w.count_nonzero()) / w.numel() for pair, w in weights.items()}
    read = sum(3 * density["0.attn.act_in", f"0.attn.{name}"] for name in "qkv")
    assert counts["edges_null"] == pytest.approx(read + density["0.attn.v", "0.attn.resid_delta"])


def test_edges_are_the_weights_between_kept_nodes(circuit, planted):
    listed = edge_list(circuit.edges(planted))
    expected = [
        ["0.attn.act_in.1", "0.attn.q.0", 1.2],
        ["0.attn.act_in.2", "0.attn.k.0", 1.8],
        ["0.attn.act_in.0", "0.attn.v.0", 1.0],
        ["0.attn.v.0", "0.attn.resid_delta.3", 1.0],
    ]
    assert [entry[:2] for entry in listed] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in listed] == pytest.approx([entry[2] for entry in expected])
    assert circuit.edges(planted)["0.attn.v", "0.attn.resid_delta"].shape == (16, 8)


def test_the_planted_circuit_does_the_task_and_each_node_is_needed(
    circuit, planted, make_prompts, planted_names, choose
):
    batch = make_prompts(32, 5)

    def loss(names):
        with torch.no_grad():
            tap = circuit.with_nodes(choose(planted, names)).tap(planted)
            return float(two_way_loss(answer_difference(planted, batch, tap)))

    assert loss(planted_names) < 0.01
    for name in planted_names:
        assert loss(tuple(other for other in planted_names if other != name)) > 0.5, name


def test_set_algebra(circuit, planted, choose):
    other = circuit.with_nodes(choose(planted, ("0.attn.v.0", "0.attn.q.0", "0.mlp.post_act.1")))
    sizes = {name: len(circuit.with_nodes(getattr(circuit, name)(other)).node_names) for name in
             ("union", "intersection", "difference")}  # fmt: skip
    assert sizes == {"union": 8, "intersection": 2, "difference": 5}
    assert circuit.jaccard(other) == other.jaccard(circuit) == 2 / 8
    assert circuit.jaccard(circuit) == 1
    nothing = circuit.with_nodes(choose(planted, ()))
    assert nothing.jaccard(nothing) == 1 and nothing.jaccard(circuit) == 0
    assert other.losses == {} and other.calibration == Calibration()


def test_kept_edges_by_hand(make_planted, make_windows, make_prompts, choose, circuit):
    model = make_planted(0, stray=0.1)
    whole = replace(circuit, model=model.fingerprint(), means=node_means(model, make_windows()), nodes=choose(model))
    assert whole.kept_edges is None
    counts = whole.counts(model)
    assert counts["edges_induced"] == counts["edges_pruned"] == 10
    fewer = whole.with_edges({QK: torch.tensor([[0], [1]]), OUT: torch.tensor([[3], [0]])})
    assert fewer.kept_edges is not None and len(fewer.kept_edges) == 6
    counts = fewer.counts(model)
    assert (counts["edges_induced"], counts["edges_pruned"]) == (10, 2)
    assert [entry[:2] for entry in edge_list(fewer.edges(model))] == [
        ["0.attn.act_in.1", "0.attn.q.0"],
        ["0.attn.v.0", "0.attn.resid_delta.3"],
    ]
    assert fewer.losses == {} and fewer.calibration == Calibration()
    assert fewer.with_edges(None).kept_edges is None and fewer.with_nodes(choose(model)).kept_edges is None
    batch = make_prompts(8, 0)
    with torch.no_grad():
        masked = answer_difference(model, batch, fewer.tap(model))
        all_edges = answer_difference(model, batch, whole.tap(model))
        torch.testing.assert_close(fewer.to_module(model).difference(batch), masked)
        torch.testing.assert_close(whole.to_module(model).difference(batch), all_edges)
    assert (masked - all_edges).abs().max() > 0.1


def test_edge_algebra(make_planted, make_windows, choose, circuit):
    model = make_planted(0, stray=0.1)
    whole = replace(circuit, model=model.fingerprint(), means=node_means(model, make_windows()), nodes=choose(model))
    few = whole.with_edges({QK: torch.tensor([[0, 0], [1, 2]])})
    sizes = [
        edge_total(join(few, model)) for join in (whole.edge_union, whole.edge_intersection, whole.edge_difference)
    ]
    assert sizes == [10, 2, 8]
    assert whole.edge_jaccard(few, model) == few.edge_jaccard(whole, model) == 2 / 10
    none = whole.with_edges({})
    assert none.edge_jaccard(none, model) == 1 and none.edge_jaccard(few, model) == 0
    other = replace(few, model="another")
    with pytest.raises(CircuitMismatchError, match="nodes and edges can only be compared within one"):
        few.edge_jaccard(other, model)


def test_edges_are_checked_against_nodes_and_weights(circuit, planted):
    with pytest.raises(ValueError, match=r"an edge at 0\.attn\.act_in\.7, which is no node"):
        circuit.with_edges({QK: torch.tensor([[0], [7]])})
    nothing = circuit.with_edges({QK: torch.tensor([[0], [2]])})  # both are nodes, but nothing joins them
    for use in (nothing.tap, nothing.edges, nothing.counts, nothing.to_module):
        with pytest.raises(CircuitMismatchError, match=r"0\.attn\.act_in\.2 -> 0\.attn\.q\.0, where the model has no"):
            use(planted)


def test_save_and_load(tmp_path, circuit, planted, make_prompts):
    path = circuit.save(tmp_path / "a.circuit.safetensors")
    back = Circuit.load(path)
    assert back.node_names == circuit.node_names and list(back.nodes) == list(planted.widths)
    assert back.to_json() == circuit.to_json()
    for location in planted.widths:
        assert torch.equal(back.scores[location], circuit.scores[location])
    batch = make_prompts(3, 0)
    with torch.no_grad():
        same = [answer_difference(planted, batch, one.tap(planted)) for one in (circuit, back)]
    assert torch.equal(*same)


def test_edges_are_saved_and_loaded(tmp_path, circuit, planted):
    whole = Circuit.load(circuit.save(tmp_path / "a.circuit.safetensors"))
    assert whole.kept_edges is None
    for edges in ({}, {OUT: torch.tensor([[3], [0]])}):
        kept = circuit.with_edges(edges)
        back = Circuit.load(kept.save(tmp_path / "b.circuit.safetensors"))
        assert back.kept_edges is not None and back.to_json(planted) == kept.to_json(planted)
        assert edge_list(back.edges(planted)) == edge_list(kept.edges(planted))


def rewritten(path, circuit, change):
    """A file of the circuit with its tensors and head changed."""
    edges = circuit.with_edges({OUT: torch.tensor([[3], [0]])})
    tensors, head = load_tensors(edges.save(path), kind="circuit")
    change(tensors, head)
    save_tensors(path, tensors, head | {"kind": "circuit"})
    return path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("edges/0.attn.v/0.attn.resid_delta", torch.tensor([[3], [99]]), "channels 99 to 99 of"),
        ("edges/0.attn.v/0.attn.resid_delta", torch.tensor([[4], [0]]), r"0\.attn\.resid_delta\.4, which is no node"),
        ("edges/0.attn.v/0.attn.resid_delta", torch.zeros(3, 1, dtype=torch.int32), r"shape \(3, 1\)"),
        ("edges/0.attn.v/0.attn.resid_delta", torch.zeros(2, 1), "float32"),
        ("edges/0.attn.v/9.attn.resid_delta", torch.zeros(2, 1, dtype=torch.int32), "is no matrix"),
        ("nodes/0.attn.v", torch.ones(2, 4, dtype=torch.bool), r"bool of shape \(2, 4\)"),
        ("nodes/0.attn.v", torch.ones(8), r"torch\.float32 of shape \(8,\)"),
        ("nodes/0.attn.v", torch.ones(5, dtype=torch.bool), r"scores of 0\.attn\.v has shape \(8,\) for 5 nodes"),
    ],
)
def test_files_whose_parts_do_not_fit_are_refused(tmp_path, circuit, name, value, message):
    path = rewritten(tmp_path / "a.circuit.safetensors", circuit, lambda tensors, head: tensors.update({name: value}))
    with pytest.raises(ArtifactError, match=message):
        Circuit.load(path)


def test_files_from_before_there_were_edge_masks_load(tmp_path, circuit, planted):
    def before(tensors, head):
        del head["edges"], tensors["edges/0.attn.v/0.attn.resid_delta"]
        for name in [name for name in tensors if name.startswith("edges/")]:
            del tensors[name]

    old = Circuit.load(rewritten(tmp_path / "a.circuit.safetensors", circuit, before))
    assert old.kept_edges is None and old.counts(planted)["edges_pruned"] == 4


def test_files_that_are_no_circuit_are_refused(tmp_path, circuit):
    with pytest.raises(ValueError, match=r"allowed are names ending in \.circuit\.safetensors"):
        circuit.save(tmp_path / "a.safetensors")
    path = tmp_path / "b.circuit.safetensors"
    save_tensors(path, {}, {"kind": "means"})
    with pytest.raises(ArtifactError, match="means"):
        Circuit.load(path)
    save_tensors(path, {}, {"kind": "circuit", "locations": ["0.attn.q"]})
    with pytest.raises(ArtifactError, match=r"no nodes of 0\.attn\.q"):
        Circuit.load(path)
    save_tensors(path, {}, {"kind": "circuit", "locations": []})
    with pytest.raises(ArtifactError, match="holds no 'model'"):
        Circuit.load(path)


def test_json_is_plain_and_readable(circuit, planted):
    summary = json.loads(json.dumps(circuit.to_json(planted)))
    assert summary["n_nodes"] == 7 and summary["counts"]["edges_induced"] == 4
    assert summary["edges"][0][:2] == ["0.attn.act_in.1", "0.attn.q.0"]
    assert summary["provenance"]["seed"] == 3 and "torch" in summary["provenance"]["versions"]
    assert "edges" not in circuit.to_json()


def test_another_model_is_refused_by_both_fingerprints(circuit, make_planted):
    other = make_planted(1)
    both = f"{circuit.model[:12]}.*{other.fingerprint()[:12]}"
    for use in (circuit.tap, circuit.edges, circuit.counts, circuit.to_json, circuit.to_module):
        with pytest.raises(CircuitMismatchError, match=both):
            use(other)

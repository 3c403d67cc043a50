"""Circuits: counting by hand, set algebra, the file, and what is refused."""

import json

import pytest
import torch

from distill.artifact import ArtifactError, save_tensors
from distill.circuits.answers import Calibration, answer_difference, two_way_loss
from distill.circuits.circuit import Circuit, CircuitMismatchError, edge_list


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
    with pytest.raises(ArtifactError, match="'model' is missing"):
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
    for use in (circuit.tap, circuit.edges, circuit.counts, circuit.to_json):
        with pytest.raises(CircuitMismatchError, match=both):
            use(other)

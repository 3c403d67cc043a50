"""Payloads of OpenAI's viewer: what is in them is what the circuit does, and its nodes come back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import Circuit, Subject, Task, encode, load_subject, load_task
from distill.artifact import ArtifactError, read_manifest
from distill.circuits.answers import Calibration, answer_difference, two_way_loss
from distill.circuits.edges import EdgeTap
from distill.circuits.masks import MaskTap
from distill.formats import VizSettings, export_viz, import_viz, kept_nodes, read_viz, viz_payload
from distill.model import Record, chain, node_locations

KEPT, PAIRS = 5, 2
SETTINGS = VizSettings(pairs=PAIRS, windows=6)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject("sparse")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("single_double_quote")


@pytest.fixture(scope="module")
def circuit(subject: Subject) -> Circuit:
    """The most active nodes of the first layer."""
    nodes = {location: torch.zeros(width, dtype=torch.bool) for location, width in subject.model.widths.items()}
    for location, magnitude in subject.means.magnitude.items():
        if location.startswith("0."):
            nodes[location][magnitude.topk(KEPT).indices] = True
    return Circuit(
        model=subject.model.fingerprint(),
        model_name="sparse",
        task="single_double_quote",
        nodes=nodes,
        scores={location: mask.float() for location, mask in nodes.items()},
        means=subject.means,
        calibration=Calibration(),
        losses={},
        target=0.15,
        provenance={"config": {"k": 1}, "path": Path("x")},
    )


@pytest.fixture(scope="module")
def payload(circuit: Circuit, subject: Subject, task: Task) -> dict[str, Any]:
    return viz_payload(circuit, subject, task, SETTINGS)


def loss(circuit: Circuit, subject: Subject, task: Task, tap: Any = None) -> float:
    """Mean over the prompts of both classes, by way of the circuit's own tap."""
    batch = encode(task, subject.tokenizer, "val", PAIRS, 0)
    with torch.no_grad():
        return float(two_way_loss(answer_difference(subject.model, batch, tap or circuit.tap(subject.model))))


def test_losses_are_those_of_the_circuit_doubled(
    payload: dict[str, Any], circuit: Circuit, subject: Subject, task: Task
) -> None:
    found = payload["importances"]
    assert found["interv_loss"] == pytest.approx(2 * loss(circuit, subject, task), rel=1e-5)
    assert found["loss"] == pytest.approx(2 * loss(circuit, subject, task, Record(())), rel=1e-5)
    assert payload["all_loss"] == [(0, found["interv_loss"])]
    assert list(found["ch_interv_losses"]) == list(node_locations(3))
    for location in ("0.attn.v", "0.mlp.post_act"):
        for n, channel in enumerate(circuit.nodes[location].nonzero()[:, 0].tolist()):
            mask = circuit.nodes[location].clone()
            mask[channel] = False
            without = circuit.with_nodes({**circuit.nodes, location: mask})
            assert found["ch_interv_losses"][location][n] == pytest.approx(2 * loss(without, subject, task), rel=1e-5)
    assert found["ch_interv_losses"]["2.mlp.post_act"] == []
    none = {place: mask & (not place.startswith("0.attn")) for place, mask in circuit.nodes.items()}
    assert found["layer_interv_losses"]["0.attn"] == pytest.approx(
        loss(circuit.with_nodes(none), subject, task), rel=1e-5
    )
    assert found["layer_interv_losses"]["2.mlp"] == pytest.approx(found["interv_loss"] / 2, rel=1e-5)


def test_edges_have_the_change_that_taking_one_away_makes(
    payload: dict[str, Any], circuit: Circuit, subject: Subject, task: Task
) -> None:
    edges, whole = circuit.edge_set(subject.model), 2 * loss(circuit, subject, task)
    pairs = {tuple(pair[3]): pair for pair in payload["importances"]["pair_data"]}
    assert pairs.keys() == edges.keys() and sum(index.shape[1] for index in edges.values()) > 5
    for (source, target), (effect, sources, targets, _) in pairs.items():
        index = edges[source, target]
        assert tuple(effect.shape) == (len(sources), len(targets))
        # The viewer lines them up with the losses of the nodes.
        assert len(sources) == len(payload["importances"]["ch_interv_losses"][source])
        assert sources == circuit.nodes[source].nonzero()[:, 0].tolist()
        allowed = {(sources.index(int(s)), targets.index(int(t))) for t, s in index.T.tolist()}
        assert {tuple(place) for place in effect.nonzero().tolist()} <= allowed
        if index.shape[1]:
            without = circuit.with_edges({**edges, (source, target): index[:, 1:]})
            at = effect[sources.index(int(index[1, 0])), targets.index(int(index[0, 0]))]
            assert float(at) == pytest.approx(2 * loss(without, subject, task) - whole, abs=1e-5)


def test_linear_effects_are_slopes(circuit: Circuit, subject: Subject, task: Task) -> None:
    linear = viz_payload(circuit, subject, task, VizSettings(pairs=PAIRS, windows=1, effects="linear"))
    edges, model = circuit.edge_set(subject.model), subject.model
    gates = {matrix: torch.ones(index.shape[1]) for matrix, index in edges.items()}
    for effect, sources, targets, matrix in linear["importances"]["pair_data"]:
        if not edges[matrix].shape[1] or not bool(effect.any()):
            continue
        found = []
        for opened in (1.01, 0.99):
            gates[matrix][0] = opened
            tap = chain(MaskTap(circuit.nodes, circuit.means), EdgeTap(model, edges, circuit.means, gates))
            found.append(2 * loss(circuit, subject, task, tap))
        gates[matrix][0] = 1
        target, source = edges[matrix][:, 0].tolist()
        slope = (found[1] - found[0]) / 0.02
        assert float(effect[sources.index(source), targets.index(target)]) == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_prompts_are_one_class_and_then_the_other(
    payload: dict[str, Any], circuit: Circuit, subject: Subject, task: Task
) -> None:
    tokens, activations = payload["importances"]["task_samples"]
    batch = encode(task, subject.tokenizer, "val", PAIRS, 0)
    rows = {tuple(row[mask.bool()].tolist()): int(label)
            for row, mask, label in zip(batch.tokens, batch.attention_mask, batch.labels, strict=True)}  # fmt: skip
    assert tokens.dtype == torch.long and len(tokens) == 2 * PAIRS
    found = [rows[tuple(row[: int(row.nonzero().max()) + 1].tolist())] for row in tokens]
    assert found == [0] * PAIRS + [1] * PAIRS
    record = Record({"0.mlp.post_act"})
    with torch.no_grad():
        subject.model.run(tokens, tap=chain(circuit.tap(subject.model), record))
    for channel, values in activations["0.mlp.post_act"].items():
        torch.testing.assert_close(values[:, 0], record.values["0.mlp.post_act"][:, 0, channel])
    assert {place: list(each) for place, each in activations.items()} == {
        place: mask.nonzero()[:, 0].tolist() for place, mask in circuit.nodes.items()
    }


def test_examples_are_low_and_high_activations_of_the_whole_model(payload: dict[str, Any], subject: Subject) -> None:
    record = Record({"0.attn.v"})
    with torch.no_grad():
        subject.model.run(subject.sample[:6, :-1], tap=record)
    for channel, shares in payload["samples"]["0.attn.v"].items():
        assert list(shares) == [0.001, 0.01, 0.1, 0.5]
        values = record.values["0.attn.v"][..., channel]
        for share, (bottom, top) in shares.items():
            count = max(1, round(share * values.numel()))
            assert len(bottom) == len(top) == min(5, count)
            low, high = values.flatten().sort().values[[count - 1, -count]]
            for tokens, activations, _ in (*bottom, *top):
                row = int((subject.sample[:6, :-1] == tokens).all(1).nonzero()[0, 0])
                torch.testing.assert_close(activations, values[row])
            assert all(float(acts[at]) <= float(low) + 1e-6 for _, acts, at in bottom)
            assert all(float(acts[at]) >= float(high) - 1e-6 for _, acts, at in top)
        # The viewer stacks them all to find its scale of colours.
        assert torch.stack([item[1] for ends in shares.values() for end in ends for item in end]).dim() == 2


def test_nodes_come_back(tmp_path: Path, circuit: Circuit, subject: Subject, task: Task) -> None:
    path = export_viz(circuit, subject, task, tmp_path, VizSettings(pairs=1, windows=1, effects="linear"), command="t")
    assert (
        path == tmp_path / "viz" / "sparse" / "single_double_quote" / "distill" / str(circuit.n_nodes) / "viz_data.pt"
    )
    assert read_manifest(path.parent, "circuit")["format_version"] == 1
    payload = torch.load(path, weights_only=True)
    assert sum(index.numel() for index in payload["circuit_data"].values()) == circuit.n_nodes
    assert payload["importances"]["beeg_model_config"]["d_head"] == subject.model.d_head
    assert payload["prune_config"] == {"config": {"k": 1}, "path": "x"}
    back = import_viz(path, subject, task="single_double_quote", target=0.2, command="t")
    assert back.node_names == circuit.node_names and back.model == circuit.model
    assert back.losses["circuit"] == pytest.approx(payload["importances"]["interv_loss"] / 2)
    assert Circuit.load(back.save(tmp_path / "back.circuit.safetensors")).node_names == circuit.node_names
    with pytest.raises(ArtifactError, match="exists already"):
        export_viz(circuit, subject, task, tmp_path, VizSettings(pairs=1, windows=1, effects="linear"), command="t")


@pytest.mark.parametrize(
    ("circuit_data", "message"),
    [
        ({"0.attn.y": torch.tensor([1])}, "circuit_data has '0.attn.y'; allowed are 0.attn.act_in"),
        ({"7.attn.v": torch.tensor([1])}, "circuit_data has '7.attn.v'"),
        ({"0.attn.v": torch.tensor([256])}, "names channels 256 to 256, 1 in all; allowed are 0 to 255, each once"),
        ({"0.attn.v": torch.tensor([-1, 2])}, "names channels -1 to 2"),
        ({"0.attn.v": torch.tensor([3, 3])}, "each once"),
        ({"0.attn.v": torch.tensor([0.5])}, "is torch.float32 of shape (1,); allowed are whole numbers on one axis"),
        ({"0.attn.v": torch.tensor([[1]])}, "of shape (1, 1)"),
        ({"0.attn.v": [1]}, "is of type list, allowed are tensors"),
    ],
)
def test_payloads_that_do_not_fit_are_named(
    tmp_path: Path, subject: Subject, circuit_data: dict[str, Tensor], message: str
) -> None:
    torch.save({"circuit_data": circuit_data}, tmp_path / "viz_data.pt")
    with pytest.raises(ArtifactError) as error:
        kept_nodes(read_viz(tmp_path / "viz_data.pt"), subject.model, tmp_path / "viz_data.pt")
    assert message in str(error.value) and "viz_data.pt" in str(error.value)


def test_what_theirs_holds_beyond_nodes_is_left(tmp_path: Path, subject: Subject) -> None:
    data = {"1.mlp.act_in": torch.tensor([5, 2], dtype=torch.int32), "final_resid": torch.arange(9)}
    torch.save({"circuit_data": data, "importances": {"loss": torch.tensor(0.25)}}, tmp_path / "a.pt")
    back = import_viz(tmp_path / "a.pt", subject, task="my_task", target=0.2, command="t")
    assert back.node_names == ["1.mlp.act_in.2", "1.mlp.act_in.5"] and back.losses == {"full": 0.125}
    assert back.provenance["final_resid_left_out"] == 9 and back.target == 0.2
    for importances, message in (
        ({"loss": "low"}, "importances.loss is 'low'; allowed are finite numbers"),
        ({"interv_loss": float("nan")}, "importances.interv_loss is nan"),
        ({"beeg_model_config": {"n_layer": 8}}, "was made for a model with n_layer 8, the one given has 3"),
    ):
        torch.save({"circuit_data": data, "importances": importances}, tmp_path / "a.pt")
        with pytest.raises(ArtifactError) as error:
            import_viz(tmp_path / "a.pt", subject, task="my_task", target=0.2, command="t")
        assert message in str(error.value)
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="holds no 'circuit_data'"):
        read_viz(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("field", "value"), [("pairs", 0), ("windows", 0), ("examples", 0), ("seed", -1), ("effects", "guessed")]
)
def test_impossible_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: got .*allowed are"):
        VizSettings(**{field: value})

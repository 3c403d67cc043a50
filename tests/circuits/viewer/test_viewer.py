import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from distill.artifact import ArtifactError
from distill.circuits import Circuit, CircuitMismatchError, Subject, Task, circuit_tap, encode, node_means
from distill.circuits.answers import Calibration, answer_difference, two_way_loss
from distill.circuits.circuit import names_of
from distill.circuits.edges import induced_edge_set
from distill.circuits.viewer import ViewConfig, labels_path, read_labels, render, view, write_labels
from distill.circuits.viewer.activations import activations, correlations, examples, rounded
from distill.circuits.viewer.at_work import FPR, PAIRS, at_work
from distill.circuits.viewer.describe import leaning, profile, sentence
from distill.circuits.viewer.edge_table import edge_table
from distill.circuits.viewer.page import escaped, shrunk
from distill.circuits.watch import make_watch
from distill.model import DenseModel
from distill.model.sites import split_node

HOSTILE = "</script><script>window.broken=1</script>"


def test_a_view_names_the_nodes_and_edges_of_its_circuits(
    one_view: dict[str, Any], subject: Subject, make_circuit: Callable[..., Circuit]
) -> None:
    circuit = make_circuit(0.5)
    assert [node["name"] for node in one_view["nodes"]] == circuit.node_names
    by_target = {point["target"]: point for point in one_view["points"]}
    assert list(by_target) == [0.5, 0.15]
    names = [one_view["nodes"][place]["name"] for place in by_target[0.5]["nodes"]]
    assert names == make_circuit(0.25).node_names
    edges = one_view["edges"]
    listed = {
        (one_view["nodes"][s]["name"], one_view["nodes"][t]["name"], w)
        for s, t, w in zip(edges["source"], edges["target"], edges["weight"], strict=True)
    }
    expected = circuit.to_json(subject.model)["edges"]
    assert listed == {(s, t, float(f"{w:.3g}")) for s, t, w in expected} and one_view["edges_note"] == ""
    sizes = [abs(weight) for weight in edges["weight"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(by_target[0.15]["edges"]) == len(by_target[0.15]["edge_effect"]) == len(expected)


def test_activations_are_those_of_model_and_circuit(
    one_view: dict[str, Any], subject: Subject, task: Task, make_circuit: Callable[..., Circuit]
) -> None:
    circuit, model = make_circuit(0.5), subject.model
    batch = encode(task, subject.tokenizer, "test", 2, 0, context=model.context)
    theirs = activations(model, circuit.nodes, batch.tokens)
    ours = activations(model, circuit.nodes, batch.tokens, circuit_tap(model, circuit.nodes, circuit.means))
    point = one_view["points"][1]
    place = int((ours - theirs).abs().amax((0, 1)).argmax())
    for row, last in enumerate(batch.last.tolist()):
        assert one_view["nodes"][place]["pairs"][row] == rounded(theirs[row, : last + 1, place])
        assert point["pairs"][place][row] == rounded(ours[row, : last + 1, place])
    tokens = one_view["pairs"][0]["clean"]["tokens"]
    text = "".join(one_view["tokens"][token] for token in tokens)
    assert text == subject.tokenizer.decode(batch.tokens[0, : int(batch.last[0]) + 1])


def test_the_effect_of_a_node_is_what_leaving_it_out_costs(
    subject: Subject, task: Task, make_circuit: Callable[..., Circuit]
) -> None:
    circuit, model = make_circuit(0.1), subject.model
    config = ViewConfig(pairs=1, judged=4, windows=2)
    found = view(subject, [circuit], task, config=config)["points"][0]
    assert found["effect_kind"] == "left out one by one"
    batch = encode(task, subject.tokenizer, "test", 4, 0, context=model.context)

    def loss(nodes: dict[str, torch.Tensor]) -> float:
        return float(two_way_loss(answer_difference(model, batch, circuit_tap(model, nodes, circuit.means))))

    place = max(range(len(found["effect"])), key=lambda i: abs(found["effect"][i]))
    location, channel = split_node(circuit.node_names[place])
    less = {name: mask.clone() for name, mask in circuit.nodes.items()}
    less[location][channel] = False
    with torch.no_grad():
        expected = loss(less) - loss(circuit.nodes)
    assert found["effect"][place] == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_effects_of_many_nodes_are_to_first_order(one_view: dict[str, Any]) -> None:
    assert {point["effect_kind"] for point in one_view["points"]} == {"first order"}
    assert all(len(point["effect"]) == len(point["nodes"]) for point in one_view["points"])


def test_the_text_is_coloured_by_the_watch(
    one_view: dict[str, Any], subject: Subject, task: Task, make_circuit: Callable[..., Circuit]
) -> None:
    found = one_view["at_work"]
    windows = subject.sample[torch.linspace(0, len(subject.sample) - 1, len(one_view["windows"])).long(), :-1]
    pairs = min(PAIRS, task.size("train"))
    watch = make_watch(subject, make_circuit(0.5), task, fpr=FPR, pairs=pairs, windows=len(windows))
    for row in found["rows"]:
        scores = watch.score(subject.model, windows[[row["window"]]])
        assert row["strength"] == rounded(scores.strength[0]) and row["lean"] == rounded(scores.lean[0])
    assert found["target"] == 0.15 and found["threshold"] == pytest.approx(watch.threshold)


def test_without_training_prompts_the_text_is_left_out_with_a_reason(
    subject: Subject, task: Task, make_circuit: Callable[..., Circuit]
) -> None:
    bare = replace(task, splits={name: pairs for name, pairs in task.splits.items() if name != "train"})
    found = at_work(subject, make_circuit(0.5), bare, subject.sample[:4, :-1], count=2)
    assert found["rows"] == [] and "has no training prompts" in found["reason"]


def test_attention_in_a_view_is_a_distribution(one_view: dict[str, Any]) -> None:
    heads = {(node["layer"], node["head"]) for node in one_view["nodes"] if node["head"] is not None}
    assert {(one["layer"], one["head"]) for one in one_view["heads"]} == heads
    for one in one_view["heads"]:
        size = len(one_view["pairs"][0]["clean"]["tokens"])
        triangle = one["pattern"][0]
        assert len(triangle) == size * (size + 1) // 2
        assert 0 < sum(triangle[-size:]) <= 100 + size


def test_examples_are_the_extremes_of_different_windows() -> None:
    values = torch.zeros(4, 6)
    values[0, 2], values[0, 3], values[1, 5], values[2, 0], values[3, 1] = 5.0, 4.0, 3.0, -2.0, 1.0
    config = ViewConfig(top=2, bottom=2, quantiles=(0.5,), before=1, after=2)
    found = {one.group: [] for one in examples(values, config)}
    for one in examples(values, config):
        found[one.group].append((one.window, one.position, one.start, one.stop))
    assert found["top"] == [(0, 2, 1, 5), (1, 5, 4, 6)]
    assert found["bottom"] == [(2, 0, 0, 3)]
    # Of -2, 1, 3, 4, 5 the middle one.
    assert found["q0.5"] == [(1, 5, 4, 6)]
    assert examples(torch.zeros(3, 4), config) == []


def test_correlation_by_hand() -> None:
    ours = torch.tensor([[1.0, 1.0, 2.0], [2.0, 1.0, 0.0], [3.0, 1.0, -2.0]])
    theirs = torch.tensor([[2.0, 0.0, 1.0], [4.0, 3.0, 2.0], [6.0, 5.0, 3.0]])
    assert correlations(ours, theirs) == [1.0, None, -1.0]


def test_rounding_keeps_three_digits_and_drops_needless_points() -> None:
    assert rounded(torch.tensor([1.23456, 2.0, -0.00123456, 0.0])) == [1.23, 2, -0.00123, 0]


def test_places_of_edges() -> None:
    nodes = {"0.attn.act_in": torch.tensor([True, False, True]), "0.attn.q": torch.tensor([False, True])}
    edges = {("0.attn.act_in", "0.attn.q"): torch.tensor([[1, 1], [0, 2]])}
    table = edge_table(edges, nodes)
    assert (table.source.tolist(), table.target.tolist()) == ([0, 1], [2, 2])
    there, here = table.places_of(table.chosen(torch.tensor([1])))
    assert (there.tolist(), here.tolist()) == ([0], [1])


def test_profile_and_leaning() -> None:
    values = torch.zeros(2, 16)
    values[:, :2] = -4.0
    values[:, 8] = 2.0
    assert profile(values) == [1.0, 0, 0, 0, 0.25, 0, 0, 0]
    assert leaning(profile(values)) == "strongest at the start of the text"
    assert leaning(profile(values.flip(1))) == "strongest at the end of the text"
    assert leaning([1.0] * 8) == ""


def test_a_description_says_what_was_computed() -> None:
    description = {"high": [(0, 0.75)], "low": [], "profile": [1.0] * 8, "raises": [(1, 2.0)], "lowers": []}
    assert sentence(description, {0: " a", 1: "b"}) == "Highest at “·a” (75%); by itself raises “b”."
    spread = {**description, "high": [], "raises": []}
    assert sentence(spread, {}) == "Highest at no token in particular."
    silent = {**spread, "profile": [0.0] * 8}
    assert sentence(silent, {}) == "Zero on all of the held-out text looked at."


def test_what_a_write_raises_is_its_row_of_the_unembedding(one_view: dict[str, Any], subject: Subject) -> None:
    node = next(node for node in one_view["nodes"] if node["kind"] == "mlp.resid_delta")
    column = subject.model.unembedding()[:, node["channel"]]  # gains are 1 at the start
    best = int(column.argmax())
    token, value = node["description"]["raises"][0]
    assert value == pytest.approx(float(column[best]), rel=1e-2)
    assert one_view["tokens"][token] == subject.tokenizer.decode([best])


def test_a_view_is_a_function_of_its_inputs(
    one_view: dict[str, Any], subject: Subject, task: Task, make_circuit: Callable[..., Circuit]
) -> None:
    config = ViewConfig(pairs=1, judged=2, windows=2, exact=0)
    one, two = (view(subject, [make_circuit(0.3)], task, config=config) for _ in range(2))
    assert json.dumps(one) == json.dumps(two)


def test_circuits_of_other_models_and_tasks_are_refused(
    subject: Subject, task: Task, make_circuit: Callable[..., Circuit]
) -> None:
    import dataclasses

    circuit = make_circuit(0.3)
    with pytest.raises(CircuitMismatchError, match="fingerprint"):
        view(subject, [dataclasses.replace(circuit, model="other")], task)
    with pytest.raises(CircuitMismatchError, match="one task"):
        view(subject, [circuit, dataclasses.replace(circuit, task="other")], task)
    with pytest.raises(ValueError, match="circuits: got none"):
        view(subject, [], task)


def test_a_gated_model_with_shared_values_has_nodes_and_no_edges(subject: Subject, task: Task) -> None:
    config = LlamaConfig(
        vocab_size=len(subject.tokenizer), hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = DenseModel(LlamaForCausalLM(config).eval())
    means = node_means(model, subject.sample[:, :-1])
    llama = Subject(name="llama", model=model, tokenizer=subject.tokenizer, sample=subject.sample, means=means)
    circuit = Circuit(
        model=model.fingerprint(),
        model_name="llama",
        task=task.name,
        nodes={name: torch.arange(width) % 2 == 0 for name, width in model.widths.items()},
        scores={name: torch.zeros(width) for name, width in model.widths.items()},
        means=means,
        calibration=Calibration(),
        losses={"circuit": 0.2},
        target=0.15,
    )
    one = view(llama, [circuit], task, config=ViewConfig(pairs=1, judged=2, windows=2))
    assert [node["name"] for node in one["nodes"]] == circuit.node_names
    assert one["edges"] == {"source": [], "target": [], "weight": []}
    assert one["points"][0]["edges"] == [] and one["points"][0]["edge_effect"] == []
    assert one["edges_note"].startswith("nodes only: the model has a gated MLP and values shared by heads")
    assert any(one["points"][0]["effect"]) and one["points"][0]["counts"]["edges_induced"] > 0
    assert len(render([one]).html) > 10_000


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_payload_and_nothing_can_leave_it(one_view: dict[str, Any]) -> None:
    page = render([one_view])
    block = re.search(r'<script type="application/json" id="payload">(.*?)</script>', page.html, re.DOTALL)
    assert block is not None
    assert json.loads(block[1]) == json.loads(json.dumps(page.payload))
    assert HOSTILE in json.loads(block[1])["circuits"][0]["tokens"]
    assert HOSTILE not in page.html
    assert "default-src 'none'" in page.html
    # Names of XML, and no other address.
    outside = re.sub(r"<script>.*?</script>", "", page.html, flags=re.DOTALL)
    assert re.findall(r"https?://[^\s\"'<]*", outside) == []


@given(st.dictionaries(st.text(), st.lists(st.text() | st.floats(allow_nan=False, allow_infinity=False))))
@settings(max_examples=25, deadline=None)
def test_escaping_loses_nothing_and_ends_nothing(value: Any) -> None:
    text = escaped(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def test_a_page_that_is_too_large_loses_examples_of_the_least_nodes(one_view: dict[str, Any]) -> None:
    payload = dict(render([one_view]).payload)
    room = len(escaped(payload)) - 3000
    lighter = shrunk(payload, room)
    assert len(escaped(lighter)) <= room
    bare = [i for i, node in enumerate(lighter["circuits"][0]["nodes"]) if node["examples"] is None]
    assert bare and f"{len(bare)} nodes" in lighter["notes"][0]
    point = one_view["points"][1]
    effects = {place: abs(effect) for place, effect in zip(point["nodes"], point["effect"], strict=True)}
    others = [effect for place, effect in effects.items() if place not in bare]
    assert max(effects[place] for place in bare) <= min(others) + 0.05
    with pytest.raises(ValueError, match="megabytes"):
        shrunk(payload, 1000)


def test_a_page_saves_whole_and_shows_in_notebooks(one_view: dict[str, Any], tmp_path: Path) -> None:
    page = render([one_view])
    path = page.save(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == page.html
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]
    framed = page._repr_html_()
    assert framed.startswith("<iframe") and "<script" not in framed


def test_labels_are_kept_beside_the_circuit(tmp_path: Path) -> None:
    file = tmp_path / "quotes.tiny.circuit.safetensors"
    assert read_labels(file) == {}
    path = write_labels(file, {"0.attn.q.3": HOSTILE})
    assert path == labels_path(file) == tmp_path / "quotes.tiny.labels.json"
    assert read_labels(file) == {"0.attn.q.3": HOSTILE}
    for broken in ('["a"]', '{"0.attn.q.3": 1}', '{"nothing": "a"}'):
        path.write_text(broken)
        with pytest.raises(ArtifactError, match="labels.json"):
            read_labels(file)


@pytest.mark.parametrize(("field", "value"), [("pairs", 0), ("after", -1), ("quantiles", (1.5,)), ("megabytes", 0.5)])
def test_impossible_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ViewConfig(**{field: value})


def test_a_circuit_shows_in_notebooks(make_circuit: Callable[..., Circuit]) -> None:
    import dataclasses

    circuit = dataclasses.replace(make_circuit(0.25), task=HOSTILE)
    shown = circuit._repr_html_()
    assert HOSTILE not in shown and "&lt;/script&gt;" in shown
    kept = int(circuit.nodes["1.mlp.post_act"].sum())
    assert f">{kept}<" in shown and f"{circuit.n_nodes} nodes" in shown


def test_names_and_edges_of_a_whole_model_fit(subject: Subject, make_circuit: Callable[..., Circuit]) -> None:
    nodes = make_circuit(1.1).nodes
    table = edge_table(induced_edge_set(subject.model, nodes), nodes)
    assert int(table.target.max()) < len(names_of(nodes))

"""Twice the budget: on rows by hand, and on a small model."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from bridges import Comparison
from bridges.budget import add_budget, again, budget_check, doubled
from distill.circuits import Circuit, PruneConfig, Subject, Task, node_means
from distill.circuits.answers import Calibration
from distill.circuits.selection import TargetError
from distill.circuits.task_files import read_lines
from distill.data.tokens import train_tokenizer
from distill.model import Architecture, SparseTransformer


def found(edges: int, twice: int | None) -> dict:
    if twice is None:
        return {"edges_induced": edges, "doubled": {"nodes": None, "reason": "out of reach"}}
    done = {"nodes": 3, "edges_induced": twice, "moved": twice / edges - 1, "moved_pruned": 0.0}
    return {"edges_induced": edges, "doubled": done}


def test_moves_are_geometric_means_over_circuits() -> None:
    rows = {
        "a": {"sparse": found(100, 50), "dense": found(100, 104)},
        "b": {"sparse": found(100, 200), "dense": found(100, 100)},
    }
    check = budget_check(rows, ["a", "b"])
    assert check["models"]["sparse"] == {
        "moved": pytest.approx(0.0), "moved_pruned": 0.0, "typical": pytest.approx(1.0), "worst": 1.0, "circuits": 2,
    }  # fmt: skip
    assert check["models"]["dense"]["moved"] == pytest.approx(1.04**0.5 - 1)
    # One halved, one doubled: no move on average, and yet far from settled.
    assert not check["holds"] and check["limit"] == 0.1
    calm = {"a": {"sparse": found(100, 95), "dense": found(100, 104)}}
    assert budget_check(calm, ["a"])["holds"]
    # sqrt(104/50 * 100/200).
    assert check["edge_ratio_geomean"] == pytest.approx((2.08 * 0.5) ** 0.5)
    assert not budget_check({"a": rows["a"]}, ["a"])["holds"]


def test_what_is_out_of_reach_at_twice_the_budget_says_nothing() -> None:
    check = budget_check({"a": {"sparse": found(100, None), "dense": found(100, 100)}}, ["a"])
    assert list(check["models"]) == ["dense"] and check["edge_ratio_geomean"] is None
    assert budget_check({}, [])["holds"] is None


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "quotes.jsonl"
    lines = [
        {"clean": f"f('{word}", "corrupt": f'f("{word}', "answer": "')", "other": '")', "split": split}
        for split, words in (("train", "abcdef"), ("val", "ghij"), ("test", "klmn"))
        for word in words
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return read_lines(path)


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.set_num_threads(1)
    text = "f('a b')\nf(\"a b\")\nfor item in items:\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=262)
    shape = Architecture(vocab_size=262, context=24, n_layer=1, d_model=8, d_head=8)
    model = SparseTransformer.build(shape, seed=0).eval()
    sample = torch.tensor(tokenizer(text).input_ids)[: 8 * 17].view(8, 17)
    means = node_means(model, sample[:, :-1])
    return Subject(name="sparse", model=model, tokenizer=tokenizer, sample=sample, means=means)


@pytest.fixture(scope="module")
def circuit(subject: Subject, task: Task) -> Circuit:
    """Half of the nodes, with the settings of a search."""
    generator = torch.Generator().manual_seed(0)
    return Circuit(
        model=subject.model.fingerprint(),
        model_name="sparse",
        task=task.name,
        nodes={name: torch.rand(width, generator=generator) < 0.5 for name, width in subject.model.widths.items()},
        scores={name: torch.zeros(width) for name, width in subject.model.widths.items()},
        means=subject.means,
        calibration=Calibration(),
        losses={},
        target=3.0,
        provenance={"config": asdict(PruneConfig(target=3.0, steps=3, clean_up=5, edge_clean_up=2, screen=2))},
    )


def test_the_budget_is_twice_that_of_the_circuit(circuit: Circuit) -> None:
    settings = doubled(circuit)
    assert (settings.steps, settings.clean_up, settings.edge_clean_up) == (6, 10, 4)
    before = PruneConfig(**circuit.provenance["config"])
    assert replace(settings, steps=3, clean_up=5, edge_clean_up=2) == before
    limited = replace(circuit, provenance={"config": asdict(replace(before, time_budget=2.0)) | {"of_old": 1}})
    assert doubled(limited).time_budget == 4.0


def test_a_comparison_gets_what_twice_the_budget_finds(
    circuit: Circuit, subject: Subject, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def searched(*given: object, **named: object) -> Circuit:
        asked.append(given[4])
        # Fewer nodes than before.
        return replace(circuit, nodes={name: mask & False for name, mask in circuit.nodes.items()})

    monkeypatch.setattr("bridges.budget.prune", searched)
    edges = circuit.counts(subject.model)["edges_induced"]
    rows = {task.name: {"sparse": {"edges_induced": edges}}}
    comparison = Comparison(record={"tasks": rows, "tasks_counted": []}, circuits={(task.name, "sparse"): circuit})
    record = add_budget(comparison, [subject], [task]).record
    one = record["tasks"][task.name]["sparse"]["doubled"]
    assert asked == [doubled(circuit)] and one["steps"] == 6
    assert one["edges_induced"] == 0 and one["moved"] == pytest.approx(1 / edges - 1)
    assert record["budget"]["models"]["sparse"]["moved"] == pytest.approx(one["moved"])
    assert not record["budget"]["holds"]

    def nothing(*given: object, **named: object) -> Circuit:
        raise TargetError("out of reach")

    monkeypatch.setattr("bridges.budget.prune", nothing)
    assert again(subject, task, circuit)["reason"] == "out of reach"


def test_a_real_search_at_twice_the_budget(circuit: Circuit, subject: Subject, task: Task) -> None:
    one = again(subject, task, circuit)
    # Anything meets a target of 3 nats, no node at all among it.
    assert one["steps"] == 6 and one["reason"] is None and one["nodes"] == 0 and one["moved"] < 0

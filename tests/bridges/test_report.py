"""What a report says, from records written by hand."""

import pytest

from bridges.report import basis_lines, budget_lines, crossing_lines, said, specificity_lines, summary, table

RATIOS = {
    "tasks_counted": ["a"],
    "left_out": {},
    "matched": None,
    "objective": "paper",
    "edge_ratio_geomean": 4.0,
    "pruned_edge_ratio_geomean": 3.0,
    "node_ratio_geomean": 2.0,
    "null_ratio_geomean": 1.5,
    "edge_ratio_interval": (2.0, 8.0),
}


@pytest.mark.parametrize(
    ("over", "cut", "words"),
    [
        ({"tasks": 3, "sparse": 1, "dense": 1}, 400, "95% over tasks 2.00 to 8.00); after cutting edges 3.00, nodes"),
        ({"tasks": 3, "sparse": 1, "dense": 2}, 0, "over tasks x 1 sparse x 2 dense seeds 2.00 to 8.00); no edges cut"),
    ],
)
def test_a_ratio_says_what_its_interval_is_over_and_whether_edges_were_cut(over: dict, cut: int, words: str) -> None:
    record = {**RATIOS, "interval_over": over, "config": {"prune": {"edge_clean_up": cut}}}
    assert words in summary(record)[-1]


def test_twice_the_budget_in_words() -> None:
    models = {"sparse": {"moved": -0.04, "moved_pruned": 0.0, "worst": -0.2, "circuits": 3}}
    budget = {"limit": 0.1, "models": models, "holds": True, "edge_ratio_geomean": 1.25}
    (line,) = budget_lines({"budget": budget})
    assert "sparse -4% (most in one circuit -20%; after cutting edges +0%)" in line
    assert line.endswith("within 10%, and the ratio is 1.25 then")
    (line,) = budget_lines({"budget": {**budget, "holds": False, "edge_ratio_geomean": None}})
    assert line.endswith("NOT within 10%")
    assert budget_lines({}) == [] and budget_lines({"budget": {**budget, "models": {}}}) == []


def test_what_losing_a_circuit_does_elsewhere() -> None:
    damage = {"damage_task": 0.6, "damage_other_b": 0.1, "damage_other_c": 0.3, "damage_corpus": 0.02}
    rows = {"a": {"sparse": {"damage": damage}, "dense": {"damage": None}, "student": {"damage": damage}}}
    (line,) = specificity_lines({"models": dict.fromkeys(rows["a"]), "tasks": rows})
    assert line.endswith("in sparse 0.600, c 0.300 at most, text 0.020 a token")


def test_the_basis_in_words() -> None:
    found = {
        "tasks": ["a", "b"],
        "edge_ratio_geomean": 1.5,
        "pruned_edge_ratio_geomean": 1.2,
        "node_ratio_geomean": 1.1,
    }
    (line,) = basis_lines({"basis": found})
    assert "1.50 times the edges and 1.10 times the nodes" in line and "2 tasks" in line
    assert basis_lines({"basis": None}) == [] and basis_lines({}) == []


@pytest.mark.parametrize(("unrelated", "words"), [(0.6, ", NOT more than the unrelated"), (0.1, ", more than the un")])
def test_an_interchange_says_whether_it_speaks_for_the_student(unrelated: float, words: str) -> None:
    site = {"site": "final_resid", "channels": 7, "effect": 0.5, "ceiling": 0.9}
    best = {
        "site": "final_resid", "effect": 0.5, "controls": [0.1, 0.3, 0.2], "p": 0.25, "unrelated": unrelated,
        "class_means": None, "above_unrelated": unrelated < 0.5,
    }  # fmt: skip
    row = {"interchange": {"sites": [site], "best": best, "pairs": 4, "skipped": 1}}
    (line,) = crossing_lines({"tasks": {"a": row}})
    assert words in line and "7 channels goes 0.50 of the way" in line
    assert "random channels 0.20, p 0.25" in line and "class means" not in line
    weak = {"interchange": {"sites": [], "best": None, "accuracy": 0.7}}
    assert crossing_lines({"tasks": {"a": weak}}) == ["a: no interchange, the dense model is right on 70% only"]
    none = {"interchange": {"sites": [], "best": None, "accuracy": None, "pairs": 0, "skipped": 32}}
    (line,) = crossing_lines({"tasks": {"a": none}})
    assert line == "a: no interchange, none of 32 pairs has prompts of equal length"


def test_long_names_move_no_column() -> None:
    cells = dict.fromkeys(
        ("loss_full", "loss_empty", "loss_circuit", "loss_calibrated", "nodes", "edges_induced", "reason",
         "loss_without_circuit", "loss_without_random_median")
    )  # fmt: skip
    names = ("sparse", "dense_gpt2_rotated")
    record = {
        **RATIOS, "models": {name: {"heldout_loss": 3.0} for name in names}, "interval_over": {}, "left_out": {},
        "tasks": {"a_task_of_a_rather_long_name": {"target": 0.15, **{name: cells for name in names}}},
        "edge_ratio_interval": None,
    }  # fmt: skip
    head, *rows = table(record).splitlines()[2:5]
    assert {line.index(word) for line, word in zip([head, *rows], ("model", *names), strict=True)} == {30}
    assert len({len(line) for line in (head, *rows)}) == 1


def test_everything_that_is_said_stands_in_order() -> None:
    record = {
        **RATIOS, "interval_over": {"tasks": 1, "sparse": 1, "dense": 1}, "edge_ratio_interval": None, "models": {},
        "tasks": {}, "budget": {"limit": 0.1, "models": {"sparse": {"moved": 0.0, "moved_pruned": 0.0, "worst": 0.0}},
        "holds": True, "edge_ratio_geomean": None},
    }  # fmt: skip
    lines = said(record)
    assert [line.split()[0] for line in lines] == ["objective:", "edges", "twice"]

import math

import pytest

from bridges.compare import CompareConfig, common_target
from bridges.ratios import matched, ratios
from bridges.report import bridge_lines, summary, table
from distill import PruneConfig


def _one(edges: int, nodes: int, empty: float = 0.7, meets: bool = True) -> dict:
    losses = {"loss_full": 0.1, "loss_empty": empty, "loss_circuit": 0.14, "loss_calibrated": 0.13, "reason": None}
    sizes = {
        "nodes": nodes,
        "edges_induced": edges,
        "edges_pruned": edges,
        "edges_embed": 3,
        "edges_null": float(nodes),
    }
    return {
        **losses, **sizes, "meets_target": meets, "loss_without_circuit": 0.69, "loss_without_random_median": 0.1
    }  # fmt: skip


ROWS = {
    "a": {"target": 0.15, "sparse": _one(10, 5), "dense": _one(160, 10)},
    "b": {"target": 0.15, "sparse": _one(10, 5), "dense": _one(10, 5)},
    "c": {"target": 0.15, "sparse": _one(1, 1, empty=0.3), "dense": _one(999, 9)},
    "d": {"target": 0.15, "sparse": _one(1, 1), "dense": _one(999, 9, meets=False)},
}


def test_the_ratio_is_a_geometric_mean_over_the_tasks_that_count() -> None:
    found = ratios(ROWS, 0.5)
    assert found["tasks_counted"] == ["a", "b"]
    assert found["tasks_eligible"] == ["a", "b", "d"]
    assert "needs no circuit" in found["left_out"]["c"]
    assert "dense's circuit misses the target on unseen prompts" in found["left_out"]["d"]
    assert found["edge_ratio_geomean"] == pytest.approx(4.0)
    assert found["node_ratio_geomean"] == pytest.approx(math.sqrt(2))
    assert found["null_ratio_geomean"] == pytest.approx(math.sqrt(2))


def test_a_task_that_the_bigram_table_does_alone_needs_no_circuit() -> None:
    leaning = {**_one(10, 5, empty=1.98), "loss_empty_calibrated": 0.0}
    rows = {**ROWS, "e": {"target": 0.15, "sparse": leaning, "dense": _one(160, 10)}}
    found = ratios(rows, 0.5)
    assert "e" not in found["tasks_eligible"]
    assert found["left_out"]["e"].startswith("sparse does it without any node (loss_empty 0.000)")
    assert "a" in found["tasks_eligible"]
    low, high = found["edge_ratio_interval"]
    assert low == pytest.approx(1.0) and high == pytest.approx(16.0)


def test_without_a_task_that_counts_there_is_no_ratio() -> None:
    assert ratios({"c": ROWS["c"]}, 0.5)["edge_ratio_geomean"] is None
    missing = {"a": {"target": 0.15, "sparse": _one(1, 1)}}
    assert ratios(missing, 0.5)["tasks_counted"] == []


def test_the_target_gives_way_to_the_worse_of_two_models() -> None:
    assert common_target(0.15, [0.01, 0.15]) == 0.15
    expected = math.log(2) - 0.83 * (math.log(2) - 0.4)
    assert common_target(0.15, [0.01, 0.4]) == pytest.approx(expected)
    assert common_target(0.15, []) == 0.15


def test_the_table_says_what_the_record_says() -> None:
    tasks = {name: row for name, row in ROWS.items() if name in "ab"}
    record = {
        "models": {"sparse": {"heldout_loss": 3.0}, "dense": {"heldout_loss": 3.01}},
        "tasks": tasks,
        **ratios(tasks, 0.5),
        "objective": "paper",
        "matched": matched({"sparse": {"heldout_loss": 3.0}, "dense": {"heldout_loss": 3.01}}),
    }
    assert record["matched"]["holds"]
    text = table(record)
    assert "sparse 3.000, dense 3.010" in text
    assert "edges dense / sparse: 4.00" in text
    assert "160" in text
    assert summary({**record, "tasks_counted": []})[-1].startswith("no task counts")
    far = {"sparse": {"heldout_loss": 3.0}, "dense": {"heldout_loss": 3.1}}
    assert "+3.3%, NOT matched" in summary({**record, "matched": matched(far)})[0]
    test = {
        "site": "all", "test": "sufficiency", "share": 0.25, "loss": 0.2, "loss_full": 0.1, "controls": [0.6, 0.5],
        "verdict": "above chance", "p": {"random": 0.01, "channels": 0.02},
    }  # fmt: skip
    record["tasks"]["a"]["bridge"] = [test, {**test, "site": "0.resid_in"}]
    lines = bridge_lines(record)
    assert len(lines) == 1
    expected = "random subspaces 0.550: above chance (random p 0.01, channels p 0.02)"
    assert f"25% of the width): loss 0.200, model 0.100, {expected}" in lines[0]


@pytest.mark.parametrize(("field", "value"), [("test_pairs", 0), ("random_sets", 0), ("able", 0.8), ("empty", 0.0)])
def test_impossible_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        CompareConfig(**{field: value})


@pytest.mark.parametrize("settings", [{"relative": True}, {"goal": 0.1}])
def test_settings_that_the_comparison_makes_itself_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="prune: relative and goal"):
        CompareConfig(prune=PruneConfig(**settings))

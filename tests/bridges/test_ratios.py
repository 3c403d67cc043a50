import math

import numpy as np
import pytest

from bridges.ratios import arm_name, arm_of, arms, interval, log_sizes, matched, ratios


def row(**edges: int) -> dict:
    """A task's row in which every model has a circuit, of so many edges and half as many nodes."""
    return {"target": 0.15} | {
        name: {
            "loss_full": 0.1,
            "loss_empty": 0.7,
            "loss_circuit": 0.14,
            "reason": None,
            "nodes": count // 2,
            "edges_induced": count,
            "edges_pruned": count,
            "edges_null": float(count),
            "meets_target": True,
        }
        for name, count in edges.items()
    }


def test_models_belong_to_arms_by_their_names() -> None:
    assert [arm_name("dense", index) for index in range(3)] == ["dense", "dense_2", "dense_3"]
    assert [arm_of(name) for name in ("sparse", "dense_12", "dense_gpt2", "student", "sparse_")] == [
        "sparse", "dense", None, None, None
    ]  # fmt: skip
    assert arms(["dense_2", "sparse", "student", "dense"]) == {"sparse": ["sparse"], "dense": ["dense_2", "dense"]}


def test_several_seeds_are_averaged_within_their_arm() -> None:
    rows = {"a": row(sparse=10, dense=40, dense_2=160), "b": row(sparse=10, dense=20, dense_2=20)}
    found = ratios(rows, 0.5)
    # sqrt(40 * 160) / 10 = 8 in the one task, 2 in the other.
    assert found["edge_ratio_geomean"] == pytest.approx(4.0)
    assert found["interval_over"] == {"tasks": 2, "sparse": 1, "dense": 2}
    low, high = found["edge_ratio_interval"]
    assert 1.99 < low < 4.0 < high < 16.01
    worse = {
        "a": rows["a"],
        "b": row(sparse=10, dense=20, dense_2=20) | {"dense_2": rows["b"]["dense"] | {"meets_target": False}},
    }
    assert ratios(worse, 0.5)["left_out"] == {
        "b": "dense_2's circuit misses the target on unseen prompts (0.140 > 0.150)"
    }


def test_one_task_and_several_seeds_have_an_interval_over_seeds() -> None:
    found = ratios({"a": row(sparse=10, dense=20, dense_2=80)}, 0.5)
    assert found["edge_ratio_geomean"] == pytest.approx(4.0)
    assert found["edge_ratio_interval"] == pytest.approx((2.0, 8.0))


def test_the_interval_of_a_mean_by_the_normal_law() -> None:
    generator = np.random.default_rng(0)
    tasks, seeds = 400, 50
    by_seed = generator.normal(0, 1, seeds)
    dense = by_seed + generator.normal(0, 1, (tasks, 1)) + np.zeros((tasks, seeds))
    low, high = interval(np.zeros((tasks, 1)), dense, seed=0) or (0.0, 0.0)
    deviation = math.sqrt(by_seed.var() / seeds + (dense - by_seed)[:, 0].var() / tasks)
    width = math.log(high) - math.log(low)
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    # Seeds left out of the draw would make it far too narrow.
    narrow = interval(np.zeros((tasks, 1)), dense.mean(1, keepdims=True), seed=0) or (0.0, 0.0)
    assert math.log(narrow[1]) - math.log(narrow[0]) < 0.6 * width


def test_nothing_to_draw_from_gives_no_interval() -> None:
    one = np.array([[1.0]])
    assert interval(one, one, seed=0) is None
    assert interval(np.zeros((0,)), np.zeros((0,)), seed=0) is None
    assert interval(one, np.array([[1.0, 2.0]]), seed=0) == interval(one, np.array([[1.0, 2.0]]), seed=0)
    assert log_sizes({"a": row(sparse=0)}, ["a"], "sparse", "edges_induced").tolist() == [[0.0]]


def test_arms_are_matched_by_their_means() -> None:
    losses = {"sparse": 3.0, "dense": 2.9, "dense_2": 3.1, "dense_gpt2": 9.0}
    found = matched({name: {"heldout_loss": loss} for name, loss in losses.items()})
    assert found is not None and found["holds"] and found["gap"] == pytest.approx(0.0)
    assert matched({"sparse": {"heldout_loss": 3.0}}) is None

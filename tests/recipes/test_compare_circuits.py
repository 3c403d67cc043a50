"""The comparison with everything that can be asked of it, on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Recipe = Callable[..., int]
SMALL = ["--config.able", "0.69", "--config.prune.steps", "2", "--config.test-pairs", "8", "--config.random-sets", "2",
         "--config.prune.val-pairs", "8", "--config.prune.clean-up", "1", "--config.prune.edge-clean-up", "0",
         "--config.subspaces", "2", "--config.heldout-windows", "8"]  # fmt: skip


def _own_task(folder: Path) -> Path:
    path = folder / "own.jsonl"
    lines = [
        {"clean": f"x{i} = call('a", "corrupt": f'x{i} = call("a', "answer": "')", "other": '")'} for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_several_seeds_a_second_budget_and_another_basis(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", models / "sparse", "--dense", models / "dense", models / "sparse", "--bridge",
            models / "student", "--second-dense", models / "dense", "--check-budget", "--rotated", "--task",
            _own_task(tmp_path), "--out", tmp_path / "out", *SMALL]  # fmt: skip
    assert recipe("compare_circuits", argv) == 0
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(record["models"]) == ["sparse", "dense", "dense_2", "dense_gpt2", "student", "dense_gpt2_rotated"]
    row = record["tasks"]["own"]
    # The same weights have the same circuit under another name.
    assert row["dense_2"]["nodes"] == row["sparse"]["nodes"]
    for name in ("sparse", "dense", "dense_2"):
        found = (tmp_path / "out" / f"own.{name}.circuit.safetensors").is_file()
        assert ("doubled" in row[name]) == found
        assert not found or row[name]["doubled"]["steps"] == 4
    assert "doubled" not in row["student"]
    assert set(record["budget"]) == {"limit", "models", "holds", "edge_ratio_geomean"}
    assert record["interval_over"]["dense"] == 2 and set(record["basis"]) >= {"tasks", "edge_ratio_geomean"}
    alike = {tuple(one["models"]): one["pearson_log"] for one in record["agreement"]}
    assert alike["dense", "second_dense"] == pytest.approx(1.0) and alike["dense", "dense_2"] < 1.0
    assert "second_dense" in capsys.readouterr().out


def test_a_model_twice_in_one_arm_is_refused(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", models / "sparse", models / "sparse", "--dense", models / "dense", "--out", tmp_path / "out"]
    assert recipe("compare_circuits", argv) == 2
    assert "error: model: got" in capsys.readouterr().err

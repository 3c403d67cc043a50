"""The results of the source, rerun on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bridges.headlines import HEADLINES
from distill.artifact import read_manifest, read_record

Recipe = Callable[..., int]
QUICK = ["--config.able", "0.69", "--config.prune.steps", "4", "--config.test-pairs", "8", "--config.random-sets", "3",
         "--config.prune.val-pairs", "8", "--config.prune.clean-up", "2"]  # fmt: skip


def test_the_list_names_every_result(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("reproduce", ["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and one.rule in shown for name, one in HEADLINES.items())


def test_a_result_that_is_not_there_is_named(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert recipe("reproduce", ["--only", "kurtosis", "loss", "--out", tmp_path / "x"]) == 2
    error = capsys.readouterr().err
    assert "only: got 'loss', allowed are edges" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_all_results_on_tiny_models(models: Path, recipe: Recipe, tmp_path: Path) -> None:
    task = tmp_path / "own.jsonl"
    lines = [
        {"clean": f"x{i} = call('a", "corrupt": f'x{i} = call("a', "answer": "')", "other": '")'} for i in range(60)
    ]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--model", models / "sparse", "--dense", models / "dense", "--family", models / "gpt2",
            "--bridge", models / "student", "--task", task, *QUICK, "--out", tmp_path / "all"]  # fmt: skip
    assert recipe("reproduce", argv) == 0
    out = tmp_path / "all"
    assert all((out / f"{name}.json").is_file() for name in HEADLINES)
    assert (out / "results.md").read_text().count("\n") == 1 + len(HEADLINES)
    assert read_manifest(out, "report")["provenance"]["command"] == "recipes/reproduce.py"
    kurtosis = read_record(out / "kurtosis.json", what="result")
    assert set(kurtosis["numbers"]["models"]) == {"sparse", "dense", "gpt2"}
    assert all(row["kurtosis"] > 1 for row in kurtosis["numbers"]["models"].values())
    agreement = read_record(out / "agreement.json", what="result")["numbers"]["pairs"]
    assert all(-1 <= pair["pearson_log"] <= 1 for pair in agreement.values()) and len(agreement) == 3
    steering = read_record(out / "steering.json", what="result")["numbers"]["own"]
    assert steering["strengths"][-1] == 1.0 and len(steering["nodes"]) == 16
    # A second run over it takes the circuits that lie there.
    assert recipe("reproduce", [*argv, "--only", "necessity"]) == 0

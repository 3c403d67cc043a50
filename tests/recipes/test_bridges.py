"""The recipes of students and bridges, on tiny models made by the recipes themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Recipe = Callable[..., int]


def test_gpt2_is_planned_for_without_its_weights(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--dense", "gpt2", "--preset", "gpt2-small", "--dry-run", "--out", tmp_path / "run"]
    assert recipe("fit_bridges", argv) == 0
    said = capsys.readouterr().out
    assert "dense model: 124,439,808 parameters, frozen; student: 1,671,290,112" in said
    assert "983,040,000 tokens" in said and "hours on one GPU" in said and "memory: about" in said
    assert "corpus: hf:Skylion007/openwebtext, read as a stream" in said
    assert "--task ioi greater_than gendered_pronoun subject_verb_agreement" in said
    assert list(tmp_path.iterdir()) == []
    assert recipe("fit_bridges", ["--dense", "no/such", "--dry-run"]) == 2
    assert "allowed without a network are a folder with config.json, and gpt2," in capsys.readouterr().err


def test_a_student_is_measured_beside_its_rivals(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Two students of one size and tokenizer: the second stands for the one trained with KL alone.
    argv = ["--bridge", models / "student", "--corpus", models / "sparse.tokens", "--unrelated", models / "sparse",
            "--kl-only", models / "student", "--windows", "4", "--context", "32", "--mixtures", "3",
            "--out", tmp_path / "out"]  # fmt: skip
    assert recipe("measure_bridges", argv) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "bridges.json").read_text())
    assert set(found["baselines"]) == {"mean", "least_squares", "unrelated", "kl_only"} and len(found["mixtures"]) == 3
    assert found["baselines"]["kl_only"]["sites"] == found["baselines"]["least_squares"]["sites"]
    assert found["tokens"] == 4 * 32 and "| unrelated |" in said and "| 0.resid_mid |" in said
    assert (tmp_path / "out" / "bridges.png").read_bytes()[1:4] == b"PNG"
    # The same student on text that is read on the way, counted from its start.
    streamed = ["--corpus", models / "texts", "--stream", "--unrelated", "none", "--kl-only", "none"]
    assert recipe("measure_bridges", [*argv, *streamed, "--out", tmp_path / "streamed"]) == 0
    told = json.loads((tmp_path / "streamed" / "bridges.json").read_text())
    assert told["tokens"] == 4 * 32 and told["bigram_ce"] > 0 and "least_squares" in told["baselines"]
    assert recipe("measure_bridges", [*argv, "--unrelated", models / "gpt2"]) == 2
    assert "unrelated" in capsys.readouterr().err


def test_a_dense_model_is_steered_by_its_student(models: Path, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"clean": f"x{i} = call('a", "corrupt": f'x{i} = call("a', "answer": "')", "other": '")'} for i in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--bridge", models / "student", "--task", path, "--top", "3", "--controls", "2", "--pairs", "4",
            "--strength", "0:1:3", "--out", tmp_path / "out"]  # fmt: skip
    assert recipe("steer", argv) == 0
    found = json.loads((tmp_path / "out" / "steering.json").read_text())["own"]
    assert len(found["nodes"]) == 3 and found["strengths"] == [0.0, 0.5, 1.0] and 0 < found["ceiling"] < 1
    assert {name: len(runs) for name, runs in found["probability"].items()} == {"node": 1, "random": 2, "reads": 1}
    assert (tmp_path / "out" / "steering.png").is_file()

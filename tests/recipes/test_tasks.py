import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.circuits.tasks import task_names

Recipe = Callable[..., int]


def own_file(folder: Path) -> Path:
    lines = [{"clean": f"call('v{i}", "corrupt": f'call("v{i}', "answer": "')", "other": '")'} for i in range(20)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "own.jsonl"


def test_alone_it_lists_the_tasks(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("tasks", []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == task_names("all")


def test_a_file_is_checked(recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = own_file(tmp_path)
    assert recipe("tasks", ["--task", path]) == 0
    assert capsys.readouterr().out.startswith(
        "own  \"')\" or '\")'. own task of own.jsonl (train 10 val 5 test 5 pairs)"
    )
    path.write_text(path.read_text() + '{"clean": "a"}\n')
    assert recipe("tasks", ["--task", path]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line 21: field 'corrupt' must be a text")


def test_a_model_gets_its_table(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", models / "sparse", "--task", own_file(tmp_path), "ioi", "for_while:nonsense", "--pairs", "4"]
    assert recipe("tasks", [*argv, "--out", tmp_path / "tasks.json"]) == 0
    out = capsys.readouterr().out
    (record,) = json.loads((tmp_path / "tasks.json").read_text())["models"]
    assert [one["task"] for one in record["tasks"]] == ["own", "ioi", "for_while_nonsense"]
    assert record["model"] == "sparse" and record["seed"] == 0
    own, ioi, _ = record["tasks"]
    assert {split: row["pairs"] for split, row in own["splits"].items()} == {"train": 4, "val": 4, "test": 4}
    assert (
        own["fits"] and 0 <= own["splits"]["test"]["accuracy"]["low"] <= own["splits"]["test"]["accuracy"]["high"] <= 1
    )
    assert not ioi["fits"] and f"| ioi | no: {ioi['reason']} |" in out  # longer than these models' context
    assert "| ioi | does not fit |" in out
    assert f"tables in {tmp_path / 'tasks.json'}" in out


def test_models_stand_side_by_side(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", models / "sparse", models / "gpt2", "--task", own_file(tmp_path), "--pairs", "4"]
    assert recipe("tasks", [*argv, "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert out.count("| own") == 3 and "| train |" not in out
    assert "| task | sparse | gpt2 |" in out


def test_pairs_are_shown(models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("tasks", ["--task", "for_while", "var_if", "--show", "2"]) == 0
    shipped = capsys.readouterr().out
    assert shipped.count("\n  clean ") == shipped.count("\n  corrupt ") == 4
    assert recipe("tasks", ["--task", "for_while", "var_if", "--show", "2", "--model", models / "sparse"]) == 0
    assert capsys.readouterr().out != shipped  # other tokens


def test_the_document_has_a_section_a_task(recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert recipe("tasks", ["--document", "--task", "ioi", "for_while", own_file(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("## ")] == ["## ioi", "## for_while", "## own"]
    assert out.count("--- test") == 3 and out.count("--- shift") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "quotes"], "task: unknown task 'quotes'; known: bracket_brace"),
        (["--pairs", "0"], "pairs, show: got 0, 0; allowed are 1 and more, 0 and more"),
        (["--out", "x.json"], "out: holds the table of a model; give --model as well"),
        (["--document", "--task", "none.jsonl"], "task: no such file: none.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], message: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("tasks", argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")

"""A user's own tasks: JSONL files of pairs, and every fault named by file, line and field."""

import json
from pathlib import Path

import pytest

from distill.circuits.tasks import Task, load_task


def own_task(folder: Path, *lines: object) -> Task:
    path = folder / "own.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return load_task(path)


def line(clean: str = "a(", corrupt: str = "a[", answer: str = ")", other: str = "]", **more: object) -> dict:
    return {"clean": clean, "corrupt": corrupt, "answer": answer, "other": other, **more}


def test_own_pairs_keep_their_direction_and_orientation_needs_two_completions(tmp_path: Path) -> None:
    task = own_task(tmp_path, line(), line("b(", "b["), line("c[", "c(", "]", ")"), line("d(", "d[", split="shift"))
    assert task.own and task.oriented and task.kind == "own" and task.name == "own"
    assert {split: task.size(split) for split in task.splits} == {"train": 2, "val": 1, "shift": 1}
    drawn = [pair for split in task.splits for pair in task.pairs(split, task.size(split), seed=0)]
    assert {(pair.clean, pair.label) for pair in drawn} == {("a(", 0), ("b(", 0), ("c[", 1), ("d(", 0)}
    varied = own_task(tmp_path, line(), line("b{", "b[", "}", "]"))
    assert not varied.oriented
    assert varied.fingerprint != task.fingerprint
    with pytest.raises(ValueError, match="'own' has no pairs in 'test'; splits with pairs: train, val"):
        varied.pairs("test", 1, seed=0)


def test_a_pair_knows_its_line(tmp_path: Path) -> None:
    task = own_task(tmp_path, line(split="test"), "", line("b(", "b[", split="val"))
    assert task.where(task.pairs("val", 1, seed=0)[0]) == f"{tmp_path / 'own.jsonl'}, line 3: "
    built_in = load_task("for_while")
    assert built_in.where(built_in.pairs("val", 1, seed=0)[0]) == ""


def test_the_deal_of_lines_without_a_split_does_not_depend_on_their_order(tmp_path: Path) -> None:
    lines = [line(f"{letter}(", f"{letter}[") for letter in "abcdefgh"]
    forward, backward = own_task(tmp_path, *lines), own_task(tmp_path, *reversed(lines))
    for split, size in (("train", 4), ("val", 2), ("test", 2)):
        assert {*forward.pairs(split, size, seed=0)} == {*backward.pairs(split, size, seed=0)}


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be a JSON object, got list"),
        ({"clean": "a(", "corrupt": "a[", "answer": ")"}, "line 2: field 'other' must be a text .* got None"),
        (line(clean=""), "line 2: field 'clean' must be a text that is not empty, got ''"),
        ({**line(), "answer": 3}, "line 2: field 'answer' must be a text .* got 3"),
        (line(corrupt="a("), r"line 2: field 'corrupt' equals 'clean': 'a\('"),
        (line(other=")"), "line 2: field 'other' equals 'answer'"),
        (line(split="dev"), "line 2: field 'split' is 'dev'; allowed: train, val, test, shift"),
        (line(split=["test"]), r"line 2: field 'split' is \['test'\]; allowed: train"),
        (line(splt="val"), "line 2: unknown field 'splt'; allowed: clean"),
        (line("x[", "x(", "]", ")"), "line 2: field 'clean' repeats the pair of line 1"),
    ],
)
def test_faults_of_an_own_file_name_file_line_and_field(tmp_path: Path, faulty: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"own\.jsonl, {message}") as error:
        own_task(tmp_path, line("x(", "x["), faulty)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(b'{"clean": "\xff"}\n')
    with pytest.raises(ValueError, match=r"own\.jsonl, line 1: not JSON"):
        load_task(tmp_path / "own.jsonl")


def test_an_own_file_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"own\.jsonl: no pairs; one JSON object per line"):
        own_task(tmp_path, "", "  ")

"""The recipe that makes models ready for others, on tiny ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bridges import load_bridged
from distill import load_subject
from distill.artifact import read_manifest

Recipe = Callable[..., int]


def test_models_are_shipped(models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    argv = ["--model", models / "sparse", "--out", out, "--bigram", "int8"]
    assert recipe("ship", argv) == 0
    extra = read_manifest(out, "model")["provenance"]["extra"]
    assert f"held-out loss {extra['heldout_loss']:.4f}" in capsys.readouterr().out
    assert load_subject(out).model.fingerprint() == extra["fingerprint"]
    assert recipe("ship", argv) == 2
    assert "exists already" in capsys.readouterr().err
    assert recipe("ship", [*argv, "--overwrite"]) == 0


def test_a_shipped_one_is_known_by_its_short_name(recipe: Recipe, tmp_path: Path) -> None:
    """With its bridges, where it has any."""
    assert recipe("ship", ["--model", "student", "--out", tmp_path / "student"]) == 0
    assert load_bridged(tmp_path / "student")[2].source.endswith("dense_gpt2")


def test_a_student_is_shipped_with_its_bridges(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert recipe("ship", ["--model", models / "gpt2", "--out", tmp_path / "gpt2"]) == 0
    argv = ["--model", models / "student", "--out", tmp_path / "student", "--bigram", "int8"]
    assert recipe("ship", [*argv, "--dense", tmp_path / "gpt2"]) == 0
    student, bridges, info = load_bridged(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "dense.json").read_text())["name"] == "../gpt2"
    assert info.dense.load().n_layer == student.n_layer and len(bridges.sites) == 2 * student.n_layer + 1
    extra = read_manifest(tmp_path / "student", "bridge")["provenance"]["extra"]
    assert extra["heldout_loss"] == pytest.approx(info.metrics["student_ce"], abs=0.5)
    assert load_subject(tmp_path / "student").means.model == student.fingerprint()
    assert not list((tmp_path / "student").glob("checkpoint*"))
    cards = list((tmp_path / "student").rglob("README.md"))
    assert cards == [tmp_path / "student" / "README.md"] and cards[0].read_text().count("# student\n") == 1
    assert "| steps | 12 |" in cards[0].read_text() and "| hardware | " in cards[0].read_text()
    for change, said in (
        (["--dense", models / "dense"], "bridges were fitted to"),
        (["--model", models / "gpt2", "--dense", "x"], "dense: "),
        (["--out", tmp_path / "student"], "exists already"),
    ):
        assert recipe("ship", [*argv, "--out", tmp_path / "other", *change]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()

"""The recipe's own ways: streamed text, a plan with the time in it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.artifact import read_manifest

Recipe = Callable[..., int]
SMALL = ["--architecture.d-model", "16", "--architecture.d-head", "8", "--architecture.n-layer", "1", "--config.steps",
         "6", "--config.batch", "4", "--vocab-size", "300", "--config.context", "32", "--architecture.context", "32",
         "--config.kept", "0.25"]  # fmt: skip


def test_text_is_streamed_and_mixed_and_the_run_gone_on_with(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distill.data.stream.TOKENIZER_BYTES", 2**15)
    monkeypatch.setattr("distill.data.stream.HELDOUT_TOKENS", 4000)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.py").write_text(f"for item in range({i}):\n    print('value {i}', item)\n" * 4)
    words = ["--stream", "--corpus", tmp_path / "texts", "idioms", "--weights", "1", "3", *SMALL]
    assert recipe("train_sparse", [*words, "--out", tmp_path / "run"]) == 0
    described = read_manifest(tmp_path / "run.tokens", "tokens")["provenance"]["extra"]
    assert described["weights"] == [0.25, 0.75]
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state.json"
    (position,) = json.loads(saved.read_text())["position"]
    assert position["step"] == 6 and len(position["shards"]) == 4
    assert recipe("train_sparse", [*words, "--out", tmp_path / "run", "--resume"]) == 0
    capsys.readouterr()
    assert recipe("train_sparse", ["--weights", "1", "--out", tmp_path / "new", *SMALL]) == 2
    assert "weights" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_plan_of_a_dry_run_says_how_long(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("train_sparse", ["--dry-run", "--out", tmp_path / "run", *SMALL]) == 0
    printed = capsys.readouterr().out
    for part in ("parameters", "stay", "768 tokens", "memory", "disk", "measured now at 1 and 2 layers"):
        assert part in printed
    assert list(tmp_path.iterdir()) == []

"""The recipe that judges saved circuits: files, tables, two circuits side by side, and bad input in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.artifact import read_manifest
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.subject import load_subject

Recipe = Callable[..., int]
FEW = ["--limits.pairs", "6", "--limits.few-pairs", "4", "--limits.sets", "4", "--limits.draws", "2",
       "--limits.random-circuits", "4", "--limits.subsets", "2", "--limits.ascent-steps", "2",
       "--limits.single-nodes", "4", "--limits.single-edges", "4", "--limits.worst-steps", "1",
       "--limits.other-tasks", "1", "--limits.seeds", "2", "--limits.interchange-draws", "1"]  # fmt: skip
PRUNE = {"steps": 2, "pairs": 4, "train_pairs": 8, "val_pairs": 4, "screen": 2, "clean_up": 2}


@pytest.fixture(scope="module")
def circuits(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two circuits of the sparse model and one of the GPT-2."""
    folder = tmp_path_factory.mktemp("circuits")
    for name, model, seed in (("one", "sparse", 0), ("two", "sparse", 1), ("gpt2", "gpt2", 0)):
        subject = load_subject(models / model)
        generator = torch.Generator().manual_seed(seed)
        nodes = {location: torch.rand(width, generator=generator) < 0.5
                 for location, width in subject.model.widths.items()}  # fmt: skip
        circuit = Circuit(
            model=subject.model.fingerprint(), model_name=model, task="for_while", nodes=nodes,
            scores={location: mask.float() for location, mask in nodes.items()}, means=subject.means,
            calibration=Calibration(), losses={}, target=0.7,
            provenance={"config": PRUNE | {"target": 0.7, "objective": "paper"}, "seed": 0},
        )  # fmt: skip
        circuit.save(folder / f"{name}.circuit.safetensors")
    return folder


def test_a_scorecard_is_written_and_printed(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = circuits / "one.circuit.safetensors"
    argv = ["--circuit", file, "--model", models / "sparse", "--out", tmp_path / "out", *FEW]
    assert recipe("check_circuit", argv) == 0
    printed = capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["circuit"] == "one" and card["model"] == "sparse" and card["verdict"] in printed
    names = [check["name"] for check in card["checks"]]
    assert names == ["sufficiency", "ablations", "necessity", "stochastic", "role", "minimality", "shift"]
    assert all(name in printed for name in names)
    assert card["limits"]["sets"] == 4 and card["about"]["objective"] == "paper"


def test_full_runs_all_twelve_checks_on_a_dense_model(
    models: Path, circuits: Path, recipe: Recipe, tmp_path: Path
) -> None:
    file = circuits / "gpt2.circuit.safetensors"
    argv = ["--circuit", file, "--model", models / "gpt2", "--full", "--out", tmp_path / "out", *FEW]
    assert recipe("check_circuit", argv) == 0
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert len(card["checks"]) == 12 and set(card["seconds"]) == {check["name"] for check in card["checks"]}
    controls = next(check for check in card["checks"] if check["name"] == "controls")
    assert {"edges_a nonsense rule", "edges_redrawn weights"} <= set(controls["details"])


def test_several_circuits_and_two_side_by_side(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, two, gpt2 = (circuits / f"{name}.circuit.safetensors" for name in ("one", "two", "gpt2"))
    where = ["--model", models / "sparse", models / "gpt2", "--out", tmp_path / "out"]
    assert recipe("check_circuit", ["--circuit", one, gpt2, *where, *FEW]) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert rows[0].startswith("circuit") and rows[1].startswith("one") and rows[2].startswith("gpt2")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one.scorecard.json", "gpt2.scorecard.json"}
    assert recipe("check_circuit", ["--circuit", one, "--against", two, *where, *FEW]) == 0
    both = json.loads((tmp_path / "out" / "versus.json").read_text())
    assert 0 < both["shared"]["jaccard_nodes"] < 1 and len(both["transfer"]) == 4
    assert "jaccard nodes" in capsys.readouterr().out


def test_without_a_folder_it_stands_beside_the_circuit(models: Path, circuits: Path, recipe: Recipe) -> None:
    argv = ["--circuit", circuits / "two.circuit.safetensors", "--model", models / "sparse", *FEW]
    assert recipe("check_circuit", argv) == 0
    assert json.loads((circuits / "two.scorecard.json").read_text())["circuit"] == "two"


def test_an_earlier_scorecard_is_replaced_and_nothing_else(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--circuit", circuits / "one.circuit.safetensors", "--model", models / "sparse", "--out"]
    (tmp_path / "file").write_text("mine")
    assert recipe("check_circuit", [*argv, tmp_path / "file"]) == 2
    assert (tmp_path / "file").read_text() == "mine"
    for name, text, message in (
        ("damaged", "{", "scorecard.json"),
        ("foreign", '{"kind": "model"}', "is no scorecard"),
        ("other", '{"checks": [], "verdict": "", "task": "ioi", "model": "sparse"}', "circuit of 'ioi' in 'sparse'"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scorecard.json").write_text(text)
        assert recipe("check_circuit", [*argv, tmp_path / name]) == 2
        assert (tmp_path / name / "scorecard.json").read_text() == text
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in lines[-1]
    same = '{"checks": [], "verdict": "", "task": "for_while", "model": "sparse"}'
    (tmp_path / "other" / "scorecard.json").write_text(same)
    assert recipe("check_circuit", [*argv, tmp_path / "other", *FEW]) == 0
    assert len(json.loads((tmp_path / "other" / "scorecard.json").read_text())["checks"]) == 7


def test_pruning_brings_a_scorecard_unless_it_is_left_out(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", "dense", "--task", "while_return_true", "--target", "0.6", "--prune.steps", "2",
            "--prune.screen", "2", "--prune.clean-up", "0", "--prune.edge-clean-up", "0",
            "--out", tmp_path / "out"]  # fmt: skip
    assert recipe("prune_circuit", argv) == 0
    card = json.loads((tmp_path / "out" / "while_return_true.dense.scorecard.json").read_text())
    assert card["circuit"] == "while_return_true.dense" and card["verdict"] in capsys.readouterr().out
    assert "while_return_true.dense.scorecard.json" in read_manifest(tmp_path / "out", "report")["files"]
    assert recipe("prune_circuit", [*argv, "--no-checks"]) == 0
    assert not (tmp_path / "out" / "while_return_true.dense.scorecard.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--circuit", "{circuits}/none.circuit.safetensors"], "none.circuit.safetensors"),
        (["--circuit", "{circuits}/one.circuit.safetensors"], "--model"),
        (["--circuit", "{circuits}/one.circuit.safetensors", "--model", "{models}/gpt2"], "fingerprint"),
        (["--circuit", "{circuits}/one.circuit.safetensors", "--model", "{models}/texts"], "no model folder"),
        (["--circuit", "{circuits}/one.circuit.safetensors", "--task", "no_such_task"], "no_such_task"),
        (["--circuit", "{circuits}/one.circuit.safetensors", "--limits.sets", "0"], "sets"),
        (["--circuit", "{circuits}/one.circuit.safetensors", "{circuits}/two.circuit.safetensors", "--against",
          "{circuits}/two.circuit.safetensors"], "one with --against"),
        (["--circuit", "{models}/texts/0.py"], "0.py"),
        ([], "circuit"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(
    models: Path,
    circuits: Path,
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    argv: list[str],
    message: str,
) -> None:
    words = [word.format(models=models, circuits=circuits) for word in argv]
    capsys.readouterr()
    assert recipe("check_circuit", [*words, "--out", tmp_path / "out"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()

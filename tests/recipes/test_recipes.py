import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill import Circuit, load_model, load_subject
from distill.data import train_tokenizer
from distill.model import DenseModel, SparseTransformer

Recipe = Callable[..., int]
PRUNE = ["--config.able", "0.69", "--config.prune.steps", "4", "--config.test-pairs", "8", "--config.random-sets", "3",
         "--config.prune.val-pairs", "8", "--config.prune.clean-up", "2"]  # fmt: skip


def _own_task(folder: Path) -> Path:
    """Pairs that an untrained model answers better than chance on one side: what counts here is the way through."""
    path = folder / "own.jsonl"
    lines = [
        {"clean": f"x{i} = call('a", "corrupt": f'x{i} = call("a', "answer": "')", "other": '")'} for i in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_training_leaves_a_folder_that_loads(models: Path) -> None:
    assert isinstance(load_model(models / "sparse"), SparseTransformer)
    assert isinstance(load_model(models / "dense"), SparseTransformer)
    assert isinstance(load_model(models / "gpt2"), DenseModel)
    assert isinstance(load_model(models / "student"), SparseTransformer)
    for name in ("sparse", "dense", "gpt2"):
        lines = (models / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 12
    metrics = json.loads((models / "student" / "bridges.json").read_text())
    assert set(metrics["sites"]) == {"0.resid_in", "0.resid_mid", "final_resid"}


def test_a_training_refuses_a_folder_in_use_and_resumes_or_overwrites_it(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--corpus", models / "sparse.tokens", "--vocab-size", "400", "--architecture.d-model", "16",
              "--architecture.n-layer", "1", "--config.context", "32", "--config.batch", "4", "--config.steps", "6",
              "--out", tmp_path / "run"]  # fmt: skip
    assert recipe("train_dense", common) == 0
    first = load_model(tmp_path / "run").fingerprint()
    capsys.readouterr()
    assert recipe("train_dense", common) == 2
    assert "allowed are a new folder, --resume or --overwrite" in capsys.readouterr().err
    assert recipe("train_dense", [*common, "--resume"]) == 0
    assert load_model(tmp_path / "run").fingerprint() == first
    assert recipe("train_dense", [*common, "--overwrite", "--seed", "1"]) == 0
    assert load_model(tmp_path / "run").fingerprint() != first


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("train_sparse", "train_dense"):
        assert recipe(name, ["--preset", "tiny", "--dry-run", "--out", tmp_path / "run"]) == 0
        assert "10,240 tokens" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_writes_everything_and_replaces_itself(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--model", models / "sparse", "--dense", models / "dense", "--bridge", models / "student",
            "--task", "for_while", _own_task(tmp_path), "--out", tmp_path / "out", *PRUNE]  # fmt: skip
    assert recipe("compare_circuits", argv) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(record["models"]) == {"sparse", "dense", "dense_gpt2", "student"}
    assert {"edge_ratio_geomean", "seed", "versions", "objective"} <= set(record)
    for task in ("for_while", "own"):
        row = record["tasks"][task]
        assert row["target"] >= 0.15
        for name in record["models"]:
            fields = {"loss_full", "loss_empty", "loss_circuit", "loss_calibrated", "nodes", "edges_induced",
                      "edges_embed", "loss_without_circuit", "loss_without_random_median"}  # fmt: skip
            assert fields <= set(row[name])
            file = tmp_path / "out" / f"{task}.{name}.circuit.safetensors"
            assert file.is_file() == (row[name]["nodes"] is not None)
            assert (row[name]["reason"] is None) == file.is_file()
            if file.is_file():
                circuit = Circuit.load(file)
                assert circuit.n_nodes == row[name]["nodes"]
            assert name in printed
    page = (tmp_path / "out" / "index.html").read_text()
    assert "http" not in page.replace("https://", "http").split("How this was made")[0]
    assert "data:image/png;base64," in page
    assert recipe("compare_circuits", [*argv, "--seed", "1"]) == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["seed"] == 1


def test_prune_circuit_takes_one_model(models: Path, recipe: Recipe, tmp_path: Path) -> None:
    argv = ["--model", models / "gpt2", "--task", "for_while", "--out", tmp_path / "out", "--prune.steps", "2"]
    assert recipe("prune_circuit", argv) == 0
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(record["models"]) == {"gpt2"}
    assert record["edge_ratio_geomean"] is None


def test_a_subject_measures_its_means_on_what_lies_beside_it(models: Path) -> None:
    subject = load_subject(models / "gpt2")
    assert subject.means.model == subject.model.fingerprint()
    assert subject.means.per_position
    tokens = subject.sample[:, :-1]
    with torch.no_grad():
        stream = subject.model.run(tokens, stop="0.resid_in")
    assert stream.shape[:2] == tokens.shape


BAD = [
    ("prune_circuit", ["--task", "no_such_task"], "no_such_task"),
    ("prune_circuit", ["--model", "{models}/texts"], "no model folder"),
    ("prune_circuit", ["--model", "{models}/sparse", "--target", "-1"], "target"),
    ("prune_circuit", ["--model", "{models}/sparse", "--prune.objective", "best"], "objective"),
    ("prune_circuit", ["--model", "{models}/sparse", "--task", "{models}/none.jsonl"], "none.jsonl"),
    ("prune_circuit", ["--model", "{models}/nowhere"], "nowhere"),
    (
        "compare_circuits",
        ["--model", "{models}/sparse", "--dense", "{models}/dense", "--bridge", "{models}/gpt2"],
        "bridge",
    ),
    ("train_sparse", ["--corpus", "{models}/nothing"], "nothing"),
    ("train_sparse", ["--config.kept", "0"], "kept"),
    ("train_sparse", ["--architecture.d-model", "17"], "d_model"),
    ("train_sparse", ["--config.steps", "many"], "steps"),
    ("train_sparse", ["--preset", "huge"], "preset"),
    ("train_dense", ["--config.kept", "0.5"], "kept"),
    ("train_dense", ["--device", "abacus"], "device"),
    ("fit_bridges", ["--dense", "{models}/texts"], "no model folder"),
    ("fit_bridges", ["--dense", "{models}/gpt2", "--bridge.k-fraction", "0"], "k_fraction"),
    ("fit_bridges", ["--dense", "{models}/gpt2", "--student.context", "128"], "context"),
]


@pytest.mark.parametrize(("name", "argv", "message"), BAD)
def test_bad_input_gets_one_line_and_status_2(
    models: Path,
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    argv: list[str],
    message: str,
) -> None:
    words = [word.format(models=models) for word in argv]
    capsys.readouterr()
    assert recipe(name, [*words, "--out", tmp_path / "out"]) == 2
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "out").exists()


def test_prompts_longer_than_the_context_are_refused(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    long = "value = " + "1 + " * 80
    lines = [{"clean": f"{long}f{i}('a", "corrupt": f'{long}f{i}("a', "answer": "')", "other": '")'} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recipe("prune_circuit", ["--model", models / "sparse", "--task", path, "--out", tmp_path / "out"]) == 2
    assert "context" in capsys.readouterr().err


def test_a_recipe_runs_as_a_script() -> None:
    path = Path(__file__).parents[2] / "recipes" / "compare_circuits.py"
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for flag in ("--model", "--dense", "--bridge", "--task", "--target", "--out", "--seed", "--device"):
        assert flag in done.stdout


def test_answers_that_no_single_token_tells_apart_are_refused(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "same.jsonl"
    lines = [{"clean": f"x{i} = a", "corrupt": f"y{i} = a", "answer": "\n", "other": "\n"} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recipe("prune_circuit", ["--model", models / "sparse", "--task", path, "--out", tmp_path / "out"]) == 2
    error = capsys.readouterr().err
    assert "same" in error
    assert "answer" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_tokenizer_of_another_model_is_refused(
    models: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, with_manifest: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "sparse" / "model", folder)
    texts = [path.read_text() for path in sorted((models / "texts").iterdir())]
    train_tokenizer(texts, 420).save_pretrained(folder)
    if not with_manifest:
        (folder / "manifest.json").unlink()
    assert recipe("prune_circuit", ["--model", folder, "--task", "for_while", "--out", tmp_path / "out"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "tokenizer" in error[0]

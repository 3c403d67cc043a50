"""The recipes that use circuits: edited models and their accounts, watched text, reports, bad input in one line."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from distill.artifact import read_manifest
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.subject import load_subject
from distill.circuits.watch import Watch
from distill.model import load_model

Recipe = Callable[..., int]
FEW = ["--edit.pairs", "4", "--edit.windows", "4", "--edit.controls", "1", "--edit.most", "2"]
NODE = "0.mlp.act_in.3"


@pytest.fixture(scope="module")
def circuits(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a circuit of the sparse model and one of the student."""
    folder = tmp_path_factory.mktemp("circuits")
    for name, place in (("sparse", models / "sparse"), ("student", models / "student" / "model")):
        subject = load_subject(place)
        generator = torch.Generator().manual_seed(0)
        nodes = {location: torch.rand(width, generator=generator) < 0.3
                 for location, width in subject.model.widths.items()}  # fmt: skip
        Circuit(
            model=subject.model.fingerprint(), model_name=name, task="for_while", nodes=nodes,
            scores={location: mask.float() for location, mask in nodes.items()}, means=subject.means,
            calibration=Calibration(), losses={}, target=0.7,
        ).save(folder / f"{name}.circuit.safetensors")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def edited(models: Path, circuits: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The sparse model edited, and what was printed."""
    out, printed = tmp_path_factory.mktemp("edited") / "model", io.StringIO()
    argv = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", models / "sparse", "--out", out, *FEW]
    with redirect_stdout(printed):
        assert recipe("edit_circuit", [*argv, "--op", "scale", "--factor", "-0.5", "--edit.controls", "2"]) == 0
    return out, printed.getvalue()


def test_an_edited_model_lies_beside_its_account(
    models: Path, circuits: Path, edited: tuple[Path, str], recipe: Recipe, tmp_path: Path
) -> None:
    out, printed = shutil.copytree(edited[0], tmp_path / "edited"), edited[1]
    argv = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", models / "sparse", "--out", out, *FEW]
    account = json.loads((out / "account.json").read_text())
    assert all(name in printed for name in ("before", "after", "random median", "others lost"))
    assert len(account["random"]) == 2 and account["edit"]["changes"][0]["factor"] == -0.5
    assert set(account["before"]["others"]) == set(account["after"]["others"]) and account["tokens"] == 4 * 64
    manifest = read_manifest(out, "model")["provenance"]
    model = load_model(models / "sparse")
    assert manifest["extra"]["edited"] == model.fingerprint() != load_model(out).fingerprint()
    assert manifest["extra"]["nodes"] == [change["node"] for change in account["edit"]["changes"]]
    assert load_subject(out).sample.shape == load_subject(models / "sparse").sample.shape
    # Again, with a scale of 1: the same model, bit for bit, in place of the other.
    assert (
        recipe("edit_circuit", [*argv, "--op", "scale", "--factor", "1", "--nodes", NODE, "--edit.controls", "0"]) == 0
    )
    assert load_model(out).fingerprint() == model.fingerprint()


def test_only_an_edited_model_is_replaced(
    models: Path,
    circuits: Path,
    edited: tuple[Path, str],
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A trained model, the model that is edited among them, and what is no model stay to the last byte."""
    trained, notes, ours = tmp_path / "trained", tmp_path / "notes", edited[0]
    shutil.copytree(models / "sparse" / "model", trained)
    notes.mkdir()
    (notes / "thesis.txt").write_text("years")
    argv = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", models / "sparse", *FEW, "--op", "ablate"]
    for out, words in ((trained, "a model that is no edited one"), (notes, "is not ours")):
        before = {path: path.read_bytes() for path in out.rglob("*")}
        assert recipe("edit_circuit", [*argv, "--out", out]) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
        assert {path: path.read_bytes() for path in out.rglob("*")} == before
    # An edited model is one that may be edited again, but not into its own place.
    again = Circuit.load(circuits / "sparse.circuit.safetensors")
    file = replace(again, model=load_model(ours).fingerprint()).save(tmp_path / "again.circuit.safetensors")
    argv = ["--circuit", file, "--model", ours, *FEW, "--op", "ablate"]
    capsys.readouterr()
    assert recipe("edit_circuit", [*argv, "--out", ours]) == 2
    assert "holds the very model that is to be edited" in capsys.readouterr().err
    code = ["--nodes", NODE, "--edit.controls", "0", "--edit.away", "closing_quotes", "--edit.code", models / "texts"]
    assert recipe("edit_circuit", [*argv, *code, "--out", tmp_path / "twice"]) == 0, "it remembers its training's split"


def test_edges_are_cut_and_text_is_code(models: Path, circuits: Path, recipe: Recipe, tmp_path: Path) -> None:
    file, out = circuits / "sparse.circuit.safetensors", tmp_path / "cut"
    model = load_model(models / "sparse")
    edges = Circuit.load(file).edge_set(model)["0.mlp.act_in", "0.mlp.post_act"]
    node = f"0.mlp.post_act.{int(edges[0, 0])}"
    argv = ["--circuit", file, "--model", models / "sparse", "--out", out, *FEW, "--op", "cut-edges", "--nodes", node]
    assert recipe("edit_circuit", [*argv, "--edit.away", "closing_quotes", "--edit.code", models / "texts"]) == 0
    account = json.loads((out / "account.json").read_text())
    assert account["left_out_of_away"] == "tokens that close a string"
    assert account["edit"]["cuts"] and all(node in (cut["source"], cut["target"]) for cut in account["edit"]["cuts"])


def test_code_needs_the_split_of_the_training(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(models / "sparse" / "model", bare)
    (bare / "manifest.json").unlink()
    argv = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", bare]
    edit = [*argv, "--out", tmp_path / "out", *FEW, "--op", "ablate", "--edit.away", "closing_quotes"]
    for name, words in (("edit_circuit", edit), ("monitor", [*argv, "--evaluate", tmp_path / "report.json"])):
        assert recipe(name, words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: code: nothing says which files") and "leave code out" in error
    assert recipe("monitor", [*argv, "--evaluate", tmp_path / "report.json", "--code"]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert "code" not in found and found["splits"]


def test_the_dense_model_behind_the_bridge_is_edited(
    models: Path, circuits: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "dense"
    argv = ["--circuit", circuits / "student.circuit.safetensors", "--bridge", models / "student", "--out", out, *FEW]
    assert recipe("edit_circuit", [*argv, "--op", "ablate"]) == 0
    account = json.loads((out / "account.json").read_text())
    assert account["edit"]["op"] == "ablate" and account["edit"]["directions"]
    loaded, original = (GPT2LMHeadModel.from_pretrained(place) for place in (out, models / "gpt2" / "model"))
    changed = {
        name for name, value in original.state_dict().items() if not torch.equal(value, loaded.state_dict()[name])
    }
    assert changed and all(
        name.split(".", 3)[-1].rsplit(".", 1)[0] in ("attn.c_proj", "mlp.c_proj") for name in changed
    )


def test_text_is_watched_as_json_lines_in_colour_and_as_a_page(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    argv = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", models / "sparse"]
    text = "for item in range(3):\n    print('<b>', item)\n" * 9
    saved = tmp_path / "one.watch.safetensors"
    assert recipe("monitor", [*argv, "--input", text, "--html", tmp_path / "page.html", "--save", saved]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(record["token"] for record in records) == text
    assert set(records[0]) == {"token", "id", "strength", "lean", "flag"}
    watch = Watch.load(saved)
    assert [record["flag"] for record in records] == [record["strength"] > watch.threshold for record in records]
    page = (tmp_path / "page.html").read_text()
    assert "&lt;" in page and "<b>" not in page
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert recipe("monitor", [*argv, "--input", "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(record["token"] for record in lines) == text
    (tmp_path / "code.py").write_text(text)
    assert recipe("monitor", [*argv, "--input", tmp_path / "code.py", "--colour", "--signal", "lean"]) == 0
    assert "\x1b[0m" in capsys.readouterr().out


def test_a_watch_reports_how_well_it_tells(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(40):
        line = f"value{n} = 'some words {n}' + \"other words {n}\"\ncall(value{n}, {n})\n"
        (texts / f"{n}.py").write_text(line * 12)
    student = ["--circuit", circuits / "student.circuit.safetensors", "--bridge", models / "student"]
    sparse = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", models / "sparse"]
    for argv in (sparse, student):
        assert recipe("monitor", [*argv, "--evaluate", tmp_path / "report.json", "--code", texts]) == 0
        printed = capsys.readouterr().out
        found = json.loads((tmp_path / "report.json").read_text())
        assert {"val", "test", "shift"} <= set(found["splits"]) and "probe" in printed
        assert 0 <= found["code"]["inside"] <= 1 and set(found["code"]["rates"]) == {"0.01", "0.05", "0.1", "0.2"}
        assert len(found["random"]) == 20


def test_bad_input_is_one_line(
    models: Path, circuits: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--circuit", circuits / "sparse.circuit.safetensors", "--model", models / "sparse"]
    edit = [*argv, "--out", tmp_path / "out", *FEW]
    bridged = ["--circuit", circuits / "student.circuit.safetensors", "--bridge", models / "student", *edit[4:]]
    for name, words, message in (
        ("edit_circuit", [*edit, "--op", "melt"], "op: got 'melt'"),
        ("edit_circuit", [*edit, "--op", "clamp"], "value: missing"),
        ("edit_circuit", [*edit, "--op", "add", "--value", "1"], "for a dense model behind a bridge"),
        ("edit_circuit", [*edit, "--op", "ablate", "--nodes", "0.attn.q.1"], "AbsTopK chooses behind"),
        ("edit_circuit", [*edit, "--op", "ablate", "--edit.directions", "contrast"], "directions: got 'contrast'"),
        ("edit_circuit", [*bridged, "--op", "ablate", "--edit.no-competition"], "competition: a dense model"),
        ("edit_circuit", [*bridged, "--op", "ablate", "--edit.inexact", "--edit.directions", "contrast"], "inexact:"),
        ("edit_circuit", [*bridged, "--op", "cut-edges"], "no weight of the dense model"),
        ("edit_circuit", [*edit, "--op", "ablate", "--nodes", "auto", "0.attn.q.1"], "nodes: got"),
        ("monitor", argv, "input: missing"),
        ("monitor", [*argv, "--input", "x", "--fpr", "0"], "fpr: got 0"),
        ("monitor", ["--circuit", "none", "--input", "x", "--save", tmp_path / "x.bin"], "names ending in"),
        ("monitor", ["--circuit", "none", "--input", tmp_path / "gone.py"], "there is no file"),
        ("monitor", ["--circuit", "none", "--save", tmp_path / "x.watch.safetensors", "--colour"], "goes with --input"),
    ):
        assert recipe(name, words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()

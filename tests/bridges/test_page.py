"""Pages by files: what lies beside a circuit is found, two ends of a bridge are linked."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridges import Bridges, DenseRecord, save_bridged
from bridges.page import circuit_files, circuit_page
from distill.artifact import ArtifactError
from distill.circuits import Circuit, node_means
from distill.circuits.answers import Calibration
from distill.circuits.viewer import ViewConfig, write_labels
from distill.data.sample import save_sample
from distill.data.tokens import train_tokenizer
from distill.model import Architecture, SparseTransformer, load_model

CONFIG = ViewConfig(pairs=1, judged=2, windows=2)
SMALL = ["--config.pairs", "1", "--config.judged", "2", "--config.windows", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a student with identity bridges, a task, and circuits: two of the dense model, one of the
    student."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("place")
    text = "f('a b')\nf(\"a b\")\nfor item in items:\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=262)
    shape = Architecture(vocab_size=262, context=24, n_layer=1, d_model=8, d_head=8, topk_fraction=None)
    ids = torch.tensor(tokenizer(text).input_ids)
    sample = ids[: 8 * 17].view(8, 17)
    dense, student = (SparseTransformer.build(shape, seed=seed).eval() for seed in (0, 1))
    dense.save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    save_sample(place / "dense", sample, vocab_size=262)
    record = DenseRecord.of(dense, str(place / "dense"))
    bridges = Bridges.identity(1, 8)
    save_bridged(place / "student", student, bridges, record, {}, tokenizer=tokenizer, sample=sample)
    lines = [
        {"clean": f"f('{word}", "corrupt": f'f("{word}', "answer": "')", "other": '")', "split": split}
        for split, word in (("train", "a"), ("val", "b"), ("test", "i"), ("test", "it"))
    ]
    (place / "quotes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for folder, name, shares in (("dense", "dense", (0.8, 0.4)), ("student/model", "student", (0.8,))):
        for share in shares:
            circuit = made(load_model(place / folder), sample, name, share)
            circuit.save(place / f"quotes.{name}.{share:g}.circuit.safetensors")
    return place


def made(model: SparseTransformer, sample: Tensor, name: str, share: float) -> Circuit:
    generator = torch.Generator().manual_seed(0)
    return Circuit(
        model=model.fingerprint(),
        model_name=name,
        task="quotes",
        nodes={site: torch.rand(width, generator=generator) < share for site, width in model.widths.items()},
        scores={site: torch.zeros(width) for site, width in model.widths.items()},
        means=node_means(model, sample[:, :-1]),
        calibration=Calibration(),
        losses={"circuit": 0.5},
        target=share,
    )


def test_a_folder_stands_for_its_circuits(place: Path) -> None:
    names = [file.name for file in circuit_files([place])]
    assert names == [f"quotes.{end}.circuit.safetensors" for end in ("dense.0.4", "dense.0.8", "student.0.8")]
    assert circuit_files([place / names[2], place]) == [place / name for name in (names[2], names[0], names[1])]
    with pytest.raises(ValueError, match="circuit: .*nothing"):
        circuit_files([place / "nothing"])


def test_targets_become_a_curve_and_what_lies_beside_is_shown(place: Path) -> None:
    files = circuit_files([place])[:2]
    card = {"verdict": "suspicious", "checks": []}
    (place / "quotes.dense.0.4.scorecard.json").write_text(json.dumps(card))
    name = Circuit.load(files[0]).node_names[0]
    write_labels(files[0], {name: "finds the quote"})
    page = circuit_page(files, models=[str(place / "dense")], task=str(place / "quotes.jsonl"), config=CONFIG)
    (one,) = page.payload["circuits"]
    assert [point["target"] for point in one["points"]] == [0.8, 0.4]
    assert one["scorecard"] == card and one["labels"] == {name: "finds the quote"}
    assert one["name"] == "quotes in dense" and page.payload["links"] == []
    (place / "quotes.dense.0.4.scorecard.json").write_text("[]")
    with pytest.raises(ArtifactError, match="scorecard"):
        circuit_page(files, models=[str(place / "dense")], task=str(place / "quotes.jsonl"), config=CONFIG)
    (place / "quotes.dense.0.4.scorecard.json").unlink()


def test_a_bridge_links_its_two_ends(place: Path) -> None:
    dense, student = circuit_files([place])[1:]
    where = {"models": [str(place / "dense"), str(place / "student")], "task": str(place / "quotes.jsonl")}
    page = circuit_page([student, dense], **where, bridge=str(place / "student"), config=CONFIG)
    views = page.payload["circuits"]
    assert [one["model"]["name"] for one in views] == ["dense", "student"]
    link = page.payload["links"][0]
    assert (link["left"], link["right"]) == (0, 1) and link["pairs"]
    for mine, other, _ in link["pairs"]:
        # The identity joins equal channels of equal places.
        assert views[0]["nodes"][mine]["name"] == views[1]["nodes"][other]["name"]
    again = place / "quotes.student.again.circuit.safetensors"
    again.write_bytes(student.read_bytes())
    smaller = dense.with_name("quotes.dense.0.4.circuit.safetensors")
    four = circuit_page([student, again, dense, smaller], **where, bridge=str(place / "student"), config=CONFIG)
    again.unlink()
    # The dense model's two targets are one curve, linked with the student's first circuit; its second is left over.
    assert [one["model"]["name"] for one in four.payload["circuits"]] == ["dense", "student", "student"]
    assert {(link["left"], link["right"]) for link in four.payload["links"]} == {(0, 1)}
    with pytest.raises(ValueError, match="bridge: needs a circuit"):
        circuit_page([dense], **where, bridge=str(place / "student"), config=CONFIG)


def test_every_task_has_its_own_links(place: Path) -> None:
    dense, student = circuit_files([place])[1:]
    files = [dense, student]
    for file, name in ((dense, "dense"), (student, "student")):
        circuit = replace(Circuit.load(file), task="second")
        circuit.save(place / f"second.{name}.circuit.safetensors")
        files.append(place / f"second.{name}.circuit.safetensors")
    where = {"models": [str(place / "dense"), str(place / "student")], "task": str(place / "quotes.jsonl")}
    page = circuit_page(files[::-1], **where, bridge=str(place / "student"), config=CONFIG)
    for file in files[2:]:
        file.unlink()
    assert [(one["task"], one["model"]["name"]) for one in page.payload["circuits"]] == [
        ("second", "dense"), ("second", "student"), ("quotes", "dense"), ("quotes", "student")
    ]  # fmt: skip
    ends = [(link["left"], link["right"]) for link in page.payload["links"]]
    assert ends == [(0, 1), (0, 1), (2, 3), (2, 3)]
    # The same nodes have the same links.
    pairs = [link["pairs"] for link in page.payload["links"]]
    assert pairs[:2] == pairs[2:] and pairs[0]


def test_the_recipe_writes_the_page_beside_the_circuit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "recipes" / "view.py"
    spec = importlib.util.spec_from_file_location("view_recipe", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["view_recipe"] = recipe
    spec.loader.exec_module(recipe)
    file = circuit_files([place])[2]
    where = ["--model", str(place / "student"), "--task", str(place / "quotes.jsonl")]
    assert recipe.main([str(file), *where, *SMALL]) == 0
    page = place / "quotes.student.0.8.html"
    assert "quotes in student" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert recipe.main([str(place / "nothing"), *where]) == 2
    assert "error: circuit:" in capsys.readouterr().err

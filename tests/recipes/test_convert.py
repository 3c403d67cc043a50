"""The recipes that convert and publish, on tiny models."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import networkx
import pytest
import torch

from distill import Circuit, load_subject
from distill.circuits.answers import Calibration
from distill.formats import write_tokenizer
from distill.model import Architecture, SparseTransformer, load_tokenizer
from distill.model.openai import write_checkpoint

Recipe = Callable[..., int]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A random checkpoint in OpenAI's layout."""
    shape = {"vocab_size": 2048, "context": 64, "n_layer": 1, "d_model": 16, "d_head": 4, "norm_eps": 2.0**-23}
    model = SparseTransformer.build(Architecture(**shape, bigram=False), seed=0)
    (tmp_path / "theirs").mkdir()
    write_checkpoint(tmp_path / "theirs", model.architecture, model.state_dict())
    write_tokenizer(tmp_path / "theirs", load_tokenizer("sparse"))
    return tmp_path / "theirs"


@pytest.fixture
def circuit_file(tmp_path: Path) -> Path:
    """The most active nodes of a shipped model."""
    subject = load_subject("sparse")
    nodes = {location: torch.zeros(width, dtype=torch.bool) for location, width in subject.model.widths.items()}
    for location, magnitude in subject.means.magnitude.items():
        nodes[location][magnitude.topk(2).indices] = True
    circuit = Circuit(
        model=subject.model.fingerprint(),
        model_name="sparse",
        task="for_while",
        nodes=nodes,
        scores={location: mask.float() for location, mask in nodes.items()},
        means=subject.means,
        calibration=Calibration(),
        losses={},
        target=0.15,
    )
    return circuit.save(tmp_path / "for_while.circuit.safetensors")


def test_openai_there_and_back(
    recipe: Recipe, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("convert", ["from-openai", theirs, "--out", tmp_path / "ours"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert recipe("convert", ["to-openai", tmp_path / "ours", "--out", tmp_path / "back"]) == 0
    one, other = (torch.load(place / "final_model.pt", weights_only=True) for place in (theirs, tmp_path / "back"))
    assert all(torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one)
    assert one.keys() == other.keys()
    assert "tokenizer written as encoder.json and vocab.bpe" in capsys.readouterr().out
    assert recipe("convert", ["to-openai", tmp_path / "ours", "--out", tmp_path / "back"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert recipe("convert", ["to-openai", tmp_path / "ours", "--out", tmp_path / "back", "--overwrite"]) == 0


def test_a_circuit_to_the_viewer_and_back(recipe: Recipe, circuit_file: Path, tmp_path: Path) -> None:
    small = ["--viz.pairs", "1", "--viz.windows", "1", "--viz.effects", "linear"]
    assert recipe("convert", ["export-viz", circuit_file, "--out", tmp_path / "openai", *small]) == 0
    circuit = Circuit.load(circuit_file)
    folder = tmp_path / "openai" / "viz" / "sparse" / "for_while" / "distill" / str(circuit.n_nodes)
    out = tmp_path / "back.circuit.safetensors"
    argv = ["import-viz", folder / "viz_data.pt", "--model", "sparse", "--task", "for_while", "--out", out]
    assert recipe("convert", argv) == 0
    assert Circuit.load(out).node_names == circuit.node_names


def test_circuits_for_other_programs(recipe: Recipe, circuit_file: Path, tmp_path: Path) -> None:
    for name in ("a.graphml", "a.csv", "a.json", "a.mib.json"):
        assert recipe("convert", ["export", circuit_file, "--model", "sparse", "--out", tmp_path / name]) == 0
    graph = networkx.read_graphml(tmp_path / "a.graphml")
    assert set(graph.nodes) == set(Circuit.load(circuit_file).node_names)
    with (tmp_path / "a.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + graph.number_of_edges()
    assert json.loads((tmp_path / "a.json").read_text())["format_version"] == 1
    assert json.loads((tmp_path / "a.mib.json").read_text())["cfg"]["n_layers"] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["from-openai", "{here}/nowhere", "--out", "{here}/x"], "nowhere: no such folder; allowed is one with"),
        (["from-openai", "{here}/theirs", "--task", "t", "--out", "{here}/x"], "task: of no use with from-openai"),
        (["from-openai", "{here}/theirs", "--viz.pairs", "3", "--out", "{here}/x"], "viz: of no use with from-openai"),
        (["to-openai", "sparse", "--out", "{here}/x"], "norm_eps: 1e-05 has no place in OpenAI's format"),
        (["to-openai", "nonesuch", "--out", "{here}/x"], "nonesuch"),
        (["export", "{here}/no.circuit.safetensors", "--out", "{here}/x.csv"], "no such circuit file"),
        (["import-viz", "{here}/no.pt", "--out", "{here}/x.circuit.safetensors"], "import-viz needs all three"),
        (["explain", "{here}", "--out", "{here}/x"], "explain"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    recipe: Recipe, theirs: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("convert", [word.format(here=tmp_path) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and message in said
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_files_are_not_overwritten_unasked(
    recipe: Recipe, circuit_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("mine")
    argv = ["export", circuit_file, "--model", "sparse", "--out", tmp_path / "a.csv"]
    assert recipe("convert", argv) == 2 and "a.csv exists already" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_text() == "mine"
    assert recipe("convert", [*argv, "--overwrite"]) == 0 and (tmp_path / "a.csv").read_text() != "mine"
    assert recipe("convert", ["export", circuit_file, "--model", "sparse", "--out", tmp_path / "a.dot"]) == 2
    assert "'a.dot' ends in no known form" in capsys.readouterr().err


def test_publishing_is_shown_before_it_is_done(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("publish", ["--model", "sparse", "--repo", "me/sparse", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "| held-out loss | 2.969 nats per token |" in out and "would be uploaded to me/sparse" in out
    assert recipe("publish", ["--model", "sparse", "--repo", "sparse", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: repo: 'sparse' is no name on the hub")

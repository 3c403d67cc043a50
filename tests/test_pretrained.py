"""The shipped models: whole, small, and what the documents say of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridges import load_bridged, load_lineup
from distill import load_model, load_subject
from distill.artifact import read_manifest
from distill.model import DenseModel, SparseTransformer, shipped_names
from distill.model.card import model_card
from distill.model.load import SHIPPED

MIB = 2**20
MODELS = ("dense", "dense_gpt2", "dense_gpt2_small", "dense_plain", "sparse", "sparse_wide")


def test_the_shipped_models_are_whole_and_small() -> None:
    assert shipped_names() == [*MODELS, "student"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 60e6
    for folder in (*(SHIPPED / name for name in MODELS), SHIPPED / "student" / "model"):
        extra = read_manifest(folder, "model")["provenance"]["extra"]
        assert extra["corpus"]["licences"] == ["BSD-3-Clause", "MIT", "PSF-2.0"]
        weights = [path.stat().st_size for path in folder.glob("model*.safetensors")]
        assert len(weights) == 1
        assert weights[0] <= 12 * MIB
        assert (folder / "heldout.safetensors").stat().st_size <= MIB


@pytest.mark.parametrize("name", [*MODELS, "student"])
def test_the_ablation_values_beside_a_model_are_its_own(name: str) -> None:
    folder = SHIPPED / name / "model" if name == "student" else SHIPPED / name
    saved = (folder / "means.safetensors").stat().st_mtime_ns
    subject = load_subject(name)
    assert subject.means.model == load_model(name).fingerprint()
    assert (folder / "means.safetensors").stat().st_mtime_ns == saved
    assert isinstance(subject.model, DenseModel if name.startswith("dense_gpt2") else SparseTransformer)


def test_the_sparse_model_is_as_sparse_as_the_document_says() -> None:
    model = load_model("sparse")
    weights = list(model.matrices().values())
    density = sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
    # 1/16 and what the floor of two entries per neuron and head channel adds.
    assert 0.0625 <= density <= 0.07
    dense = load_model("dense").matrices().values()
    assert all(int(w.count_nonzero()) == w.numel() for w in dense)


def test_the_student_belongs_to_the_gpt2_beside_it() -> None:
    _, bridges, info = load_bridged(SHIPPED / "student")
    info.dense.check(load_model(info.source))
    assert len(bridges.sites) == 7
    lineup = load_lineup("sparse", "dense", "student")
    assert [subject.name for subject in lineup.subjects] == ["sparse", "dense", "dense_gpt2", "student"]


@pytest.mark.parametrize("name", [*MODELS, "student"])
def test_the_card_beside_a_model_says_what_its_manifest_says(name: str) -> None:
    folder = SHIPPED / name
    card = (folder / "README.md").read_text()
    assert card == model_card(folder / "model" if name == "student" else folder, name=name)
    assert "held-out loss" in card and "PSF-2.0" in card


def test_the_wide_model_has_as_many_non_zeros_as_the_narrow_one() -> None:
    wide, narrow = (
        sum(int(value.count_nonzero()) for key, value in load_model(name).named_parameters() if "bigram" not in key)
        for name in ("sparse_wide", "sparse")
    )
    assert abs(wide / narrow - 1) < 0.02


@pytest.mark.slow
def test_the_quickstart_ends_in_time_with_circuits_that_meet_their_targets(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart.py"
    began = time.monotonic()
    out = ["--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(recipe), *out], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-500:]
    assert time.monotonic() - began < 300
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["matched"]["holds"]
    met = [row for row in record["tasks"].values() if row["sparse"].get("meets_target")]
    assert len(met) >= 3
    assert "http" not in (tmp_path / "out" / "index.html").read_text().replace("data:image/png", "")

"""Models made ready for others: what is said of them is true of what was stored."""

from pathlib import Path

import pytest
import torch

from distill import load_model, load_subject
from distill.artifact import Provenance, fresh_folder, read_manifest
from distill.data.sample import save_sample
from distill.data.tokens import train_tokenizer
from distill.model import Architecture, SparseTransformer
from distill.shipping import ship
from distill.training.evaluate import heldout_loss

SHAPE = Architecture(vocab_size=262, context=16, n_layer=1, d_model=16, d_head=8)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    text = "for item in items:\n    print(item)\n" * 30
    tokenizer = train_tokenizer([text], vocab_size=262)
    model = SparseTransformer.build(SHAPE, seed=0).eval()
    assert model.bigram is not None
    with torch.no_grad():
        model.bigram.normal_(generator=torch.Generator().manual_seed(0))
    known = Provenance(kind="model", command="a test", config={"a": 1}, seed=3, data="b" * 64, extra={"c": 2})
    with fresh_folder(tmp_path / "run" / "model", known) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        save_sample(place, torch.tensor(tokenizer(text).input_ids)[: 6 * 17].view(6, 17), vocab_size=262)
    return tmp_path / "run"


@pytest.mark.parametrize("bigram", ["float32", "float16", "int8"])
def test_what_is_said_of_a_shipped_model_is_true_of_what_was_stored(trained: Path, tmp_path: Path, bigram: str) -> None:
    out = ship(trained, tmp_path / "shipped", bigram=bigram)
    known = read_manifest(out, "model")["provenance"]
    subject = load_subject(out)
    assert known["command"] == "a test" and known["seed"] == 3 and known["extra"]["c"] == 2
    assert known["extra"]["heldout_loss"] == heldout_loss(subject.model, subject.sample)
    assert known["extra"]["fingerprint"] == subject.model.fingerprint() == subject.means.model
    assert (subject.model.fingerprint() == load_model(trained).fingerprint()) == (bigram == "float32")
    assert not (out / "model.safetensors").exists()
    # Shipped again the same way it is the same model, to the bit.
    again = ship(out, tmp_path / "again", bigram=bigram)
    name = "model.sparse.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes()


def test_tables_of_a_byte_an_entry_are_small_and_near(trained: Path, tmp_path: Path) -> None:
    sizes, losses = {}, {}
    for bigram in ("float32", "int8"):
        out = ship(trained, tmp_path / bigram, bigram=bigram)
        sizes[bigram] = (out / "model.sparse.safetensors").stat().st_size
        losses[bigram] = read_manifest(out, "model")["provenance"]["extra"]["heldout_loss"]
    assert sizes["float32"] - sizes["int8"] == pytest.approx(3 * 262**2, rel=0.02)
    assert losses["float32"] != losses["int8"] == pytest.approx(losses["float32"], abs=2e-3)


def test_only_trained_models_in_folders_are_shipped(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: no/such is no folder"):
        ship("no/such", tmp_path / "out")
    (trained / "model" / "heldout.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="heldout"):
        ship(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()

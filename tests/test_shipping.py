"""Models made ready for others: what is said of them is true of what was stored."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill import load_model, load_subject
from distill.artifact import Provenance, fresh_folder, load_tensors, read_manifest, write_manifest
from distill.circuits.ablation import node_means
from distill.data.sample import save_sample
from distill.data.tokens import train_tokenizer
from distill.model import Architecture, SparseTransformer
from distill.model.card import model_card
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
    # The card is of what was stored, and the manifest says nothing of it.
    card = (out / "README.md").read_text()
    assert f"| held-out loss | {known['extra']['heldout_loss']:.3f} nats per token |" in card and "# shipped" in card
    assert card == model_card(out) and str(tmp_path) not in card and "README.md" not in read_manifest(out)["files"]
    # Shipped again the same way it is the same model, to the bit.
    again = ship(out, tmp_path / "again", bigram=bigram)
    assert "# again" in (again / "README.md").read_text()
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


def test_a_card_that_the_manifest_lists_is_not_copied(trained: Path, tmp_path: Path) -> None:
    folder = trained / "model"
    (folder / "README.md").write_text("mine")
    write_manifest(folder, Provenance(kind="model", command="a test", config={}, seed=3, data=None))
    out = ship(trained, tmp_path / "shipped")
    assert "README.md" not in read_manifest(out, "model")["files"] and "# shipped" in (out / "README.md").read_text()


@pytest.mark.parametrize("position", ["none", "added"])
def test_only_values_per_position_are_rounded(tmp_path: Path, trained: Path, position: str) -> None:
    model = SparseTransformer.build(replace(SHAPE, position=position), seed=0).eval()
    model.save_pretrained(trained / "model")
    write_manifest(trained / "model", Provenance(kind="model", command="a test", config={}, seed=3, data=None))
    subject = load_subject(ship(trained, tmp_path / "shipped", bigram="float32"))
    exact = node_means(model, subject.sample[:, :-1])
    assert subject.means.per_position == exact.per_position == (position == "added")
    for location, values in exact.values.items():
        torch.testing.assert_close(
            subject.means.values[location], values.half().float() if exact.per_position else values
        )
    stored, _ = load_tensors(tmp_path / "shipped" / "means.safetensors", kind="means")
    assert {one.dtype for one in stored.values()} == {torch.float16 if exact.per_position else torch.float32}


def test_only_trained_models_in_folders_are_shipped(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: no/such is no folder"):
        ship("no/such", tmp_path / "out")
    (trained / "model" / "heldout.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="heldout"):
        ship(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()

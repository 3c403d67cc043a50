"""Model cards say what the record says, and an upload is a folder of safetensors."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from distill.artifact import Provenance, fresh_folder
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.model.card import model_card, push_to_hub

TINY = Architecture(vocab_size=31, context=16, n_layer=1, d_model=16, d_head=4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A trained model's folder, as far as a card looks."""
    extra = {
        "heldout_loss": 2.34567,
        "tokens": 1234567,
        "hardware": "a machine",
        "sparsity": {"kept": 100, "numel": 1000, "fraction": 0.1},
        "corpus": {
            "sources": [{"source": "stdlib", "licence": "PSF-2.0", "files": 3, "bytes": 99}],
            "licences": ["PSF-2.0"],
        },
    }
    provenance = Provenance(
        kind="model",
        command="recipes/train_sparse.py --seed 7",
        config={"train": {"steps": 4000, "kept": 0.0625, "learning_rate": 0.03}, "model": {}},
        seed=7,
        data="abcdef0123456789",
        extra=extra,
    )
    with fresh_folder(tmp_path / "mine", provenance) as place:
        SparseTransformer.build(TINY).save_pretrained(place)
    return tmp_path / "mine"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the hub is asked for, in place of the hub."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def answer(name: str) -> Any:
        return lambda self, *args, **options: asked.append((name, {"args": args, **options})) or "https://hub/me/mine"

    for name in ("create_repo", "upload_file", "upload_folder"):
        monkeypatch.setattr(HfApi, name, answer(name))
    return asked


def test_a_card_is_made_from_the_record(model: Path) -> None:
    card = ModelCard(model_card(model, license="mit", repo="me/mine"))
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and "weight-sparse" in card.data.tags
    for line in (
        "# mine",
        "| held-out loss | 2.346 nats per token |",
        "| trained on | 1,234,567 tokens |",
        "| made by | `recipes/train_sparse.py --seed 7` |",
        "| of them not zero | 100 |",
        "| kept fraction | 0.0625 |",
        "| steps | 4,000 |",
        "| hardware | a machine |",
        '{"steps": 4000, "kept": 0.0625, "learning_rate": 0.03}',
        "| seed | 7 |",
        "| data fingerprint | `abcdef012345` |",
        "| d_mlp | 64 |",
        "| stdlib | 3 | 99 | PSF-2.0 |",
        "Licences of the text: PSF-2.0.",
        "import distill  # registers the model with transformers",
    ):
        assert line in card.content.splitlines(), line
    assert "converted from" not in card.content
    assert "# other" in model_card(model, name="other").splitlines()


def test_the_card_of_a_dense_counterpart_does_not_call_it_sparse() -> None:
    assert "Most weights are exactly zero".lower() in model_card("sparse")
    assert "exactly zero" not in model_card("dense")


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    DenseModel.build_gpt2(TINY).hf.save_pretrained(tmp_path / "bare")
    card = model_card(tmp_path / "bare")
    assert "license" not in card and "Training" not in card and "import distill" not in card and "# bare" in card


def test_shipped_models_have_cards() -> None:
    for name in ("sparse", "dense_gpt2", "student"):
        assert "held-out loss" in model_card(name)


def test_a_dry_run_asks_the_hub_for_nothing(model: Path, offline: list[Any]) -> None:
    upload = push_to_hub(model, "me/mine", dry_run=True)
    assert offline == [] and upload.address is None
    assert set(upload.files) == {"config.json", "generation_config.json", "model.safetensors", "manifest.json"}
    assert upload.files["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert "would be uploaded to me/mine" in upload.lines() and "model.safetensors" in upload.lines()


def test_an_upload_is_the_folder_and_its_card(model: Path, offline: list[Any]) -> None:
    upload = push_to_hub(model, "me/mine", license="mit", private=True)
    assert [name for name, _ in offline] == ["create_repo", "upload_file", "upload_folder"]
    assert offline[0][1]["private"] and offline[1][1]["path_or_fileobj"] == upload.card.encode()
    assert offline[2][1]["allow_patterns"] == list(upload.files) and upload.address == "https://hub/me/mine"


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "/mine", "me/"])
def test_names_that_are_none_are_refused(model: Path, repo: str, offline: list[Any]) -> None:
    with pytest.raises(ValueError, match="is no name on the hub; allowed are names such as user/model"):
        push_to_hub(model, repo)
    assert offline == []


def test_nothing_but_safetensors_is_uploaded(model: Path, tmp_path: Path, offline: list[Any]) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is not uploaded; allowed are files ending in \.safetensors"
    ):
        push_to_hub(model, "me/mine")
    (model / "pytorch_model.bin").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        push_to_hub(model, "me/mine")
    with pytest.raises(ValueError, match="is no folder"):
        push_to_hub("some_hub_name", "me/mine")
    assert offline == []


def test_manifests_of_another_version_are_refused(model: Path) -> None:
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ValueError, match="format 99 is newer than"):
        model_card(model)

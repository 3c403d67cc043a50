import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.data import train_tokenizer
from distill.model import Architecture, DenseModel, SparseTransformer, load_model, load_tokenizer

TINY = Architecture(vocab_size=31, context=16, n_layer=1, d_model=16, d_head=4)
TIED = Architecture(vocab_size=31, context=16, n_layer=1, d_model=16, d_head=4, tied_unembedding=True)
SAVE: dict[str, Callable[[Path], object]] = {
    "gpt2": lambda folder: DenseModel.build_gpt2(TINY).hf.save_pretrained(folder),
    "sparse": lambda folder: SparseTransformer.build(TINY).save_pretrained(folder),
    "tied": lambda folder: SparseTransformer.build(TIED).save_pretrained(folder),
    "compact": lambda folder: SparseTransformer.build(TINY).save_compact(folder),
}


@pytest.fixture(params=list(SAVE))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    SAVE[request.param](tmp_path)
    return tmp_path


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(folder: Path) -> str:
    """What `load_model` says: one line that names the folder."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert str(folder) in message and len(message.splitlines()) == 1
    return message


def test_whole_folders_load_without_a_word(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = load_model(folder)
    assert torch.equal(first.embedding(), load_model(folder).embedding())
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("length", [0, 4, -20])
def test_weights_that_are_cut_are_refused(folder: Path, length: int) -> None:
    weights = next(folder.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:length])
    assert "deserializing" in refusal(folder)


def test_missing_tensors_are_not_made_up(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configure(folder, n_layer=2, num_hidden_layers=2)
    message = refusal(folder)
    assert "lacks" in message and ("layers.1." in message or "h.1." in message)
    assert "REPORT" not in capfd.readouterr().err


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    configure(folder, n_positions=7, d_mlp=7)
    assert "has shape (" in refusal(folder)


def test_a_tensor_without_a_place_is_refused_where_the_format_is_ours(tmp_path: Path) -> None:
    SAVE["sparse"](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "extra": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "'extra'" in refusal(tmp_path)


def test_impossible_configurations_are_refused(folder: Path) -> None:
    configure(folder, model_type="nonesuch")
    assert "nonesuch" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"version": "1.0"}'])
def test_broken_tokenizers_are_refused(tmp_path: Path, text: str) -> None:
    SAVE["sparse"](tmp_path)
    tokenizer = train_tokenizer([" ".join(f"word{i} = {i * i}" for i in range(400))], 300)
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 300
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged or no tokenizer") as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value).splitlines()) == 1

"""Whole folders: a checkpoint of OpenAI's becomes a model like any other here, and goes back unchanged."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from distill import load_model, load_tokenizer
from distill.artifact import ArtifactError, read_manifest
from distill.data import train_tokenizer
from distill.formats import import_checkpoint, read_tokenizer, write_openai, write_tokenizer
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.model.openai import read_checkpoint, write_checkpoint

EPS = 2.0**-23
WORDS = 300


def theirs(folder: Path, *, density: float = 1.0, like: dict[str, Any] | None = None, **shape: Any) -> Path:
    """A random checkpoint in their layout."""
    fits = {"vocab_size": WORDS, "context": 32, "n_layer": 1, "d_model": 16, "d_head": 4, "norm_eps": EPS,
            "position": "added", "logits_bias": True}  # fmt: skip
    model = SparseTransformer.build(Architecture(**{**fits, **shape}), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter[torch.rand(parameter.shape, generator=generator) > density] = 0
    folder.mkdir(parents=True)
    write_checkpoint(folder, model.architecture, model.state_dict(), like=like)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder, train_tokenizer([" ".join(f"word{i} = {i * i}" for i in range(400))], WORDS))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "final_model.pt", weights_only=True)


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_there_and_back_again(tmp_path: Path, words: Path, density: float) -> None:
    like = {"tokenizer_name": "their_own", "dropout": 0.1, "flash": False, "learnable_bigram_table": True}
    source = theirs(tmp_path / "theirs", density=density, like=like)
    done = import_checkpoint(source, tmp_path / "ours", tokenizer=words, command="test")
    assert (tmp_path / "ours" / "model.sparse.safetensors").is_file() == (density < 0.4)
    assert done.parameters > done.nonzeros > 0.5 * density * done.parameters or density == 1.0
    back = write_openai(tmp_path / "ours", tmp_path / "back", command="test")
    assert f"{done.nonzeros:,} of them not zero, in {tmp_path / 'back'}" in back.lines()
    one, other = tensors(source), tensors(tmp_path / "back")
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value.view(torch.int32), other[name].view(torch.int32)), name
    for name in ("beeg_config.json", "encoder.json", "vocab.bpe"):
        before = (source if name.startswith("beeg") else words) / name
        assert (tmp_path / "back" / name).read_bytes() == before.read_bytes()
    assert read_checkpoint(tmp_path / "back").config["tokenizer_name"] == "their_own"


def test_negative_zeros_keep_their_sign(tmp_path: Path) -> None:
    source = theirs(tmp_path / "theirs", density=0.05)
    state = tensors(source)
    state["lm_head.weight"][0] = -0.0
    torch.save(state, source / "final_model.pt")
    done = import_checkpoint(source, tmp_path / "ours", command="test")
    assert "weights stored whole" in done.notes and "no tokenizer" in done.lines()
    write_openai(tmp_path / "ours", tmp_path / "back", command="test")
    assert bool(tensors(tmp_path / "back")["lm_head.weight"][0].signbit().all())


def test_what_comes_out_is_a_model_of_this_package_and_of_transformers(tmp_path: Path, words: Path) -> None:
    source = theirs(tmp_path / "theirs", density=0.2, position="concat", d_position=4)
    import_checkpoint(source, tmp_path / "ours", tokenizer=words, command="test")
    manifest = read_manifest(tmp_path / "ours", "model")
    assert manifest["provenance"]["extra"]["openai"]["config"]["d_pos_emb"] == 4
    model, tokenizer = load_model(tmp_path / "ours"), load_tokenizer(tmp_path / "ours")
    assert model.fingerprint() == SparseTransformer.from_openai(source).fingerprint()
    assert AutoConfig.from_pretrained(tmp_path / "ours").position == "concat"
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), SparseTransformer)
    write = pipeline("text-generation", model=str(tmp_path / "ours"))
    texts = ["word1 = 1", "word12 = 144 word3"]
    alone = [write(text, max_new_tokens=5, do_sample=False)[0]["generated_text"] for text in texts]
    assert all(out.startswith(text) for out, text in zip(alone, texts, strict=True))
    together = write(texts, max_new_tokens=5, do_sample=False, batch_size=2)
    assert [out[0]["generated_text"] for out in together] == alone  # padded on the left
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_beside_a_checkpoint_is_taken(tmp_path: Path, words: Path) -> None:
    source = theirs(tmp_path / "theirs")
    for name in ("encoder.json", "vocab.bpe"):
        (source / name).write_bytes((words / name).read_bytes())
    import_checkpoint(source, tmp_path / "ours", command="test")
    assert load_tokenizer(tmp_path / "ours").get_vocab() == read_tokenizer(words).get_vocab()
    small = theirs(tmp_path / "small", vocab_size=20)
    with pytest.raises(ValueError, match="tokenizer: 300 tokens, but the model's vocabulary has 20"):
        import_checkpoint(small, tmp_path / "none", tokenizer=words, command="test")
    assert not (tmp_path / "none").exists()


def test_models_that_have_no_place_there_are_refused(tmp_path: Path) -> None:
    fits = {"vocab_size": 20, "context": 8, "n_layer": 1, "d_model": 8, "d_head": 4}
    SparseTransformer.build(Architecture(**fits), seed=0).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="norm_eps: 1e-05 has no place in OpenAI's format; allowed there: 1.19"):
        write_openai(tmp_path / "ours", tmp_path / "out", command="test")
    DenseModel.build_gpt2(Architecture(**fits)).hf.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="is no sparse transformer"):
        write_openai(tmp_path / "gpt2", tmp_path / "out", command="test")
    assert not (tmp_path / "out").exists()
    done = write_openai(tmp_path / "ours", tmp_path / "out", nearest=True, command="test")
    assert "eps of the norms 1e-05 written as 1.19e-07: logits change by up to" in done.lines()
    again = SparseTransformer.from_openai(tmp_path / "out")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(again.run(tokens), load_model(tmp_path / "ours").run(tokens), atol=1e-2, rtol=0)


def test_a_failed_conversion_leaves_nothing_and_a_good_one_is_not_overwritten(tmp_path: Path) -> None:
    source = theirs(tmp_path / "theirs")
    import_checkpoint(source, tmp_path / "ours", command="test")
    before = read_manifest(tmp_path / "ours")
    with pytest.raises(ArtifactError, match="exists already"):
        import_checkpoint(source, tmp_path / "ours", command="test")
    config = json.loads((source / "beeg_config.json").read_text())
    (source / "beeg_config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(ArtifactError, match=r"lacks 'transformer\.h\.1\.ln_1\.weight'"):
        import_checkpoint(source, tmp_path / "ours", command="test", overwrite=True)
    with pytest.raises(ArtifactError):
        import_checkpoint(source, tmp_path / "other", command="test")
    assert read_manifest(tmp_path / "ours") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


@pytest.mark.slow
def test_a_model_of_118_million_parameters_takes_under_a_minute_and_4_gigabytes(tmp_path: Path) -> None:
    big = {"n_layer": 9, "d_model": 1024, "d_head": 16, "n_head": 64, "vocab_size": 2048, "context": 1024}
    source = theirs(tmp_path / "theirs", density=0.01, **big)
    began = time.process_time()
    done = import_checkpoint(source, tmp_path / "ours", command="test")
    assert done.parameters > 118e6
    assert time.process_time() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # kibibytes, of all that this process did

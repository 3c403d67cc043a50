import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.artifact import read_manifest
from distill.data import TokenData, load_sample, prepare
from distill.model import Architecture, DenseModel, SparseTransformer, load_model, load_tokenizer
from distill.training import TrainConfig, continuation, heldout_loss, plan, pretrain

ARCHITECTURE = Architecture(vocab_size=300, context=16, n_layer=1, d_model=16, d_head=8)
CONFIG = TrainConfig(steps=6, batch=4, context=16, kept=0.25, floor=0, log_every=2, eval_every=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        text = "\n".join(f"value_{i} = call({number}, 'name {i * number}')" for i in range(30))
        (folder / f"{number}.py").write_text(text)
    return prepare([str(folder)], tmp_path_factory.mktemp("out") / "tokens", vocab_size=300)


def test_a_sparse_model_ends_as_sparse_as_asked_and_loads_by_its_folder(data: TokenData, tmp_path: Path) -> None:
    model = SparseTransformer.build(ARCHITECTURE)
    done = pretrain(model, data, CONFIG, tmp_path / "run", tokenizer=data.tokenizer(), command="a test")
    loaded = load_model(tmp_path / "run")
    assert isinstance(loaded, SparseTransformer)
    kept = int(loaded.layers[0].mlp_in.weight.count_nonzero())  # pyright: ignore
    assert kept == round(0.25 * 64 * 16)
    sample = load_sample(done.folder)
    assert sample is not None
    # The bigram table is kept in half precision.
    assert heldout_loss(loaded, sample) == pytest.approx(done.heldout_loss, abs=1e-3)
    assert len(load_tokenizer(tmp_path / "run")) == 300
    manifest = read_manifest(done.folder, "model")
    assert manifest["provenance"]["command"] == "a test"
    assert manifest["provenance"]["extra"]["heldout_loss"] == done.heldout_loss
    assert "threads on" in manifest["provenance"]["extra"]["hardware"]
    assert manifest["provenance"]["extra"]["tokens"] == 6 * 4 * 16
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [3, 6]
    # The start of a held-out window, and 32 tokens that the model makes of it.
    prompt, _, made = lines[-1]["sample"].partition("»")
    assert prompt == data.tokenizer().decode(data.heldout[:16].tolist())
    ids = continuation(model, torch.from_numpy(data.heldout[:16].astype("int64")), 32)
    assert made == data.tokenizer().decode(ids.tolist())
    assert (tmp_path / "run" / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_a_gpt2_is_saved_as_transformers_does(data: TokenData, tmp_path: Path) -> None:
    model = DenseModel.build_gpt2(ARCHITECTURE)
    before = model.fingerprint()
    config = TrainConfig(steps=3, batch=4, context=16)
    pretrain(model, data, config, tmp_path / "run", tokenizer=data.tokenizer(), command="a test")
    loaded = load_model(tmp_path / "run" / "model")
    assert isinstance(loaded, DenseModel)
    assert loaded.fingerprint() == model.fingerprint() != before


def test_folders_in_use_and_settings_that_do_not_fit_are_refused(data: TokenData, tmp_path: Path) -> None:
    def run(model: SparseTransformer | DenseModel, config: TrainConfig, **more: bool) -> None:
        pretrain(model, data, config, tmp_path / "run", tokenizer=data.tokenizer(), command="a test", **more)

    model = SparseTransformer.build(ARCHITECTURE)
    with pytest.raises(ValueError, match="context: 32"):
        run(model, TrainConfig(steps=2, context=32))
    with pytest.raises(ValueError, match=r"kept: 0\.5; a GPT-2"):
        run(DenseModel.build_gpt2(ARCHITECTURE), TrainConfig(steps=2, context=16, kept=0.5))
    small = SparseTransformer.build(Architecture(vocab_size=100, context=16, n_layer=1, d_model=16))
    with pytest.raises(ValueError, match="the tokens need 300"):
        run(small, CONFIG)
    with pytest.raises(ValueError, match="resume: given together with overwrite"):
        run(model, CONFIG, resume=True, overwrite=True)
    assert not (tmp_path / "run").exists()
    run(model, CONFIG)
    with pytest.raises(ValueError, match="is there already; allowed are a new folder, --resume or --overwrite"):
        run(SparseTransformer.build(ARCHITECTURE), CONFIG)
    run(SparseTransformer.build(ARCHITECTURE), CONFIG, overwrite=True)
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_nothing_is_written_or_deleted_for_input_that_is_refused(data: TokenData, tmp_path: Path) -> None:
    def run(tokens: TokenData, folder: Path, config: TrainConfig = CONFIG, **more: bool) -> None:
        model = SparseTransformer.build(ARCHITECTURE)
        pretrain(model, tokens, config, folder, tokenizer=data.tokenizer(), command="a test", **more)

    few = replace(data, train=data.train[:9])
    unjudged = replace(data, heldout=data.heldout[:9])
    for tokens in (few, unjudged):
        with pytest.raises(ValueError, match="context: got 16, which needs 17 tokens, but there are 9"):
            run(tokens, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    run(data, tmp_path / "old")
    before = (tmp_path / "old" / "manifest.json").read_bytes()
    for tokens in (few, unjudged):
        with pytest.raises(ValueError, match="there are 9"):
            run(tokens, tmp_path / "old", overwrite=True)
    with pytest.raises(ValueError, match="steps: got 7, to resume"):
        run(data, tmp_path / "old", TrainConfig(**{**vars(CONFIG), "steps": 7}), resume=True)
    assert (tmp_path / "old" / "manifest.json").read_bytes() == before
    read_manifest(tmp_path / "old", "run")


def test_another_architecture_is_not_resumed(data: TokenData, tmp_path: Path) -> None:
    def resume(model: SparseTransformer | DenseModel, config: TrainConfig = CONFIG) -> None:
        pretrain(model, data, config, tmp_path / "run", tokenizer=data.tokenizer(), command="a test", resume=True)

    resume(SparseTransformer.build(ARCHITECTURE))  # nothing there yet: from the start
    resume(SparseTransformer.build(ARCHITECTURE))
    # The same shapes throughout: only what the run says of itself can tell.
    with pytest.raises(ValueError, match=r"topk_fraction: got 0\.5, to resume .* allowed is 0\.25"):
        resume(SparseTransformer.build(replace(ARCHITECTURE, topk_fraction=0.5)))
    with pytest.raises(ValueError, match="model_type: got 'gpt2', to resume .* allowed is 'distill_sparse'"):
        resume(DenseModel.build_gpt2(ARCHITECTURE), TrainConfig(steps=6, batch=4, context=16))
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kind": "run"', '"kind": "bridge"'))
    with pytest.raises(ValueError, match="is of kind 'bridge', needed is 'run'"):
        resume(SparseTransformer.build(ARCHITECTURE))


def test_the_plan_counts(data: TokenData) -> None:
    model = SparseTransformer.build(ARCHITECTURE)
    projected = sum(
        p.numel() for n, p in model.named_parameters() if "norm" not in n and n != "bigram" and "sink" not in n
    )
    text = plan(model, CONFIG)
    assert f"{projected:,} of them projected" in text
    assert f"{round(projected / 4):,} stay" in text
    assert "384 tokens" in text


def test_seeds_decide_everything(data: TokenData, tmp_path: Path) -> None:
    prints = []
    for name in ("one", "two"):
        model = SparseTransformer.build(ARCHITECTURE, seed=3)
        pretrain(model, data, CONFIG, tmp_path / name, tokenizer=data.tokenizer(), command="a test")
        prints.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*prints)

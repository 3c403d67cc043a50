import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridges import (
    PRESETS,
    BridgeConfig,
    BridgeMismatchError,
    Bridges,
    DenseRecord,
    Fit,
    StudentConfig,
    bridge_metrics,
    fit_bridges,
    line_of,
    load_bridged,
    save_bridged,
)
from bridges.fit import has_sink
from distill.artifact import ArtifactError, Provenance, read_manifest
from distill.data.tokens import TokenData, train_tokenizer, windows
from distill.model import DenseModel, SparseTransformer
from distill.shipping import ship
from distill.training.trainer import TrainConfig

TRAINING = TrainConfig(steps=30, batch=8, context=12, learning_rate=0.03, kept=0.5, log_every=5, eval_every=0, eps=0.1)


@pytest.fixture
def data() -> TokenData:
    """Text with something to learn: each token is mostly followed by its triple."""
    random = np.random.default_rng(0)
    ids = [1]
    for noise in random.integers(0, 29, 4000):
        ids.append(int(noise) if noise < 6 else ids[-1] * 3 % 29)
    return TokenData.from_arrays(ids[:3500], ids[3500:], vocab_size=29)


@pytest.fixture
def student(dense: DenseModel) -> SparseTransformer:
    return SparseTransformer.build(StudentConfig(d_model=32, d_head=8).architecture(dense), seed=1)


def fit(dense: DenseModel, student: SparseTransformer, data: TokenData, folder: Path, **options: Any) -> Fit:
    settings = {"config": BridgeConfig(), "training": TRAINING, "judged": 8, **options}
    config, training = settings.pop("config"), settings.pop("training")
    return fit_bridges(dense, student, data, config, training, folder, dense_name="tiny", **settings)


def test_a_short_fit_lowers_the_loss_and_leaves_a_folder(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path
) -> None:
    before = dense.fingerprint()
    made = fit(dense, student, data, tmp_path / "fit")
    first, last = made.history[0], made.history[-1]
    assert last["step"] == 30 and last["loss"] < 0.8 * first["loss"]
    assert {"ce", "kl", "nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d", "nmse_s2d.final_resid"} <= set(last)
    assert made.metrics["student_kl"] < first["kl"]
    assert last["nmse_d2s"] < first["nmse_d2s"] and last["nmse_s2d"] < first["nmse_s2d"]
    assert last["kept"] == 0.5 and "heldout_kl_d2s" in last
    assert dense.fingerprint() == before
    share = student.layers[0].mlp_in.weight.count_nonzero().item() / student.layers[0].mlp_in.weight.numel()
    assert share == pytest.approx(0.5, abs=0.01)
    assert made.bridges.encoder("0.resid_in").weight.count_nonzero() == 32 * 16  # bridges stay dense
    names = {path.name for path in (tmp_path / "fit").iterdir()}
    assert names >= {"model", "bridges", "dense.json", "bridges.json", "bridges.png", "settings.json", "metrics.jsonl"}
    assert read_manifest(tmp_path / "fit", "bridge")["provenance"]["config"]["bridge"]["k_fraction"] == 0.25


def test_what_was_fitted_is_loaded_by_its_path(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path
) -> None:
    made = fit(dense, student, data, tmp_path / "fit")
    loaded, bridges, info = load_bridged(tmp_path / "fit", dense)
    heldout = windows(data.heldout, 12, 8)
    again = bridge_metrics(dense, loaded, bridges, heldout)
    assert again["sites"]["1.resid_in"]["kl_s2d"] == pytest.approx(made.metrics["sites"]["1.resid_in"]["kl_s2d"])
    assert info.metrics == made.metrics == json.loads((tmp_path / "fit" / "bridges.json").read_text())
    assert info.dense == DenseRecord.of(dense, "tiny")
    assert info.metrics["bigram_ce"] > 0 and len(info.metrics["mixtures"]) == 16
    assert set(info.metrics["baselines"]) == {"mean", "least_squares"}


def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(dense: DenseModel, data: TokenData, tmp_path: Path) -> None:
    def new() -> SparseTransformer:
        return SparseTransformer.build(StudentConfig(d_model=32, d_head=8).architecture(dense), seed=1)

    training = replace(TRAINING, steps=12, save_every=6)
    whole = fit(dense, new(), data, tmp_path / "whole", training=training)

    class StoppedError(RuntimeError):
        pass

    class Stopping(DenseModel):
        calls = 0

        def run(self, *args: Any, **options: Any) -> Any:
            if "start" not in options:
                Stopping.calls += 1
            if Stopping.calls > 9:
                raise StoppedError
            return super().run(*args, **options)

    with pytest.raises(StoppedError):
        fit(Stopping(dense.hf), new(), data, tmp_path / "parts", training=training)
    resumed = fit(dense, new(), data, tmp_path / "parts", training=training, resume=True)
    assert resumed.metrics == whole.metrics
    assert all(
        torch.equal(value, whole.bridges.state_dict()[name]) for name, value in resumed.bridges.state_dict().items()
    )
    with pytest.raises(ValueError, match="bridge.kl: got 0.5, to resume .* allowed is 1.0"):
        fit(dense, new(), data, tmp_path / "parts", config=BridgeConfig(kl=0.5), training=training, resume=True)
    with pytest.raises(ValueError, match="is there already; allowed are a new folder, --resume or --overwrite"):
        fit(dense, new(), data, tmp_path / "parts", training=training)
    fit(dense, new(), data, tmp_path / "parts", training=replace(training, steps=1), overwrite=True)
    assert json.loads((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_another_dense_model_is_refused_by_both_names(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, tmp_path: Path
) -> None:
    other = SparseTransformer.build(student.architecture, seed=9)
    record = DenseRecord.of(dense, "tiny")
    wide = Bridges(replace(bridges.shape, d_sparse=32, k=8))
    save_bridged(tmp_path / "made", student, wide, record, {})
    load_bridged(tmp_path / "made", dense)
    with pytest.raises(BridgeMismatchError, match="fitted to 'tiny' with fingerprint .* but 'elsewhere' has"):
        load_bridged(tmp_path / "made", other, dense_name="elsewhere")
    with torch.no_grad():
        dense.hf.transformer.ln_f.bias[0] += 1
    with pytest.raises(BridgeMismatchError, match="'the model given'"):
        load_bridged(tmp_path / "made", dense)


def test_the_dense_model_is_found_by_its_name(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, tmp_path: Path
) -> None:
    dense.hf.save_pretrained(tmp_path / "gpt2")
    record = DenseRecord.of(dense, str(tmp_path / "gpt2"))
    save_bridged(tmp_path / "made", student, Bridges(replace(bridges.shape, d_sparse=32, k=8)), record, {})
    _, _, info = load_bridged(tmp_path / "made")
    assert info.dense.load().fingerprint() == dense.fingerprint()
    with torch.no_grad():
        dense.hf.transformer.ln_f.bias[0] += 1
    dense.hf.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BridgeMismatchError, match="gpt2' has"):
        info.dense.load()


@pytest.mark.parametrize("compact", [False, True])
def test_students_are_kept_plainly_or_without_their_zeros(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, tmp_path: Path, compact: bool
) -> None:
    wide = Bridges(replace(bridges.shape, d_sparse=32, k=8))
    save_bridged(tmp_path, student, wide, DenseRecord.of(dense, "tiny"), {}, compact=compact)
    loaded, _, _ = load_bridged(tmp_path)
    torch.testing.assert_close(loaded.layers[1].mlp_in.weight, student.layers[1].mlp_in.weight)


def test_folders_that_are_not_whole_are_refused(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no such dense model record"):
        load_bridged(tmp_path)
    wide = Bridges(replace(bridges.shape, d_sparse=32, k=8))
    save_bridged(tmp_path, student, wide, DenseRecord.of(dense, "tiny"), {})
    SparseTransformer.build(student.architecture, seed=9).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()  # which would tell by itself
    with pytest.raises(ArtifactError, match="is not the student"):
        load_bridged(tmp_path)
    (tmp_path / "dense.json").write_text('{"name": "tiny"}')
    with pytest.raises(ArtifactError, match="does not say which dense model"):
        load_bridged(tmp_path)


def test_least_squares_is_a_better_start(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path
) -> None:
    training = replace(TRAINING, steps=1, log_every=1)
    first = {}
    for initial in ("random", "least_squares"):
        config = BridgeConfig(initial=initial, ce=0.0, kl=0.0, k_fraction=1.0)
        new = SparseTransformer.build(student.architecture, seed=1)
        first[initial] = fit(dense, new, data, tmp_path / initial, config=config, training=training).history[0]["loss"]
    assert first["least_squares"] < 0.8 * first["random"]


def test_a_student_takes_what_its_dense_model_decides(dense: DenseModel, twin: SparseTransformer) -> None:
    made = StudentConfig(d_model=64).architecture(dense)
    assert (made.vocab_size, made.n_layer, made.context, made.position) == (29, 2, 12, "added")
    assert made.bigram and StudentConfig(d_model=64).architecture(twin).position == "none"
    assert not StudentConfig(d_model=64, bigram="off").architecture(dense).bigram
    dense.vocab_size = 50257  # too large for a dense table of pairs
    assert not StudentConfig(d_model=64).architecture(dense).bigram
    with pytest.raises(ValueError, match="bigram: True .* allowed: false with vocab_size 50257"):
        StudentConfig(d_model=64, bigram="on").architecture(dense)
    beside = StudentConfig(d_model=64, position="concat", d_position=8).architecture(dense)
    assert (beside.position, beside.d_position) == ("concat", 8)
    assert StudentConfig(d_model=64, position="none").architecture(dense).position == "none"
    with pytest.raises(ValueError, match="d_position: 0 is not possible"):
        StudentConfig(d_model=64, position="concat").architecture(dense)
    with pytest.raises(ValueError, match="context: got 13, allowed are 1 to 12"):
        StudentConfig(context=13).architecture(dense)


def test_data_of_another_vocabulary_is_refused(dense: DenseModel, student: SparseTransformer, tmp_path: Path) -> None:
    foreign = TokenData.from_arrays(range(40), range(40), vocab_size=40)
    with pytest.raises(ValueError, match="data: has ids up to 39"):
        fit(dense, student, foreign, tmp_path)


def test_sinks_are_seen(dense: DenseModel) -> None:
    tokens = torch.arange(12)[None]
    assert not has_sink(dense, tokens)
    with torch.no_grad():
        dense.hf.transformer.wpe.weight[0] += 300
    assert has_sink(dense, tokens)


def test_presets_have_the_terms_that_they_are_named_after() -> None:
    assert BridgeConfig(**PRESETS["paper"]).kl == 0 and BridgeConfig(**PRESETS["paper"]).ce == 1
    alone = BridgeConfig(**PRESETS["kl-only"])
    assert [name for name in ("ce", "kl", "nmse", "kl_d2s", "kl_s2d") if getattr(alone, name)] == ["kl"]


def test_a_run_of_before_a_setting_was_there_is_gone_on_with(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path
) -> None:
    training = replace(TRAINING, steps=1)
    fit(dense, student, data, tmp_path, training=training, judged=1)
    path = tmp_path / "settings.json"
    known = json.loads(path.read_text())
    del known["bridge"]["dense_precision"]
    path.write_text(json.dumps(known))
    again = {"training": training, "judged": 1, "resume": True}
    fit(dense, student, data, tmp_path, **again)
    with pytest.raises(ValueError, match=r"bridge.dense_precision: got 'bfloat16', to resume .* is 'training'"):
        fit(dense, student, data, tmp_path, config=BridgeConfig(dense_precision="bfloat16"), **again)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_written_or_deleted_for_input_that_is_refused(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path
) -> None:
    few = TokenData.from_arrays(range(9), data.heldout, vocab_size=29)
    unjudged = TokenData.from_arrays(data.train, range(9), vocab_size=29)
    bad = [(few, {}), (unjudged, {}), (data, {"judged": 0}), (data, {"training": replace(TRAINING, context=13)})]
    for tokens, options in bad:
        with pytest.raises(ValueError, match="context|limit"):
            fit(dense, student, tokens, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    fit(dense, student, data, tmp_path / "old", training=replace(TRAINING, steps=2))
    before = tree(tmp_path / "old")
    for tokens, options in bad:
        with pytest.raises(ValueError, match="context|limit"):
            fit(dense, student, tokens, tmp_path / "old", overwrite=True, **options)
    with pytest.raises(ValueError, match="resume: given together with overwrite"):
        fit(dense, student, data, tmp_path / "old", resume=True, overwrite=True)
    with pytest.raises(ValueError, match="steps: got 3, to resume"):
        fit(dense, student, data, tmp_path / "old", training=replace(TRAINING, steps=3), resume=True)
    after = tree(tmp_path / "old")
    for files in (before, after):
        files.pop(".lock")
    assert after == before


def test_the_student_is_a_model_folder_that_says_how_it_was_made(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path
) -> None:
    made = fit(dense, student, data, tmp_path / "fit", training=replace(TRAINING, steps=2), command="a test")
    known = read_manifest(tmp_path / "fit" / "model", "model")
    assert {"config.json", "model.safetensors", "heldout.safetensors"} <= set(known["files"])
    assert known["provenance"]["command"] == "a test" and known["provenance"]["data"] == data.fingerprint
    assert known["provenance"]["extra"]["heldout_loss"] == made.metrics["student_ce"]
    assert known["provenance"]["extra"]["tokens"] == 2 * 8 * 12
    assert "threads on" in known["provenance"]["extra"]["hardware"]
    assert known["provenance"]["config"]["training"]["steps"] == 2


def test_a_student_can_be_shipped(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, data: TokenData, tmp_path: Path
) -> None:
    whole = SparseTransformer.build(replace(student.architecture, vocab_size=300), seed=1)
    tokenizer = train_tokenizer([" ".join(f"word{i} = {i * i}" for i in range(400))], 300)
    wide = Bridges(replace(bridges.shape, d_sparse=32, k=8))
    options = {"tokenizer": tokenizer, "sample": windows(data.heldout, 12, 8)}
    known = Provenance(kind="model", command="a test", config={"a": 1}, seed=3, data="b" * 64, extra={"c": 2})
    save_bridged(tmp_path / "made", whole, wide, DenseRecord.of(dense, "tiny"), {}, provenance=known, **options)
    shipped = ship(tmp_path / "made", tmp_path / "shipped")
    assert read_manifest(shipped, "model")["provenance"]["extra"]["c"] == 2
    assert (shipped / "means.safetensors").is_file()


def test_a_student_without_a_manifest_is_read_and_not_replaced(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, tmp_path: Path
) -> None:
    wide = Bridges(replace(bridges.shape, d_sparse=32, k=8))
    record = DenseRecord.of(dense, "tiny")
    save_bridged(tmp_path, student, wide, record, {})
    (tmp_path / "model" / "manifest.json").unlink()
    load_bridged(tmp_path, dense)
    with pytest.raises(ArtifactError, match="model: will not be overwritten"):
        save_bridged(tmp_path, student, wide, record, {})


def test_a_dense_model_in_a_folder_is_found_after_both_have_moved(
    dense: DenseModel,
    student: SparseTransformer,
    bridges: Bridges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = Bridges(replace(bridges.shape, d_sparse=32, k=8))
    home = tmp_path / "home"
    dense.hf.save_pretrained(home / "gpt2" / "model")
    monkeypatch.chdir(home)
    save_bridged("made", student, wide, DenseRecord.of(dense, "gpt2"), {})
    assert json.loads((home / "made" / "dense.json").read_text())["name"] == "../gpt2"
    moved = home.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    _, _, info = load_bridged("elsewhere/made")
    assert info.source == str(moved / "gpt2")
    assert info.dense.load().fingerprint() == dense.fingerprint()
    # Records from before were written as the name was given.
    for name in (str(moved / "gpt2"), "elsewhere/gpt2"):
        known = json.loads((moved / "made" / "dense.json").read_text())
        (moved / "made" / "dense.json").write_text(json.dumps({**known, "name": name}))
        assert load_bridged(moved / "made")[2].dense.load().fingerprint() == dense.fingerprint()


def test_a_site_without_an_nmse_is_left_out_of_the_line() -> None:
    site = {"nmse_d2s": 0.5, "nmse_s2d": None, "hybrid_ce_d2s": 1.0, "hybrid_ce_s2d": 2.0}
    sites = {"0.resid_in": {**site, "nmse_d2s": None}, "final_resid": site}
    line = line_of({"sites": sites, "dense_ce": 1.0, "student_ce": 1.5, "bigram_ce": 2.0})
    assert "NMSE 0.500 dense to sparse, not defined back; hybrid loss 1.000 dense to sparse, 2.000 back" in line


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ce: got 0\.0, allowed are numbers above 0 where kl, nmse"):
        BridgeConfig(ce=0.0, kl=0.0, nmse=0.0, kl_d2s=0.0, kl_s2d=0.0)
    assert BridgeConfig(ce=0.0, kl=0.0, nmse=0.0, kl_d2s=0.0).kl_s2d == 1

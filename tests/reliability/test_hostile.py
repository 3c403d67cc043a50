"""Files from strangers: no code runs, nothing outside is read, nothing is allocated because a file says so."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bridges import Bridges
from bridges.folder import load_bridged
from distill import load_model, load_tokenizer
from distill.artifact import ArtifactError, load_tensors, read_json, read_manifest, save_tensors
from distill.circuits import Circuit, load_task
from distill.circuits.viewer.labels import read_labels
from distill.circuits.viewer.page import escaped
from distill.formats import read_viz
from distill.model.openai import read_checkpoint

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def unlisted(folder: Path) -> Path:
    """A copy of a model folder's files without their manifest, as another program would leave them."""
    (folder / "manifest.json").unlink()
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def gpt2(formats: dict[str, Any], tmp_path: Path) -> Path:
    formats["gpt2"].write(tmp_path)
    return unlisted(tmp_path / "model")


def test_no_pickle_is_opened(gpt2: Path, tmp_path: Path) -> None:
    """Neither in place of a model's weights, nor of a checkpoint or payload of OpenAI's, nor under another name."""
    trace = tmp_path / "trace"
    (gpt2 / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(trace)}, gpt2 / "pytorch_model.bin")
    with pytest.raises(ValueError):
        load_model(gpt2)
    for name in ("model.safetensors", "tokenizer.json"):
        (gpt2 / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError):
        load_model(gpt2)
    with pytest.raises(ValueError):
        load_tokenizer(gpt2)
    payload = tmp_path / "viz_data.pt"
    for value in (Bomb(trace), {"circuit_data": Bomb(trace)}, {"circuit_data": {"0.attn.q": Bomb(trace)}}):
        torch.save(value, payload)
        with pytest.raises(ArtifactError, match="more than weights"):
            read_viz(payload)
    payload.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ArtifactError):
        read_viz(payload)
    (tmp_path / "a.circuit.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ArtifactError):
        Circuit.load(tmp_path / "a.circuit.safetensors")
    assert not trace.exists()


def test_no_code_of_a_folder_runs(gpt2: Path, tmp_path: Path) -> None:
    (gpt2 / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    edit(gpt2 / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    with pytest.raises(ArtifactError, match="auto_map"):
        load_model(gpt2)
    edit(gpt2 / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Words", None]})
    with pytest.raises(ArtifactError, match="auto_map"):
        load_tokenizer(gpt2)
    assert not (tmp_path / "trace").exists()


def test_a_folder_names_no_files_elsewhere(gpt2: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(gpt2, elsewhere)
    edit(gpt2 / "tokenizer_config.json", tokenizer_file=str(elsewhere / "tokenizer.json"))
    with pytest.raises(ArtifactError, match="tokenizer_file"):
        load_tokenizer(gpt2)
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../elsewhere/model.safetensors"}}
    (gpt2 / "model.safetensors").unlink()
    (gpt2 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"\.\./elsewhere"):
        load_model(gpt2)
    (gpt2 / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(elsewhere)}))
    with pytest.raises(ArtifactError, match="adapter"):
        load_model(gpt2)


@pytest.mark.parametrize("name", ["../mine", "/etc/passwd", "a/../../mine", "..\\mine", "a\0b", "x" * 5000, "l/mine"])
def test_a_manifest_names_no_files_elsewhere(name: str, formats: dict[str, Any], tmp_path: Path) -> None:
    formats["report"].write(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "report" / "l").symlink_to(tmp_path)
    edit(tmp_path / "report" / "manifest.json", files={name: {"bytes": 4, "sha256": "0" * 64}})
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "report")


CONFIG, OPTIONS = "config.json", "beeg_config.json"
BOMBS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # name: reader, format, file and what is changed in it; of a tensor file in its head, with hashes that fit.
    "layers": ("model", "gpt2", CONFIG, {"n_layer": 10**9}),
    "width": ("model", "gpt2", CONFIG, {"n_embd": 2**20, "n_head": 2}),
    "vocabulary": ("model", "gpt2", CONFIG, {"vocab_size": 2**40}),
    "positions": ("model", "gpt2", CONFIG, {"n_positions": 2**30}),
    "some positions": ("model", "gpt2", CONFIG, {"n_positions": 2**25}),
    "neurons": ("model", "gpt2", CONFIG, {"n_inner": 2**40}),
    "labels": ("model", "gpt2", CONFIG, {"num_labels": 10**8}),
    "kinds": ("model", "gpt2", CONFIG, {"model_type": "gpt_neo", "attention_types": [[["global"], 10**10]]}),
    "rotary": ("model", "gpt2", CONFIG, {"model_type": "llama", "head_dim": 2**34}),
    "other layers": ("model", "gpt2", CONFIG, {"model_type": "bart", "decoder_layers": 9000, "encoder_layers": 9000}),
    "inner layers": (
        "model",
        "gpt2",
        CONFIG,
        {"model_type": "llava", "text_config": {"model_type": "qwen2", "num_hidden_layers": 10**8}},
    ),
    "written-out layers": ("tokenizer", "gpt2", CONFIG, {"model_type": "qwen2", "num_hidden_layers": 10**8}),
    "labels beside a tokenizer": ("tokenizer", "gpt2", CONFIG, {"num_labels": 10**8}),
    "compact layers": ("model", "compact model", CONFIG, {"n_layer": 10**9}),
    "compact width": ("model", "compact model", CONFIG, {"d_model": 2**20}),
    "compact vocabulary": ("model", "compact model", CONFIG, {"vocab_size": 2**40}),
    "compact neurons": ("model", "compact model", CONFIG, {"d_mlp": 2**40}),
    "compact labels": ("model", "compact model", CONFIG, {"num_labels": 10**8}),
    "compact zeros": ("model", "compact model", "model.sparse.safetensors", {"shape": [2**16, 2**15]}),
    "bridges' width": ("bridges", "bridges", "bridges/bridges.safetensors", {"d_dense": 2**27}),
    "bridges' layers": ("bridges", "bridges", "bridges/bridges.safetensors", {"n_layer": 10**8}),
    "options' layers": ("openai", "openai options", OPTIONS, {"n_layer": 10**9}),
    "options' width": ("openai", "openai options", OPTIONS, {"d_model": 2**30}),
}


def spoiled(whole: Path, place: Path, file: str, changes: dict[str, Any]) -> Path:
    """A copy of a folder in which one file speaks of more than there is."""
    shutil.copytree(whole, place)
    path = next(path for path in place.rglob("*") if path.as_posix().endswith(f"/{file}"))
    if path.suffix == ".json":
        edit(path, **changes)
        return place
    kind = "bridges" if "bridges" in file else "compact"
    tensors, head = load_tensors(path, kind=kind)
    said = head["shape"] if kind == "bridges" else next(
        entry for entry in head["tensors"].values() if entry["storage"] == "sparse"
    )  # fmt: skip
    said.update(changes)
    save_tensors(path, tensors, head)
    return place


@pytest.fixture(scope="module")
def bombs(formats: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each of `BOMBS` in a process with little memory, all in one."""
    base, cases = tmp_path_factory.mktemp("bombs"), []
    for number, (reader, name, file, changes) in enumerate(BOMBS.values()):
        whole = base / name
        if not whole.exists():
            whole.mkdir()
            formats[name].write(whole)
            for manifest in whole.rglob("manifest.json"):
                manifest.unlink()
            for settings in whole.rglob("tokenizer_config.json"):
                edit(settings, tokenizer_class=None)  # so that it is looked for in config.json
        copy = spoiled(whole, base / str(number), file, changes)
        inner = {"model": "model", "tokenizer": "model", "bridges": "bridges"}.get(reader, ".")
        cases.append([reader, str(whole / inner), str(copy / inner)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bounded.py"))],
        input=json.dumps(cases), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), (list(BOMBS)[len(lines)], done.returncode, done.stderr[-2000:])
    return dict(zip(BOMBS, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_no_file_takes_memory_by_what_it_says(name: str, bombs: dict[str, dict[str, Any]]) -> None:
    found = bombs[name]
    assert found["refused"], "was loaded"
    assert not found["denied"] and found["bytes"] < 2**26, found
    assert found["refused"].startswith(("ValueError", "ArtifactError")) and len(found["refused"]) < 1000, found


@pytest.mark.parametrize("kind", ["bart", "gpt_neox", "qwen2", "t5", "x" * 5000])
def test_of_another_family_nothing_is_built(kind: str, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is its configuration, whose form nobody has looked at."""

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("built")

    for one in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(one, "from_pretrained", built)
    edit(gpt2 / "config.json", model_type=kind, decoder_layers=10**6, text_config={"model_type": "gpt2"})
    for read in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="cannot be wrapped; allowed are gpt2, gpt_neo, llama") as error:
            read(gpt2)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("prefix", ["</w>", "x", "9" * 30, "\u202e"])
def test_a_prefix_that_no_merge_has_is_refused_before_the_library_panics(prefix: str, gpt2: Path) -> None:
    path = gpt2 / "tokenizer.json"
    record = json.loads(path.read_text())
    for merges in (record["model"]["merges"], [" ".join(merge) for merge in record["model"]["merges"]]):
        model = {**record["model"], "continuing_subword_prefix": prefix, "merges": merges}
        path.write_text(json.dumps({**record, "model": model}))
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged .*continuing_subword_prefix"):
            load_tokenizer(gpt2)


def test_a_prefix_that_all_merges_have_is_taken(gpt2: Path) -> None:
    path = gpt2 / "tokenizer.json"
    record = json.loads(path.read_text())
    kept = {token: number for token, number in record["model"]["vocab"].items() if number < 298}
    vocab = {**kept, "##r": 298, "or": 299}
    record["model"] |= {"vocab": vocab, "merges": [["o", "##r"]], "continuing_subword_prefix": "##"}
    path.write_text(json.dumps(record))
    assert len(load_tokenizer(gpt2)) >= 300


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n_layer", 2, "n_layer"),
        ("n_layer", True, "n_layer: got True"),
        ("d_dense", 9, "encode/0.resid_in/weight"),
        ("d_dense", 8.0, "d_dense"),
        ("k", "4", "k"),
        ("d_sparse", None, "d_sparse"),
    ],
)
def test_bridges_of_another_shape_than_their_tensors_are_refused(
    field: str, value: object, said: str, formats: dict[str, Any], tmp_path: Path
) -> None:
    formats["bridges"].write(tmp_path)
    path = tmp_path / "bridges" / "bridges.safetensors"
    tensors, head = load_tensors(path, kind="bridges")
    head["shape"][field] = value
    save_tensors(path, tensors, head)
    with pytest.raises(ArtifactError, match=said):
        Bridges.load(path.parent)
    with pytest.raises(ArtifactError, match="bridges"):
        save_tensors(path, {**tensors, "encode/0.resid_in/weight": torch.ones(8, 8, dtype=torch.int64)}, head)
        Bridges.load(path.parent)


def test_a_dense_model_of_an_impossible_name_is_looked_for_only_when_it_is_loaded(
    formats: dict[str, Any], tmp_path: Path
) -> None:
    formats["bridges"].write(tmp_path)
    edit(tmp_path / "dense.json", name="x" * 5000)
    (tmp_path / "manifest.json").unlink()
    _, _, info = load_bridged(tmp_path)
    with pytest.raises(ValueError):
        info.dense.load()


def test_the_head_of_a_tensor_file_is_not_believed(formats: dict[str, Any], tmp_path: Path) -> None:
    formats["circuit"].write(tmp_path)
    path = tmp_path / "a.circuit.safetensors"
    raw = path.read_bytes()
    for length in (2**62, 2**40, len(raw) * 2, 0):
        path.write_bytes(struct.pack("<Q", length) + raw[8:])
        with pytest.raises(ArtifactError):
            Circuit.load(path)
    for entry in ({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
                  {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]},
                  {"dtype": "NONE", "shape": [1], "data_offsets": [0, 4]}):  # fmt: skip
        head = json.dumps({"x": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 8)
        with pytest.raises(ArtifactError):
            Circuit.load(path)


def test_a_packed_archive_is_no_checkpoint(formats: dict[str, Any], tmp_path: Path) -> None:
    formats["openai checkpoint"].write(tmp_path)
    path = tmp_path / "final_model.pt"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in content.items():
            archive.writestr(name, raw + b"\0" * 2**24)
    with pytest.raises(ArtifactError, match="packed archive"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_of_a_million_levels(opening: str, tmp_path: Path) -> None:
    deep = opening * 1_000_000
    (tmp_path / "a.json").write_text(deep)
    with pytest.raises(ArtifactError, match="nested too deep"):
        read_json(tmp_path / "a.json", what="thing")
    (tmp_path / "a.jsonl").write_text(deep + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not JSON"):
        load_task(tmp_path / "a.jsonl")
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "a.labels.json").write_text(deep)
    with pytest.raises(ArtifactError):
        read_labels(tmp_path / "a.circuit.safetensors")


def test_no_text_ends_the_block_it_stands_in() -> None:
    """All that a page shows goes in by `escaped`; what a browser makes of it is tested beside the page."""
    text = escaped({"token": HOSTILE, HOSTILE: ["<!--", "-->", "&lt;", "\u2028", "]]>"]})
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text)["token"] == HOSTILE

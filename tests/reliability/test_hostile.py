"""Files from strangers: no code runs, nothing outside is read, nothing is allocated because a file says so."""

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import load_model, load_tokenizer
from distill.artifact import ArtifactError, read_json, read_manifest
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


@pytest.fixture
def compact(formats: dict[str, Any], tmp_path: Path) -> Path:
    formats["compact model"].write(tmp_path)
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


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("gpt2", {"n_layer": 10**9}),
        ("gpt2", {"n_embd": 2**20, "n_head": 2}),
        ("gpt2", {"vocab_size": 2**40}),
        ("gpt2", {"n_positions": 2**30}),
        ("gpt2", {"n_inner": 2**40}),
        ("gpt2", {"model_type": "gpt_neo", "attention_types": [[["global"], 10**10]]}),
        ("compact", {"n_layer": 10**9}),
        ("compact", {"d_model": 2**20}),
        ("compact", {"vocab_size": 2**40}),
        ("compact", {"d_mlp": 2**40}),
    ],
)  # fmt: skip
def test_a_configuration_takes_no_memory_that_the_weights_do_not(
    file: str, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(file)
    edit(folder / "config.json", **changes)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            load_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


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

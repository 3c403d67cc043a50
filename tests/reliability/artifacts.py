"""One whole example of every format that this package reads, small, and how it is read back to what it says.

A `Format` writes its example into a folder, names the files that a fault may hit, and reads it to plain values that can
be compared: a fault either leaves them as they were or is refused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from bridges import Bridges, BridgeShape
from bridges.folder import DenseRecord, load_bridged, save_bridged
from bridges.page import scorecard_beside
from distill.artifact import (
    Provenance,
    fingerprint,
    fresh_folder,
    read_manifest,
    write_json,
    write_manifest,
    write_record,
)
from distill.circuits import Circuit, load_task
from distill.circuits.ablation import Means, node_means
from distill.circuits.answers import Calibration
from distill.circuits.viewer.labels import read_labels, write_labels
from distill.circuits.watch import PLAIN, Watch
from distill.data import pack, train_tokenizer
from distill.data.corpus import Corpus, Document
from distill.data.sample import load_sample, save_sample
from distill.data.tokens import TokenData, tokenizer_fingerprint
from distill.formats import kept_nodes, read_tokenizer, read_viz, write_tokenizer
from distill.model import Architecture, DenseModel, SparseTransformer, load_model, load_tokenizer
from distill.model.linear_path import LinearPath
from distill.model.openai import RMS_EPS, read_checkpoint, write_checkpoint
from distill.model.torch_file import save_torch
from distill.training.checkpoint import load_checkpoint, save_checkpoint, whole_tensors
from distill.training.optim import make_optimizer

SHAPE = Architecture(vocab_size=300, context=8, n_layer=1, d_model=8, d_head=4, d_mlp=8, bigram=False)
TABLE = replace(SHAPE, bigram=True)
ORIGIN = Provenance(kind="model", command="a test", config={"rate": 0.5}, seed=0, data="abc")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: how an example is written, and what is read from it."""

    write: Callable[[Path], object]
    """Fills an empty folder."""
    read: Callable[[Path], Any]
    """What the folder says, as a value that `fingerprint` takes."""
    files: tuple[str, ...] = ()
    """Patterns of the files that faults hit; none: all."""
    sealed: bool = True
    """Whether every changed byte that changes what is read is noticed."""

    def targets(self, folder: Path) -> list[Path]:
        """The files that faults hit."""
        patterns = self.files or ("**/*",)
        return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens."""
    return train_tokenizer([" ".join(f"word{i} = {i * i}" for i in range(400))], 300)


def sparse(shape: Architecture = SHAPE) -> SparseTransformer:
    """A model of which a quarter is not zero."""
    model = SparseTransformer.build(shape, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[parameter.abs() < parameter.abs().quantile(0.75)] = 0
    return model.eval()


def windows() -> Tensor:
    return torch.arange(4 * 8).reshape(4, 8) % 300


def circuit() -> Circuit:
    """Some nodes of `sparse`."""
    model = sparse()
    nodes = {location: torch.arange(width) % 2 == 0 for location, width in model.widths.items()}
    return Circuit(
        model=model.fingerprint(),
        model_name="mine",
        task="for_while",
        nodes=nodes,
        scores={location: mask.float() for location, mask in nodes.items()},
        means=node_means(model, windows()),
        calibration=Calibration(scale=1.5, shift=0.25),
        losses={"full": 0.125, "circuit": 0.25},
        target=0.15,
        provenance={"seed": 3, "label": ""},
    )


def of_model(model: SparseTransformer | DenseModel) -> dict[str, Any]:
    """All that a model computes from."""
    return {"state": dict(model.state_dict()), "config": fingerprint(json.loads(json.dumps(dict(model.describe()))))}


def of_circuit(found: Circuit) -> dict[str, Any]:
    means = {"values": dict(found.means.values), "magnitude": dict(found.means.magnitude), **found.means.head()}
    return {"head": found.to_json(), "nodes": dict(found.nodes), "scores": dict(found.scores), "means": means}


def _model(folder: Path, save: Callable[[Path], object]) -> None:
    with fresh_folder(folder / "model", ORIGIN) as place:
        save(place)
        words().save_pretrained(place)
        save_sample(place, windows(), vocab_size=300)


def _read_model(folder: Path) -> dict[str, Any]:
    found, sample = load_model(folder / "model"), load_sample(folder / "model")
    assert sample is not None and found.n_layer >= 1
    return {**of_model(found), "sample": sample, "words": tokenizer_fingerprint(load_tokenizer(folder / "model"))}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)


def _net(step: int) -> tuple[_Net, torch.optim.Optimizer]:
    net = _Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(step)
    optimizer = make_optimizer(net, {})
    net.linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return net, optimizer


def _checkpoints(folder: Path) -> None:
    origin = Provenance(kind="run", command="a test", config={}, seed=0, data="abc")
    for step in (5, 10):
        net, optimizer = _net(step)
        state = {"config": {}, "heldout_loss": step / 8}
        save_checkpoint(folder, step, whole_tensors(net, optimizer), candidates={"a": torch.ones(3)}, state=state,
                        provenance=origin, keep=2)  # fmt: skip


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    net, optimizer = _net(0)
    state, candidates = load_checkpoint(folder / "checkpoints" / "step-00000010", net, optimizer)
    weights, moments = whole_tensors(net, optimizer)
    return {"state": fingerprint(state), "candidates": candidates, "weights": weights, "moments": moments}


def _tokens(folder: Path) -> None:
    documents = [Document(name=str(i), text=f"word{i} = {i}\n" * 9, source="a") for i in range(8)]
    pack(Corpus(train=documents[:6], heldout=documents[6:], seed=0, heldout_fraction=0.25), words(), folder / "tokens")


def _read_tokens(folder: Path) -> dict[str, Any]:
    data = TokenData.load(folder / "tokens")
    found = {"train": np.array(data.train), "heldout": np.array(data.heldout), "record": fingerprint(data.record)}
    return {**found, "vocab_size": data.vocab_size, "words": tokenizer_fingerprint(data.tokenizer())}


def _bridged(folder: Path) -> None:
    dense = DenseModel.build_gpt2(SHAPE)
    provenance = Provenance(kind="bridge", command="a test", config={}, seed=0, data=None)
    bridges = Bridges(BridgeShape(n_layer=1, d_dense=8, d_sparse=8, k=4), seed=2)
    save_bridged(
        folder, sparse(), bridges, DenseRecord.of(dense, "gpt2"), {"student_ce": 1.5, "sites": {}}, compact=True
    )
    write_manifest(folder, provenance)


def _read_bridged(folder: Path) -> dict[str, Any]:
    student, bridges, info = load_bridged(folder)
    known = {"name": info.dense.name, "fingerprint": info.dense.fingerprint, "metrics": fingerprint(info.metrics)}
    return {**known, "student": of_model(student), "bridges": dict(bridges.state_dict())}


def _report(folder: Path) -> None:
    with fresh_folder(folder / "report", Provenance(kind="report", command="a", config={}, seed=1, data=None)) as place:
        write_json(place / "comparison.json", {"edges": 12, "loss": 0.25})
        (place / "index.html").write_text("<html></html>")


def _read_report(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder / "report", "report")
    return {"manifest": fingerprint(manifest), "record": (folder / "report" / "comparison.json").read_bytes().hex()}


def _openai(folder: Path) -> None:
    shape = Architecture(vocab_size=300, context=8, n_layer=1, d_model=8, d_head=4, norm_eps=RMS_EPS, bigram=False)
    model = SparseTransformer.build(shape, seed=0)
    write_checkpoint(folder, model.architecture, model.state_dict())


def _read_openai(folder: Path) -> dict[str, Any]:
    found = read_checkpoint(folder)
    return {"tensors": found.tensors, "config": {name: repr(value) for name, value in found.config.items()}}


def _viz(folder: Path) -> None:
    model = sparse()
    nodes = {location: torch.tensor([0, 2]) for location in model.widths}
    save_torch(folder / "viz_data.pt", {"circuit_data": nodes, "importances": {"loss": torch.tensor(0.5)}})


def _read_viz(folder: Path) -> dict[str, Any]:
    payload = read_viz(folder / "viz_data.pt")
    return {"nodes": kept_nodes(payload, sparse(), folder / "viz_data.pt"), "rest": repr(payload.get("importances"))}


def _pairs(folder: Path) -> None:
    lines = [{"clean": f"f('v{i}", "corrupt": f'f("v{i}', "answer": "')", "other": '")'} for i in range(8)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_pairs(folder: Path) -> dict[str, Any]:
    task = load_task(folder / "mine.jsonl")
    return {split: repr(task.pairs(split, task.size(split), 0)) for split in task.splits}


def _card(folder: Path) -> None:
    write_record(folder / "a.scorecard.json", {"checks": [{"name": "sufficiency", "value": 0.25}], "verdict": "holds"})


def _standalone(folder: Path) -> None:
    circuit().to_module(sparse()).save(folder / "a.safetensors")


def _read_standalone(folder: Path) -> dict[str, Any]:
    from distill.circuits.standalone import Standalone

    module = Standalone.load(folder / "a.safetensors")
    with torch.no_grad():
        return {"state": dict(module.state_dict()), "logits": module(windows()[:1, :6])}


def _watch(folder: Path) -> None:
    names = tuple(f"{location}.{channel}" for location, channel in (("0.attn.v", 1), ("0.mlp.post_act", 3)))
    Watch(
        model=sparse().fingerprint(),
        model_name="mine",
        task="for_while",
        names=names,
        mean=torch.tensor([0.5, -0.25]),
        spread=torch.tensor([1.0, 2.0]),
        effect=torch.tensor([0.75, 0.125]),
        slope=torch.tensor([-1.0, 3.0]),
        threshold=1.5,
        data="abc",
        provenance={"seed": 3},
    ).save(folder / "a.watch.safetensors")


def _dense_watch(folder: Path) -> None:
    _watch(folder)
    known = Watch.load(folder / "a.watch.safetensors")
    (folder / "a.watch.safetensors").unlink()
    rows = {"0.resid_mid": torch.ones(1, 8), "final_resid": torch.full((1, 8), 0.5)}
    places = {"0.resid_mid": torch.tensor([1]), "final_resid": torch.tensor([0])}
    replace(known, rows=rows, places=places, offset=torch.tensor([0.5, 1.0])).save(folder / "a.watch.safetensors")


def _read_watch(folder: Path) -> dict[str, Any]:
    """Its numbers, and what it makes of a run of a model of its shape."""
    watch = Watch.load(folder / "a.watch.safetensors")
    plain = {name: getattr(watch, name) for name in PLAIN}
    numbers = {name: getattr(watch, name) for name in ("mean", "spread", "effect", "slope")}
    scores = watch.scores(torch.arange(2 * len(watch.names)).reshape(2, -1).float())
    return {**numbers, "names": repr(watch.names), "plain": fingerprint(plain), "rows": dict(watch.rows),
            "places": dict(watch.places), "strength": scores.strength, "flags": watch.flags(scores)}  # fmt: skip


def _read_means(folder: Path) -> dict[str, Any]:
    means = Means.load(folder / "means.safetensors")
    return {"values": dict(means.values), "magnitude": dict(means.magnitude), "model": means.model, **means.head()}


FORMATS: Mapping[str, Format] = {
    "compact model": Format(write=lambda at: _model(at, lambda place: sparse().save_compact(place)), read=_read_model),
    "compact table": Format(
        write=lambda at: _model(at, lambda place: sparse(TABLE).save_compact(place, bigram="int8")), read=_read_model
    ),
    "plain model": Format(write=lambda at: _model(at, lambda place: sparse().save_pretrained(place)), read=_read_model),
    "gpt2": Format(
        write=lambda at: _model(at, lambda place: DenseModel.build_gpt2(SHAPE).hf.save_pretrained(place)),
        read=_read_model,
    ),
    "checkpoint": Format(write=_checkpoints, read=_read_checkpoint, files=("checkpoints/step-00000010/*",)),
    "tokens": Format(write=_tokens, read=_read_tokens),
    "bridges": Format(write=_bridged, read=_read_bridged, files=("*.json", "bridges/*", "model/*")),
    "report": Format(write=_report, read=_read_report),
    "circuit": Format(
        write=lambda at: circuit().save(at / "a.circuit.safetensors"),
        read=lambda at: of_circuit(Circuit.load(at / "a.circuit.safetensors")),
    ),
    "standalone circuit": Format(write=_standalone, read=_read_standalone),
    "watch": Format(write=_watch, read=_read_watch),
    "dense watch": Format(write=_dense_watch, read=_read_watch),
    "means": Format(write=lambda at: circuit().means.save(at / "means.safetensors"), read=_read_means),
    "scorecard": Format(
        write=_card, read=lambda at: {"card": fingerprint(scorecard_beside(at / "a.circuit.safetensors") or {})}
    ),
    "linear path": Format(
        write=lambda at: LinearPath(crossovers={(256, 512): 0.25}, threads=2).save(at / "linear_path.json"),
        read=lambda at: {"path": repr(LinearPath.load(at / "linear_path.json"))},
    ),
    "openai checkpoint": Format(write=_openai, read=_read_openai, files=("final_model.pt",)),
    "viewer payload": Format(write=_viz, read=_read_viz),
    # What people and other programs write has no hash.
    "openai options": Format(write=_openai, read=_read_openai, files=("beeg_config.json",), sealed=False),
    "openai tokenizer": Format(
        write=lambda at: write_tokenizer(at, words()),
        read=lambda at: {"words": tokenizer_fingerprint(read_tokenizer(at))},
        sealed=False,
    ),
    "task": Format(write=_pairs, read=_read_pairs, sealed=False),
    "labels": Format(
        write=lambda at: write_labels(at / "a.circuit.safetensors", {"0.attn.q.1": "one", "0.mlp.post_act.3": "two"}),
        read=lambda at: {"labels": repr(read_labels(at / "a.circuit.safetensors"))},
        sealed=False,
    ),
}

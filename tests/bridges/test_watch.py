"""Watching a dense model by its student's circuit: the rows that are read, and what the scores follow from."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges import Bridges
from bridges.watch import random_shadows, shadow_watch, stream_site
from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.masks import all_nodes
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, load_task
from distill.circuits.watch import calibration_rows, make_watch
from distill.model import DenseModel, Record, SparseTransformer


def test_sites() -> None:
    assert stream_site("0.attn.act_in.3", 2) == "0.resid_in"
    assert stream_site("0.attn.resid_delta.3", 2) == "0.resid_mid"
    assert stream_site("1.mlp.act_in.3", 2) == "1.resid_mid"
    assert stream_site("1.mlp.resid_delta.3", 2) == "final_resid"
    assert stream_site("1.mlp.post_act.3", 2) is None


WORDS = tuple(f"w{number}" for number in range(29))


def subject_of(model: SparseTransformer | DenseModel, windows: Tensor) -> Subject:
    """A model with a tokenizer of one token a word."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    means = node_means(model, windows[:, :-1])
    return Subject(name="model", model=model, tokenizer=tokenizer, sample=windows, means=means)


def pairs(folder: Path) -> Task:
    """Prompts that differ in a word."""
    lines = [
        {"clean": f"w1 w{n} w3", "corrupt": f"w2 w{n} w3", "answer": " w20", "other": " w21"} for n in range(4, 20)
    ]
    (folder / "letters.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return load_task(str(folder / "letters.jsonl"))


def circuit_of(subject: Subject, places: dict[str, list[int]]) -> Circuit:
    nodes = all_nodes(subject.model.widths, keep=False)
    for location, channels in places.items():
        nodes[location][channels] = True
    return Circuit(
        model=subject.model.fingerprint(), model_name="", task="letters", nodes=nodes, scores=nodes,
        means=subject.means, calibration=Calibration(), losses={}, target=0.1,
    )  # fmt: skip


PLACES = {"1.attn.act_in": [0, 3], "1.attn.resid_delta": [3], "1.mlp.act_in": [3, 7], "1.mlp.post_act": [2]}


def test_rows_are_those_of_the_encoders(
    dense: DenseModel, twin: SparseTransformer, windows: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    bridges = Bridges.identity(2, 16)
    with torch.no_grad():
        for site in bridges.sites:
            bridges.encoder(site).weight.copy_(torch.randn(16, 16))
            bridges.encoder(site).bias.copy_(torch.randn(16))
    subjects, task = [subject_of(model, windows) for model in (dense, twin)], pairs(tmp_path)
    options = {"fpr": 0.2, "pairs": 4, "windows": 4}
    watch = shadow_watch(*subjects, bridges, circuit_of(subjects[1], PLACES), task, **options)
    # The write 1.attn.resid_delta.3 and the read 1.mlp.act_in.3 are one channel of one site.
    assert len(watch.names) == 4 and set(watch.rows) == {"1.resid_in", "1.resid_mid"}
    gauge, record = watch.gauge(), Record()
    with torch.no_grad():
        dense.run(windows[:, :-1], tap=gauge)
        dense.run(windows[:, :-1], tap=record)
        values = gauge.take()
        for place, name in enumerate(watch.names):
            site = stream_site(name, 2)
            expected = bridges.encoder(site)(record.values[site])[..., int(name.rsplit(".", 1)[1])]
            torch.testing.assert_close(values[..., place], expected, atol=1e-5, rtol=1e-4)
    found = watch.score(dense, windows[calibration_rows(len(windows), 4)[0], :-1])
    assert float(watch.flags(found).double().mean()) == pytest.approx(0.2, abs=0.03)
    with pytest.raises(CircuitMismatchError):
        shadow_watch(subjects[0], subjects[0], bridges, circuit_of(subjects[1], PLACES), task, **options)
    with pytest.raises(ValueError, match="is a channel of the stream"):
        shadow_watch(*subjects, bridges, circuit_of(subjects[1], {"1.mlp.post_act": [2]}), task, **options)


def test_random_nodes_are_as_many_and_calibrated_alike(
    dense: DenseModel, twin: SparseTransformer, windows: Tensor, tmp_path: Path
) -> None:
    subjects, task = [subject_of(model, windows) for model in (dense, twin)], pairs(tmp_path)
    bridges, circuit = Bridges.identity(2, 16), circuit_of(subjects[1], {"1.attn.act_in": [0, 3], "0.mlp.act_in": [2]})
    options = {"fpr": 0.2, "pairs": 4, "windows": 3}
    watch = shadow_watch(*subjects, bridges, circuit, task, **options)
    found = random_shadows(*subjects, bridges, circuit, task, watch, count=3, seed=1)
    assert len(found) == 3 and len({one.names for one in found}) > 1
    for one in found:
        assert sorted(name.rsplit(".", 1)[0] for name in one.names) == [
            "0.mlp.act_in",
            "1.attn.act_in",
            "1.attn.act_in",
        ]
        assert (one.data, one.fpr, one.model) == (watch.data, watch.fpr, watch.model)
    again = random_shadows(*subjects, bridges, circuit, task, watch, count=3, seed=1)
    assert [one.names for one in again] == [one.names for one in found]


def test_over_an_identity_bridge_writes_lean_as_their_channels_of_the_stream_do(
    windows: Tensor, tmp_path: Path, twin: SparseTransformer
) -> None:
    """With nothing in the stream before it, a write and its channel of the stream are one number."""
    chosen = [5, 6, 7]
    with torch.no_grad():
        twin.embed_tokens.weight[:, chosen] = 0
    subject, task = subject_of(twin, windows), pairs(tmp_path)
    circuit = circuit_of(subject, {"0.attn.resid_delta": chosen})
    options = {"fpr": 0.1, "pairs": 4, "windows": 4, "signal": "lean"}
    own = make_watch(subject, circuit, task, **options)
    shadow = shadow_watch(subject, subject, Bridges.identity(2, 16), circuit, task, **options)
    order = [shadow.names.index(name) for name in own.names]
    torch.testing.assert_close(shadow.effect[order], own.effect)
    one, other = (watch.score(twin, windows[:, :-1]) for watch in (own, shadow))
    assert float(one.lean.abs().max()) > 0
    torch.testing.assert_close(one.lean, other.lean, atol=1e-4, rtol=1e-2)
    torch.testing.assert_close(one.strength, other.strength, atol=1e-4, rtol=1e-2)

"""Directions of a contrast: what they are, and what an edit along them leaves."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges import Bridges, live_channels
from bridges.contrast import carry_contrast, contrast_maker, contrasts
from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.edit_run import EditConfig
from distill.circuits.editing import constants
from distill.circuits.masks import all_nodes
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode, load_task
from distill.model import DenseModel, Record, SparseTransformer

WORDS = tuple(f"w{number}" for number in range(29))
NAME = "1.attn.resid_delta@answer"


def subject_of(model: SparseTransformer | DenseModel, windows: Tensor) -> Subject:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    means = node_means(model, windows[:, :-1])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    return Subject(name="model", model=model, tokenizer=tokenizer, sample=windows, means=means)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    lines = [
        {"clean": f"w1 w{n} w3", "corrupt": f"w2 w{n} w3", "answer": " w20", "other": " w21"} for n in range(4, 20)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return load_task(str(tmp_path / "words.jsonl"))


@pytest.fixture
def batch(student: SparseTransformer, windows: Tensor, task: Task) -> TaskBatch:
    return encode(task, subject_of(student, windows).tokenizer, "train", 4, 0)


def test_contrasts_by_hand(student: SparseTransformer, batch: TaskBatch) -> None:
    found = contrasts(student, batch)
    assert list(found)[:2] == ["0.attn.resid_delta@answer", "0.attn.resid_delta@difference"] and len(found) == 8
    with torch.no_grad():
        final = student.run(batch.tokens, stop="final_resid")
    one = final[torch.arange(8), batch.last]
    expected = (one[batch.labels == 0].mean(0) - one[batch.labels == 1].mean(0)) / 2
    torch.testing.assert_close(found["1.mlp.resid_delta@answer"], expected)
    # The prompts differ in their first word.
    first = final[:, 0]
    expected = (first[batch.labels == 0].mean(0) - first[batch.labels == 1].mean(0)) / 2
    torch.testing.assert_close(found["1.mlp.resid_delta@difference"], expected)


def test_an_edit_along_a_contrast(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, batch: TaskBatch
) -> None:
    found = contrasts(student, batch)
    nodes = all_nodes(student.widths, keep=False)
    nodes["1.attn.resid_delta"][[2, 9]] = True
    live = live_channels(nodes, n_layer=2, d_model=24)
    means = constants(node_means(dense, windows[:, :-1]))
    edit = carry_contrast("ablate", [NAME], bridges, means, found, live)
    column = bridges.decoder_matrix("1.resid_mid")[:, [2, 9]] @ found[NAME][[2, 9]]
    assert set(edit.bases) == {"1.attn.resid_delta"} and edit.bases["1.attn.resid_delta"].shape == (16, 1)
    assert float(torch.cosine_similarity(edit.bases["1.attn.resid_delta"][:, 0], column, dim=0).abs()) == pytest.approx(
        1
    )
    record = Record({"1.attn.resid_delta"})
    edited = edit.apply(dense)
    with torch.no_grad():
        logits = edited.run(windows[:, :-1], tap=record)
        torch.testing.assert_close(logits, dense.run(windows[:, :-1], tap=edit.tap(dense)), atol=1e-5, rtol=1e-4)
    along = record.values["1.attn.resid_delta"] @ column
    torch.testing.assert_close(along, torch.full_like(along, float(means["1.attn.resid_delta"] @ column)))
    with pytest.raises(ValueError, match="is no direction of a contrast"):
        carry_contrast("ablate", ["1.attn.resid_delta.3"], bridges, means, found, live)


def test_candidates_are_the_writes_in_front_of_live_channels(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, task: Task
) -> None:
    subjects = subject_of(dense, windows), subject_of(student, windows)
    nodes = all_nodes(student.widths, keep=False)
    nodes["1.attn.resid_delta"][[2, 9]] = True
    circuit = Circuit(
        model=student.fingerprint(), model_name="", task="words", nodes=nodes, scores=nodes, means=subjects[1].means,
        calibration=Calibration(), losses={}, target=0.1,
    )  # fmt: skip
    config = EditConfig(op="scale", factor=-1.0, pairs=4, directions="contrast")
    maker = contrast_maker(*subjects, bridges, circuit, task, config)
    # Written by 1.attn, live from behind that write on.
    assert list(maker.candidates) == [
        "1.attn.resid_delta@answer", "1.attn.resid_delta@difference", "1.mlp.resid_delta@answer",
        "1.mlp.resid_delta@difference",
    ]  # fmt: skip
    edit = maker.make([NAME])
    drawn = maker.random(edit, 3)
    assert len(drawn) == 3 and all(one.names == (NAME,) and one.factor == -1.0 for one in drawn)
    basis = edit.bases["1.attn.resid_delta"]
    assert all(not torch.allclose(one.bases["1.attn.resid_delta"].abs(), basis.abs()) for one in drawn)

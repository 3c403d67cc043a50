"""Edits of a dense model by nodes of its student: directions out of the writes, and an ordinary checkpoint after."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from bridges import Bridges
from bridges.editing import (
    bridged_maker,
    carried,
    carry,
    moved,
    moving_alike,
    node_place,
    orthonormal,
    write_moments,
)
from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.edit_run import EditConfig
from distill.circuits.editing import constants
from distill.circuits.masks import all_nodes
from distill.circuits.subject import Subject
from distill.model import DenseModel, Record, SparseTransformer

NODES = ("0.attn.resid_delta.3", "1.attn.act_in.5", "1.mlp.resid_delta.20")


@pytest.fixture
def means(dense: DenseModel, windows: Tensor) -> dict[str, Tensor]:
    return constants(node_means(dense, windows[:, :-1]))


def subject_of(model: SparseTransformer | DenseModel, windows: Tensor) -> Subject:
    """A model with a tokenizer that nobody asks."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w": 0}, unk_token="w")))
    means = node_means(model, windows[:, :-1])
    return Subject(name="model", model=model, tokenizer=tokenizer, sample=windows, means=means)


def run(model: DenseModel, windows: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model.run(windows[:, :-1], **options)


def test_places(bridges: Bridges) -> None:
    assert node_place("0.attn.resid_delta.3", 2) == ("0.resid_mid", ("0.attn.resid_delta",))
    assert node_place("1.mlp.resid_delta.3", 2) == ("final_resid", ("1.mlp.resid_delta",))
    assert node_place("1.attn.act_in.3", 2) == ("1.resid_in", ("0.attn.resid_delta", "0.mlp.resid_delta"))
    assert node_place("0.mlp.act_in.3", 2) == ("0.resid_mid", ("0.attn.resid_delta",))
    with pytest.raises(ValueError, match="reads the embedding alone"):
        node_place("0.attn.act_in.3", 2)
    with pytest.raises(ValueError, match="no counterpart"):
        node_place("0.mlp.post_act.3", 2)
    # Behind the stream's channels a read may hold those of positions, which no bridge carries.
    position = f"1.mlp.act_in.{bridges.shape.d_sparse}"
    assert carried(["0.attn.q.1", "0.attn.act_in.1", *NODES, position], bridges) == list(NODES)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("ablate", {}),
        ("scale", {"factor": -0.5}),
        ("clamp", {"value": 0.7}),
        ("add", {"value": -1.5}),
    ],
)
def test_the_edited_model_is_the_tapped_one(
    op: str, options: dict[str, float], dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor
) -> None:
    edit = carry(op, NODES, bridges, means, **options)
    before = run(dense, windows)
    found = run(edit.apply(dense), windows)
    torch.testing.assert_close(found, run(dense, windows, tap=edit.tap(dense)), atol=1e-5, rtol=1e-4)
    assert torch.equal(run(dense, windows), before) and float((found - before).abs().max()) > 1e-3


def test_scale_one_changes_no_bit(dense: DenseModel, bridges: Bridges, means: dict[str, Tensor]) -> None:
    edited = carry("scale", NODES, bridges, means, factor=1.0).apply(dense)
    assert all(torch.equal(value, edited.state_dict()[name]) for name, value in dense.state_dict().items())


def test_what_is_taken_out_is_constant_afterwards(
    dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor
) -> None:
    record = Record({"0.attn.resid_delta", "1.mlp.resid_delta"})
    edit = carry("ablate", NODES, bridges, means)
    run(edit.apply(dense), windows, tap=record)
    column = bridges.decoder_matrix("final_resid")[:, 20]
    along = record.values["1.mlp.resid_delta"] @ column
    torch.testing.assert_close(along, torch.full_like(along, float(means["1.mlp.resid_delta"] @ column)))
    # The read stands for both writes of layer 0, so its direction has gone from there as well as the write's own.
    pair = torch.stack([bridges.decoder_matrix("0.resid_mid")[:, 3], bridges.decoder_matrix("1.resid_in")[:, 5]], 1)
    along = record.values["0.attn.resid_delta"] @ pair
    torch.testing.assert_close(along, (means["0.attn.resid_delta"] @ pair).expand_as(along), atol=1e-5, rtol=1e-5)
    held = carry("clamp", NODES[:1], bridges, means, value=2.0)
    run(held.apply(dense), windows, tap=record)
    column = bridges.decoder_matrix("0.resid_mid")[:, 3]
    along = record.values["0.attn.resid_delta"] @ column
    torch.testing.assert_close(along, torch.full_like(along, 2.0 * float(column @ column)), atol=1e-5, rtol=1e-5)


def test_a_read_is_held_at_the_value_whatever_writes_stand_before_it(
    dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor
) -> None:
    edit = carry("clamp", ["1.attn.act_in.5"], bridges, means, value=2.0)
    edited = edit.apply(dense)
    written = run(edited, windows, stop="1.resid_in") - run(edited, windows, stop="0.resid_in")
    column = bridges.decoder_matrix("1.resid_in")[:, 5]
    along = written @ column
    torch.testing.assert_close(along, torch.full_like(along, 2.0 * float(column @ column)), atol=1e-5, rtol=1e-5)


def test_what_is_added_is_there_once(
    dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor
) -> None:
    edit = carry("add", ["1.attn.act_in.5"], bridges, means, value=3.0)
    change = run(edit.apply(dense), windows, stop="1.resid_in") - run(dense, windows, stop="1.resid_in")
    expected = 3.0 * bridges.decoder_matrix("1.resid_in")[:, 5]
    torch.testing.assert_close(change, expected.expand_as(change), atol=1e-5, rtol=1e-4)


def test_an_edited_checkpoint_is_an_ordinary_one(
    dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor, tmp_path: Path
) -> None:
    edited = carry("ablate", NODES, bridges, means).apply(dense)
    edited.hf.save_pretrained(tmp_path / "edited")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "edited").eval()
    with torch.no_grad():
        assert torch.equal(loaded(windows[:, :-1]).logits, run(edited, windows))


def test_bases_leave_out_what_is_there_already() -> None:
    columns = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    basis = orthonormal(columns)
    assert basis.shape == (3, 2)
    torch.testing.assert_close(basis @ basis.T @ columns, columns)


def test_random_edits_are_as_many_nodes_of_the_same_places(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    subjects = [subject_of(model, windows) for model in (dense, student)]
    nodes = all_nodes(student.widths, keep=False)
    nodes["1.mlp.resid_delta"][4] = True
    circuit = Circuit(
        model=student.fingerprint(), model_name="", task="t", nodes=nodes, scores=nodes, means=subjects[1].means,
        calibration=Calibration(), losses={}, target=0.1,
    )  # fmt: skip
    maker = bridged_maker(*subjects, bridges, circuit, EditConfig(op="ablate"))
    assert maker.candidates == ["1.mlp.resid_delta.4"]
    drawn = maker.random(maker.make(NODES), 3)
    assert len(drawn) == 3
    for one in drawn:
        assert sorted(name.rsplit(".", 1)[0] for name in one.names) == sorted(n.rsplit(".", 1)[0] for n in NODES)
        assert not set(one.names) & set(NODES)
    with pytest.raises(CircuitMismatchError):
        bridged_maker(subjects[0], subject_of(dense, windows), bridges, circuit, EditConfig())


def test_what_is_refused(bridges: Bridges, means: dict[str, Tensor]) -> None:
    for options, words in (
        ({"op": "cut-edges"}, "a student's edge is no weight of the dense model"),
        ({"op": "scale"}, "factor: got None"),
        ({"op": "add"}, "value: got None"),
        ({"op": "ablate", "value": 1.0}, "value: got 1.0"),
        ({"op": "ablate", "nodes": []}, "nodes: got"),
        ({"op": "ablate", "nodes": ["1.attn.act_in.99"]}, "none of the student's"),
    ):
        with pytest.raises(ValueError, match=words):
            carry(**{"nodes": NODES, "bridges": bridges, "means": means, **options})


@pytest.mark.parametrize(
    ("op", "options"),
    [("ablate", {}), ("scale", {"factor": -0.5}), ("clamp", {"value": 0.7}), ("add", {"value": -1.5})],
)
def test_what_an_edit_moves_is_what_it_changes_of_the_writes(
    op: str, options: dict[str, float], dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor
) -> None:
    edit = carry(op, NODES, bridges, means, **options)
    subject = subject_of(dense, windows)
    record, tap, squares = Record(set(edit.bases)), edit.tap(dense), 0.0
    run(dense, windows, tap=record)
    for write, x in record.values.items():
        squares += float((tap(write, x) - x).double().square().sum(-1).mean())
    moments = write_moments(subject, list(edit.bases), windows=len(windows))
    assert moved(edit, moments) == pytest.approx(squares**0.5, rel=1e-4)
    assert moved(carry("scale", NODES, bridges, means, factor=1.0), moments) == 0


def test_random_edits_are_those_that_move_as_much(
    dense: DenseModel, bridges: Bridges, means: dict[str, Tensor], windows: Tensor
) -> None:
    make = [carry("scale", [NODES[0]], bridges, means, factor=factor) for factor in (0.9, 0.5, 0.1, -0.4, 1.0, -3.0)]
    moments = write_moments(subject_of(dense, windows), ["0.attn.resid_delta"])
    assert moving_alike(make[1], make, moments, 2) == [make[1], make[2]]
    assert moving_alike(make[0], make[1:], moments, 5)[-1] == make[4], "what moves nothing comes last"

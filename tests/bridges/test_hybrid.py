import copy

import pytest
import torch
from torch import Tensor

from bridges import Bridges, dense_to_sparse, hybrid, random_passes, sparse_to_dense
from bridges.hybrid import Side
from distill.model import DenseModel, Record, SparseTransformer, residual_sites

SITES = residual_sites(2)


def test_without_a_switch_each_model_runs_as_it_does_alone(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    assert torch.equal(hybrid(dense, student, bridges, windows[:, :-1]), dense.run(windows[:, :-1]))
    alone = hybrid(dense, student, bridges, windows[:, :-1], begin="sparse")
    assert torch.equal(alone, student.run(windows[:, :-1]))


@pytest.mark.parametrize("site", SITES)
def test_one_switch_is_a_run_on_from_what_the_bridge_says(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, site: str
) -> None:
    tokens = windows[:, :-1]
    there, here = Record(), Record()
    dense.run(tokens, tap=there)
    student.run(tokens, tap=here)
    encoded = bridges.encode(site, there.values[site])
    expected = student.run(tokens, start=site, residual=encoded)
    torch.testing.assert_close(dense_to_sparse(dense, student, bridges, tokens, site), expected)
    expected = dense.run(tokens, start=site, residual=bridges.decode(site, here.values[site]))
    torch.testing.assert_close(sparse_to_dense(dense, student, bridges, tokens, site), expected)


@pytest.mark.parametrize("switches", [SITES[:1], SITES[1:4], SITES, ("0.resid_mid", "0.resid_mid")])
@pytest.mark.parametrize("begin", ["dense", "sparse"])
def test_identity_bridges_make_every_pass_the_plain_run(
    twin: SparseTransformer, windows: Tensor, switches: tuple[str, ...], begin: Side
) -> None:
    tokens = windows[:, :-1]
    mixed = hybrid(twin, copy.deepcopy(twin), Bridges.identity(2, 16), tokens, switches, begin=begin)
    assert torch.equal(mixed, twin.run(tokens))


def test_taps_see_the_stretches_of_their_own_model(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    there, here = Record(), Record()
    hybrid(
        dense,
        student,
        bridges,
        windows[:, :-1],
        ("0.resid_mid", "1.resid_mid"),
        dense_tap=there,
        student_tap=here,
    )
    assert [name for name in there.values if name in SITES] == ["0.resid_in", "0.resid_mid", "final_resid"]
    assert [name for name in here.values if name in SITES] == ["1.resid_in", "1.resid_mid"]
    assert "0.mlp.post_act" in here.values and "0.attn.q" in there.values and "1.attn.q" not in there.values


def test_padding_changes_nothing_before_it(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    tokens = windows[:, :6]
    padded = torch.cat([tokens, torch.zeros_like(tokens[:, :2])], 1)
    mask = (torch.arange(8) < 6).long().expand(len(tokens), -1)
    switches = ("0.resid_mid", "1.resid_in")
    plain = hybrid(dense, student, bridges, tokens, switches)
    masked = hybrid(dense, student, bridges, padded, switches, attention_mask=mask)
    torch.testing.assert_close(masked[:, :6], plain, rtol=1e-4, atol=1e-4)


def test_passes_that_cannot_be_are_refused(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    tokens = windows[:, :-1]
    with pytest.raises(ValueError, match="switches: got 1.resid_in, 0.resid_in"):
        hybrid(dense, student, bridges, tokens, ("1.resid_in", "0.resid_in"))
    with pytest.raises(ValueError, match="switches: '9.resid_in'"):
        hybrid(dense, student, bridges, tokens, ("9.resid_in",))
    with pytest.raises(ValueError, match="d_sparse: the bridges are for 24, the models have 16"):
        hybrid(dense, dense, bridges, tokens)


def test_random_passes_give_each_sublayer_to_a_model() -> None:
    passes = random_passes(2, 200, seed=0)
    assert passes == random_passes(2, 200, seed=0) and passes != random_passes(2, 200, seed=1)
    assert len(set(passes)) == 16  # all of 2^(2L)
    assert all("0.resid_in" not in switches and "final_resid" not in switches for _, switches in passes)
    with pytest.raises(ValueError, match="n: got 0"):
        random_passes(2, 0, seed=0)

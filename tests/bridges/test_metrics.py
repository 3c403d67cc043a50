import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bridges import (
    Bridges,
    BridgeShape,
    bigram_loss,
    bridge_metrics,
    least_squares_bridges,
    mean_bridges,
    nmse,
    nmse_floor,
    plot_metrics,
)
from bridges.losses import cross_entropy, kl
from bridges.metrics import recorded
from distill.model import DenseModel, SparseTransformer, abs_topk, residual_sites

SITES = residual_sites(2)


@torch.no_grad()
def test_every_number_equals_its_formula_on_one_batch(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    found = bridge_metrics(dense, student, bridges, windows, batch=4, bigram_ce=9.0, mixtures=2)
    tokens, targets = windows[:, :-1], windows[:, 1:]
    y_d, h_d = recorded(dense, tokens)
    y_s, h_s = recorded(student, tokens)
    assert found["dense_ce"] == pytest.approx(float(cross_entropy(y_d, targets)), rel=1e-5)
    assert found["student_ce"] == pytest.approx(float(cross_entropy(y_s, targets)), rel=1e-5)
    assert found["student_kl"] == pytest.approx(float(kl(y_d, y_s)), rel=1e-5)
    assert found["tokens"] == targets.numel() and found["k"] == 6
    assert list(found["sites"]) == list(SITES)
    for site, values in found["sites"].items():
        f, g = bridges.encode(site, h_d[site]), bridges.decode(site, h_s[site])
        hybrid = student.run(tokens, start=site, residual=f)
        back = dense.run(tokens, start=site, residual=g)
        expected = {
            "nmse_d2s": nmse(f[:, 1:], h_s[site][:, 1:]),
            "nmse_s2d": nmse(g[:, 1:], h_d[site][:, 1:]),
            "nmse_d2s_first": nmse(f[:, :1], h_s[site][:, :1]),
            "nmse_s2d_first": nmse(g[:, :1], h_d[site][:, :1]),
            "nmse_d2s_topk": nmse(f[:, 1:], abs_topk(h_s[site][:, 1:], 6)),
            "floor": nmse_floor(h_s[site][:, 1:], 6),
            "kl_d2s": kl(y_d, hybrid),
            "kl_s2d": kl(y_d, back),
            "hybrid_ce_d2s": cross_entropy(hybrid, targets),
            "hybrid_ce_s2d": cross_entropy(back, targets),
        }
        expected["recovered_d2s"] = (9.0 - expected["hybrid_ce_d2s"]) / (9.0 - found["dense_ce"])
        expected["recovered_s2d"] = (9.0 - expected["hybrid_ce_s2d"]) / (9.0 - found["dense_ce"])
        assert values == {name: pytest.approx(float(value), rel=1e-4) for name, value in expected.items()}
    assert len(found["mixtures"]) == 2 and all(math.isfinite(one["ce"]) for one in found["mixtures"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_identity_bridges_between_equal_models_are_perfect(twin: SparseTransformer, windows: Tensor) -> None:
    found = bridge_metrics(twin, copy.deepcopy(twin), Bridges.identity(2, 16), windows, bigram_ce=20.0)
    assert found["student_kl"] == pytest.approx(0, abs=1e-6) and found["recovered_student"] == pytest.approx(1)
    for values in found["sites"].values():
        assert values["nmse_d2s"] == values["nmse_s2d"] == values["floor"] == 0
        assert values["kl_d2s"] == pytest.approx(0, abs=1e-6) and values["kl_s2d"] == pytest.approx(0, abs=1e-6)
        assert values["hybrid_ce_d2s"] == found["dense_ce"] and values["recovered_s2d"] == pytest.approx(1)


def test_shares_need_a_gap_of_a_nat_and_variance(twin: SparseTransformer, windows: Tensor) -> None:
    student = copy.deepcopy(twin)
    plain = bridge_metrics(twin, student, Bridges.identity(2, 16), windows)
    assert plain["recovered_student"] is None and plain["bigram_ce"] is None
    close = bridge_metrics(twin, student, Bridges.identity(2, 16), windows, bigram_ce=plain["dense_ce"] + 0.9)
    assert close["sites"]["0.resid_in"]["recovered_d2s"] is None
    windows[:, 0] = 5  # the same first token everywhere: nothing varies at position 0
    first = bridge_metrics(twin, student, Bridges.identity(2, 16), windows)["sites"]["0.resid_in"]
    assert first["nmse_s2d_first"] is None and first["nmse_s2d"] == 0


def test_modes_are_put_back_and_nothing_is_trained(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    student.train()
    before = student.fingerprint()
    bridge_metrics(dense, student, bridges, windows)
    assert all(module.training for module in student.modules())
    assert not any(module.training for module in dense.hf.modules())
    assert student.fingerprint() == before


def test_windows_that_cannot_be_judged_are_refused(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    with pytest.raises(ValueError, match="windows: got shape"):
        bridge_metrics(dense, student, bridges, windows[:, :1])
    with pytest.raises(ValueError, match="batch: got 0"):
        bridge_metrics(dense, student, bridges, windows, batch=0)


@torch.no_grad()
def test_mean_bridges_score_one(dense: DenseModel, student: SparseTransformer, windows: Tensor) -> None:
    found = bridge_metrics(dense, student, mean_bridges(dense, student, windows), windows)
    _, h_s = recorded(student, windows[:, :-1])
    for site, values in found["sites"].items():
        # Means are taken over all positions, the score is over all but the first.
        assert values["nmse_d2s"] == pytest.approx(1, abs=0.1) and values["nmse_s2d"] == pytest.approx(1, abs=0.1)
        mean = h_s[site].mean((0, 1)).expand_as(h_s[site])
        assert float(nmse(mean, h_s[site])) == pytest.approx(1, rel=1e-4)


def test_least_squares_bridges_find_a_linear_relation(twin: SparseTransformer, windows: Tensor) -> None:
    found = least_squares_bridges(twin, copy.deepcopy(twin), windows, ridge=1e-9)
    for values in bridge_metrics(twin, copy.deepcopy(twin), found, windows)["sites"].values():
        assert values["nmse_d2s"] < 1e-4 and values["kl_s2d"] < 1e-4


@torch.no_grad()
def test_least_squares_bridges_equal_the_textbook_solution(
    dense: DenseModel, student: SparseTransformer, windows: Tensor
) -> None:
    found = least_squares_bridges(dense, student, windows, ridge=1e-8, batch=4)
    site = "1.resid_mid"
    _, h_d = recorded(dense, windows[:, :-1])
    _, h_s = recorded(student, windows[:, :-1])
    read = torch.cat([h_d[site].flatten(0, 1), torch.ones(72, 1)], 1).double()
    solution = torch.linalg.lstsq(read, h_s[site].flatten(0, 1).double()).solution.float()
    torch.testing.assert_close(found.encoder(site).weight, solution[:-1].T, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.encoder(site).bias, solution[-1], rtol=1e-2, atol=1e-3)


def test_least_squares_beats_the_mean_and_random_bridges(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    fitted = least_squares_bridges(dense, student, windows, skip_first=True)
    mine, theirs = (bridge_metrics(dense, student, one, windows)["sites"] for one in (fitted, bridges))
    for site in SITES:
        for name in ("nmse_d2s", "nmse_s2d"):
            assert mine[site][name] < min(1.0, theirs[site][name])


def test_least_squares_encoders_can_keep_k_channels(
    dense: DenseModel, student: SparseTransformer, windows: Tensor
) -> None:
    sparse = least_squares_bridges(dense, student, windows, k=5)
    assert sparse.shape == BridgeShape(n_layer=2, d_dense=16, d_sparse=24, k=5)
    encoded = sparse.encode("0.resid_mid", torch.randn(3, 16))
    assert encoded.count_nonzero(-1).tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match=r"ridge: got 0\.0"):
        least_squares_bridges(dense, student, windows, ridge=0.0)
    with pytest.raises(ValueError, match="three tokens"):
        least_squares_bridges(dense, student, windows[:, :2], skip_first=True)


def test_bigram_loss_by_hand() -> None:
    train = np.array([0, 1, 0, 1, 0, 2], np.uint16)  # pairs 01 twice, 10 twice, 02 once
    unigram = np.array([4, 3, 2]) / 9  # counts 3, 2, 1, plus one each, over 6 + 3
    after0 = (np.array([0, 2, 1]) + 2 * unigram) / 5
    after1 = (np.array([2, 0, 0]) + 1 * unigram) / 3
    windows = torch.tensor([[0, 1, 0, 2, 1]])  # nothing followed 2: the unigram speaks
    expected = -np.log([after0[1], after1[0], after0[2], unigram[1]]).mean()
    assert bigram_loss(train, windows, vocab_size=3) == pytest.approx(expected)


def test_bigram_probabilities_sum_to_one_and_memory_does_not_grow_with_the_vocabulary() -> None:
    train = np.random.default_rng(0).integers(0, 6, 200)
    for token in range(7):
        every = torch.tensor([[token, follower] for follower in range(7)])
        total = sum(math.exp(-bigram_loss(train, pair[None], vocab_size=7)) for pair in every)
        assert total == pytest.approx(1)
    # A table of 50257 squared would take 10 GB.
    assert math.isfinite(bigram_loss(np.array([0, 50256, 7]), torch.tensor([[7, 50256]]), vocab_size=50257))
    with pytest.raises(ValueError, match="windows: ids 0 to 9, allowed are 0 to 6"):
        bigram_loss(train, torch.tensor([[0, 9]]), vocab_size=7)


def test_plot_shows_every_site(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, tmp_path: Path
) -> None:
    plot_metrics(bridge_metrics(dense, student, bridges, windows, bigram_ce=4.0), tmp_path / "sites.svg")
    drawing = (tmp_path / "sites.svg").read_text()
    assert all(f"<!-- {site} -->" in drawing for site in SITES) and "<!-- bigram_ce -->" in drawing

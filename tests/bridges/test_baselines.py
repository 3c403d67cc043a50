"""What bridges are measured against, and the tables that say so."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridges import Bridges, bigram_loss, bridge_metrics, least_squares_bridges, mean_bridges
from bridges.baselines import KL_ONLY, LEAST_SQUARES, MEAN, UNRELATED, load_rivals, measure
from bridges.tables import metrics_table, site_mean
from distill.data import train_tokenizer
from distill.model import Architecture, DenseModel, SparseTransformer, residual_sites

SITES = residual_sites(2)


def test_baselines_are_the_metrics_of_their_own_bridges(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    rival = SparseTransformer.build(Architecture(vocab_size=29, context=12, n_layer=2, d_model=32, d_head=8), seed=7)
    train, heldout = windows[:4], windows[4:]
    found = measure(dense, student, bridges, heldout, train=train, bigram_ce=9.0, rivals={UNRELATED: rival}, mixtures=3)
    assert set(found["baselines"]) == {MEAN, LEAST_SQUARES, UNRELATED} and len(found["mixtures"]) == 3
    assert found["sites"] == bridge_metrics(dense, student, bridges, heldout, bigram_ce=9.0)["sites"]
    fitted = {
        MEAN: (student, mean_bridges(dense, student, train)),
        LEAST_SQUARES: (student, least_squares_bridges(dense, student, train, k=6)),
        UNRELATED: (rival, least_squares_bridges(dense, rival, train, k=8)),  # a quarter, as of the fitted ones
    }
    for name, (model, maps) in fitted.items():
        plain, told = bridge_metrics(dense, model, maps, heldout, bigram_ce=9.0), found["baselines"][name]
        assert (told["student_ce"], told["student_kl"], told["k"]) == (
            plain["student_ce"],
            plain["student_kl"],
            plain["k"],
        )
        for site in SITES:
            assert told["sites"][site].items() <= plain["sites"][site].items()
            assert {"nmse_d2s", "kl_s2d", "hybrid_ce_d2s", "recovered_s2d"} <= set(told["sites"][site])
    shallow = SparseTransformer.build(Architecture(vocab_size=29, context=12, n_layer=1, d_model=16, d_head=8))
    with pytest.raises(ValueError, match="unrelated: n_layer 1, allowed is 2"):
        measure(dense, student, bridges, heldout, train=train, bigram_ce=9.0, rivals={UNRELATED: shallow})


def test_every_single_switch_and_mixtures_of_all_kinds_are_measured(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    found = bridge_metrics(dense, student, bridges, windows, mixtures=40)
    assert set(found["sites"]) == set(SITES)
    assert all(values[f"hybrid_ce_{way}"] > 0 for values in found["sites"].values() for way in ("d2s", "s2d"))
    kinds = {(one["begin"], tuple(one["switches"])) for one in found["mixtures"]}
    assert ("dense", ("1.resid_in",)) in kinds and max(len(switches) for _, switches in kinds) == 3
    for one in found["mixtures"]:  # with one switch it is the pass that the site's entry speaks of
        if len(one["switches"]) == 1:
            way = "d2s" if one["begin"] == "dense" else "s2d"
            site = found["sites"][one["switches"][0]]
            assert one["ce"] == pytest.approx(site[f"hybrid_ce_{way}"], rel=1e-5)


def test_a_gap_below_a_nat_is_said_in_words(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    far = bridge_metrics(dense, student, bridges, windows, bigram_ce=99.0)
    assert far["warnings"] == [] and far["sites"]["0.resid_in"]["recovered_d2s"] is not None
    close = bridge_metrics(dense, student, bridges, windows, bigram_ce=far["dense_ce"] + 0.5)
    assert len(close["warnings"]) == 1 and "less than 1 below that of a bigram model" in close["warnings"][0]
    assert close["warnings"][0] in metrics_table(close)


def test_tables_show_sites_and_baselines_beside_the_fitted(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    found = measure(dense, student, bridges, windows, train=windows, bigram_ce=99.0, mixtures=2)
    lines = metrics_table(found).splitlines()
    first = found["sites"]["1.resid_mid"]
    row = next(line for line in lines if line.startswith("| 1.resid_mid |"))
    assert f"{first['nmse_d2s']:.3f} ({first['nmse_d2s_first']:.3f})" in row and f"{first['floor']:.3f}" in row
    mean = next(line for line in lines if line.startswith("| mean |"))
    assert f"{site_mean(found['baselines'][MEAN]['sites'], 'kl_s2d'):.3f}" in mean
    assert len({line.count("|") for line in lines if line.startswith("| mean") or line.startswith("| fitted")}) == 1
    assert "2 random mixtures" in lines[-1]


def test_windows_are_counted_without_the_pairs_between_them() -> None:
    rows = torch.tensor([[0, 1, 2], [3, 4, 0]]).numpy()
    judged = torch.tensor([[0, 1]])
    # 0 is followed by 1, once; of 6 tokens 1 is one: (1 + 1 * 2/11) / (1 + 1).
    assert bigram_loss(rows, judged, vocab_size=5) == pytest.approx(-torch.tensor((1 + 2 / 11) / 2).log().item())
    # In one row the pair 2, 3 would stand too; here nothing followed 2.
    assert bigram_loss(rows, torch.tensor([[2, 3]]), vocab_size=5) == pytest.approx(-torch.tensor(2 / 11).log().item())


def test_rivals_are_taken_where_depth_and_tokenizer_agree(dense: DenseModel, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([" ".join(f"word{i} = {i * i}" for i in range(400))], 300)
    assert load_rivals(dense, tokenizer) == {}  # the shipped model is of another depth and tokenizer
    with pytest.raises(ValueError, match="unrelated: sparse has 3 layers, allowed is 2"):
        load_rivals(dense, tokenizer, unrelated="sparse")
    dense.vocab_size = 300
    model = SparseTransformer.build(Architecture(vocab_size=300, context=12, n_layer=2, d_model=16, d_head=8))
    for name, its in (("same", tokenizer), ("other", train_tokenizer(["abc " * 50 + "xyzw " * 50] * 9, 262))):
        model.save_pretrained(tmp_path / name)
        its.save_pretrained(tmp_path / name)
    found = load_rivals(dense, tokenizer, unrelated="none", kl_only=str(tmp_path / "same"))
    assert list(found) == [KL_ONLY] and found[KL_ONLY].fingerprint() == model.fingerprint()
    with pytest.raises(ValueError, match="kl_only: .*other has another tokenizer"):
        load_rivals(dense, tokenizer, unrelated="none", kl_only=str(tmp_path / "other"))
    dense.hf.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is a dense model, allowed are sparse ones"):
        load_rivals(dense, tokenizer, unrelated=str(tmp_path / "dense"))

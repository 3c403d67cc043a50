from pathlib import Path

import pytest
import torch

from bridges import Bridges, BridgeShape
from bridges.maps import FILE, check_bridges
from distill.artifact import ArtifactError, save_tensors

SHAPE = BridgeShape(n_layer=2, d_dense=16, d_sparse=24, k=6)


def test_a_bridge_at_each_residual_site(bridges: Bridges) -> None:
    assert bridges.sites == ("0.resid_in", "0.resid_mid", "1.resid_in", "1.resid_mid", "final_resid")
    assert bridges.encoder("1.resid_mid").weight.shape == (24, 16)
    assert bridges.decoder_matrix("final_resid").shape == (16, 24)
    assert not bridges.decoder_matrix("final_resid").requires_grad


def test_encoder_is_linear_with_bias_then_abs_topk(bridges: Bridges) -> None:
    linear = bridges.encoder("0.resid_mid")
    with torch.no_grad():
        linear.bias.normal_()
    h = torch.randn(3, 5, 16)
    plain = h @ linear.weight.T + linear.bias
    kept = plain.abs() >= plain.abs().sort(-1, descending=True).values[..., 5:6]
    torch.testing.assert_close(bridges.encode("0.resid_mid", h), plain * kept)


def test_decoder_is_linear_with_bias(bridges: Bridges) -> None:
    with torch.no_grad():
        bridges.decoder("final_resid").bias.fill_(2.0)
    h = torch.randn(3, 5, 24)
    torch.testing.assert_close(bridges.decode("final_resid", h), h @ bridges.decoder_matrix("final_resid").T + 2)


def test_k_of_the_whole_width_is_the_plain_linear_map() -> None:
    bridges = Bridges(BridgeShape(n_layer=1, d_dense=4, d_sparse=6, k=6))
    assert bool((bridges.encode("0.resid_in", torch.randn(2, 3, 4)) != 0).all())


def test_start_follows_the_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (Bridges(SHAPE, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.encoder("0.resid_in").weight, same.encoder("0.resid_in").weight)
    assert not torch.equal(one.encoder("0.resid_in").weight, other.encoder("0.resid_in").weight)
    assert not torch.equal(one.encoder("0.resid_in").weight, one.encoder("0.resid_mid").weight)
    wide = Bridges(BridgeShape(n_layer=1, d_dense=400, d_sparse=100, k=100))
    assert wide.encoder("0.resid_in").weight.std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert wide.decoder("0.resid_in").weight.std().item() == pytest.approx(100**-0.5, rel=0.05)


def test_identity_changes_nothing() -> None:
    bridges = Bridges.identity(2, 8)
    h = torch.randn(2, 3, 8)
    for site in bridges.sites:
        assert torch.equal(bridges.encode(site, h), h) and torch.equal(bridges.decode(site, h), h)


def test_what_is_saved_is_loaded(bridges: Bridges, tmp_path: Path) -> None:
    bridges.save(tmp_path / "bridges")
    loaded = Bridges.load(tmp_path / "bridges")
    assert loaded.shape == bridges.shape
    for name, value in bridges.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_damaged_files_are_refused_in_words(bridges: Bridges, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such bridges file"):
        Bridges.load(tmp_path)
    bridges.save(tmp_path)
    raw = bytearray((tmp_path / FILE).read_bytes())
    raw[-1] ^= 1
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(ArtifactError, match="changed or damaged"):
        Bridges.load(tmp_path)
    save_tensors(tmp_path / FILE, {}, {"kind": "bridges", "shape": {"n_layer": 1, "d_dense": 2, "d_sparse": 3, "k": 1}})
    with pytest.raises(ArtifactError, match="not those of bridges"):
        Bridges.load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("n_layer", 0), ("d_dense", 0), ("d_sparse", 0), ("k", 0), ("k", 25)])
def test_impossible_shapes_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}"):
        BridgeShape(**{**vars(SHAPE), field: value})


def test_unknown_sites_and_other_models_are_refused(bridges: Bridges) -> None:
    with pytest.raises(ValueError, match="site: '7.resid_in'"):
        bridges.encode("7.resid_in", torch.zeros(1, 1, 16))
    check_bridges(bridges, n_layer=2, d_dense=16, d_sparse=24)
    with pytest.raises(ValueError, match="d_dense: the bridges are for 16, the models have 32"):
        check_bridges(bridges, n_layer=2, d_dense=32, d_sparse=24)

import copy

import pytest
import torch
from torch import Tensor

from bridges import BridgeConfig, BridgeObjective, Bridges, BridgeShape, check_pair
from bridges.losses import cross_entropy, kl, nmse
from bridges.metrics import recorded
from distill.model import Architecture, DenseModel, SparseTransformer, residual_sites

SITES = residual_sites(2)


@torch.no_grad()
def plain_terms(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, first: int = 0
) -> dict[str, Tensor]:
    """Every term written out, without sampling."""
    tokens = windows[:, :-1]
    y_d, h_d = recorded(dense, tokens)
    y_s, h_s = recorded(student, tokens)
    terms = {"ce": cross_entropy(y_s, windows[:, 1:]), "kl": kl(y_d, y_s)}
    for site in SITES:
        f, g = bridges.encode(site, h_d[site]), bridges.decode(site, h_s[site])
        terms[f"nmse_d2s.{site}"] = nmse(f[:, first:], h_s[site][:, first:])
        terms[f"nmse_s2d.{site}"] = nmse(g[:, first:], h_d[site][:, first:])
        terms[f"kl_d2s.{site}"] = kl(y_d, student.run(tokens, start=site, residual=f))
        terms[f"kl_s2d.{site}"] = kl(y_d, dense.run(tokens, start=site, residual=g))
    return terms


@pytest.mark.parametrize("skip_first", [False, True])
def test_with_all_sites_the_loss_is_the_sum_of_its_terms(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, skip_first: bool
) -> None:
    coefficients = {"ce": 0.5, "kl": 0.25, "nmse": 2.0, "kl_d2s": 3.0, "kl_s2d": 0.125}
    objective = BridgeObjective(
        dense, student, bridges, BridgeConfig(sites="all", **coefficients), skip_first=skip_first
    )
    loss, logged = objective(windows, 0)
    plain = plain_terms(dense, student, bridges, windows, int(skip_first))
    expected = 0.0
    for name, value in plain.items():
        torch.testing.assert_close(logged[name], value)
        term = name.split(".")[0]
        expected += coefficients["nmse" if term.startswith("nmse") else term] * float(value)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    for term in ("nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d"):
        assert float(logged[term]) == pytest.approx(sum(float(plain[f"{term}.{site}"]) for site in SITES), rel=1e-4)


@pytest.mark.parametrize("nmse_sites", ["sample", "all"])
def test_sampled_sites_give_loss_and_gradient_of_the_full_sum_on_average(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor, nmse_sites: str
) -> None:
    def mean(config: BridgeConfig, steps: range) -> tuple[float, dict[str, Tensor]]:
        objective = BridgeObjective(dense, student, bridges, config)
        modules = torch.nn.ModuleDict({"student": student, "bridges": bridges})
        modules.zero_grad()
        losses = [objective(windows, step)[0] / len(steps) for step in steps]
        for loss in losses:
            loss.backward()
        return sum(loss.item() for loss in losses), {n: p.grad.clone() for n, p in modules.named_parameters()}

    full, gradient = mean(BridgeConfig(sites="all"), range(1))
    for first in (0, 5, 35):
        sampled = BridgeConfig(sites="sample", nmse_sites="all" if nmse_sites == "all" else "sample")
        average, averaged = mean(sampled, range(first, first + 5))
        assert average == pytest.approx(full, rel=1e-4)
        for name, value in gradient.items():
            torch.testing.assert_close(averaged[name], value, rtol=1e-3, atol=1e-4)


def test_sites_are_dealt_from_decks_that_differ_and_follow_the_seed(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges
) -> None:
    one, same, other = (BridgeObjective(dense, student, bridges, BridgeConfig(seed=seed)) for seed in (0, 0, 1))
    decks = [tuple(one.site(step) for step in range(5 * deal, 5 * deal + 5)) for deal in range(20)]
    assert all(sorted(deck) == sorted(SITES) for deck in decks)
    assert len(set(decks)) > 10
    assert [same.site(step) for step in range(50)] == [one.site(step) for step in range(50)]
    assert [other.site(step) for step in range(50)] != [one.site(step) for step in range(50)]


def test_a_step_runs_one_partial_pass_of_each_model(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    _, logged = BridgeObjective(dense, student, bridges, BridgeConfig())(windows, 3)
    for term in ("kl_d2s", "kl_s2d"):
        assert len([name for name in logged if name.startswith(f"{term}.")]) == 1
    assert len([name for name in logged if name.startswith("nmse_s2d.")]) == 5


def test_dense_weights_are_frozen_and_gradients_run_through_them(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    only = BridgeConfig(ce=0.0, kl=0.0, nmse=0.0, kl_d2s=0.0, sites="all")
    loss, _ = BridgeObjective(dense, student, bridges, only)(windows, 0)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in dense.parameters())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    for site in SITES:
        grad = bridges.decoder(site).weight.grad
        assert grad is not None and float(grad.abs().sum()) > 0
        assert bridges.encoder(site).weight.grad is None
    assert student.embed_tokens.weight.grad is not None and student.unembed.weight.grad is None


def test_terms_without_a_coefficient_are_not_computed(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    config = BridgeConfig(kl=0.0, nmse=0.0, kl_d2s=0.0, kl_s2d=0.0)
    loss, logged = BridgeObjective(dense, student, bridges, config)(windows, 0)
    assert set(logged) == {"ce"} and loss.item() == pytest.approx(float(logged["ce"]))


def test_recomputing_changes_neither_loss_nor_gradient(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    found = []
    for recompute in (False, True):
        student.zero_grad()
        loss, _ = BridgeObjective(dense, student, bridges, BridgeConfig(recompute=recompute, sites="all"))(windows, 0)
        loss.backward()
        found.append((loss.detach(), student.embed_tokens.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_identity_bridges_cost_nothing(twin: SparseTransformer, windows: Tensor) -> None:
    objective = BridgeObjective(twin, copy.deepcopy(twin), Bridges.identity(2, 16), BridgeConfig(sites="all"))
    _, logged = objective(windows, 0)
    rest = {name: float(value) for name, value in logged.items() if name != "ce"}
    assert len(rest) == 1 + 4 + 4 * 5
    assert all(abs(value) < 1e-6 for value in rest.values())


def test_a_dense_model_in_half_precision_stays_close(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    full, _ = BridgeObjective(dense, student, bridges, BridgeConfig(sites="all"))(windows, 0)
    half, _ = BridgeObjective(dense.to(torch.bfloat16), student, bridges, BridgeConfig(sites="all"))(windows, 0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(full.item(), rel=0.03)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ce", -1.0),
        ("kl", float("nan")),
        ("k_fraction", 0.0),
        ("k_fraction", 1.5),
        ("kl_top", 0),
        ("seed", -1),
        ("dense_precision", "float16"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value!r}"):
        BridgeConfig(**{field: value})


def test_encoder_k_is_a_share_of_the_students_width(dense: DenseModel, student: SparseTransformer) -> None:
    assert BridgeConfig(k_fraction=0.25).shape(dense, student) == BridgeShape(n_layer=2, d_dense=16, d_sparse=24, k=6)
    assert BridgeConfig(k_fraction=1.0).shape(dense, student).k == 24
    assert BridgeConfig(k_fraction=0.001).shape(dense, student).k == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 30}, "vocab_size: the student has 30, allowed is 29"),
        ({"n_layer": 3}, "n_layer: the student has 3, allowed is 2"),
        ({"context": 8}, "context: got 12, allowed are 1 to 8 \\(the student's\\)"),
    ],
)
def test_models_that_do_not_fit_are_refused(dense: DenseModel, change: dict[str, int], message: str) -> None:
    numbers = {"vocab_size": 29, "n_layer": 2, "context": 12, "d_model": 16, **change}
    with pytest.raises(ValueError, match=message):
        check_pair(dense, SparseTransformer.build(Architecture(**numbers)), context=12)


def test_one_model_cannot_be_both(twin: SparseTransformer) -> None:
    with pytest.raises(ValueError, match="student: is the dense model itself"):
        check_pair(twin, twin)

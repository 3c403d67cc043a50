import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bridges import (
    Bridges,
    BridgeShape,
    ResidualMeans,
    SubspaceTest,
    bridged_subspace,
    live_channels,
    residual_means,
    subspace_test,
)
from bridges.metrics import recorded
from bridges.subspace import RANDOM, SubspaceTap, principal_subspaces, random_subspaces, variance_share
from distill.circuits.tasks import TaskBatch, task_loss
from distill.model import DenseModel, SparseTransformer, node_locations, residual_sites

SITES = residual_sites(2)
WIDTH = 16


@pytest.fixture
def batch(windows: Tensor) -> TaskBatch:
    """Six prompts of differing lengths with made-up answers."""
    last = torch.tensor([4, 5, 6, 7, 8, 9])
    return TaskBatch(
        tokens=windows[:, :10],
        attention_mask=(torch.arange(10) <= last[:, None]).long(),
        last=last,
        answer=torch.arange(6),
        other=torch.arange(6) + 7,
        orientation=torch.ones(6),
        labels=torch.zeros(6, dtype=torch.int64),
    )


@pytest.fixture
def means(dense: DenseModel, windows: Tensor) -> ResidualMeans:
    return residual_means(dense, windows[:, :-1])


def nodes(**kept: int) -> dict[str, Tensor]:
    """No nodes of a model of width 4 but those named, as `a0_attn_resid_delta=3`."""
    masks = {location: torch.zeros(4, dtype=torch.bool) for location in node_locations(2)}
    for name, channel in kept.items():
        layer, part, kind = name[1:].split("_", 2)
        masks[f"{layer}.{part}.{kind}"][channel] = True
    return masks


def live(**kept: int) -> list[list[int]]:
    found = live_channels(nodes(**kept), n_layer=2, d_model=4)
    assert tuple(found) == SITES
    return [mask.nonzero()[:, 0].tolist() for mask in found.values()]


def test_a_written_channel_is_live_after_its_write() -> None:
    assert live(a0_attn_resid_delta=3) == [[], [3], [3], [3], [3]]
    assert live(a1_mlp_resid_delta=3) == [[], [], [], [], [3]]


def test_a_read_channel_is_live_up_to_its_read() -> None:
    assert live(a0_attn_act_in=2) == [[2], [], [], [], []]
    assert live(a1_mlp_act_in=2) == [[2], [2], [2], [2], []]


def test_reads_and_writes_add_up_and_inner_nodes_do_not_count() -> None:
    both = live(a0_mlp_resid_delta=1, a1_attn_act_in=1, a0_attn_act_in=0, a0_attn_q=3, a1_mlp_post_act=3)
    assert both == [[0, 1], [1], [1], [1], [1]]


def test_position_channels_are_no_part_of_the_stream() -> None:
    masks = nodes()
    masks["0.attn.act_in"] = torch.tensor([False, False, False, True, True, True])
    assert live_channels(masks, n_layer=2, d_model=4)["0.resid_in"].tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match=r"'1\.mlp\.act_in' is missing"):
        live_channels({k: v for k, v in masks.items() if k != "1.mlp.act_in"}, n_layer=2, d_model=4)


def test_bridged_subspace_is_the_span_of_the_live_columns(bridges: Bridges) -> None:
    mask = torch.zeros(24, dtype=torch.bool)
    mask[[2, 5, 11]] = True
    basis = bridged_subspace(bridges, {"1.resid_in": mask})["1.resid_in"]
    assert basis.shape == (16, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    columns = bridges.decoder_matrix("1.resid_in")[:, mask]
    torch.testing.assert_close(basis @ (basis.T @ columns), columns, atol=1e-5, rtol=0)


def test_rank_not_count_is_the_dimension(bridges: Bridges) -> None:
    with torch.no_grad():
        bridges.decoder("1.resid_in").weight[:, 1] = 2 * bridges.decoder("1.resid_in").weight[:, 0]
    mask = torch.arange(24) < 2
    assert bridged_subspace(bridges, {"1.resid_in": mask})["1.resid_in"].shape == (16, 1)
    assert bridged_subspace(bridges, {"1.resid_in": mask & False})["1.resid_in"].shape == (16, 0)
    assert bridged_subspace(bridges, {"1.resid_in": mask | True})["1.resid_in"].shape == (16, 16)


def test_means_are_those_of_the_run(dense: DenseModel, twin: SparseTransformer, windows: Tensor) -> None:
    tokens = windows[:, :-1]
    with torch.no_grad():
        _, streams = recorded(dense, tokens)
    found = residual_means(dense, tokens, batch=4)
    site = "1.resid_mid"
    torch.testing.assert_close(found.at(site, 12), streams[site].mean(0), rtol=1e-4, atol=1e-5)
    assert found.at(site, 5).shape == (5, 16)
    deviation = (streams[site] - streams[site].mean(0)).reshape(-1, 16)
    torch.testing.assert_close(found.covariance[site], deviation.T @ deviation / 72, rtol=1e-4, atol=1e-4)
    plain = residual_means(twin, tokens)  # without positions: one mean
    with torch.no_grad():
        rows = recorded(twin, tokens)[1][site].reshape(-1, 16)
    torch.testing.assert_close(plain.at(site, 7), rows.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.covariance[site], rows.T.cov(correction=0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="length: 13 tokens"):
        found.at(site, 13)


def test_position_zero_is_protected_where_its_norm_is_giant(
    dense: DenseModel, windows: Tensor, means: ResidualMeans
) -> None:
    assert not means.protect_first
    with torch.no_grad():
        dense.hf.transformer.wpe.weight[0] += 300
    giant = residual_means(dense, windows[:, :-1])
    assert giant.protect_first
    x = torch.randn(2, 5, 16)
    out = SubspaceTap({"0.resid_in": torch.zeros(16, 0)}, giant, "sufficiency")("0.resid_in", x)
    assert torch.equal(out[:, 0], x[:, 0])
    torch.testing.assert_close(out[:, 1:], giant.at("0.resid_in", 5)[1:].expand(2, 4, 16))


def test_the_whole_space_keeps_everything_and_nothing_is_mean_ablation(
    dense: DenseModel, batch: TaskBatch, means: ResidualMeans
) -> None:
    whole = {site: torch.eye(WIDTH) for site in SITES}
    nothing = {site: torch.zeros(WIDTH, 0) for site in SITES}
    rows = torch.arange(6)
    with torch.no_grad():
        full = float(task_loss(dense.run(batch.tokens)[rows, batch.last], batch).mean())
        ablated = {
            site: dense.run(batch.tokens, start=site, residual=means.at(site, 10).expand(6, -1, -1)) for site in SITES
        }
        empty = {site: float(task_loss(logits[rows, batch.last], batch).mean()) for site, logits in ablated.items()}
    empty["all"] = empty["final_resid"]  # the last ablation leaves nothing of the earlier ones
    for bases, kept, removed in ((whole, None, empty), (nothing, empty, None)):
        for outcome in subspace_test(dense, batch, bases, means):
            expected = kept if outcome.test == "sufficiency" else removed
            value = full if expected is None else expected[outcome.site]
            assert outcome.loss == pytest.approx(value, rel=1e-3, abs=1e-5), outcome.line()
            assert outcome.loss_full == pytest.approx(full, rel=1e-4)
            assert outcome.loss_empty == pytest.approx(empty[outcome.site], rel=1e-4)


def test_what_is_kept_and_what_is_removed_make_up_the_stream(means: ResidualMeans) -> None:
    basis = torch.linalg.qr(torch.randn(16, 3)).Q
    x = torch.randn(2, 6, 16)
    kept, rest = (
        SubspaceTap({"1.resid_in": basis}, means, test)("1.resid_in", x) for test in ("sufficiency", "necessity")
    )
    torch.testing.assert_close(kept + rest, x + means.at("1.resid_in", 6), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((rest - means.at("1.resid_in", 6)) @ basis, torch.zeros(2, 6, 3), rtol=0, atol=1e-4)
    assert SubspaceTap({"1.resid_in": basis}, means, "necessity")("1.resid_mid", x) is x


def test_a_subspace_that_carries_the_answer_beats_its_controls(
    twin: SparseTransformer, windows: Tensor, batch: TaskBatch
) -> None:
    # At the end only the unembedding's difference of the two answers matters; the model answers by its own stream.
    with torch.no_grad():
        logits = twin.run(batch.tokens)[torch.arange(6), batch.last]
        best = logits.topk(2, dim=-1).indices
        batch = replace(batch, answer=best[:, 0], other=logits.argmin(-1))
        wanted = (twin.unembed.weight[batch.answer] - twin.unembed.weight[batch.other]).T
    bases = {"final_resid": torch.linalg.qr(wanted).Q[:, :6]}
    means = residual_means(twin, windows[:, :-1])
    controls = {RANDOM: random_subspaces(bases, means, 20, seed=0, matched=False)}
    for outcome in subspace_test(twin, batch, bases, means, controls=controls):
        assert len(outcome.controls[RANDOM]) == 20 and outcome.p == {RANDOM: 1 / 21}
        assert outcome.verdict == "above chance"
        assert outcome.site == "final_resid" and outcome.dimension == 6 and outcome.share == 6 / 16
        assert "above chance" in outcome.line() and json.loads(json.dumps(outcome.to_json()))["p"] == {RANDOM: 1 / 21}


def test_a_random_subspace_is_at_chance(dense: DenseModel, batch: TaskBatch, means: ResidualMeans) -> None:
    shape = {site: torch.eye(16, 4) for site in SITES}
    drawn = list(random_subspaces(shape, means, 40, seed=1, matched=False))
    outcomes = subspace_test(dense, batch, drawn[0], means, controls={RANDOM: drawn[1:]}, each_site=39)
    assert len(outcomes) == 2 * 6
    assert sum(outcome.verdict == "at chance" for outcome in outcomes) >= 9


def test_side_by_side_controls_equal_one_by_one(
    dense: DenseModel, batch: TaskBatch, means: ResidualMeans, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = {site: torch.eye(16, 3) for site in SITES}
    # Of different dimensions, as images of channels may be.
    wide, narrow = ({site: torch.eye(16, dim).flip(0) for site in SITES} for dim in (5, 1))
    alone = [subspace_test(dense, batch, control, means) for control in (wide, narrow, bases)]
    for tokens in (1, 150):
        monkeypatch.setattr("bridges.subspace.TOKENS_AT_ONCE", tokens)
        found = subspace_test(
            dense, batch, bases, means, controls={"mine": [wide, narrow, bases]}, other={"narrow": narrow}
        )
        for index, outcome in enumerate(found):
            expected = [outcomes[index].loss for outcomes in alone]
            assert outcome.loss == pytest.approx(expected[2], rel=1e-4)
            assert outcome.other == {"narrow": pytest.approx(expected[1], rel=1e-4)}
            # Only all sites together are held against controls unless asked.
            assert outcome.controls == {"mine": pytest.approx(expected, rel=1e-4) if outcome.site == "all" else ()}


def outcome_of(**changes: object) -> SubspaceTest:
    values = {
        "test": "sufficiency", "site": "all", "dimension": 8, "share": 0.5, "variance": 0.1, "loss": 0.1,
        "loss_full": 0.1, "loss_empty": 1.0, "protect_first": False,
    }  # fmt: skip
    return SubspaceTest(**{**values, **changes})


@pytest.mark.parametrize(
    ("share", "controls", "verdict"),
    [
        (0.6, {"a": (9.0,) * 19}, "says nothing"),
        (0.5, {}, "no controls"),
        (0.5, {"a": ()}, "no controls"),
        (0.5, {"a": (9.0,) * 18}, "too few controls"),
        (0.5, {"a": (9.0,) * 19}, "above chance"),
        (0.5, {"a": (9.0,) * 19, "b": (9.0,) * 18}, "too few controls"),
        (0.5, {"a": (9.0,) * 19, "b": (9.0,) * 18 + (0.0,)}, "at chance"),
    ],
)
def test_verdict_needs_a_small_subspace_and_every_family(share: float, controls: dict, verdict: str) -> None:
    assert outcome_of(share=share, controls=controls).verdict == verdict


def test_ties_with_controls_count_as_good() -> None:
    controls = {"a": (0.4, 0.5, 0.6, 0.7), RANDOM: (0.5,)}
    keep = outcome_of(loss=0.5, controls=controls)
    drop = outcome_of(test="necessity", loss=0.5, controls=controls)
    assert keep.p == {"a": 3 / 5, RANDOM: 1.0} and drop.p == {"a": 4 / 5, RANDOM: 1.0}


def test_json_keeps_the_random_family_apart() -> None:
    controls = {RANDOM: (0.5, 0.6), "channels": (0.7,)}
    found = json.loads(json.dumps(outcome_of(controls=controls, other={"principal": 0.3}).to_json()))
    assert found["controls"] == [0.5, 0.6] and found["families"] == {"channels": [0.7]}
    assert found["other"] == {"principal": 0.3} and found["ceiling"] is None
    assert found["p"] == {RANDOM: 1 / 3, "channels": 1 / 2} and found["verdict"] == "too few controls"
    assert "principal 0.300" in outcome_of(other={"principal": 0.3}).line()


def test_random_subspaces_overlap_across_sites_as_the_bases_do(means: ResidualMeans) -> None:
    bases = {"0.resid_in": torch.eye(16)[:, :3], "0.resid_mid": torch.eye(16)[:, 1:5]}
    for drawn in random_subspaces(bases, means, 5, seed=0, matched=False):
        overlap = torch.linalg.svdvals(drawn["0.resid_in"].T @ drawn["0.resid_mid"])
        torch.testing.assert_close(overlap, torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_principal_subspaces_hold_the_most_variance() -> None:
    covariance = torch.tensor([1.0, 4.0, 3.0, 2.0]).diag()
    means = ResidualMeans(
        values={"0.resid_in": torch.zeros(1, 4)}, covariance={"0.resid_in": covariance}, protect_first=False
    )
    for dim, share in ((0, 0.0), (1, 0.4), (2, 0.7), (4, 1.0)):
        found = principal_subspaces({"0.resid_in": torch.eye(4, dim)}, means)["0.resid_in"]
        assert found.shape == (4, dim)
        assert variance_share(found, covariance) == pytest.approx(share, abs=1e-5)


def test_random_subspaces_are_orthonormal_of_equal_dimension_and_seeded(bridges: Bridges, means: ResidualMeans) -> None:
    bases = bridged_subspace(bridges, {site: torch.arange(24) < 3 for site in SITES})
    one, two = (list(random_subspaces(bases, means, 3, seed=seed)) for seed in (0, 0))
    for drawn, again in zip(one, two, strict=True):
        for site in SITES:
            assert drawn[site].shape == bases[site].shape
            torch.testing.assert_close(drawn[site].T @ drawn[site], torch.eye(3), atol=1e-5, rtol=0)
            assert torch.equal(drawn[site], again[site])
    assert not torch.equal(one[0]["0.resid_in"], one[1]["0.resid_in"])


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_matched_controls_hold_as_much_variance(target: float) -> None:
    values = torch.linspace(0, -4, 32).exp()
    means = ResidualMeans(
        values={"0.resid_in": torch.zeros(1, 32)}, covariance={"0.resid_in": values.diag()}, protect_first=False
    )
    # A subspace of coordinates that holds about the target.
    chosen = torch.zeros(32, 4)
    first = min(range(28), key=lambda i: abs(float(values[i : i + 4].sum() / values.sum()) - target))
    chosen[first : first + 4] = torch.eye(4)
    held = variance_share(chosen, values.diag())
    drawn = random_subspaces({"0.resid_in": chosen}, means, 40, seed=0)
    shares = torch.tensor([variance_share(one["0.resid_in"], values.diag()) for one in drawn])
    assert float(shares.mean()) == pytest.approx(held, abs=0.1)


def test_controls_must_cover_the_sites(dense: DenseModel, batch: TaskBatch, means: ResidualMeans) -> None:
    bases = {site: torch.zeros(16, 1) for site in SITES}
    short = {site: basis for site, basis in bases.items() if site != "0.resid_mid"}
    with pytest.raises(ValueError, match=r"controls: one has no subspace at '0\.resid_mid'"):
        subspace_test(dense, batch, bases, means, controls={RANDOM: [short]})
    with pytest.raises(ValueError, match=r"other: one has no subspace at '0\.resid_mid'"):
        subspace_test(dense, batch, bases, means, other={"unrelated": short})


def test_prompts_longer_than_the_means_are_refused(dense: DenseModel, batch: TaskBatch, windows: Tensor) -> None:
    short = residual_means(dense, windows[:, :4])
    with pytest.raises(ValueError, match="measure them on longer windows"):
        subspace_test(dense, batch, {"0.resid_in": torch.zeros(16, 1)}, short)


def test_identity_bridge_of_a_whole_circuit_is_the_whole_space(twin: SparseTransformer) -> None:
    kept = {location: torch.ones(width, dtype=torch.bool) for location, width in twin.widths.items()}
    bases = bridged_subspace(Bridges.identity(2, 16), live_channels(kept, n_layer=2, d_model=16))
    assert all(basis.shape == (16, 16) for basis in bases.values())
    assert BridgeShape(n_layer=2, d_dense=16, d_sparse=16, k=16) == Bridges.identity(2, 16).shape

"""Laws: a model compared with itself through identity bridges corresponds in full, with a random circuit by chance."""

import pytest
import torch
from torch import Tensor

from bridges import Bridges
from bridges.correspondence import (
    WEAKEST,
    causal_map,
    decoder_strength,
    heads_and_neurons,
    node_links,
    overlap,
    subspace_overlap,
    units_of,
)
from bridges.crossing import unit_share
from bridges.interchange import Interchange, Interchanges, Other, interchange, turned
from bridges.subspace import live_channels
from distill.circuits import node_means
from distill.circuits.tasks import TaskBatch
from distill.model import SparseTransformer

LAYERS, WIDTH = 2, 16


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def batch(twin: SparseTransformer) -> TaskBatch:
    """Pairs that differ in one early token; the right answer is what the model itself prefers on each prompt."""
    tokens = torch.randint(0, 29, (8, 9), generator=torch.Generator().manual_seed(5))
    other = tokens.clone()
    other[:, 2] = (tokens[:, 2] + 7) % 29
    rows = torch.cat([tokens, other])
    with torch.no_grad():
        logits = twin.run(rows)[:, -1]
    clean, corrupt = (rows[:, :, None] - rows[:, None] for rows in logits.chunk(2))
    best = torch.minimum(clean, -corrupt).flatten(1).argmax(1)
    first, second = best // 29, best % 29
    labels = torch.arange(8) % 2
    return TaskBatch(
        tokens=rows,
        attention_mask=torch.ones_like(rows),
        last=torch.full((16,), 8),
        answer=torch.cat([first, second]),
        other=torch.cat([second, first]),
        orientation=torch.zeros(16),
        labels=torch.cat([labels, 1 - labels]),
    )


def some(model: SparseTransformer, share: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(width, generator=generator) < share for name, width in model.widths.items()}


def test_overlap_by_hand() -> None:
    unit = torch.eye(6)
    assert overlap(unit[:, :2], unit[:, :2]) == pytest.approx(1.0)
    assert overlap(unit[:, :1], unit[:, :3]) == pytest.approx(1.0)
    # Disjoint lines: (0 - 1/6) / (1 - 1/6).
    assert overlap(unit[:, :1], unit[:, 1:2]) == pytest.approx(-0.2)
    assert overlap(unit[:, :3], unit[:, :3]) is None
    assert overlap(unit[:, :0], unit[:, :2]) is None


def test_overlap_of_random_subspaces_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.eye(32)
    found = [
        overlap(unit[:, :6], torch.linalg.qr(torch.randn(32, 8, generator=generator, dtype=torch.float64)).Q)
        for _ in range(200)
    ]
    mean = torch.tensor(found).mean()
    assert abs(float(mean)) < 0.03


def test_a_circuit_corresponds_to_itself_and_not_to_a_random_one(twin: SparseTransformer) -> None:
    identity = Bridges.identity(LAYERS, WIDTH)
    mine = {name: torch.zeros(width, dtype=torch.bool) for name, width in twin.widths.items()}
    mine["0.attn.resid_delta"][:3] = True
    itself = subspace_overlap(mine, mine, identity)
    # Before the first write nothing is live.
    assert itself["0.resid_in"] is None
    assert all(value == pytest.approx(1.0) for site, value in itself.items() if site != "0.resid_in")
    generator = torch.Generator().manual_seed(1)
    random = []
    for _ in range(200):
        other = {name: torch.zeros_like(mask) for name, mask in mine.items()}
        other["0.attn.resid_delta"][torch.randperm(WIDTH, generator=generator)[:3]] = True
        random.append(subspace_overlap(mine, other, identity)["final_resid"])
    assert abs(float(torch.tensor(random).mean())) < 0.08


def test_the_causal_map_of_a_neuron_is_its_row_of_weights(twin: SparseTransformer, batch: TaskBatch) -> None:
    means = node_means(twin, batch.tokens)
    identity = Bridges.identity(LAYERS, WIDTH)
    units = [unit for unit in heads_and_neurons(twin) if unit.location == "1.mlp.post_act"][:3]
    found = causal_map(twin, identity, batch, means, units)
    values: dict[str, Tensor] = {}

    def keep(site: str, x: Tensor, /) -> Tensor:
        values[site] = x.detach()
        return x

    twin.run(batch.tokens, tap=keep)
    weight = twin.matrices()["1.mlp.post_act", "1.mlp.resid_delta"]
    deviation = values["final_resid"].flatten(0, 1).std(0)
    for row, unit in zip(found, units, strict=True):
        channel = unit.channels[0]
        moved = values["1.mlp.post_act"][..., channel] - means.values["1.mlp.post_act"][channel]
        expected = weight[:, channel].abs() * moved.square().mean().sqrt() / deviation
        assert torch.allclose(row, expected, atol=1e-5)


def test_units_are_heads_and_neurons(twin: SparseTransformer) -> None:
    units = heads_and_neurons(twin)
    heads = [unit for unit in units if ".head." in unit.name]
    assert [unit.name for unit in heads] == ["0.attn.head.0", "0.attn.head.1", "1.attn.head.0", "1.attn.head.1"]
    assert heads[1].channels == tuple(range(8, 16)) and heads[1].before == "0.resid_in"
    assert heads[3].after(LAYERS) == "1.resid_mid" and units[-1].after(LAYERS) == "final_resid"
    assert len(units) == 4 + 2 * twin.widths["0.mlp.post_act"]
    nodes = some(twin, 0.2, 0)
    kept = sum(int(nodes[f"{layer}.{kind}"].sum()) for layer in range(2) for kind in ("attn.v", "mlp.post_act"))
    assert len(units_of(nodes)) == kept


def test_identity_links_join_equal_channels(twin: SparseTransformer, batch: TaskBatch) -> None:
    nodes = some(twin, 0.4, 2)
    identity = Bridges.identity(LAYERS, WIDTH)
    decoder, ablation = node_links(twin, twin, identity, batch, node_means(twin, batch.tokens), (nodes, nodes))
    shared = sum(
        int(nodes[f"{layer}.{kind}"].sum())
        for layer in range(2)
        for kind in ("attn.act_in", "attn.resid_delta", "mlp.act_in", "mlp.resid_delta")
    )
    assert len(decoder["pairs"]) == shared
    assert all(mine == other and value == 1.0 for mine, other, value in decoder["pairs"])
    assert ablation["pairs"] and all(WEAKEST <= value <= 1 for _, _, value in ablation["pairs"])


def test_decoder_strength_by_hand() -> None:
    bridges = Bridges.identity(1, 2)
    stream = torch.tensor([[1.0, 10.0], [-1.0, -10.0]])
    strength = decoder_strength(bridges, "final_resid", stream, stream.flip(1))
    # One deviation of student channel 0 is ten of dense channel 0.
    assert torch.allclose(strength, torch.tensor([[10.0, 0.0], [0.0, 0.1]]))


def test_shares_of_units_against_random_ones() -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 3.0])
    share, drawn = unit_share(weight, torch.tensor([True, False, False, True]), ["a", "a", "b", "b"], seed=0)
    assert share == 1.0
    assert set(drawn) == {0.0, 0.25, 0.75, 1.0}


# --- interchange -----------------------------------------------------------------------------------------------------


def test_identity_bridges_interchange_in_full(twin: SparseTransformer, batch: TaskBatch) -> None:
    identity = Bridges.identity(LAYERS, WIDTH)
    sites = identity.sites
    whole = {site: torch.ones(WIDTH, dtype=torch.bool) for site in sites}
    none = {site: torch.zeros(WIDTH, dtype=torch.bool) for site in sites}
    found = interchange(twin, twin, identity, batch, whole, controls=[none], classes=batch)
    assert found.accuracy == 1.0 and (found.pairs, found.skipped) == (8, 0)
    for one in found.sites:
        assert one.effect == pytest.approx(1.0, abs=1e-4) and one.ceiling == pytest.approx(1.0, abs=1e-4)
        # What was scaled from nothing stays nothing.
        assert one.controls == pytest.approx((0.0,), abs=1e-6) and one.p == 0.5


def test_a_random_circuit_interchanges_as_its_controls_do(twin: SparseTransformer, batch: TaskBatch) -> None:
    identity = Bridges.identity(LAYERS, WIDTH)
    generator = torch.Generator().manual_seed(3)

    def draw() -> dict[str, Tensor]:
        chosen = torch.randperm(WIDTH, generator=generator)[:4]
        mask = torch.zeros(WIDTH, dtype=torch.bool)
        mask[chosen] = True
        return dict.fromkeys(identity.sites, mask)

    found = interchange(twin, twin, identity, batch, draw(), controls=[draw() for _ in range(15)])
    last = found.sites[-1]
    assert last.channels == 4
    assert min(last.controls) <= last.effect <= max(last.controls)


def test_pairs_of_unequal_length_are_skipped_and_weak_models_refused(twin: SparseTransformer, batch: TaskBatch) -> None:
    import dataclasses

    identity = Bridges.identity(LAYERS, WIDTH)
    live = {site: torch.ones(WIDTH, dtype=torch.bool) for site in identity.sites}
    last = batch.last.clone()
    last[:3] = 7
    found = interchange(twin, twin, identity, dataclasses.replace(batch, last=last), live)
    assert (found.pairs, found.skipped) == (5, 3)
    wrong = dataclasses.replace(batch, answer=batch.other, other=batch.answer)
    refused = interchange(twin, twin, identity, wrong, live)
    assert refused.sites == () and refused.accuracy == 0.0
    assert refused.to_json()["pairs"] == 8


def test_an_unrelated_student_is_read_beside(twin: SparseTransformer, batch: TaskBatch) -> None:
    identity = Bridges.identity(LAYERS, WIDTH)
    nodes = some(twin, 0.3, 4)
    live = live_channels(nodes, n_layer=LAYERS, d_model=WIDTH)
    other = Other(model=twin, bridges=identity, live=live)
    found = interchange(twin, twin, identity, batch, live, other=other)
    for one in found.sites:
        assert one.unrelated == pytest.approx(one.effect, abs=1e-5)
        assert one.unrelated_ceiling == pytest.approx(one.ceiling, abs=1e-5)
    alone = interchange(twin, twin, identity, batch, live, other=Other(model=twin, bridges=identity, live=None))
    assert alone.sites[0].unrelated is None and alone.sites[0].unrelated_ceiling is not None


def test_the_best_site_is_read_against_the_best_of_every_control() -> None:
    def site(name: str, effect: float, controls: tuple[float, ...], unrelated: float | None) -> Interchange:
        return Interchange(
            site=name, channels=2, effect=effect, ceiling=1.0, controls=controls, class_means=None, unrelated=unrelated
        )

    first = site("0.resid_in", 0.2, (0.9, 0.0, 0.1), 0.6)
    second = site("final_resid", 0.5, (0.1, 0.6, 0.2), 0.4)
    found = Interchanges(pairs=3, skipped=0, accuracy=1.0, sites=(first, second))
    best = found.best
    assert best is not None and found.to_json()["best"] == best
    assert (best["site"], best["effect"], best["controls"]) == ("final_resid", 0.5, [0.9, 0.6, 0.2])
    # Two of three controls do as well somewhere, though none of them does everywhere.
    assert best["p"] == 3 / 4 and second.p == 2 / 4
    assert best["unrelated"] == 0.6 and best["above_unrelated"] is False and best["class_means"] is None
    alone = Interchanges(pairs=3, skipped=0, accuracy=1.0, sites=(site("final_resid", 0.5, (), None),)).best
    assert alone is not None and alone["p"] is None and alone["above_unrelated"] is None
    assert Interchanges(pairs=0, skipped=1, accuracy=None, sites=()).best is None


def test_partners_are_turned() -> None:
    assert turned(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [3, 4, 1, 2]

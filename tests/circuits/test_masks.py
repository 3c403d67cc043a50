"""Masks by hand: the step and its surrogate gradient, tying, ablation with and without competition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.circuits.ablation import Means, node_means
from distill.circuits.masks import MaskTap, NodeMasks, all_nodes, group_index, heaviside, node_count
from distill.model.sites import Record, chain
from distill.model.topk import abs_topk

WIDTHS = {"0.attn.act_in": 3, "0.attn.q": 2, "0.attn.k": 2, "0.attn.v": 2, "0.mlp.post_act": 4}


def means_of(mean, protect_first=False):
    return Means(
        values={"0.attn.v": torch.tensor(mean)},
        magnitude={"0.attn.v": torch.tensor(mean).abs()},
        model="m",
        data="d",
        tokens=1,
        protect_first=protect_first,
    )


def test_heaviside_steps_at_zero():
    assert heaviside(torch.tensor([-1.0, -1e-6, 0.0, 1e-6, 1.0])).tolist() == [0, 0, 0, 1, 1]


@given(st.floats(-1, 1), st.floats(0.1, 3))
def test_the_surrogate_gradient_is_that_of_a_sigmoid(value, temperature):
    tau = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    (3 * heaviside(tau, temperature)).sum().backward()
    sigmoid = 1 / (1 + math.exp(-value / temperature))
    assert tau.grad is not None
    assert float(tau.grad) == pytest.approx(3 * sigmoid * (1 - sigmoid) / temperature, rel=1e-9)


def test_q_and_k_share_a_group_only_where_tied_and_equally_wide():
    tied = group_index(WIDTHS)
    assert tied["0.attn.q"].tolist() == tied["0.attn.k"].tolist() == [3, 4]
    assert tied["0.attn.v"].tolist() == [5, 6] and tied["0.mlp.post_act"].tolist() == [7, 8, 9, 10]
    assert group_index(WIDTHS, tie_qk=False)["0.attn.k"].tolist() == [5, 6]
    grouped = group_index(WIDTHS | {"0.attn.k": 1})
    assert grouped["0.attn.k"].tolist() == [5]


def test_a_tied_pair_counts_as_two_nodes_and_adds_up_its_gradients():
    masks = NodeMasks(WIDTHS, init_noise=0.0)
    nodes, count = masks()
    assert float(count.detach()) == node_count({name: mask.bool() for name, mask in nodes.items()}) == 13
    count.backward()
    slope = float(torch.sigmoid(torch.tensor(0.1)) * torch.sigmoid(torch.tensor(-0.1)))
    assert masks.tau.grad is not None
    assert masks.tau.grad[3] == pytest.approx(2 * slope) and masks.tau.grad[0] == pytest.approx(slope)


def test_the_start_is_seeded_and_clamped():
    first, same, other = (NodeMasks(WIDTHS, seed=seed).tau for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    masks = NodeMasks(WIDTHS)
    with torch.no_grad():
        masks.tau += torch.linspace(-5, 5, 11)
    masks.clamp()
    assert masks.tau.min().item() == -1 and masks.tau.max().item() == 1


def test_ablation_by_hand():
    tap = MaskTap({"0.attn.v": torch.tensor([True, False])}, means_of([0.5, -2.0]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert tap("0.attn.v", x).tolist() == [[[1, -2], [3, -2]]]
    assert tap("0.attn.q", x) is x


def test_ablation_per_position_by_hand():
    tap = MaskTap({"0.attn.v": torch.tensor([True, False])}, means_of([[0.0, 5.0], [0.0, 6.0], [0.0, 7.0]]))
    assert tap("0.attn.v", torch.ones(1, 2, 2)).tolist() == [[[1, 5], [1, 6]]]


def test_a_protected_first_position_is_never_ablated():
    tap = MaskTap({"0.attn.v": torch.tensor([False, False])}, means_of([0.5, -2.0], protect_first=True))
    assert tap("0.attn.v", torch.ones(1, 2, 2)).tolist() == [[[1, 1], [0.5, -2]]]


def test_the_gradient_of_a_mask_is_activation_minus_mean():
    mask = torch.tensor([1.0, 0.0], requires_grad=True)
    MaskTap({"0.attn.v": mask}, means_of([0.5, -2.0]), competition=True)(
        "0.attn.v", torch.ones(1, 3, 2)
    ).sum().backward()
    assert mask.grad is not None
    assert mask.grad.tolist() == [3 * 0.5, 3 * 3.0]


def test_without_competition_dropped_channels_leave_their_slots():
    keep = torch.tensor([False, True, True])
    means = Means(values={"0.attn.v": torch.zeros(3)}, magnitude={}, model="m", data="d", tokens=1)
    x = torch.tensor([[[9.0, 2.0, -1.0]]])
    free, competing = (MaskTap({"0.attn.v": keep}, means, competition=on) for on in (False, True))
    assert free.wants == {"pre"} and competing.wants == frozenset()
    assert free("0.attn.v", abs_topk(free("0.attn.v.pre", x), 1)).tolist() == [[[0, 2, 0]]]
    assert competing("0.attn.v", abs_topk(x, 1)).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("competition", [False, True])
@pytest.mark.parametrize("topk_fraction", [0.25, None])
def test_masks_of_ones_equal_no_masks(make_planted, make_prompts, make_windows, competition, topk_fraction):
    model = make_planted(3, topk_fraction)
    tokens = make_prompts(4, 0).tokens
    tap = MaskTap(all_nodes(model.widths), node_means(model, make_windows()), competition=competition)
    with torch.no_grad():
        assert torch.equal(model.run(tokens, tap=tap), model.run(tokens))


def test_masks_of_zeros_put_the_means_everywhere(planted, planted_means, make_prompts):
    record = Record(planted.widths)
    tap = MaskTap(all_nodes(planted.widths, keep=False), planted_means)
    with torch.no_grad():
        planted.run(make_prompts(2, 0).tokens, tap=chain(tap, record))
    for location, value in record.values.items():
        assert torch.equal(value, planted_means.at(location, 10)[None].expand_as(value))

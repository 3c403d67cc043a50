"""Answers: logits at the right place, the loss by hand, calibration by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.circuits.ablation import NonFiniteError
from distill.circuits.answers import (
    Calibration,
    answer_difference,
    answer_logits,
    calibrate,
    frozen,
    take,
    two_way_loss,
)
from distill.circuits.masks import MaskTap, all_nodes


def test_logits_are_those_of_the_whole_run_at_the_last_token(planted, make_prompts):
    batch = make_prompts(6, 0)
    with torch.no_grad():
        whole = planted.run(batch.tokens, attention_mask=batch.attention_mask)
        found = answer_logits(planted, batch)
    torch.testing.assert_close(found, whole[torch.arange(12), batch.last])
    with torch.no_grad():
        difference = answer_difference(planted, batch)
    rows = torch.arange(12)
    torch.testing.assert_close(difference, found[rows, batch.answer] - found[rows, batch.other])


def test_loss_by_hand():
    assert float(two_way_loss(torch.zeros(4))) == pytest.approx(math.log(2))
    assert float(two_way_loss(torch.tensor([math.log(3), -math.log(3)]))) == pytest.approx(math.log(16 / 3) / 2)


def test_take_keeps_both_members_and_trims(make_prompts):
    batch = make_prompts(6, 0)
    few = take(batch, torch.tensor([4, 1]))
    assert few.tokens.shape == (4, int(batch.last[[4, 1]].max()) + 1)
    assert few.answer.tolist() == batch.answer[[4, 1, 10, 7]].tolist()
    assert few.answer[:2].tolist() == few.other[2:].tolist()


def test_calibration_by_hand():
    # Class 0 at difference +1 in 3 of 4 cases, class 1 likewise: the best probability is 3/4, so scale = ln 3.
    difference = torch.tensor([1.0, 1, 1, -1] * 2)
    fitted = calibrate(difference, torch.tensor([1.0] * 4 + [-1.0] * 4))
    assert fitted.scale == pytest.approx(math.log(3), abs=1e-4) and fitted.shift == pytest.approx(0, abs=1e-4)


def test_the_shift_belongs_to_the_class():
    # Logits that say nothing, and three times as many answers of the first class.
    orientation = torch.tensor([1.0, 1, 1, -1])
    fitted = calibrate(torch.zeros(4), orientation)
    assert fitted.shift == pytest.approx(math.log(3), abs=1e-4)
    loss = float(two_way_loss(fitted(torch.zeros(4), orientation)))
    assert loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-5)
    assert calibrate(torch.zeros(4), torch.zeros(4)).shift == 0
    assert calibrate(torch.ones(4), orientation, shift=False).shift == 0


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.booleans())
def test_calibration_never_hurts_and_never_turns_the_sign(values, shift):
    difference = torch.tensor(values, dtype=torch.float64)
    orientation = torch.ones_like(difference)
    orientation[::2] = -1
    fitted = calibrate(difference, orientation, shift=shift)
    assert fitted.scale >= 0
    after = float(two_way_loss(fitted(difference, orientation)))
    assert after <= min(float(two_way_loss(difference)), math.log(2)) + 1e-6


def test_a_model_that_is_wrong_throughout_is_scaled_to_nothing():
    orientation = torch.tensor([1.0, -1, 1, -1])
    fitted = calibrate(torch.full((4,), -3.0), orientation)
    assert fitted.scale == 0 and fitted.shift == pytest.approx(0, abs=1e-6)
    assert calibrate(torch.full((4,), -3.0), orientation, shift=False) == Calibration(scale=0.0, shift=0.0)


def test_frozen_puts_everything_back(planted):
    planted.train()
    planted.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(KeyError), frozen(planted):
        assert not planted.training and not any(p.requires_grad for p in planted.parameters())
        raise KeyError
    assert planted.training and planted.unembed.weight.requires_grad
    assert not planted.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_the_first_broken_place_is_named(planted, planted_means, make_prompts, masked):
    with torch.no_grad():
        planted.layers[0].mlp_out.weight[5, :] = float("nan")
    tap = MaskTap(all_nodes(planted.widths), planted_means) if masked else None
    with pytest.raises(NonFiniteError, match=r"^0\.mlp\.resid_delta: activations are not finite"):
        answer_difference(planted, make_prompts(2, 0), tap)

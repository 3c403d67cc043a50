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
    frozen_norms,
    take,
    two_way_loss,
)
from distill.circuits.masks import MaskTap, all_nodes
from distill.model.sites import Edit, Record, chain


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
    orientation = torch.tensor([1.0] * 4 + [-1.0] * 4)
    fitted = calibrate(difference, orientation, smooth=False)
    assert fitted.scale == pytest.approx(math.log(3), abs=1e-4) and fitted.shift == pytest.approx(0, abs=1e-4)
    # Smoothed: right with probability 9/10 * 3/4 + 1/10 * 1/4 = 0.7, further from the optimum of the loss than scale 1.
    assert calibrate(difference, orientation) == Calibration()
    # Where doubled logits would do much better, the smoothed fit is taken: scale * 0.2 = ln(0.7 / 0.3).
    fitted = calibrate(0.2 * difference, orientation)
    assert fitted.scale == pytest.approx(5 * math.log(7 / 3), rel=1e-3)


def test_a_separable_task_keeps_a_finite_scale():
    # Eight prompts, all right by 0.5: the loss alone would have the scale grow for ever.
    difference, orientation = torch.full((8,), 0.5), torch.tensor([1.0, -1] * 4)
    assert calibrate(difference, orientation, smooth=False).scale > 20
    assert calibrate(difference, orientation).scale == pytest.approx(2 * math.log(9), abs=1e-3)
    # One such prompt wrong elsewhere costs scale * 0.5 nats, not thousands.
    wrong = calibrate(difference, orientation)(torch.tensor([-0.5]), torch.tensor([1.0]))
    assert float(two_way_loss(wrong)) < 2.5


def test_the_shift_belongs_to_the_class():
    # Logits that say nothing, and three times as many answers of the first class.
    orientation = torch.tensor([1.0, 1, 1, -1])
    fitted = calibrate(torch.zeros(4), orientation, smooth=False)
    assert fitted.shift == pytest.approx(math.log(3), abs=1e-4)
    loss = float(two_way_loss(fitted(torch.zeros(4), orientation)))
    assert loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-5)
    assert calibrate(torch.zeros(4), torch.zeros(4)).shift == 0
    assert calibrate(torch.ones(4), orientation, shift=False).shift == 0


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.booleans(), st.booleans())
def test_calibration_never_hurts_and_never_turns_the_sign(values, shift, smooth):
    difference = torch.tensor(values, dtype=torch.float64)
    orientation = torch.ones_like(difference)
    orientation[::2] = -1
    fitted = calibrate(difference, orientation, shift=shift, smooth=smooth)
    assert fitted.scale >= 0 and math.isfinite(fitted.scale)
    after = float(two_way_loss(fitted(difference, orientation)))
    assert after <= float(two_way_loss(difference)) + 1e-6
    if not smooth:
        assert after <= math.log(2) + 1e-6


def test_a_model_that_is_wrong_throughout_is_scaled_to_nothing():
    orientation = torch.tensor([1.0, -1, 1, -1])
    fitted = calibrate(torch.full((4,), -3.0), orientation)
    assert fitted.scale == 0 and fitted.shift == pytest.approx(0, abs=1e-6)
    assert calibrate(torch.full((4,), -3.0), orientation, shift=False) == Calibration(scale=0.0, shift=0.0)


def test_norms_frozen_at_the_models_own_scales_change_nothing_there(planted, make_prompts):
    batch = make_prompts(6, 0)
    norms = frozen_norms(planted, batch)
    assert set(norms.scales) == {"0.attn.norm_scale", "0.mlp.norm_scale", "final.norm_scale"}
    with torch.no_grad():
        torch.testing.assert_close(answer_difference(planted, batch, norms), answer_difference(planted, batch))
        # A stream twice as long passes twice as long through frozen norms, and no norm notices it otherwise.
        double = Edit({"0.resid_in": lambda x: 2 * x})
        reads = {}
        for name, tap in (("free", double), ("frozen", chain(double, norms))):
            record = Record(["0.attn.act_in"])
            planted.run(batch.tokens, tap=chain(tap, record), stop="final_resid")
            reads[name] = record.values["0.attn.act_in"]
    torch.testing.assert_close(reads["frozen"], 2 * reads["free"], atol=1e-4, rtol=1e-4)
    rows = torch.tensor([3, 9])
    with torch.no_grad():
        some = answer_difference(planted, take(batch, torch.tensor([3])), norms.rows(rows))
        torch.testing.assert_close(some, answer_difference(planted, batch)[rows])


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

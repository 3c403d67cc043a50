import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridges.losses import cross_entropy, kl, nmse, nmse_floor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nmse_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # channel means 2 and 2: spread 1 + 4 + 1 + 4 = 10
    predicted = torch.tensor([[1.0, 1.0], [3.0, 2.0]])  # errors 0, 1, 0, 2: squares 5
    assert nmse(predicted, target).item() == pytest.approx(0.5)


def test_predicting_the_channel_means_scores_one() -> None:
    target = draw(4, 5, 3) + 7
    assert nmse(target.mean((0, 1)).expand_as(target), target).item() == pytest.approx(1.0, rel=1e-5)


def test_nmse_sends_no_gradient_to_its_target() -> None:
    predicted, target = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    nmse(predicted, target).backward()
    assert target.grad is None and predicted.grad is not None and bool(predicted.grad.abs().sum() > 0)


def test_nmse_of_a_target_without_variance_is_zero_only_for_the_target_itself() -> None:
    target = torch.ones(3, 2)
    assert nmse(target, target).item() == 0
    assert nmse(target + 1, target).item() > 1e6


def test_floor_by_hand_and_off_at_full_width() -> None:
    target = torch.tensor([[1.0, 3.0], [-3.0, 1.0]])  # k = 1 drops 1 and 1; means -1 and 2: spread 4 + 4 + 1 + 1
    assert nmse_floor(target, 1).item() == pytest.approx(2 / 10)
    assert nmse_floor(target, 2).item() == 0


def test_cross_entropy_is_the_mean_of_the_targets_log_probabilities() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    targets = torch.tensor([[0, 1]])
    assert cross_entropy(logits, targets).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def plain_kl(p: Tensor, q: Tensor) -> float:
    p, q = p.softmax(-1), q.softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def test_kl_equals_its_definition_and_is_a_mean_over_tokens() -> None:
    p, q = draw(2, 3, 7), draw(2, 3, 7, seed=1)
    assert kl(p, q).item() == pytest.approx(plain_kl(p, q), rel=1e-5)
    assert kl(p, p).item() == pytest.approx(0, abs=1e-6)


def test_top_kl_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    expected = 0.5 * math.log(0.5 / 0.1) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.7)
    assert kl(p, q, top=2).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_top_kl_grows_with_the_classes_up_to_the_full_one(seed: int, top: int) -> None:
    p, q = 3 * draw(4, 11, seed=seed), 3 * draw(4, 11, seed=seed + 1)
    coarse, fine, full = kl(p, q, top=top), kl(p, q, top=top + 1), kl(p, q)
    assert -1e-5 <= float(coarse) <= float(fine) + 1e-4 and float(fine) <= float(full) + 1e-4
    assert kl(p, q, top=11).item() == pytest.approx(full.item(), rel=1e-5)


def test_top_kl_punishes_mass_outside_the_top() -> None:
    # Among the top two tokens q has the right proportions, but nearly all of its mass lies elsewhere.
    p = torch.tensor([[0.6, 0.3, 0.1]]).log()
    q = torch.tensor([[0.06, 0.03, 0.91]]).log()
    assert kl(p, q, top=2).item() > 1


def test_top_kl_stays_finite_where_the_tail_is_tiny() -> None:
    q = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    divergence = kl(torch.tensor([[0.0, 0.0, 0.0]]), q, top=1)
    divergence.backward()
    assert divergence.item() == pytest.approx(2 / 3 * (60 - math.log(2)) + plain_entropy(), rel=1e-4)
    assert q.grad is not None and bool(q.grad.isfinite().all())


def plain_entropy() -> float:
    return 1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)


def test_kl_sends_no_gradient_to_the_reference() -> None:
    p, q = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    kl(p, q, top=3).backward()
    assert p.grad is None and q.grad is not None


def test_top_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="top: got 0"):
        kl(draw(2, 5), draw(2, 5), top=0)

"""Held-out loss of a model whose probabilities are known."""

import math

import pytest
import torch
from torch import nn

from distill.model import Architecture, SparseTransformer
from distill.model.run import Runnable
from distill.training.evaluate import continuation, heldout_loss, per_token_losses

torch.set_num_threads(1)


class Known(Runnable):
    """Gives the successor of a token three times the weight of each other token."""

    def __init__(self, size: int):
        super().__init__()
        self.table = nn.Parameter(torch.roll(torch.eye(size), 1, dims=1) * math.log(3))
        self.batches: list[int] = []

    def run(self, tokens, **_):
        assert not self.training
        self.batches.append(len(tokens))
        return self.table[tokens]


def test_loss_by_hand():
    model = Known(4)
    windows = torch.tensor([[0, 1, 2], [1, 0, 1], [3, 0, 1]])
    right, wrong = -math.log(3 / 6), -math.log(1 / 6)
    expected = torch.tensor([[right, right], [wrong, right], [right, right]])
    assert torch.allclose(per_token_losses(model, windows, batch=2), expected)
    assert model.batches == [2, 1]
    assert heldout_loss(model, windows) == pytest.approx((5 * right + wrong) / 6)
    assert model.training


def test_no_gradient_is_kept():
    assert not per_token_losses(Known(4), torch.tensor([[0, 1]])).requires_grad


@pytest.mark.parametrize(
    ("windows", "batch", "field"),
    [(torch.zeros(1, 3, dtype=torch.int64), 0, "batch"), (torch.zeros(0, 3, dtype=torch.int64), 1, "windows"),
     (torch.zeros(2, 1, dtype=torch.int64), 1, "windows")],
)  # fmt: skip
def test_nothing_to_measure(windows, batch, field):
    with pytest.raises(ValueError, match=f"{field}: got"):
        heldout_loss(Known(4), windows, batch=batch)


def test_a_continuation_takes_the_likeliest_token_each_time() -> None:
    model = SparseTransformer.build(Architecture(vocab_size=20, context=6, n_layer=1, d_model=16), seed=0)
    tokens = [3, 1, 4]
    for _ in range(6):  # beyond the context, which moves along
        logits = model.run(torch.tensor([tokens[-6:]]))
        tokens.append(int(logits[0, -1].argmax()))
    assert continuation(model, torch.tensor([3, 1, 4]), 6).tolist() == tokens[3:]
    assert continuation(model, torch.tensor([3]), 0).tolist() == []

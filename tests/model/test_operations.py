import math

import pytest
import torch
from torch import Tensor

from distill.model import operations as ops


def _qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator).requires_grad_() for _ in range(3))
    return q, k, v


def test_the_sink_takes_its_share_of_the_softmax() -> None:
    q = torch.zeros(1, 1, 2, 4)
    pattern = ops.attention_pattern(q, q, torch.tensor([math.log(3.0)]), ops.visible(2, 2, None, q.device))
    # Scores are 0: the first token sees itself (1) beside the sink (3), the second two tokens (1 + 1) beside it.
    torch.testing.assert_close(pattern[0, 0], torch.tensor([[0.25, 0.0], [0.2, 0.2]]))


@pytest.mark.parametrize("with_sink", [True, False])
def test_fused_attention_equals_the_plain_one(with_sink: bool) -> None:
    q, k, v = _qkv(2, 3, 9, 4)
    sink = torch.tensor([0.5, -1.0, 2.0], requires_grad=True) if with_sink else None
    inputs = [q, k, v] + ([] if sink is None else [sink])
    plain = ops.attention_pattern(q, k, sink, ops.visible(9, 9, None, q.device)) @ v
    fused = ops.causal_attention(q, k, v, sink)
    torch.testing.assert_close(fused, plain)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((plain * weight).sum(), inputs)
    for got, want in zip(torch.autograd.grad((fused * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_queries_see_the_past_and_no_padding() -> None:
    mask = torch.tensor([[0, 1, 1]])
    assert ops.visible(2, 3, mask, mask.device)[0, 0].tolist() == [[False, True, False], [False, True, True]]


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_linear_equals_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    weight = torch.randn(3, 7, generator=generator, requires_grad=True)
    bias = torch.randn(3, generator=generator, requires_grad=True)
    plain, fast = torch.nn.functional.linear(x, weight, bias), ops.linear(x, weight, bias)
    torch.testing.assert_close(fast, plain)
    wants = torch.autograd.grad(plain.pow(2).sum(), [x, weight, bias])
    for got, want in zip(torch.autograd.grad(fast.pow(2).sum(), [x, weight, bias]), wants, strict=True):
        torch.testing.assert_close(got, want)


def test_norms_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])
    scale = ops.norm_scale(x, center=False, eps=0.0)
    assert scale.item() == pytest.approx(1 / math.sqrt(12.5))
    gain = torch.tensor([2.0, 1.0])
    assert ops.scaled(x, scale, gain, None, center=False)[0, 0].item() == pytest.approx(6 / math.sqrt(12.5))
    centred = ops.scaled(x, ops.norm_scale(x, center=True, eps=0.0), gain, torch.tensor([0.0, 1.0]), center=True)
    assert centred[0].tolist() == pytest.approx([-2.0, 2.0])

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
def test_fused_attention_equals_the_plain_one(path: str, with_sink: bool) -> None:
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
def test_linear_equals_torch(path: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    weight = torch.randn(3, 7, generator=generator, requires_grad=True)
    bias = torch.randn(3, generator=generator, requires_grad=True)
    plain, fast = torch.nn.functional.linear(x, weight, bias), ops.linear(x, weight, bias)
    torch.testing.assert_close(fast, plain)
    wants = torch.autograd.grad(plain.pow(2).sum(), [x, weight, bias])
    for got, want in zip(torch.autograd.grad(fast.pow(2).sum(), [x, weight, bias]), wants, strict=True):
        torch.testing.assert_close(got, want)


def test_maps_by_hand(path: str) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, -3.0], [2.0, 0.0]]), torch.tensor([0.0, 0.0, 0.5])
    # x W^T is [1, -6, 2] and [0, 3, 0]; the bias adds one half to the third.
    one, other, third = ops.linear_topk(x, [(weight, bias), (weight, None), (weight, bias)], keep=[2, 1, None])
    assert one.tolist() == [[0.0, -6.0, 2.5], [0.0, 3.0, 0.5]]
    assert other.tolist() == [[0.0, -6.0, 0.0], [0.0, 3.0, 0.0]]
    assert third.tolist() == [[1.0, -6.0, 2.5], [0.0, 3.0, 0.5]]
    (positive,) = ops.linear_topk(x, [(weight, bias)], activation="relu", keep=[2])
    assert positive.tolist() == [[1.0, 0.0, 2.5], [0.0, 3.0, 0.5]]


def test_what_is_kept_of_a_norm_by_hand(path: str) -> None:
    x, gain = torch.tensor([[3.0, -4.0, 0.0, 0.0]]), torch.tensor([4.0, 1.0, 1.0, 1.0])
    found = ops.norm_topk(x, gain, None, center=False, eps=0.0, k=1)
    assert found[0].tolist() == pytest.approx([12 / 2.5, 0.0, 0.0, 0.0])
    found = ops.norm_topk(x, gain, None, center=False, eps=0.0, k=None)
    assert found[0].tolist() == pytest.approx([12 / 2.5, -4 / 2.5, 0.0, 0.0])


def test_logits_get_the_row_of_the_token(path: str) -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    table = torch.arange(9.0).view(3, 3).requires_grad_()
    found = ops.logits(x, weight, torch.tensor([0.0, 0.0, 10.0]), table, torch.tensor([2]))
    assert found.tolist() == [[1.0 + 6, 2.0 + 7, 13.0 + 8]]
    found.sum().backward()
    assert table.grad is not None and table.grad.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert ops.logits(x, weight, None, None, torch.tensor([2])).tolist() == [[1.0, 2.0, 3.0]]
    assert ops.embedding(table, torch.tensor([[1, 1]])).tolist() == [[[3.0, 4.0, 5.0]] * 2]


def test_cross_entropy_leaves_negative_targets_out(path: str) -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [7.0, 1.0]]])
    assert ops.cross_entropy(logits, torch.tensor([[1, -1]])).item() == pytest.approx(math.log(4 / 3))


def test_compiled_operations_are_for_float32_on_a_cpu(path: str) -> None:
    assert ops.native(torch.ones(1)) == (path == "auto")
    assert not ops.native(torch.ones(1, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ops.native(torch.ones(1))
        assert ops.linear(torch.ones(1, 2), torch.eye(2), None).dtype == torch.bfloat16


def test_norms_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])
    scale = ops.norm_scale(x, center=False, eps=0.0)
    assert scale.item() == pytest.approx(1 / math.sqrt(12.5))
    gain = torch.tensor([2.0, 1.0])
    assert ops.scaled(x, scale, gain, None, center=False)[0, 0].item() == pytest.approx(6 / math.sqrt(12.5))
    centred = ops.scaled(x, ops.norm_scale(x, center=True, eps=0.0), gain, torch.tensor([0.0, 1.0]), center=True)
    assert centred[0].tolist() == pytest.approx([-2.0, 2.0])

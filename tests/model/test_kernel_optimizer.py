"""The compiled optimiser against torch's in float64, and its projection against a sort."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from distill.model import kernels
from distill.model.kernels import build

SEEDS = st.integers(0, 2**32 - 1)
FRACTIONS = st.one_of(st.floats(0.0, 0.3), st.floats(0.0, 0.99))
KINDS = st.sampled_from(["normal", "rounded", "few", "equal", "tiny", "none"])


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not kernels.available():
        pytest.skip("no compiler on this machine")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63))


def gradient(seed: int, kind: str, *shape: int) -> Tensor:
    x = draw(seed, *shape)
    return {
        "normal": x,
        "rounded": (2 * x).round(),
        "few": x * (draw(seed + 1, *shape) > 1.5),
        "equal": x.sign(),
        "tiny": x * 1e-30,
        "none": x * 0,
    }[kind]


def settings_of(step: int, *, rate: float = 0.05, scale: float = 0.7) -> kernels.AdamStep:
    return kernels.AdamStep(rate=rate, betas=(0.9, 0.95), eps=0.1, weight_decay=0.1, step=step, scale=scale)


def by_sorting(weight: Tensor, count: int, floor: int = 0, axis: int | None = None) -> Tensor:
    """The largest of the tensor, and the largest of each unit, by stable sorts."""
    order = weight.abs().reshape(-1).sort(descending=True, stable=True).indices
    kept = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, order[:count], True).view(weight.shape)
    if floor:
        rows = weight.abs() if axis == 0 else weight.abs().T
        largest = rows.sort(dim=1, descending=True, stable=True).indices[:, :floor]
        units = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, largest, True)
        kept = kept | (units if axis == 0 else units.T)
    return torch.where(kept, weight, 0.0)


class Twins:
    """One weight stepped as a whole and sorted, and its twin that owns its projection; they have to stay the same."""

    def __init__(self, weight: Tensor, floor: int = 0, axis: int | None = None) -> None:
        self.weight, self.floor, self.axis = weight, floor, axis
        self.twin = torch.nn.Parameter(weight.clone())
        self.projected = kernels.Projected(self.twin, floor=floor, axis=axis)
        self.moments = [torch.zeros_like(weight) for _ in range(4)]
        self.steps = 0

    def step(self, grad: Tensor, fraction: float, rate: float = 0.05) -> int:
        self.steps += 1
        adam, count = settings_of(self.steps, rate=rate), round(fraction * grad.numel())
        kernels.adamw_(self.weight, grad, *self.moments[:2], adam)
        self.weight.copy_(by_sorting(self.weight, count, self.floor, self.axis))
        left = self.projected.step(grad, *self.moments[2:], adam, count, lists=True)
        assert torch.equal(self.twin.detach(), self.weight)
        assert torch.equal(self.moments[0], self.moments[2]) and torch.equal(self.moments[1], self.moments[3])
        assert left == int(self.weight.count_nonzero())
        return self.projected.passes


# --- AdamW -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    n=st.integers(1, 40_000),
    scale=st.floats(1e-3, 1e3),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.999)),
    eps=st.sampled_from([0.1, 1e-8]),
    decay=st.floats(0.0, 1.0),
)
def test_a_step_is_that_of_torch_in_double(
    seed: int, n: int, scale: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    weight, m, v = draw(seed, n), torch.zeros(n), torch.zeros(n)
    exact = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW([exact], lr=0.02, betas=betas, eps=eps, weight_decay=decay)
    for step in range(1, 4):
        grad = draw(seed + step, n) / scale
        exact.grad = grad.double() * scale
        optimizer.step()
        adam = kernels.AdamStep(rate=0.02, betas=betas, eps=eps, weight_decay=decay, step=step, scale=scale)
        kernels.adamw_(weight, grad, m, v, adam)
    state = optimizer.state[exact]
    torch.testing.assert_close(weight.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m.double(), state["exp_avg"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(v.double(), state["exp_avg_sq"], rtol=1e-4, atol=1e-6)


def test_first_step_by_hand() -> None:
    weight, m, v = torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3), torch.zeros(3)
    adam = kernels.AdamStep(rate=0.5, betas=(0.9, 0.95), eps=0.1, weight_decay=0.1, step=1, scale=2.0)
    kernels.adamw_(weight, torch.tensor([1.0, -0.05, 0.0]), m, v, adam)
    # Corrected for the first step the moments are g and g * g, of g = 2, -0.1, 0.
    assert weight.tolist() == pytest.approx([0.95 - 0.5 * 2 / 2.1, 0.95 + 0.5 * 0.1 / 0.2, 0.0], rel=1e-6)
    assert m.tolist() == pytest.approx([0.2, -0.01, 0.0])
    assert v.tolist() == pytest.approx([0.2, 0.0005, 0.0])


@pytest.mark.parametrize("n", [0, 1, 63, 16_384, 50_001])
def test_sum_of_squares(n: int) -> None:
    x = draw(n, n)
    assert kernels.sum_of_squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    assert kernels.sum_of_squares(torch.full((max(n, 1),), math.inf)) == math.inf


# --- projected -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kinds=st.lists(KINDS, min_size=4, max_size=4),
    fractions=st.lists(FRACTIONS, min_size=4, max_size=4),
    floor=st.integers(0, 4),
    axis=st.sampled_from([0, 1]),
)
def test_steps_of_every_kind_are_a_step_and_a_sort(
    seed: int, shape: tuple[int, int], kinds: list[str], fractions: list[float], floor: int, axis: int
) -> None:
    twins = Twins(0.1 * draw(seed, *shape), min(floor, shape[1 - axis]), axis)
    for number, (kind, fraction) in enumerate(zip(kinds, fractions, strict=True)):
        twins.step(gradient(seed + 7 * number, kind, *shape), fraction)


@pytest.mark.parametrize(("floor", "axis"), [(0, None), (2, 0), (2, 1)])
@pytest.mark.parametrize("shape", [(40, 1000), (1000, 40), (129, 257)])
def test_a_training_of_larger_weights(shape: tuple[int, int], floor: int, axis: int | None) -> None:
    twins = Twins(0.1 * draw(0, *shape), floor, axis)
    steady = draw(1, *shape)
    passes = []
    for step in range(16):
        fraction = max(1 / 32, 1 - step / 8)
        passes.append(twins.step(steady + draw(2 + step, *shape), fraction))
    # All entries are written while much is kept, then candidates alone, rarely found in more than one pass.
    assert passes[:7] == [0] * 7 and min(passes[8:]) >= 1 and passes[8:].count(1) >= 5
    assert int(twins.weight.count_nonzero()) >= round(math.prod(shape) / 32)


@pytest.mark.parametrize("wrong", [1e-30, 0.01, 2.0, 1e30])
@pytest.mark.parametrize(("floor", "axis"), [(0, None), (3, 0), (3, 1)])
def test_what_stays_does_not_depend_on_the_guess(wrong: float, floor: int, axis: int | None) -> None:
    twins = Twins(0.1 * draw(0, 80, 90), floor, axis)
    for step in range(5):
        twins.step(draw(1 + step, 80, 90), 0.1)
    bounds = twins.projected._bound
    bounds.mul_(wrong).clamp_(min=2.0**-149)
    assert twins.step(draw(9, 80, 90), 0.1) in ((1,) if wrong < 1 else (2, 3) if wrong == 2 else (4,))
    bounds[1:].mul_(wrong).clamp_(min=2.0**-149, max=float(bounds[0]))
    twins.step(draw(10, 80, 90), 0.1)


def test_a_leap_of_the_rate_and_of_the_fraction() -> None:
    twins = Twins(0.1 * draw(0, 60, 300))
    for step, (rate, fraction) in enumerate([(0.05, 0.02), (0.05, 0.02), (5.0, 0.02), (1e-6, 0.2), (0.05, 0.001)]):
        twins.step(draw(1 + step, 60, 300), fraction, rate)
    assert int(twins.weight.count_nonzero()) == 18


def test_a_weight_that_somebody_else_changed() -> None:
    twins = Twins(0.1 * draw(0, 50, 60))
    for step in range(3):
        twins.step(draw(step, 50, 60), 0.05)
    with torch.no_grad():
        for weight in (twins.weight, twins.twin):
            weight.copy_(draw(8, 50, 60))
    assert twins.step(draw(9, 50, 60), 0.05) == 0
    assert twins.step(draw(10, 50, 60), 0.05) >= 1


def test_floor_by_hand() -> None:
    weight = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, -3.0, 2.0, 3.0]])
    zeros = [torch.zeros(2, 4) for _ in range(3)]
    adam = kernels.AdamStep(rate=0.0, betas=(0.9, 0.95), eps=0.1, weight_decay=0.0, step=1)
    projected = kernels.Projected(weight, floor=1, axis=0)
    assert projected.step(*zeros, adam, 2) == 3
    assert weight.tolist() == [[9.0, 8.0, 0.0, 0.0], [0.0, -3.0, 0.0, 0.0]]


def test_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PARALLEL_FROM", 0)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        twins = Twins(0.1 * draw(0, 300, 217), 2, 1)
        for step in range(6):
            twins.step((3 * draw(1 + step, 300, 217)).round(), 0.3 if step < 2 else 0.05)
        results.append([twins.twin.detach(), *twins.moments, kernels.sum_of_squares(draw(9, 300, 217))])
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def test_the_pattern_falls_out() -> None:
    twins = Twins(0.1 * draw(0, 90, 70), 2, 0)
    for step in range(4):
        assert (twins.step(draw(1 + step, 90, 70), 0.1) > 0) == (step > 0)
    remembered, built = kernels.Pattern.of(twins.twin), kernels.Pattern.of(twins.twin.detach().clone())
    for part in ("row_start", "by_row", "column_start", "by_column"):
        assert torch.equal(getattr(remembered, part), getattr(built, part)), part
    x = draw(5, 3, 70)
    torch.testing.assert_close(kernels.sparse_linear(x, twins.twin), x @ twins.weight.T)
    twins.step(draw(6, 90, 70), 0.1)
    torch.testing.assert_close(kernels.sparse_linear(x, twins.twin), x @ twins.weight.T)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    kind=KINDS,
    fraction=st.floats(0.0, 1.0),
    floor=st.integers(0, 4),
    axis=st.sampled_from([0, 1]),
)
def test_projection_with_a_floor_is_a_sort(
    seed: int, shape: tuple[int, int], kind: str, fraction: float, floor: int, axis: int
) -> None:
    x, floor = gradient(seed, kind, *shape), min(floor, shape[1 - axis])
    expected = by_sorting(x, round(fraction * x.numel()), floor, axis)
    left = kernels.project_(x, fraction, floor=floor, axis=axis)
    assert torch.equal(x, expected)
    assert left == int(expected.count_nonzero())

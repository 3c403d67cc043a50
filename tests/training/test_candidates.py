"""Candidate mode: what is chosen, when steps are sampled, and that a sample of everything trains as exact steps do."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.model import kernels, path
from distill.model.kernels.candidates import sample_of, sampled_embedding, sampled_linear
from distill.training.candidates import CandidateConfig, CandidateTraining, choose
from distill.training.optim import make_optimizer, set_rate

WAYS = [pytest.param("plain", id="torch"), pytest.param("auto", id="compiled")]


class Map(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        sample = sample_of(self.weight)
        if sample is None:
            return super().forward(input)
        return sampled_linear(input, self.weight, self.bias, sample)


class Table(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        sample = sample_of(self.weight)
        return super().forward(input) if sample is None else sampled_embedding(input, self.weight, sample)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "auto" and not kernels.available():
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(path, "_path", request.param)
    return request.param


def kept_after(step: int) -> float:
    return max(0.1, 1 - 0.15 * step)


class Run:
    """A small training, exact or by candidates."""

    def __init__(self, config: CandidateConfig | None, *, steps: int = 40, floor: int = 2) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(Table(30, 24), Map(24, 40), nn.ReLU(), Map(40, 30))
        self.sparse = dict(self.net.named_parameters())
        self.floors: dict[str, tuple[int, int | None]] = {name: (0, None) for name in self.sparse}
        self.floors |= {"1.weight": (floor, 0), "3.weight": (floor, 1)}
        self.optimizer = make_optimizer(self.net, self.sparse, floors=self.floors)
        exact = CandidateConfig(exact_last=1.0)
        self.candidates = CandidateTraining(
            self.sparse, self.optimizer, config or exact, steps=steps, kept_after=kept_after, floors=self.floors
        )
        self.done = 0

    def update(self, number: int = 1) -> float:
        loss = torch.tensor(0.0)
        for _ in range(number):
            step = self.done
            ids = torch.randint(30, (16, 2), generator=torch.Generator().manual_seed(step))
            self.candidates.begin(step)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.net(ids[:, 0]), (ids[:, 0] * 7 + ids[:, 1] % 2) % 30)
            loss.backward()
            set_rate(self.optimizer, 0.05, 1.0)
            kept = kept_after(step + 1)
            self.optimizer.step(scale=20.0, fraction=kept, without=self.candidates.parameters)
            self.nonzeros = self.optimizer.nonzeros + self.candidates.step(20.0, kept)
            self.done += 1
        return float(loss.detach())


# --- configuration and schedule ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", -1),
        ("factor", math.inf),
        ("refresh", 0),
        ("window", 0),
        ("window", 101),
        ("choice", "size"),
        ("newcomers", "old"),
        ("exact_last", 1.5),
        ("below", 0),
    ],
)
def test_config_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        CandidateConfig(**{field: value})


def test_which_steps_are_sampled() -> None:
    config = CandidateConfig(refresh=5, window=2, exact_last=0.25)
    sampled = [step for step in range(20) if config.sampled(step, steps=20, first=3)]
    assert sampled == [3, 4, 5, 8, 9, 10, 13, 14]  # exact: 0-2, 6-7, 11-12, and the last quarter from 15


def test_the_annealing_is_exact_until_little_is_kept() -> None:
    run = Run(CandidateConfig(below=0.5, window=1, exact_last=0))
    assert run.candidates.first == 3  # after update 3 (the fourth) 0.4 are kept, after update 2 it was 0.55
    run.update(3)
    assert run.candidates.names == ()
    run.update()
    assert run.candidates.names == ("0.weight", "1.weight", "3.weight")


def test_a_window_comes_first() -> None:
    net = nn.Sequential(Map(4, 4))
    sparse = dict(net.named_parameters())
    floors: dict[str, tuple[int, int | None]] = {name: (0, None) for name in sparse}
    made = CandidateTraining(
        sparse, make_optimizer(net, sparse), CandidateConfig(window=3), steps=9, kept_after=lambda s: 0.1, floors=floors
    )
    assert made.first == 3


# --- choice ---


def chosen(config: CandidateConfig, m: Tensor, v: Tensor, seed: int = 0) -> list[int]:
    weight = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, -1.0]])
    places, moment = choose(weight, m.clone(), v, config, 0.1, torch.Generator().manual_seed(seed))
    assert torch.equal(moment, m.view(-1)[places])
    return places.tolist()


def test_choice_by_hand(way: str) -> None:
    m = torch.tensor([[1.0, 9.0, -4.0], [0.0, 2.0, 9.0]])
    v = torch.tensor([[0.01, 1.0, 100.0], [0.0, 100.0, 1.0]])
    # Updates: 1 / 0.2, -, 4 / 10.1; 0, 2 / 10.1, -.
    assert chosen(CandidateConfig(factor=0), m, v) == [1, 5]
    assert chosen(CandidateConfig(factor=0.5, choice="gradient"), m, v) == [1, 2, 5]
    assert chosen(CandidateConfig(factor=0.5, choice="update"), m, v) == [0, 1, 5]
    assert chosen(CandidateConfig(factor=1, choice="gradient"), m, v) == [1, 2, 4, 5]
    assert chosen(CandidateConfig(factor=1, choice="update"), m, v) == [0, 1, 2, 5]
    # Nothing speaks for entry 3, so it does not come in though there is room.
    assert chosen(CandidateConfig(factor=9, choice="update"), m, v) == [0, 1, 2, 4, 5]


def test_ties_go_to_the_first_place(way: str) -> None:
    m, v = torch.ones(2, 3), torch.ones(2, 3)
    assert chosen(CandidateConfig(factor=1), m, v) == [0, 1, 2, 5]


def test_random_choice_is_of_its_seed(way: str) -> None:
    weight, zeros = torch.zeros(40, 40), torch.zeros(40, 40)
    weight[0] = 1.0
    config = CandidateConfig(factor=2, choice="random")
    one, same, other = (
        choose(weight, zeros, zeros, config, 0.1, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one) == 120 and torch.equal(one[:40], torch.arange(40))


# --- training ---


def test_a_sample_of_everything_trains_as_exact_steps_do(way: str) -> None:
    exact = Run(None)
    everything = Run(CandidateConfig(factor=1e6, choice="random", below=0.8, refresh=9, window=2, exact_last=0.2))
    for _ in range(5):
        exact.update(8)
        everything.update(8)
        for name, weight in exact.sparse.items():
            other = everything.sparse[name]
            assert torch.equal(weight != 0, other != 0), name
            assert torch.allclose(weight, other, rtol=1e-4, atol=1e-6), name
    assert everything.candidates.names == ()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_steps_are_those_of_adamw(way: str, scale: float) -> None:
    run = Run(CandidateConfig(factor=0, below=0.2, window=1, exact_last=0, refresh=50))
    run.update(5)
    run.candidates.begin(5)
    group = next(group for group in run.optimizer.param_groups if group["name"] == "sparse")
    before = {name: tensor.clone() for name, tensor in run.candidates.tensors().items()}
    wanted = {}
    for name, gradient in zip(run.candidates.names, run.candidates.gradients(), strict=True):
        gradient.copy_(torch.randn(gradient.shape, generator=torch.Generator().manual_seed(len(wanted))))
        flat = nn.Parameter(run.sparse[name].detach().view(-1)[before[f"{name}/places"]].clone())
        torch_adam = torch.optim.AdamW([flat], lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=0.1)
        moments = {slot: before[f"{name}/{slot}"].clone() for slot in ("exp_avg", "exp_avg_sq")}
        torch_adam.state[flat] = {"step": torch.tensor(5.0), **moments}
        flat.grad = gradient * scale
        torch_adam.step()
        wanted[name] = flat, torch_adam.state[flat]
    run.candidates.step(scale, 1.0)
    after = run.candidates.tensors()
    for name, (flat, state) in wanted.items():
        found = run.sparse[name].detach().view(-1)[after[f"{name}/places"]]
        assert torch.allclose(found, flat, rtol=1e-5, atol=1e-6)
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(after[f"{name}/{slot}"], state[slot], rtol=1e-5, atol=1e-7)


def test_between_refreshes_nothing_is_dense(way: str) -> None:
    run = Run(CandidateConfig(factor=1, below=0.2, window=1, exact_last=0, refresh=20))
    run.update(12)
    assert run.candidates.names == ("0.weight", "1.weight", "3.weight")
    numel = compact = 0
    for name in run.candidates.names:
        weight = run.sparse[name]
        assert weight.grad is None and weight not in run.optimizer.state
        numel += weight.numel()
    for gradient in run.candidates.gradients():
        assert gradient.dim() == 1
        compact += gradient.numel()
    tensors = run.candidates.tensors()
    moments = sum(
        tensors[f"{name}/{slot}"].numel() for name in run.candidates.names for slot in ("exp_avg", "exp_avg_sq")
    )
    assert compact + moments <= 3 * 0.52 * numel  # a quarter was kept when it was chosen, and as many candidates
    assert run.sparse["1.bias"].grad is not None


def test_training_goes_down_and_keeps_the_fraction(way: str) -> None:
    run = Run(CandidateConfig(factor=2, below=0.5, window=2, refresh=6, exact_last=0.1), floor=1)
    first = run.update()
    last = run.update(39)
    assert last < 0.9 * first
    assert int(run.sparse["0.weight"].count_nonzero()) == 72
    assert run.nonzeros == sum(int(p.count_nonzero()) for p in run.sparse.values())
    assert bool((run.sparse["1.weight"] != 0).any(1).all())


def test_moments_survive_leaving(way: str) -> None:
    run = Run(CandidateConfig(factor=1, below=0.5, window=2, refresh=5, exact_last=0))
    run.update(6)
    before = run.candidates.tensors()
    run.candidates.begin(6)
    assert run.candidates.names == ()
    for name in ("0.weight", "1.weight", "3.weight"):
        state = run.optimizer.state[run.sparse[name]]
        assert float(state["step"]) == 6.0
        for slot in ("exp_avg", "exp_avg_sq"):
            outside = state[slot].view(-1).clone()
            places = before[f"{name}/places"]
            assert torch.equal(outside[places], before[f"{name}/{slot}"])
            outside[places] = 0.0
            assert not outside.any()


@pytest.mark.parametrize("newcomers", ["zero", "mean"])
def test_moments_of_newcomers(way: str, newcomers: Any) -> None:
    run = Run(CandidateConfig(factor=1, below=0.2, window=2, refresh=5, exact_last=0, newcomers=newcomers))
    run.update(8)
    held = {name: run.candidates.tensors()[f"{name}/places"] for name in run.candidates.names}
    run.update(2)  # the window
    assert run.candidates.names == ()
    run.candidates.begin(10)
    found = run.candidates.tensors()
    name = "1.weight"
    values = run.sparse[name].detach().view(-1)[found[f"{name}/places"]]
    new = ~torch.isin(found[f"{name}/places"], held[name]) & (values == 0)
    m, v = found[f"{name}/exp_avg"], found[f"{name}/exp_avg_sq"]
    assert new.any() and not m[new].any() and m[~new].any()
    typical = float(v[values != 0].mean()) if newcomers == "mean" else 0.0
    assert torch.allclose(v[new], torch.full_like(v[new], typical))


def test_squares_stand_for_the_whole_gradient(way: str) -> None:
    run = Run(CandidateConfig(factor=0, below=0.2, window=1, exact_last=0, refresh=50))
    run.update(5)
    squares, kept = {}, {}
    for n in ("0.weight", "1.weight", "3.weight"):
        grad = run.sparse[n].grad
        assert grad is not None
        squares[n], kept[n] = float(grad.square().sum()), float(grad[run.sparse[n] != 0].square().sum())
    run.optimizer.zero_grad()
    run.candidates.begin(5)
    assert len(run.candidates.gradients()) == 3
    for number, gradient in enumerate(run.candidates.gradients()):
        gradient.fill_(float(number + 1))
    wanted = sum(
        squares[n] / kept[n] * (i + 1) ** 2 * int(run.sparse[n].count_nonzero()) for i, n in enumerate(squares)
    )
    assert run.candidates.squares() == pytest.approx(wanted, rel=1e-5)


def test_resumed_equals_uninterrupted(way: str) -> None:
    config = CandidateConfig(factor=1, below=0.5, window=2, refresh=5, exact_last=0.1, newcomers="mean")
    whole = Run(config)
    whole.update(40)
    for stop in (9, 13):  # among sampled steps, and in a window
        first = Run(config)
        first.update(stop)
        second = Run(config)
        second.net.load_state_dict(first.net.state_dict())
        for name, p in first.sparse.items():
            if p in first.optimizer.state:
                state = first.optimizer.state[p]
                second.optimizer.state[second.sparse[name]] = {key: value.clone() for key, value in state.items()}
        second.candidates.restore({key: value.clone() for key, value in first.candidates.tensors().items()})
        assert second.candidates.names == first.candidates.names
        for one, other in zip(first.candidates._matrices, second.candidates._matrices, strict=True):
            assert one.beyond == other.beyond
        second.done = stop
        second.update(40 - stop)
        for name, weight in whole.sparse.items():
            assert torch.equal(weight, second.sparse[name]), (stop, name)


def test_restore_refuses_what_does_not_fit() -> None:
    run = Run(CandidateConfig())
    with pytest.raises(ValueError, match="0.weight"):
        run.candidates.restore({})


def test_after_the_end_gradients_are_dense(way: str) -> None:
    run = Run(CandidateConfig(factor=1, below=0.5, window=1, exact_last=0))
    run.update(5)
    assert run.sparse["1.weight"].grad is None and run.candidates.names
    run.candidates.close()
    run.net(torch.arange(9)).sum().backward()
    assert run.candidates.names == () and all(p.grad is not None for p in run.sparse.values())


def test_a_dense_gradient_is_not_lost_silently(way: str) -> None:
    run = Run(CandidateConfig(factor=1, below=0.5, window=1, exact_last=0))
    run.update(5)
    weight = run.sparse["1.weight"]
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="1.weight"):
        run.candidates.step(1.0, 0.1)

"""The projection by counting equals the projection, on one process and over several."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from distill.training import threshold
from distill.training.sparsity import magnitude_threshold, project_
from distill.training.threshold import Block, Thresholds, project_block_, search_cut

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ["normal", "rounded", "few", "equal", "tiny", "huge", "zero"]


def draw(seed: int, *shape: int, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return {
        "normal": x,
        "rounded": (2 * x).round() / 2,
        "few": x * (torch.rand(shape, generator=generator) > 0.9),
        "equal": x.sign(),
        "tiny": x * 1e-42,
        "huge": torch.exp(15 * x),
        "zero": x * 0,
    }[kind]


@pytest.mark.parametrize("few", [2, 1024])
@settings(max_examples=40, deadline=None)
@given(
    SEEDS,
    st.integers(1, 4000),
    st.floats(0, 1),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.one_of(st.none(), st.floats(1e-6, 1e6), st.just(1e-40)),
)
def test_cut_is_that_of_the_selection(
    few: int, seed: int, n: int, share: float, kind: str, dtype: torch.dtype, start: float | None
) -> None:
    x = draw(seed, n, kind=kind).to(dtype)
    count = round(share * n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_FEW", few)
        found = search_cut(x, count, start=start)
    # float64 holds every value of the others.
    wanted = magnitude_threshold(x.double().abs(), count)
    if wanted.value == 0:
        assert found.value == 0
    else:
        assert (found.value, found.stay) == (wanted.value, wanted.stay)
        assert math.isinf(found.value) or found.equal == int((x.double().abs() == wanted.value).sum())


@settings(max_examples=60, deadline=None)
@given(
    SEEDS,
    st.integers(1, 60),
    st.integers(1, 60),
    st.floats(0, 1),
    st.integers(0, 5),
    st.sampled_from([0, 1]),
    st.sampled_from(KINDS),
)
def test_projects_as_the_projection(
    seed: int, rows: int, columns: int, fraction: float, floor: int, axis: int, kind: str
) -> None:
    x = draw(seed, rows, columns, kind=kind)
    floor = min(floor, (columns, rows)[axis])
    wanted = x.clone()
    kept = project_(wanted, fraction, floor=floor, axis=axis if floor else None)
    found, _ = project_block_(x, Block.whole(x), fraction, floor=floor, axis=axis if floor else None)
    assert torch.equal(x, wanted) and found == kept


def test_ties_go_to_the_first() -> None:
    x = torch.tensor([[1.0, -2.0, 1.0], [-1.0, 0.0, 1.0]])
    kept, cut = project_block_(x, Block.whole(x), 0.5)
    assert x.tolist() == [[1.0, -2.0, 1.0], [0.0, 0.0, 0.0]] and (kept, cut) == (3, 1.0)


def test_views_are_projected_in_place() -> None:
    whole = draw(0, 20, 30)
    wanted = whole.clone()
    project_(wanted[::2, 3:].clone(), 0.1)
    part = wanted[::2, 3:].clone()
    project_(part, 0.1)
    project_block_(whole[::2, 3:], Block.whole(whole[::2, 3:]), 0.1)
    assert torch.equal(whole[::2, 3:], part) and torch.equal(whole[1::2], wanted[1::2])


def test_the_last_cut_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    counted = torch.count_nonzero
    monkeypatch.setattr(torch, "count_nonzero", lambda x: passes.append(x.numel()) or counted(x))
    thresholds, weight = Thresholds(), draw(0, 300, 400)
    wanted = weight
    for step in range(4):
        passes.clear()
        weight = weight + 0.003 * draw(step + 1, 300, 400)
        wanted = weight.clone()
        kept = project_(wanted, 0.02)
        x = weight.clone()
        assert thresholds.project_("a", x, 0.02) == kept == 2400
        assert torch.equal(x, wanted)
        if step:
            assert len(passes) == 3  # two bounds, and the non-zeros left
    assert thresholds.last["a"] == pytest.approx(float(wanted[wanted != 0].abs().min()))
    thresholds.project_("b", torch.zeros(2000), 0.5)
    assert "b" not in thresholds.last


@pytest.mark.parametrize(("fraction", "floor", "axis"), [(1.5, 0, None), (-0.1, 0, None), (0.5, 2, None), (0.5, 9, 0)])
def test_what_is_not_possible_is_refused(fraction: float, floor: int, axis: int | None) -> None:
    with pytest.raises(ValueError, match="fraction|floor"):
        project_block_(draw(0, 4, 5), Block(shape=(4, 5), offset=(0, 0)), fraction, floor=floor, axis=axis)


def test_places_of_a_block() -> None:
    block = Block(shape=(6, 10), offset=(2, 5))
    assert block.places(torch.tensor([0, 4, 5]), (3, 5)).tolist() == [25, 29, 35]
    assert block.numel() == 60


# --- several processes ---

SCRIPT = """
import itertools, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from distill.training import threshold
from distill.training.sparsity import project_
from distill.training.threshold import Thresholds, project_sharded_

threshold._FEW = 4
torch.set_num_threads(1)
dist.init_process_group("gloo")
ranks = dist.get_world_size()
generator = torch.Generator().manual_seed(0)


def same(weight, whole, fraction, floor=0, axis=None, by=project_sharded_):
    wanted = whole.clone()
    kept = project_(wanted, fraction, floor=floor, axis=axis)
    assert by(weight, fraction, floor=floor, axis=axis) == kept, (kept, fraction, floor, axis)
    assert torch.equal(weight.full_tensor(), wanted), (weight.placements, fraction, floor, axis)


meshes = [(init_device_mesh("cpu", (ranks,)), [[Shard(0)], [Shard(1)], [Replicate()]])]
if ranks == 4:
    square = init_device_mesh("cpu", (2, 2))
    meshes.append((square, [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Shard(1)]]))
for mesh, layouts in meshes:
    for layout, shape, kind in itertools.product(layouts, [(7, 10), (1, 5), (40, 64)], ["normal", "tied", "equal"]):
        whole = torch.randn(shape, generator=generator)
        whole = {"normal": whole, "tied": (2 * whole).round() / 2, "equal": whole.sign()}[kind]
        for fraction, (floor, axis) in itertools.product([0.0, 0.1, 0.5, 1.0], [(0, None), (1, 0), (1, 1), (3, 0)]):
            floor = min(floor, shape[1 - axis]) if floor else 0
            same(distribute_tensor(whole.clone(), mesh, layout), whole, fraction, floor, axis)

# A module sharded by fully_shard itself, trained for a few steps beside one that is whole.
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 15), nn.ReLU(), nn.Linear(15, 6))

alone, net = build(), build()
fully_shard(net)
assert all(isinstance(p, DTensor) for p in net.parameters())
thresholds = Thresholds()
for step in range(4):
    x = torch.randn(5, 9, generator=generator)
    for module in (alone, net):
        module.zero_grad()
        module(x).square().sum().backward()
    with torch.no_grad():
        for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
            p -= 0.02 * p.grad
            q -= 0.02 * q.grad
            # Sums in another order: the same numbers go into both projections.
            q.copy_(p.full_tensor())
            floor, axis = (2, int(name == "2.weight")) if p.dim() == 2 else (0, None)
            same(p, q.detach(), 0.3, floor, axis, by=lambda *a, **k: thresholds.project_(name, *a, **k))
            q.copy_(p.full_tensor())
mesh = init_device_mesh("cpu", (ranks,))
partial = DTensor.from_local(torch.ones(3), mesh, [torch.distributed.tensor.Partial()])
try:
    project_sharded_(partial, 0.5)
except ValueError as error:
    assert "Partial" in str(error)
else:
    raise AssertionError("a Partial tensor was projected")
dist.barrier()
dist.destroy_process_group()
"""


def launch(number: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    shared = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    started = []
    for rank in range(number):
        environment = {**os.environ, **{name: str(value) for name, value in {**shared, "RANK": rank}.items()}}
        started.append(subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stderr=subprocess.PIPE))
    said = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * number, "\n".join(said)


def test_two_processes_project_as_one() -> None:
    launch(2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 4])
def test_more_processes_project_as_one(number: int) -> None:
    launch(number)

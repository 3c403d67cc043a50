"""Compact storage: what comes back is what went in, small, and bad files are refused before memory is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.artifact import ArtifactError, save_tensors
from distill.model.compact import KIND, load_compact, save_compact

torch.set_num_threads(1)


def sparse(numel: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    return values * (torch.rand(numel, generator=generator) < density)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    numel=st.sampled_from([0, 1, 300, 70_000, 200_000]),
    density=st.sampled_from([0.0, 1e-5, 1e-3, 0.02, 0.3, 0.6, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_round_trip_is_exact(tmp_path_factory, seed, numel, density, dtype):
    path = tmp_path_factory.mktemp("compact") / "model.sparse.safetensors"
    state = {"a.weight": sparse(numel, density, seed).to(dtype).view(1, numel), "count": torch.tensor(3)}
    save_compact(path, state)
    loaded = load_compact(path)
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_one_in_a_hundred_is_at_least_twenty_times_smaller(tmp_path):
    weight = sparse(1_000_000, 0.01).view(1000, 1000)
    save_compact(tmp_path / "a.safetensors", {"weight": weight})
    assert (tmp_path / "a.safetensors").stat().st_size * 20 < 4_000_000


def test_dense_tensors_stay_as_they_are(tmp_path):
    weight = torch.randn(100, 100)
    save_compact(tmp_path / "a.safetensors", {"weight": weight})
    assert 40_000 <= (tmp_path / "a.safetensors").stat().st_size < 42_000
    assert torch.equal(load_compact(tmp_path / "a.safetensors")["weight"], weight)


def test_tables_in_half_precision(tmp_path):
    table = torch.randn(50, 50)
    save_compact(tmp_path / "a.safetensors", {"student.bigram": table, "other": table})
    loaded = load_compact(tmp_path / "a.safetensors")
    assert loaded["student.bigram"].dtype == torch.float32
    assert torch.equal(loaded["student.bigram"], table.half().float())
    assert torch.equal(loaded["other"], table)
    with pytest.raises(ArtifactError, match="bigram has values beyond 65504"):
        save_compact(tmp_path / "b.safetensors", {"bigram": 1e6 * table})


GAPS, VALUES = torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1.0, 2.0])
GOOD = {"shape": [2, 2], "dtype": "float32", "storage": "sparse"}


def write(path, entry, gaps=GAPS, values=VALUES, **more):
    save_tensors(path, {"w.gaps": gaps, "w.values": values, **more}, {"kind": KIND, "tensors": {"w": entry}})


def test_format_by_hand(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, GOOD)
    assert torch.equal(load_compact(path)["w"], torch.tensor([[1.0, 0.0], [2.0, 0.0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": {**GOOD, "shape": [2, 1]}}, "outside its 2 places"),
        ({"gaps": torch.tensor([1, 0], dtype=torch.uint8)}, "twice at one"),
        ({"gaps": torch.tensor([0, 1], dtype=torch.uint8)}, "outside"),
        ({"gaps": torch.tensor([1, 2])}, "uint8 or uint16"),
        ({"values": torch.ones(3)}, "equal length"),
        ({"values": torch.ones(2, dtype=torch.float64)}, "declared as 'float32', stored as torch.float64"),
        ({"entry": {**GOOD, "shape": [2**30, 2**30]}}, "declares .* bytes of tensors, more than"),
        ({"entry": {**GOOD, "shape": [-2, -2]}}, "shape"),
        ({"entry": {**GOOD, "shape": 4}}, "shape"),
        ({"entry": {**GOOD, "dtype": "int4"}}, "dtype 'int4'"),
        ({"entry": {**GOOD, "storage": "zip"}}, "'storage' must be"),
        ({"entry": {**GOOD, "storage": "half"}}, "holds no 'w'"),
        ({"entry": 3}, "'storage' must be"),
        ({"extra": torch.ones(1)}, "undeclared tensor 'extra'"),
    ],
)
def test_contradictions_are_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    write(path, **{"entry": GOOD, **change})
    with pytest.raises(ArtifactError, match=message):
        load_compact(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such"):
        load_compact(tmp_path / "a.safetensors")
    save_tensors(tmp_path / "b.safetensors", {}, {"kind": "weights"})
    with pytest.raises(ArtifactError, match="kind 'weights'"):
        load_compact(tmp_path / "b.safetensors")
    save_tensors(tmp_path / "c.safetensors", {}, {"kind": KIND})
    with pytest.raises(ArtifactError, match="'tensors' must be"):
        load_compact(tmp_path / "c.safetensors")

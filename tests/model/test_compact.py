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


def eighths(table: torch.Tensor, path) -> torch.Tensor:
    save_compact(path, {"bigram": table}, rounded={"bigram": "int8"})
    return load_compact(path)["bigram"]


def test_tables_in_eight_bits_by_hand(tmp_path):
    # A range of 255 is cut into steps of 1; a constant row and a row of zeros come back exactly.
    table = torch.tensor([[-55.0, 200.0, 0.4, 0.6], [3.3, 3.3, 3.3, 3.3], [0.0, 0.0, 0.0, 0.0]])
    found = eighths(table, tmp_path / "a.safetensors")
    assert torch.equal(found, torch.tensor([[-55.0, 200.0, 0.0, 1.0], [3.3] * 4, [0.0] * 4]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.sampled_from([0, 1, 7]),
    columns=st.sampled_from([1, 2, 40, 300]),
    size=st.sampled_from([0.0, 1e-38, 1e-30, 1e-3, 1.0, 3e4, 1e37]),
    shift=st.sampled_from([0.0, 1.0, -1.0, 255.0, -5e3, 1e6, -1e9]),
    dtype=st.sampled_from(["normal", "steps"]),
)
def test_what_was_stored_in_eight_bits_comes_back_to_the_bit(tmp_path_factory, seed, rows, columns, size, shift, dtype):
    path = tmp_path_factory.mktemp("compact") / "a.safetensors"
    table = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    table = (table if dtype == "normal" else table.round()) * size + shift * torch.ones(rows, 1)
    first = eighths(table, path)
    before = path.read_bytes()
    assert torch.equal(eighths(first, path), first)
    assert path.read_bytes() == before
    # Half a step off at most, but for rows far narrower than their distance from zero.
    low, high = table.double().amin(1), table.double().amax(1)
    step = torch.maximum((high - low) / 255, low.abs() * 2**-18) * (1 + 2**-11) + 2**-99
    assert bool(((first.double() - table.double()).abs().amax(1) <= step / 2 + high.abs() * 2**-23).all())
    assert torch.equal(first.amin(1), table.amin(1))


def test_eight_bits_are_a_quarter_of_the_file(tmp_path):
    table = torch.randn(300, 400)
    eighths(table, tmp_path / "a.safetensors")
    assert 120_000 <= (tmp_path / "a.safetensors").stat().st_size < 124_000


@pytest.mark.parametrize(
    "table",
    [torch.ones(4), torch.ones(2, 2).double(), torch.ones(2, 2).half(), torch.zeros(3, 0),
     torch.tensor([[1.0, float("nan")]]), torch.tensor([[1.0, float("inf")]]), torch.tensor([[-float("inf"), 1.0]]),
     torch.tensor([[-3e38, 3e38, 3.4e38]])],
)  # fmt: skip
def test_what_eight_bits_cannot_hold_is_refused(tmp_path, table):
    with pytest.raises(ArtifactError, match="bigram .* stored as int8"):
        eighths(table, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_precision_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="bigram: got precision 'int4', allowed are float32, float16, int8"):
        save_compact(tmp_path / "a.safetensors", {"bigram": torch.ones(2, 2)}, rounded={"bigram": "int4"})


def test_rows_are_worked_on_in_blocks(tmp_path):
    table = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    whole = eighths(table, tmp_path / "a.safetensors")
    assert torch.equal(whole[500:], eighths(table[500:], tmp_path / "b.safetensors"))


CODES = {"codes": torch.tensor([[0, 255], [1, 0]], dtype=torch.uint8),
         "offset": torch.tensor([-1.0, 2.0]), "scale": torch.tensor([0.5, 1.0])}  # fmt: skip
AFFINE = {"shape": [2, 2], "dtype": "float32", "storage": "affine"}


def write_codes(path, entry, codes, offset, scale):
    save_tensors(path, {"w": codes, "w.offset": offset, "w.scale": scale}, {"kind": KIND, "tensors": {"w": entry}})


def test_format_in_eight_bits_by_hand(tmp_path):
    write_codes(tmp_path / "a.safetensors", AFFINE, **CODES)
    assert torch.equal(load_compact(tmp_path / "a.safetensors")["w"], torch.tensor([[-1.0, 126.5], [3.0, 2.0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": {**AFFINE, "shape": [2, 3]}}, r"declared with shape \[2, 3\], stored as torch.uint8"),
        ({"entry": {**AFFINE, "shape": [2**40, 2**20]}}, "declared with shape"),
        ({"entry": {**AFFINE, "dtype": "float16"}}, "for 'float16', in 8 bits allowed are"),
        ({"codes": torch.ones(2, 2)}, "in 8 bits allowed are"),
        ({"codes": torch.ones(4, dtype=torch.uint8), "entry": {**AFFINE, "shape": [4]}}, "in 8 bits allowed are"),
        ({"offset": torch.ones(3)}, "one for each row"),
        ({"scale": torch.ones(2, 1)}, "one for each row"),
        ({"scale": torch.ones(2, dtype=torch.float64)}, "lists of float32"),
        ({"scale": torch.tensor([1.0, 0.0])}, "scale above 0"),
        ({"scale": torch.tensor([1.0, float("nan")])}, "scale above 0"),
        ({"scale": torch.tensor([1.0, float("inf")])}, "must be finite"),
        ({"scale": torch.tensor([1.0, 3e38])}, "must be finite"),
        ({"offset": torch.tensor([1.0, -float("inf")])}, "must be finite"),
        ({"entry": {**AFFINE, "storage": "half"}}, "stored as torch.uint8"),
        ({"entry": {**AFFINE, "storage": "dense", "dtype": "uint8"}}, "undeclared tensor 'w.offset'"),
    ],
)
def test_contradictions_in_eight_bits_are_refused(tmp_path, change, message):
    write_codes(tmp_path / "a.safetensors", **{"entry": AFFINE, **CODES, **change})
    with pytest.raises(ArtifactError, match=message):
        load_compact(tmp_path / "a.safetensors")


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

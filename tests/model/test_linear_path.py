"""Which products leave zeros out: what is chosen, measured, written and read."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.artifact import ArtifactError
from distill.model import kernels
from distill.model.linear_path import FIXED, GENERAL, LinearPath, chosen, fixed, measure, use


def test_the_general_rule_holds_until_another_path_is_used() -> None:
    for density in (0.0, 0.2, 0.9):
        assert chosen(64, 64, density) == kernels.worth_it(64, 64, density)
    with use(LinearPath(crossovers={(64, 128): 0.5}, other=0.1)):
        assert chosen(64, 128, 0.5) and not chosen(64, 128, 0.51)
        assert chosen(128, 64, 0.1) and not chosen(128, 64, 0.11)
        with use(FIXED["dense"]):
            assert not chosen(64, 128, 0.0)
        with use(FIXED["sparse"]):
            assert chosen(2, 2, 1.0)
        assert chosen(64, 128, 0.5)
    assert chosen(64, 128, 0.5) == kernels.worth_it(64, 128, 0.5)


def test_shapes_that_a_path_does_not_name_follow_the_general_rule() -> None:
    path = LinearPath(crossovers={(64, 128): 0.0})
    assert not path.chosen(64, 128, 0.01)
    assert path.chosen(256, 256, 0.01) and not path.chosen(256, 256, 0.9) and not path.chosen(4, 256, 0.01)


@pytest.mark.parametrize(
    "made", [{"crossovers": {(2, 3): 1.5}}, {"crossovers": {(2, 3): float("nan")}}, {"other": -1.0}]
)
def test_densities_are_checked(made: dict) -> None:
    with pytest.raises(ValueError, match="linear_path: got .* allowed is 0 to 1"):
        LinearPath(**made)


def test_a_file_gives_the_path_back(tmp_path: Path) -> None:
    path = LinearPath(crossovers={(1024, 256): 0.4, (256, 1024): 1 / 3}, machine="some processor", threads=2)
    path.save(tmp_path / "path.json")
    assert fixed(str(tmp_path / "path.json")) == path
    assert "0.4 at 1024 x 256" in path.describe() and "general rule" in path.describe()
    for name, other in FIXED.items():
        other.save(tmp_path / name)
        assert LinearPath.load(tmp_path / name) == fixed(name) == other


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "circuit"}', "nothing"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ArtifactError, match="other.json"):
        fixed(str(tmp_path / "other.json"))
    with pytest.raises(ArtifactError, match="no such linear path"):
        fixed(str(tmp_path / "missing.json"))


def test_the_crossover_is_where_the_sparse_product_begins_to_win() -> None:
    asked = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        density = int(weight.count_nonzero()) / weight.numel()
        o, i = weight.shape
        asked.append((o, i, len(x)))
        # Dense products take 3 ms, sparse ones 10 ms times their density, and 5 ms more in the second shape.
        sparse = 0.01 * density + (0.005 if o == 320 else 0.0)
        time.sleep(sparse if chosen(o, i, density) else 0.003)
        return x.sum() * weight.sum() * torch.ones(len(x), o)

    path = measure([(256, 256), (320, 256), (256, 256), (16, 8192), (8, 8)], 40, linear)
    assert path.crossovers == {(256, 256): 0.25, (320, 256): 0.0}
    assert path.threads == torch.get_num_threads() and path.machine and path.other is None
    assert set(asked) == {(256, 256, 40), (320, 256, 40)}


def test_nothing_is_measured_where_little_hangs_on_it() -> None:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("measured")

    assert measure([(64, 64), (8192, 16)], 100, linear) == GENERAL

"""What tests of the compiled operations share."""

from collections.abc import Iterator

import pytest
import torch

from distill.model import kernels, set_path
from distill.model.kernels import build


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of threads of every kernel, however small the work."""
    monkeypatch.setattr(build, "PARALLEL_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["auto", "plain"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which set of operations is used."""
    if request.param == "auto" and not kernels.available():
        pytest.skip("no compiler on this machine")
    set_path(request.param)
    yield request.param
    set_path("auto")

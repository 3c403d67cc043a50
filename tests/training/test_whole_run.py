"""A whole training on the compiled operations and on the plain ones: the same course, as far as rounding lets it be."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.artifact import Provenance
from distill.data.tokens import windows
from distill.model import Architecture, SparseTransformer, kernels, operations
from distill.training import TrainConfig, heldout_loss, next_token_loss, train
from distill.training.sparsity import sparse_parameters

VOCABULARY, CONTEXT, CHOICES = 64, 24, 8
PROVENANCE = Provenance(kind="run", command="test", config={}, seed=0, data="abc")
CONFIG = TrainConfig(
    steps=200, batch=8, context=CONTEXT, kept=1 / 8, floor=2, learning_rate=0.02, eval_every=0, save_every=0
)


@pytest.fixture(autouse=True)
def _paths() -> Iterator[None]:
    if not kernels.available():
        pytest.skip("no compiler on this machine")
    torch.set_num_threads(1)
    yield
    operations.set_path("auto")


def text() -> np.ndarray:
    """Ids of which the last two say a good deal about the next."""
    random = np.random.RandomState(0)
    table = random.randint(VOCABULARY, size=(8, 8, CHOICES))
    ids = [1, 2]
    for choice in random.randint(CHOICES, size=8000):
        ids.append(int(table[ids[-1] % 8, ids[-2] % 8, choice]))
    return np.array(ids, dtype=np.uint16)


def trained(folder: Path, path: str, *, stir: float = 0.0) -> tuple[SparseTransformer, np.ndarray, float]:
    """The model, its losses along the way, and the last one on held-out text; `stir` changes the first weights."""
    operations.set_path(path)
    shape = Architecture(vocab_size=VOCABULARY, context=CONTEXT, n_layer=2, d_model=64)
    model = SparseTransformer.build(shape, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + stir * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ids, sparse = text(), sparse_parameters(model)
    history = train(model, next_token_loss(model), ids[:6000], CONFIG, folder, sparse=sparse, provenance=PROVENANCE)
    losses = np.array([line["loss"] for line in history])
    return model, losses, heldout_loss(model, windows(ids[6000:], CONTEXT))


def test_native_and_plain_take_the_same_course(tmp_path: Path) -> None:
    plain, expected, final = trained(tmp_path / "plain", "plain")
    native, losses, got = trained(tmp_path / "native", "auto")
    # AbsTopK and the projection make leaps of roundings: this is how far apart they carry two plain runs.
    _, stirred, _ = trained(tmp_path / "stirred", "plain", stir=1e-6)
    assert final < 0.9 * expected[0] and len(losses) == 20
    assert losses[0] == pytest.approx(expected[0], rel=1e-3)
    apart = np.abs(stirred / expected - 1).max()
    assert np.abs(losses / expected - 1).max() < 3 * apart + 0.002
    assert got == pytest.approx(final, rel=0.005)
    for (name, one), other in zip(native.named_parameters(), plain.parameters(), strict=True):
        # The floor adds what it needs to.
        assert int(one.count_nonzero()) == pytest.approx(int(other.count_nonzero()), rel=0.05, abs=2), name

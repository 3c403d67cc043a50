"""Numbers: the same for any number of threads, batch size and padding, for equal seeds to the bit, and near float64."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridges import BridgeConfig, Bridges, BridgeShape
from bridges.objective import BridgeObjective
from distill import load_model, load_subject
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.training.evaluate import heldout_loss
from distill.training.objective import next_token_loss

Recipe = Callable[[str, Sequence[object]], int]
SHAPE = Architecture(vocab_size=61, context=24, n_layer=2, d_model=32, d_head=8, position="added")
MODELS = ("sparse", "dense_gpt2")


def logits(name: str, rows: slice = slice(0, 4)) -> Tensor:
    subject = load_subject(name)
    with torch.no_grad():
        return subject.model.run(subject.sample[rows, :-1])


@pytest.mark.parametrize("name", MODELS)
def test_one_thread_and_two_agree(name: str) -> None:
    one = logits(name)
    try:
        torch.set_num_threads(2)
        two = logits(name)
    finally:
        torch.set_num_threads(1)
    assert float((one - two).abs().max()) <= 1e-4 * float(one.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_the_size_of_a_batch_does_not_matter(name: str) -> None:
    together = logits(name)
    for row in range(4):
        alone = logits(name, slice(row, row + 1))[0]
        assert float((alone - together[row]).abs().max()) <= 1e-4 * float(together.abs().max())
    subject = load_subject(name)
    losses = [heldout_loss(subject.model, subject.sample[:12], batch=batch) for batch in (1, 5, 12)]
    assert max(losses) - min(losses) <= 1e-5 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_matter(name: str) -> None:
    subject = load_subject(name)
    tokens = subject.sample[:3, :20]
    lengths = torch.tensor([20, 11, 5])
    with torch.no_grad():
        whole = [subject.model.run(row[None, :length])[0, -1] for row, length in zip(tokens, lengths, strict=True)]
        for filler in (0, 7):
            padded = torch.where(torch.arange(20) < lengths[:, None], tokens, filler)
            mask = (torch.arange(20) < lengths[:, None]).long()
            for given in (None, mask):
                found = subject.model.run(padded, attention_mask=given)
                for row, length in enumerate(lengths.tolist()):
                    assert torch.allclose(found[row, length - 1], whole[row], rtol=1e-4, atol=1e-3)


def test_equal_seeds_are_equal_to_the_bit(recipe: Recipe, texts: Path, tiny: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.rand(3)  # whatever came before does not matter
        argv = ["--corpus", texts, *tiny, "--config.kept", "0.25", "--seed", "3", "--out", tmp_path / name]
        assert recipe("train_sparse", argv) == 0
    one, two = (dict(load_model(tmp_path / name).named_parameters()) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def gradients(model: SparseTransformer | DenseModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_losses_and_gradients_are_those_of_float64(fraction: float | None) -> None:
    shape = Architecture(**{**vars(SHAPE), "topk_fraction": fraction})
    tokens = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(1))
    found, losses = [], []
    for kind in (torch.float32, torch.float64):
        model = SparseTransformer.build(shape, seed=2).to(kind)
        loss, _ = next_token_loss(model)(tokens, 0)
        losses.append(loss.detach().item())
        found.append(gradients(model, loss))
    assert abs(losses[0] - losses[1]) <= 1e-4 * losses[1]
    narrow, wide = found
    for name, exact in wide.items():
        assert float((narrow[name] - exact).norm()) <= 1e-4 * float(exact.norm()) + 1e-12, name


def test_the_loss_of_bridges_is_that_of_float64() -> None:
    tokens = torch.randint(61, (2, 25), generator=torch.Generator().manual_seed(1))
    found = []
    for kind in (torch.float32, torch.float64):
        dense = DenseModel.build_gpt2(SHAPE, seed=1).to(kind)
        student = SparseTransformer.build(SHAPE, seed=2).to(kind)
        bridges = Bridges(BridgeShape(n_layer=2, d_dense=32, d_sparse=32, k=32), seed=3).to(kind)
        objective = BridgeObjective(dense, student, bridges, BridgeConfig(), skip_first=False)
        loss, _ = objective(tokens, 0)
        found.append((loss.detach().item(), gradients(student, loss)))
    (narrow, mine), (wide, exact) = found
    assert abs(narrow - wide) <= 1e-4 * wide
    total = [torch.cat([one[name].flatten() for name in exact]) for one in (mine, exact)]
    assert float((total[0] - total[1]).norm()) <= 1e-4 * float(total[1].norm())

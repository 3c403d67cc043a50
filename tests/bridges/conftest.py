"""Two small models of one depth and vocabulary, and tokens for them."""

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bridges import Bridges, BridgeShape
from distill.model import Architecture, DenseModel, SparseTransformer

VOCABULARY, LAYERS, CONTEXT = 29, 2, 12


@pytest.fixture
def dense() -> DenseModel:
    """A GPT-2 of random weights, made by transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=16, n_layer=LAYERS, n_head=2, initializer_range=0.3
        )
        return DenseModel(GPT2LMHeadModel(config).eval())


@pytest.fixture
def student() -> SparseTransformer:
    architecture = Architecture(
        vocab_size=VOCABULARY, context=CONTEXT, n_layer=LAYERS, d_model=24, d_head=8, position="added"
    )
    return SparseTransformer.build(architecture, seed=1)


@pytest.fixture
def bridges() -> Bridges:
    return Bridges(BridgeShape(n_layer=LAYERS, d_dense=16, d_sparse=24, k=6), seed=2)


@pytest.fixture
def windows() -> Tensor:
    """(6, 13) token ids, the last column being targets only."""
    return torch.randint(0, VOCABULARY, (6, CONTEXT + 1), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def twin() -> SparseTransformer:
    """A model without AbsTopK: identity bridges join it to a copy of itself."""
    architecture = Architecture(
        vocab_size=VOCABULARY, context=CONTEXT, n_layer=LAYERS, d_model=16, d_head=8, topk_fraction=None
    )
    return SparseTransformer.build(architecture, seed=4)

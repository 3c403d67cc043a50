"""Candidate mode in the training loop: a whole model, interrupted and resumed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.artifact import Provenance
from distill.model import Architecture, SparseTransformer, set_path
from distill.model.kernels.candidates import sample_of
from distill.training import sparse_parameters
from distill.training.candidates import CandidateConfig
from distill.training.objective import next_token_loss
from distill.training.trainer import TrainConfig, train

CONFIG = TrainConfig(
    steps=24,
    batch=2,
    context=8,
    kept=0.1,
    anneal_fraction=0.2,
    log_every=1,
    save_every=6,
    candidate_mode=True,
    candidates=CandidateConfig(factor=1, refresh=6, window=2, exact_last=0.2, below=0.2),
)


def model() -> SparseTransformer:
    architecture = Architecture(
        vocab_size=40, context=8, n_layer=2, d_model=32, d_head=8, position="added", topk_fraction=0.5
    )
    return SparseTransformer.build(architecture)


def run(
    net: SparseTransformer, folder: Path, *, config: TrainConfig = CONFIG, resume: bool = False
) -> list[dict[str, Any]]:
    data = np.random.RandomState(0).randint(40, size=2000)
    provenance = Provenance(kind="run", command="test", config={}, seed=0, data=None)
    sparse = sparse_parameters(net)
    return train(net, next_token_loss(net), data, config, folder, sparse=sparse, provenance=provenance, resume=resume)


@pytest.fixture(params=["auto", "plain"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which set of operations is used."""
    set_path(request.param)
    yield request.param
    set_path("auto")


@pytest.mark.usefixtures("path")
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, broken = model(), model()
    history = run(whole, tmp_path / "whole")
    objective = next_token_loss(broken)
    data = np.random.RandomState(0).randint(40, size=2000)
    provenance = Provenance(kind="run", command="test", config={}, seed=0, data=None)

    def interrupted(tokens: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        if step == 14:
            raise RuntimeError("stop here")
        return objective(tokens, step)

    sparse = sparse_parameters(broken)
    with pytest.raises(RuntimeError, match="stop here"):
        train(broken, interrupted, data, CONFIG, tmp_path / "broken", sparse=sparse, provenance=provenance)
    fresh = model()
    again = run(fresh, tmp_path / "broken", resume=True)
    for (name, one), other in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [line["loss"] for line in again] == [line["loss"] for line in history]
    assert [line["nonzeros"] for line in again] == [line["nonzeros"] for line in history]
    kept = sum(int(p.count_nonzero()) for p in sparse_parameters(whole).values())
    assert history[-1]["nonzeros"] == kept


def test_weights_hold_the_pattern_and_the_loss_falls(tmp_path: Path) -> None:
    net = model()
    history = run(net, tmp_path, config=replace(CONFIG, candidates=replace(CONFIG.candidates, exact_last=0)))
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(net.embed_tokens.weight.count_nonzero()) == round(0.1 * 40 * 32)
    assert all(sample_of(p) is None for p in net.parameters())  # it ended among sampled steps

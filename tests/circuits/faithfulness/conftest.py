"""Circuits of the planted model, true and false ones, and limits that keep the tests short."""

from collections.abc import Callable

import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness import Limits
from distill.circuits.scorecard import Evidence
from distill.model.transformer import SparseTransformer


@pytest.fixture
def quick() -> Limits:
    return Limits(sets=20, draws=8, random_circuits=8, subsets=6, ascent_steps=8, interchange_draws=2, worst_steps=2)


@pytest.fixture
def make_circuit(choose, make_windows, planted_names) -> Callable[..., Circuit]:
    """A circuit of a model from the names of its nodes."""

    def make(model: SparseTransformer, names: tuple[str, ...] = planted_names, target: float = 0.15) -> Circuit:
        return Circuit(
            model=model.fingerprint(), model_name="planted", task="opener", nodes=choose(model, names), scores={},
            means=node_means(model, make_windows()), calibration=Calibration(), losses={}, target=target,
        )  # fmt: skip

    return make


@pytest.fixture
def circuit(planted, make_circuit) -> Circuit:
    """The planted circuit itself."""
    return make_circuit(planted)


@pytest.fixture
def even(planted, make_circuit, planted_names) -> Circuit:
    """The planted circuit without query and key: its head attends evenly, and an average of all words is copied."""
    asking = ("0.attn.act_in.1", "0.attn.act_in.2", "0.attn.q.0", "0.attn.k.0")
    return make_circuit(planted, tuple(name for name in planted_names if name not in asking))


@pytest.fixture
def cancelling(make_planted) -> SparseTransformer:
    """The planted model with two more values that copy the opener too and whose writes cancel each other."""
    model = make_planted(0)
    layer = model.layers[0]
    with torch.no_grad():
        for channel, write in ((1, -4.0), (2, 4.0)):
            layer.attn_v.weight[channel] = 0.0
            layer.attn_v.weight[channel, 0] = 1.0
            layer.attn_out.weight[:, channel] = 0.0
            layer.attn_out.weight[3, channel] = write
    return model


@pytest.fixture
def evidence(make_prompts, make_windows) -> Evidence:
    """Prompts, longer ones as the shifted split, and text."""
    return Evidence(test=make_prompts(24, 5), shift=make_prompts(16, 7, 14), others={}, corpus=make_windows(3))

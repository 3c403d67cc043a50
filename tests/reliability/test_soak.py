"""A long day in miniature: many steps and many circuits in one process, with flat memory and no files left open."""

import gc
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.artifact import Provenance
from distill.circuits import PruneConfig, node_means
from distill.circuits.prune import prune_batches
from distill.model import Architecture, SparseTransformer
from distill.training.objective import next_token_loss
from distill.training.sparsity import sparse_parameters
from distill.training.trainer import TrainConfig, train

GROWTH = 0.02
"""What memory may grow by after the warm-up, as a share."""


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Watch:
    """Memory and open files at marks."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = []

    def mark(self) -> None:
        self.marks.append((resident(), open_files()))

    def check(self) -> None:
        (before, files), (after, others) = self.marks[0], self.marks[-1]
        assert after <= before * (1 + GROWTH), [round(memory / 2**20, 1) for memory, _ in self.marks]
        assert files == others


@pytest.mark.parametrize("steps", [160, pytest.param(20_000, marks=pytest.mark.slow)])
def test_steps(steps: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    shape = Architecture(vocab_size=40, context=8, n_layer=1, d_model=16, d_head=8, d_mlp=16)
    model, watch = SparseTransformer.build(shape), Watch()
    loss_of, marks = next_token_loss(model), {steps // 4 + steps // 4 * n for n in range(3)} | {steps - 1}

    def objective(tokens: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step in marks:
            watch.mark()
        loss, _ = loss_of(tokens, step)
        return loss, {}

    config = TrainConfig(steps=steps, batch=2, context=8, kept=0.25, log_every=100, save_every=steps // 8,
                         anneal_fraction=0.2)  # fmt: skip
    data = np.tile(np.arange(40, dtype=np.uint16), 50)
    origin = Provenance(kind="run", command="test", config={}, seed=0, data="abc")
    train(model, objective, data, config, tmp_path / "run", sparse=sparse_parameters(model), provenance=origin)
    watch.check()


@pytest.mark.parametrize("circuits", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_circuits(circuits: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("planted", Path(__file__).parents[1] / "circuits" / "conftest.py")
    assert spec is not None and spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    model: SparseTransformer = planted.build(0, stray=0.1)
    prompts: Callable[..., torch.Tensor] = planted.prompts
    means, watch, found = node_means(model, planted.windows()), Watch(), set()
    for seed in range(circuits):
        config = PruneConfig(steps=8, seed=seed, screen=2, clean_up=1)
        circuit = prune_batches(model, "opener", prompts(12, seed), prompts(8, 1000 + seed), means, config)
        circuit.save(tmp_path / f"{seed}.circuit.safetensors")
        found.add(circuit.n_nodes)
        if seed in (max(2, circuits // 4), circuits // 2, circuits - 1):
            watch.mark()
    assert found and min(found) >= 1
    watch.check()

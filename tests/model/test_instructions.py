"""The compiled operations on processors that know less than this one: built for them, and held to plain torch."""

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from distill.model.kernels.build import CACHE_VARIABLE, compiler

STEP = """
import torch
from distill.model import Architecture, SparseTransformer, kernels, set_path
from distill.training import make_optimizer, next_token_loss, project_, sparse_parameters
from distill.training.optim import set_rate

assert kernels.available()
ids = torch.randint(97, (3, 34), generator=torch.Generator().manual_seed(0))
losses = {}
for path in ("plain", "auto"):
    set_path(path)
    model = SparseTransformer.build(Architecture(vocab_size=97, context=33, n_layer=2, d_model=80, d_head=8))
    sparse = sparse_parameters(model)
    for parameter in sparse.values():
        project_(parameter, 0.05)
    optimizer, loss = make_optimizer(model, sparse), next_token_loss(model)
    set_rate(optimizer, 1e-2, 1.0)
    losses[path] = []
    for step in range(5):
        optimizer.zero_grad()
        value, _ = loss(ids, step)
        value.backward()
        optimizer.step(fraction=0.05)
        losses[path].append(float(value))
torch.testing.assert_close(losses["auto"], losses["plain"], rtol=1e-4, atol=0)
assert losses["auto"][-1] < losses["auto"][0]
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or compiler() is None, reason="needs an x86-64 and its compiler")
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64"])
def test_older_processors_compute_the_same(tmp_path: Path, level: str) -> None:
    program = tmp_path / "compiler"
    program.write_text(f'#!/bin/bash\nexec {compiler()} "${{@/-march=native/-march={level}}}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    cache = tmp_path / "cache"
    environment = os.environ | {"CXX": str(program), CACHE_VARIABLE: str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(cache.glob("*.so"))) == 1

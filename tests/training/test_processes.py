"""Several processes that share a batch, whole or with spread parameters, train the model that one process trains."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.artifact import read_manifest
from distill.model import load_model

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from distill.artifact import Provenance
from distill.data.tokens import windows
from distill.model import Architecture, SparseTransformer
from distill.training import TrainConfig, heldout_loss, next_token_loss, sparse_parameters, train
from distill.training.checkpoint import whole
from distill.training.sharded import shard_

folder, way, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
engine = Accelerator(cpu=True)
shape = Architecture(vocab_size=50, context=12, n_layer=1, d_model=32, d_head=8)
model = SparseTransformer.build(shape, seed=0)
if way != "float":
    model = model.double()
if way == "sharded":
    shard_(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
random = np.random.RandomState(0)
data = (np.arange(4000) % 37 + random.randint(3, size=4000)).astype(np.uint16)
config = TrainConfig(
    steps=24, batch=8, context=12, kept=0.1, floor=1, save_every=8, eval_every=8, log_every=4, learning_rate=0.1,
    accumulate=2 if way == "accumulated" else 1,
)
held = windows(data, 12, 8)
provenance = Provenance(kind="run", command="test", config={}, seed=0, data=None)
objective = next_token_loss(model)


def stopping(tokens, step):
    if step == steps:
        raise SystemExit(0)
    return objective(tokens, step)


train(
    model, stopping, data, config, folder, sparse=sparse_parameters(model), provenance=provenance, engine=engine,
    evaluate=lambda: {"heldout_loss": heldout_loss(model, held)}, resume=True,
)
state = {name: whole(p.detach()) for name, p in model.named_parameters()}
torch.save(state, folder / f"{engine.process_index}.pt")
"""


def environment(**more: object) -> dict[str, str]:
    found = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return found | {name: str(value) for name, value in more.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(folder: Path, number: int, way: str, steps: int = -1) -> list[dict[str, Tensor]]:
    """Trains in so many processes, until step `steps` where that is one; the weights that each ends with."""
    port, started = free_port(), []
    for rank in range(number):
        shared = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
        extra = shared | {"LOCAL_RANK": rank} if number > 1 else {}
        argv = [sys.executable, "-c", SCRIPT, str(folder), way, str(steps)]
        started.append(subprocess.Popen(argv, env=environment(**extra), stderr=subprocess.PIPE))
    said = [process.communicate(timeout=600)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * number, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number) if steps < 0]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def overlap(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Share of the entries kept by the one that the other keeps too."""
    both = sum(int(((one[n] != 0) & (two[n] != 0)).sum()) for n in one)
    return both / sum(int((one[n] != 0).sum()) for n in one)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["double", "accumulated", "sharded"])
def test_two_processes_equal_one(tmp_path: Path, way: str) -> None:
    (one,) = launch(tmp_path / "one", 1, "double")
    for two in launch(tmp_path / "two", 2, way):
        for name, weight in one.items():
            assert torch.equal(weight != 0, two[name] != 0), name
            assert torch.allclose(weight, two[name], rtol=1e-9, atol=1e-11), name
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    assert 0.05 < sum(int((w != 0).sum()) for w in one.values()) / sum(w.numel() for w in one.values()) < 0.9


@pytest.mark.slow
def test_two_processes_keep_the_same_entries_in_single_precision(tmp_path: Path) -> None:
    (one,), two = launch(tmp_path / "one", 1, "float"), launch(tmp_path / "two", 2, "float")
    assert all(torch.equal(two[0][name], two[1][name]) for name in one)
    assert overlap(one, two[0]) >= 0.99
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
def test_spread_parameters_are_resumed(tmp_path: Path) -> None:
    whole = launch(tmp_path / "whole", 2, "sharded")
    launch(tmp_path / "cut", 2, "sharded", steps=13)
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    resumed = launch(tmp_path / "cut", 2, "sharded")
    # A checkpoint holds whole tensors: one process goes on from it too.
    (alone,) = launch(tmp_path / "alone", 1, "double")
    for name, weight in whole[0].items():
        assert torch.equal(weight, resumed[0][name]) and torch.equal(weight, resumed[1][name]), name
        assert torch.allclose(weight, alone[name], rtol=1e-9, atol=1e-11), name


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_the_recipe_is_launched_by_torchrun(tmp_path: Path, stream: bool) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        lines = "\n".join(f"value_{i * j} = call({j}, 'name {i}')" for j in range(20))
        (texts / f"{i}.py").write_text(lines + "\n")
    recipe = [str(ROOT / "recipes" / "train_sparse.py"), "--preset", "tiny", "--corpus", str(texts), "--seed", "1",
              "--vocab-size", "300", "--architecture.d-head", "8", "--architecture.context", "32",
              "--config.context", "32", "--linear-path", "dense", *(["--stream"] if stream else [])]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for name, argv in (("one", recipe), ("two", [*launcher, *recipe])):
        done = subprocess.run(
            [sys.executable, *argv, "--out", str(tmp_path / name)],
            env=environment(), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("held-out loss") == 1
        extra = read_manifest(tmp_path / name / "model")["provenance"]["extra"]
        assert ("2 processes" in extra["hardware"]) == (name == "two")
    models = [dict(load_model(tmp_path / name).named_parameters()) for name in ("one", "two")]
    assert overlap(*models) >= 0.99
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)

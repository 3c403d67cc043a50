"""Several processes that share a batch train the model that one process trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from accelerate import Accelerator
from distill.artifact import Provenance
from distill.training.sparsity import sparse_parameters
from distill.training.trainer import TrainConfig, train

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))

def objective(tokens, step):
    logits = net(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}

config = TrainConfig(steps=12, batch=4, context=5, kept=0.25, save_every=6)
data = np.random.RandomState(0).randint(9, size=400)
engine = Accelerator(cpu=True)
folder = Path(sys.argv[1])
provenance = Provenance(kind="run", command="test", config={}, seed=0, data=None)
train(net, objective, data, config, folder, sparse=sparse_parameters(net), provenance=provenance, engine=engine)
torch.save(net.state_dict(), folder / f"{engine.process_index}-of-{engine.num_processes}.pt")
"""


def launch(folder: Path, number: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in range(number):
        extra = {**shared, "RANK": rank, "LOCAL_RANK": rank} if number > 1 else {}
        environment = {**os.environ, **{name: str(value) for name, value in extra.items()}}
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        started.append(subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment))
    assert [process.wait(timeout=300) for process in started] == [0] * number


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    launch(tmp_path / "one", 1)
    launch(tmp_path / "two", 2)
    one = torch.load(tmp_path / "one" / "0-of-1.pt")
    for rank in range(2):
        two = torch.load(tmp_path / "two" / f"{rank}-of-2.pt")
        for name, weight in one.items():
            assert torch.equal(weight != 0, two[name] != 0), name
            assert torch.allclose(weight, two[name], rtol=1e-10, atol=1e-12), name

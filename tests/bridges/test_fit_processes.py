"""Two processes, streamed text and stored targets fit what one process fits with the dense model at its side."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from bridges import load_bridged
from distill.data import train_tokenizer

ROOT = Path(__file__).parents[2]
FIT = [str(ROOT / "recipes" / "fit_bridges.py"), "--preset", "tiny", "--student.d-head", "8", "--config.steps", "6",
       "--config.log-every", "1", "--stream", "--bridge.kl-top", "20", "--bridge.initial", "least_squares"]  # fmt: skip


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """texts/ and gpt2/."""
    (tmp_path / "texts").mkdir()
    for i in range(60):
        lines = "\n".join(f"value_{i * j} = call({j}, 'name {i}')" for j in range(20))
        (tmp_path / "texts" / f"{i}.py").write_text(lines + "\n")
    tokenizer = train_tokenizer([path.read_text() for path in sorted((tmp_path / "texts").iterdir())], 300)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path


def test_two_processes_with_stored_targets_equal_one_without(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    common = [*FIT, "--dense", str(place / "gpt2"), "--corpus", str(place / "texts")]
    # An NMSE is normalised within its part of the batch: the two parts of one process are those of two processes.
    runs = {"one": [*common, "--config.accumulate", "2"], "two": [*launcher, *common, "--targets", str(place / "said")]}
    for name, argv in runs.items():
        done = subprocess.run(
            [sys.executable, *argv, "--out", str(place / name)],
            env=environment(), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("held-out loss") == 1 and done.stdout.count("frozen; student") == 1
    lines = [[json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()] for name in runs]
    assert len(lines[0]) == len(lines[1]) == 6
    for one, two in zip(*lines, strict=True):
        for term in ("loss", "ce", "nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d"):
            assert two[term] == pytest.approx(one[term], rel=1e-3)
    (student, bridges, info), (other, _, _) = (load_bridged(place / name) for name in ("two", "one"))
    assert bridges.sites == ("0.resid_in", "0.resid_mid", "final_resid") and student.d_model == other.d_model == 32
    assert set(info.metrics["baselines"]) == {"mean", "least_squares"} and info.metrics["bigram_ce"] > 0
    assert json.loads((place / "said" / "targets.json").read_text())["sites"] == "all"

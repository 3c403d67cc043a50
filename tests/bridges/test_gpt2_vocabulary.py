"""The whole path from a GPT-2 folder with GPT-2's vocabulary of 50,257 to a student with bridges, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bridges import load_bridged

VOCABULARY = 50257
LARGEST = 3 << 30
"""Bytes; a dense table of token pairs alone would take 10 GB."""
RECIPES = Path(__file__).parents[2] / "recipes"
PROGRAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import fit_bridges
status = fit_bridges.main(sys.argv[2:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
raise SystemExit(status)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as transformers saves it, two narrow layers, with a byte-level tokenizer of as many tokens as GPT-2's."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32)).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rare = [f"Ġrare{number}" for number in range(VOCABULARY - len(letters) - 1)]
    names = [*letters, *rare, "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(path)
    return path


def test_a_student_of_a_gpt2_folder_in_bounded_memory(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.py").write_text("".join(f"x{n} = {n * number}\n" for n in range(150)))
    words = ["--dense", str(folder), "--corpus", str(texts), "--out", str(tmp_path / "student"), "--preset", "tiny"]
    words += ["--config.steps", "3", "--config.context", "16", "--student.d-head", "8", "--bridge.kl-top", "64"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(RECIPES), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rsplit("peak", 1)[1]) < LARGEST
    student, _, info = load_bridged(tmp_path / "student")
    assert student.vocab_size == VOCABULARY and student.bigram is None
    assert info.dense.name == str(folder)
    metrics = json.loads((tmp_path / "student" / "bridges.json").read_text())
    assert set(metrics["sites"]) == {"0.resid_in", "0.resid_mid", "1.resid_in", "1.resid_mid", "final_resid"}
    assert all(abs(metrics[name] - 10.8) < 0.5 for name in ("dense_ce", "student_ce"))  # ln 50257, untrained

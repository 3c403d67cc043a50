"""lm-evaluation-harness on a saved model, by the line that the README gives."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill import load_tokenizer
from distill.model import Architecture, SparseTransformer

README = Path(distill.__file__).parent / "formats" / "README.md"
TASK = """task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


def documented_line() -> str:
    (line,) = re.findall(r"^python -c .*lm_eval.*$", README.read_text(), re.MULTILINE)
    return line


def test_there_is_one_line_that_imports_the_package() -> None:
    words = shlex.split(documented_line())
    assert words[:2] == ["python", "-c"] and "import distill" in words[2]
    assert words[words.index("--model_args") + 1] == "pretrained=DIR"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_line_runs_on_a_saved_model(tmp_path: Path) -> None:
    shape = Architecture(vocab_size=2048, context=64, n_layer=1, d_model=16, d_head=4)
    SparseTransformer.build(shape, seed=0).save_pretrained(tmp_path / "model")
    load_tokenizer("sparse").save_pretrained(tmp_path / "model")
    docs = [
        {"text": "for i", "choices": [" in", " out"], "label": 0},
        {"text": "x =", "choices": [" 1", " 2"], "label": 1},
    ]
    (tmp_path / "data.json").write_text("\n".join(json.dumps(doc) for doc in docs))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    line = documented_line().replace("DIR", str(tmp_path / "model")).replace("lambada_openai", "tiny")
    words = [*shlex.split(line)[1:], "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["tiny"]["acc,none"] in (0.0, 0.5, 1.0)

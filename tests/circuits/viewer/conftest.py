"""A page of the planted model, whose tokens try to break out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.circuits import Circuit, PruneConfig, Subject, Task, node_means
from distill.circuits.answers import Calibration
from distill.circuits.task_files import read_lines
from distill.circuits.viewer import ViewConfig, view
from distill.data.tokens import train_tokenizer
from distill.model.transformer import Architecture, SparseTransformer

HOSTILE = "</script><script>window.broken=1</script>"
CONFIG = ViewConfig(pairs=2, judged=4, windows=6, top=2, bottom=1, quantiles=(0.5,), before=3, after=1, exact=0)


@pytest.fixture(scope="session")
def subject() -> Subject:
    """A random model over a byte-level tokenizer in which the hostile text is one token."""
    text = "f('a b')\nf(\"a b\")\nfor item in items:\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=266)
    tokenizer.add_tokens([HOSTILE])
    model = SparseTransformer.build(
        Architecture(vocab_size=len(tokenizer), context=32, n_layer=2, d_model=8, d_head=4, topk_fraction=0.5), seed=0
    ).eval()
    ids = tokenizer(f"{text}{HOSTILE}").input_ids
    hostile = tokenizer.convert_tokens_to_ids(HOSTILE)
    rows = [ids[start : start + 24] + [hostile] for start in range(0, 192, 24)]
    sample = torch.tensor(rows).repeat_interleave(2, 0)
    sample[:, 5] = hostile
    means = node_means(model, sample[:, :-1])
    return Subject(name="tiny", model=model, tokenizer=tokenizer, sample=sample, means=means)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "quotes.jsonl"
    lines = [
        f'{{"clean": "f(\'{word}{end}", "corrupt": "f(\\"{word}{end}", "answer": "\')", "other": "\\")", '
        f'"split": "{split}"}}'
        for split, end in (("train", " i"), ("val", " o"), ("test", ""))
        for word in ("a", "b", "a b", "item", HOSTILE)
    ]
    path.write_text("\n".join(lines) + "\n")
    return read_lines(path)


def every(model: SparseTransformer, share: float, seed: int = 0) -> dict[str, Tensor]:
    """A random share of the nodes of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(width, generator=generator) < share for name, width in model.widths.items()}


@pytest.fixture(scope="session")
def make_circuit(subject: Subject, task: Task) -> Callable[..., Circuit]:
    def make(share: float = 0.5, target: float = 0.15) -> Circuit:
        return Circuit(
            model=subject.model.fingerprint(),
            model_name=subject.name,
            task=task.name,
            nodes=every(subject.model, share),
            scores={name: torch.zeros(width) for name, width in subject.model.widths.items()},
            means=subject.means,
            calibration=Calibration(),
            losses={"full": 0.1, "circuit": 0.2},
            target=target,
            provenance={"config": vars(PruneConfig()), "note": HOSTILE},
        )

    return make


@pytest.fixture(scope="session")
def one_view(subject: Subject, task: Task, make_circuit: Callable[..., Circuit]) -> dict[str, Any]:
    """A curve of two circuits, the smaller one within the larger, with a scorecard and a label."""
    card = {
        "verdict": f"suspicious because {HOSTILE}",
        "checks": [
            {"name": "shift", "value": 0.5, "control": None, "threshold": 0.9, "verdict": "flag", "reason": HOSTILE}
        ],
    }
    circuits = [make_circuit(0.5, 0.15), make_circuit(0.25, 0.5)]
    first = circuits[0].node_names[0]
    return view(subject, circuits, task, scorecard=card, labels={first: HOSTILE}, file="quotes.tiny", config=CONFIG)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")

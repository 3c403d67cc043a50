"""The whole path on a model that someone else trained, with every claim held to all 729 inputs that it can be given.

gpt-nano-sort (see recipes/OTHERS.md) reads six letters out of A, B, C and writes them sorted.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from transformers import GPT2LMHeadModel

from bridges import BridgeConfig, StudentConfig, bridge_metrics, fit_bridges, load_bridged
from bridges.interchange import interchange
from bridges.steering import NODE, rank_reads, steer
from distill import (
    Circuit,
    PruneConfig,
    SparseTransformer,
    Subject,
    TrainConfig,
    encode,
    load_subject,
    load_task,
    prune,
)
from distill.circuits import MaskTap, all_nodes
from distill.circuits.answers import answer_difference
from distill.circuits.faithfulness.necessity import without
from distill.circuits.tasks import Task
from distill.data import prepare, save_sample
from distill.model import Tap, residual_sites

CHECKPOINT = Path(__file__).parents[3] / "shared" / "checkpoints" / "gpt-nano-sort"
pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="the checkpoint gpt-nano-sort is not there")

PLACE, RIGHT, WRONG = 2, 0, 1
"""The task: is the third letter of the answer an A or a B, in other words, are there three As or two?"""
INPUTS = ["".join(letters) for letters in product("ABC", repeat=6)]
ROWS = [text + "".join(sorted(text)) for text in INPUTS]


@dataclass(frozen=True)
class Sorter:
    """The model with its input space, the task, and a circuit of it."""

    folder: Path
    subject: Subject
    task: Task
    circuit: Circuit

    @property
    def rows(self) -> Tensor:
        """Every input and its answer, (729, 12)."""
        return self.subject.sample

    def difference(self, tap: Tap | None) -> Tensor:
        """Of every input whose third letter is one of the two, logit of the right one minus that of the other."""
        with torch.no_grad():
            logits = self.subject.model.run(self.rows[:, : 6 + PLACE], tap=tap)[:, -1]
        sign = (self.rows[:, 6 + PLACE] == RIGHT).float() * 2 - 1
        among = (self.rows[:, 6 + PLACE] == RIGHT) | (self.rows[:, 6 + PLACE] == WRONG)
        return ((logits[:, RIGHT] - logits[:, WRONG]) * sign)[among]

    def accuracy(self, tap: Tap | None) -> float:
        """Of these inputs, mean over the two classes."""
        right = self.difference(tap) > 0
        third = self.rows[:, 6 + PLACE]
        classes = third[(third == RIGHT) | (third == WRONG)]
        return sum(float(right[classes == one].float().mean()) for one in (RIGHT, WRONG)) / 2


def pairs() -> Iterator[dict[str, str]]:
    """Every pair of inputs that differ in one letter, an A or a B, which decides the third letter of the answer."""
    for text in INPUTS:
        for at in range(6):
            other = text[:at] + "B" + text[at + 1 :]
            if text[at] == "A" and (sorted(text)[PLACE], sorted(other)[PLACE]) == ("A", "B"):
                yield {"clean": text + "AA", "corrupt": other + "AA", "answer": "A", "other": "B"}


@pytest.fixture(scope="module")
def sorter(tmp_path_factory: pytest.TempPathFactory) -> Sorter:
    place = tmp_path_factory.mktemp("sort")
    folder = place / "gpt-nano-sort"
    shutil.copytree(CHECKPOINT, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    ids = torch.tensor([["ABC".index(letter) for letter in row] for row in ROWS])
    save_sample(folder, ids, vocab_size=3)
    (place / "sort.txt").write_text("\n".join(ROWS))
    (place / "third.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    subject, task = load_subject(folder), load_task(place / "third.jsonl")
    config = PruneConfig(steps=40, clean_up=40, edge_clean_up=10)
    circuit = prune(subject.model, task, subject.tokenizer, subject.means, config)
    return Sorter(folder=folder, subject=subject, task=task, circuit=circuit)


def test_the_one_run_is_the_model_on_every_input(sorter: Sorter) -> None:
    model, inputs = sorter.subject.model, sorter.rows[:, :-1]
    theirs = GPT2LMHeadModel.from_pretrained(CHECKPOINT).eval()
    with torch.no_grad():
        logits = model.run(inputs)
        torch.testing.assert_close(logits, theirs(inputs).logits, rtol=1e-5, atol=1e-5)
        for site in residual_sites(model.n_layer):
            residual = model.run(inputs, stop=site)
            torch.testing.assert_close(model.run(inputs, start=site, residual=residual), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[:, 5:].argmax(-1), sorter.rows[:, 6:])


def test_the_means_are_those_of_every_input(sorter: Sorter) -> None:
    means, found = sorter.subject.means, {}
    assert means.per_position and means.tokens == 729 * 11

    def tap(site: str, x: Tensor) -> Tensor:
        found[site] = x
        return x

    with torch.no_grad():
        sorter.subject.model.run(sorter.rows[:, :-1], tap=tap)
    for location in sorter.subject.model.widths:
        torch.testing.assert_close(means.values[location], found[location].mean(0), rtol=1e-4, atol=1e-5)


def test_the_circuit_on_every_input(sorter: Sorter) -> None:
    model, circuit = sorter.subject.model, sorter.circuit
    assert circuit.n_nodes < 600 and sorter.accuracy(None) == 1
    assert len(sorter.difference(None)) == 656  # 473 with three As and more, 183 with fewer and a B in third place
    assert sorter.accuracy(circuit.tap(model)) > 0.98
    assert sorter.accuracy(without(circuit.nodes, circuit.means)) <= 0.75
    assert sorter.accuracy(MaskTap(all_nodes(model.widths, keep=False), circuit.means)) == 0.5
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        drawn = {
            location: torch.zeros_like(kept).index_fill(
                0, torch.randperm(len(kept), generator=generator)[: int(kept.sum())], True
            )
            for location, kept in circuit.nodes.items()
        }
        assert sorter.accuracy(MaskTap(drawn, circuit.means)) <= 0.75


def test_sampled_loss_against_the_truth(sorter: Sorter) -> None:
    model, circuit = sorter.subject.model, sorter.circuit
    position = {text: number for number, text in enumerate(INPUTS)}
    with torch.no_grad():
        logits = model.run(sorter.rows[:, : 6 + PLACE], tap=circuit.tap(model))[:, -1]
    d = (logits[:, RIGHT] - logits[:, WRONG]).double()
    truth = [
        (softplus(-d[position[pair["clean"][:6]]]) + softplus(d[position[pair["corrupt"][:6]]])) / 2 for pair in pairs()
    ]
    assert len(truth) == 480
    sampled = []
    for split in ("train", "val", "test"):
        n = sorter.task.size(split)
        batch = encode(sorter.task, sorter.subject.tokenizer, split, n, 0, context=model.context)
        with torch.no_grad():
            each = softplus(-answer_difference(model, batch, circuit.tap(model)).double())
        sampled.append(each.reshape(2, -1).mean(0))
    every, whole = torch.cat(sampled), torch.stack(truth)
    torch.testing.assert_close(every.sort().values, whole.sort().values, rtol=1e-4, atol=1e-5)
    test = sampled[-1]
    error = float(test.std()) / len(test) ** 0.5
    assert abs(float(test.mean() - whole.mean())) < 3 * error
    assert float(whole.mean()) < circuit.target


def test_a_student_with_bridges(sorter: Sorter, tmp_path: Path) -> None:
    dense, tokenizer = sorter.subject.model, sorter.subject.tokenizer
    data = prepare([f"lines:{sorter.folder.parent / 'sort.txt'}"], tmp_path / "tokens", tokenizer=tokenizer)
    both = [*data.train.tolist(), *data.heldout.tolist()]
    assert sorted(both) == sorted(sorter.rows.tolist()) and len(data.heldout) > 20
    shape = StudentConfig(d_model=32, d_head=8).architecture(dense)
    done = fit_bridges(
        dense,
        SparseTransformer.build(shape, seed=0),
        data,
        BridgeConfig(),
        TrainConfig(context=11, batch=24, steps=30, kept=0.5, learning_rate=0.04, log_every=5, eval_every=0),
        tmp_path / "run",
        dense_name=str(sorter.folder),
        tokenizer=tokenizer,
        judged=8,
    )
    losses = [line["loss"] for line in done.history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    student, bridges, _ = load_bridged(tmp_path / "run")
    inputs, site = sorter.rows[:, :-1], "1.resid_mid"
    metrics = bridge_metrics(dense, student, bridges, sorter.rows, batch=100)
    with torch.no_grad():
        encoded = bridges.encode(site, dense.run(inputs, stop=site))
        crossed = student.run(inputs, start=site, residual=encoded)
    expected = cross_entropy(crossed.flatten(0, 1), sorter.rows[:, 1:].flatten())
    assert metrics["sites"][site]["hybrid_ce_d2s"] == pytest.approx(float(expected), rel=1e-4)
    batch = encode(sorter.task, tokenizer, "test", sorter.task.size("test"), 0, aligned=True)
    every = {site: torch.ones(32, dtype=torch.bool) for site in residual_sites(3)}
    found = interchange(dense, student, bridges, batch, every)
    assert found.accuracy == 1 and found.skipped == 0
    assert all(site.effect == pytest.approx(site.ceiling) for site in found.sites)
    nodes = rank_reads(student, batch)[:4]
    steered = steer(dense, student, bridges, batch, nodes, (0.0, 1.0), controls=1)
    with torch.no_grad():
        own = dense.run(batch.tokens)[torch.arange(len(batch)), batch.last].softmax(-1)
    other = own[torch.arange(len(batch)), batch.other].double().mean()
    assert steered.probability[NODE][0][0] == pytest.approx(float(other), rel=1e-3)

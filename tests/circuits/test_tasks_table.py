"""What a model makes of the tasks: estimates with intervals, the empty model, the table, and pairs to look at."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.circuits import Subject, node_means
from distill.circuits.task_document import listing, pairs_shown
from distill.circuits.task_table import (
    accuracy,
    empty_difference,
    evaluate,
    evaluate_all,
    loss,
    needs_circuit,
    summary,
    table,
)
from distill.circuits.tasks import Task, encode, load_task
from distill.model.transformer import Architecture, SparseTransformer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


def brackets(folder: Path) -> Task:
    """Close the bracket that stands last: what comes before it says nothing."""
    path = folder / "brackets.jsonl"
    lines = [
        {"clean": f"{'x' * (i // 6)}{chr(97 + i)}(", "corrupt": f"{'x' * (i // 6)}{chr(97 + i)}[", "answer": ")",
         "other": "]", "split": split}
        for i in range(12) for split in (("train", "test", "shift")[i % 3],)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    return load_task(path)


@torch.no_grad()
def subject(bigram: dict[tuple[str, str], float]) -> Subject:
    """A model that says what its bigram table says, and nothing else."""
    torch.manual_seed(0)
    plan = Architecture(
        vocab_size=len(ALPHABET), context=16, n_layer=1, d_model=8, d_head=8, n_head=1, d_mlp=8, bigram=True
    )
    model = SparseTransformer.build(plan).eval()
    model.unembed.weight.zero_()
    assert model.bigram is not None
    model.bigram.zero_()
    for (last, then), value in bigram.items():
        model.bigram[ALPHABET.index(last), ALPHABET.index(then)] = value
    windows = torch.randint(0, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    means = node_means(model, windows)
    return Subject(name="hand", model=model, tokenizer=byte_tokenizer(), sample=windows, means=means)


def test_accuracy_by_hand_with_the_interval_of_wilson() -> None:
    difference = torch.tensor([1.0] * 18 + [-1.0] * 2).repeat(2)  # both members of a pair fall alike
    found = accuracy(difference)
    expected = stats.binomtest(18, 20).proportion_ci(method="wilson")
    assert found.mean == pytest.approx(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert accuracy(torch.zeros(8)).mean == 0.5  # equal logits: a guess
    all_right = accuracy(torch.ones(400))
    assert all_right.mean == all_right.high == 1.0 and 0.97 < all_right.low < 0.99


def test_loss_by_hand() -> None:
    found = loss(torch.zeros(20))
    assert found.record() == pytest.approx({"mean": math.log(2), "low": math.log(2), "high": math.log(2)})
    assert loss(torch.tensor([2.0, -1.0])).mean == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2)


def test_the_interval_of_the_loss_is_that_of_independent_pairs() -> None:
    """Members that fall alike count once: the interval is the one of n pairs, not of 2n prompts."""
    difference = torch.from_numpy(np.random.default_rng(1).normal(0, 1, 400))
    each = torch.nn.functional.softplus(-difference)
    error = float(each.std()) / math.sqrt(400)
    found = loss(difference.repeat(2))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert loss(difference.repeat(2)) == found


@settings(deadline=None, max_examples=15)
@given(values=st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_intervals_hold_the_mean(values: list[float]) -> None:
    difference = torch.tensor(values).repeat(2)
    for found in (accuracy(difference), loss(difference)):
        assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
        assert found.low >= 0


def test_the_empty_model_is_embeddings_and_bigram_table(tmp_path: Path) -> None:
    one, task = subject({("(", ")"): 3.0, ("[", "]"): 1.0}), brackets(tmp_path)
    batch = encode(task, one.tokenizer, "test", 4, seed=0)
    expected = torch.where(batch.labels == 0, 3.0, 1.0).double()
    torch.testing.assert_close(empty_difference(one.model, batch, one.means), expected)


def test_a_task_of_the_bigram_table_needs_no_circuit(tmp_path: Path) -> None:
    record = evaluate(subject({("(", ")"): 5.0, ("[", "]"): 5.0}), brackets(tmp_path), pairs=4)
    assert record["fits"] and record["spelling"] == 0 and not record["needs_circuit"]
    row = record["splits"]["test"]
    assert row["empty"] == pytest.approx(math.log1p(math.exp(-5)), abs=1e-6)
    assert row["loss"]["mean"] == pytest.approx(row["empty"], abs=1e-6)  # the model is its table
    assert (row["pairs"], row["dropped"], row["longest"], row["aligned"]) == (4, 0, 3, 1.0)
    assert row["accuracy"]["mean"] == 1.0
    assert list(record["splits"]) == ["train", "test", "shift"]


def test_a_leaning_table_is_seen_through(tmp_path: Path) -> None:
    """It says `]` always, but more so after `[`: over chance as it is, next to nothing once the lean is taken off."""
    record = evaluate(subject({("(", "]"): 8.0, ("[", "]"): 20.0}), brackets(tmp_path), pairs=4)
    row = record["splits"]["test"]
    assert row["empty"] == pytest.approx(4.0, abs=1e-3)
    assert row["empty_calibrated"] < 0.5 and not record["needs_circuit"]


def test_a_model_that_says_nothing_is_at_chance(tmp_path: Path) -> None:
    record = evaluate(subject({}), brackets(tmp_path), pairs=4)
    assert record["needs_circuit"]
    assert record["splits"]["test"]["loss"]["mean"] == pytest.approx(math.log(2))
    assert record["chance"] == {"accuracy": 0.5, "loss": pytest.approx(math.log(2))}


def test_without_a_test_or_train_split_the_last_one_decides() -> None:
    splits: dict[str, Any] = {"val": {"empty": 0.2, "empty_calibrated": None}}
    assert not needs_circuit({"splits": splits})
    assert needs_circuit({"splits": {**splits, "shift": {"empty": 0.9, "empty_calibrated": 0.6}}})


def test_a_misfit_is_a_row_with_its_reason(tmp_path: Path) -> None:
    one, task = subject({("(", ")"): 5.0, ("[", "]"): 5.0}), brackets(tmp_path)
    record = evaluate_all(one, [task, load_task("for_while")], pairs=4)
    assert [entry["fits"] for entry in record["tasks"]] == [True, False]
    assert "a prompt has" in record["tasks"][1]["reason"] and "the model's context allows 16" in table(record)
    lines = table(record).splitlines()
    assert lines[0] == "Tasks of hand. Chance: accuracy 0.500, loss 0.693 nats; [95% intervals over pairs]."
    assert lines[5].startswith(
        "| brackets * | yes | train | 4 | 3 | 1.000 [0.510, 1.000] | 0.007 [0.007, 0.007] | 0.007 /"
    )
    assert lines[6].startswith("|  |  | test | 4 | ")
    assert len({line.count("|") for line in lines[3:]}) == 1
    assert table(record, ["shift"]).splitlines()[5].startswith("| brackets * | yes | shift | 4 |")
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_models_side_by_side(tmp_path: Path) -> None:
    does: dict[str, Any] = {"loss": {"mean": 0.1}, "accuracy": {"mean": 0.97}}
    fails: dict[str, Any] = {"loss": {"mean": 0.4}, "accuracy": {"mean": 0.8}}

    def row(task: str, needs: bool, splits: dict[str, Any]) -> dict[str, Any]:
        return {"task": task, "fits": True, "needs_circuit": needs, "splits": splits}

    misfit = {"task": "c", "fits": False, "reason": "too long", "splits": {}}
    one = {"model": "m", "tasks": [row("a", True, {"test": does}), row("b", False, {"test": does}), misfit]}
    two = {"model": "n", "tasks": [row("a", True, {"test": fails}), row("b", True, {"val": does}), misfit]}
    assert summary([one, two]).splitlines()[2:] == [
        "| task | m | n |",
        "|---|---|---|",
        "| a | **0.100 (0.97)** | 0.400 (0.80) |",
        "| b * | **0.100 (0.97)** | no test split |",
        "| c | does not fit | does not fit |",
        "| below 0.15, needing a circuit | 1 | 0 |",
    ]


def test_pairs_are_shown_with_the_boundaries_of_their_tokens(tmp_path: Path) -> None:
    task = brackets(tmp_path)
    shown = pairs_shown(task, byte_tokenizer(), 99, seed=0).splitlines()
    assert len(shown) == 1 + 2 * 4  # as many as there are
    assert shown[0] == "brackets, test: ')' or ']'"
    assert {"  clean    b|(  ->  [)] not []]", "  corrupt  b|[  ->  []] not [)]"} & {
        line.replace("x|", "") for line in shown
    }
    newline = pairs_shown(load_task("else_elif"), byte_tokenizer(), 1, seed=0)
    assert "|:|↵| " in newline and newline.count("\n") == 2
    assert pairs_shown(task, byte_tokenizer(), 1, seed=0, split="val").startswith("brackets, shift:")


def test_the_list_tells_what_each_split_holds(tmp_path: Path) -> None:
    lines = listing([load_task("ioi"), brackets(tmp_path)]).splitlines()
    assert lines[0].startswith("ioi       the name that stands once")
    assert lines[0].endswith("pairs; answers vary by pair)")
    assert lines[1] == "brackets  ')' or ']'. own task of brackets.jsonl (train 4 test 4 shift 4 pairs)"

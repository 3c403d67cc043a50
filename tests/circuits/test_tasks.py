"""The task suite: its data, the drawing of pairs, and the answer token found by hand."""

import argparse
import ast
import dataclasses
import inspect
import json
import math
import textwrap
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.circuits.tasks import Family, Task, encode, load_task, logit_difference, task_loss, task_names
from distill.data.tokens import train_tokenizer

NAMES = [
    "bracket_counting",
    "class_init",
    "for_while",
    "if_equals",
    "lambda_func",
    "set_or_string",
    "single_double_quote",
    "while_return_true",
]
SPLITS = ["train", "val", "test", "shift"]
# What turns prompt + completion into whole statements, by class.
ENDINGS = {
    "bracket_counting": ("", ""),
    "class_init": ("\n", "\n"),
    "for_while": ("x:\n{indent}    pass\n", "{indent}    pass\n"),
    "if_equals": ("x:\n{indent}    pass\n", "x\n"),
    "lambda_func": ("x\n", "):\n{indent}    pass\n"),
    "while_return_true": ("{indent}    pass\n", ""),
    "set_or_string": ("x)\n", " x\n"),
    "single_double_quote": ("", ""),
}


def byte_tokenizer(
    *merges: tuple[str, str], pad: str | None = None, split: str | None = None
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, plus exactly these merges, across all text that `split` leaves whole."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    model = models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=list(merges))
    tokenizer = Tokenizer(model)
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token=pad)


def data_of(name: str) -> dict:
    return json.loads((resources.files("distill.circuits") / "task_data" / f"{name}.json").read_text())


def own_task(folder: Path, *lines: object) -> Task:
    path = folder / "own.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return load_task(path)


def line(clean: str = "a(", corrupt: str = "a[", answer: str = ")", other: str = "]", **more: object) -> dict:
    return {"clean": clean, "corrupt": corrupt, "answer": answer, "other": other, **more}


def test_the_suite_has_the_five_tasks() -> None:
    assert task_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_family_template_or_filler(name: str) -> None:
    data = data_of(name)
    assert list(data["splits"]) == SPLITS
    assert data["name"] == name
    assert sum(len(content["families"]) for content in data["splits"].values()) >= 3
    for one, two in combinations(data["splits"].values(), 2):
        assert not one["families"].keys() & two["families"].keys()
        templates = [{"\n".join(lines) for lines in split["families"].values()} for split in (one, two)]
        assert not templates[0] & templates[1]
        fillers = [{entry for entries in split["fillers"].values() for entry in entries} for split in (one, two)]
        assert not fillers[0] & fillers[1]


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_stands_in_one_list_of_a_split(name: str) -> None:
    for content in data_of(name)["splits"].values():
        entries = [entry for listed in content["fillers"].values() for entry in listed]
        assert len(entries) == len(set(entries))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_200_different_pairs_that_differ_in_one_place(name: str, split: str) -> None:
    task = load_task(name)
    pairs = task.pairs(split, 200, seed=0)
    assert len({frozenset((pair.clean, pair.corrupt)) for pair in pairs}) == 200
    for pair in pairs:
        first, second = (pair.clean, pair.corrupt) if pair.label == 0 else (pair.corrupt, pair.clean)
        parts = [*data_of(name)["parts"].values()]
        if name == "class_init":
            by_class = (pair.answer, pair.other) if pair.label == 0 else (pair.other, pair.answer)
            parts = [[text.strip() for text in by_class]]
        assert any(
            first[:at] + b + first[at + len(a) :] == second
            for a, b in parts
            for at in range(len(first) + 1)
            if first.startswith(a, at)
        ), (first, second)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_completed_pairs_are_python(name: str, split: str) -> None:
    for pair in load_task(name).pairs(split, 60, seed=1):
        for text, completion, label in (
            (pair.clean, pair.answer, pair.label),
            (pair.corrupt, pair.other, 1 - pair.label),
        ):
            last_line = text.rsplit("\n", 1)[-1]
            indent = last_line[: len(last_line) - len(last_line.lstrip())]
            whole = text + completion + ENDINGS[name][label].format(indent=indent)
            ast.parse(textwrap.dedent(whole))


@pytest.mark.parametrize("name", NAMES)
def test_each_class_is_clean_in_half_the_pairs(name: str) -> None:
    pairs = load_task(name).pairs("test", 100, seed=3)
    assert sum(pair.label for pair in pairs) == 50
    task = load_task(name)
    families = task.splits["test"]
    assert {family.name for family in families if isinstance(family, Family)} == {
        *data_of(name)["splits"]["test"]["families"]
    }
    if task.oriented:
        completions = data_of(name)["completions"]
        assert all(
            (pair.answer, pair.other) == (completions[pair.label], completions[1 - pair.label]) for pair in pairs
        )


def test_draws_depend_on_split_and_seed_alone_and_grow_from_the_front() -> None:
    task = load_task("for_while")
    assert task.pairs("train", 40, seed=5) == task.pairs("train", 40, seed=5)
    assert task.pairs("train", 90, seed=5)[:40] == task.pairs("train", 40, seed=5)
    assert task.pairs("train", 40, seed=5) != task.pairs("train", 40, seed=6)


def test_a_whole_split_can_be_drawn_without_repeats() -> None:
    task = load_task("for_while")
    held = task.size("val")
    assert len({(p.clean, p.corrupt) for p in task.pairs("val", held, 0)}) == held
    with pytest.raises(
        ValueError, match=rf"n: {held + 1} pairs asked of split 'val'.*'for_while'; it holds 1 to {held}"
    ):
        task.pairs("val", held + 1, seed=0)
    with pytest.raises(ValueError, match="n: 0 pairs"):
        encode(task, byte_tokenizer(), "val", 0, 0)


def test_a_family_counts_and_writes_its_pairs_by_hand() -> None:
    family = Family(
        name="hand",
        text="$open$n1, $n2",
        part="open",
        variants=("[", "[["),
        completions=("]", "]]"),
        fillers={"n": ("1", "2", "3"), "unused": ("x",)},
    )
    assert family.slots == ("n1", "n2")
    assert family.size == 3 * 2  # two slots of one list never hold the same entry
    assert [family.at(index).clean for index in range(6)] == ["[1, 2", "[2, 1", "[3, 1", "[1, 3", "[2, 3", "[3, 2"]
    assert family.at(0).corrupt == "[[1, 2"
    assert family.at(0).turned().label == 1


def test_unknown_names_and_splits() -> None:
    with pytest.raises(ValueError, match="unknown task 'quotes'; known: bracket_counting, class_init"):
        load_task("quotes")
    with pytest.raises(ValueError, match="no pairs in 'dev'; splits with pairs: train, val, test, shift"):
        load_task("for_while").pairs("dev", 1, seed=0)
    with pytest.raises(ValueError, match=r"no such file: missing\.jsonl"):
        load_task("missing.jsonl")


def test_encode_by_hand(tmp_path: Path) -> None:
    """`]` and `]]` before a new line: told apart at once where `]Ċ` is a token, one token later where it is not."""
    task = own_task(tmp_path, line("[a", "[[a", "]\n", "]]\n", split="test"))
    merged, plain = byte_tokenizer(("]", "Ċ")), byte_tokenizer()
    ids = merged.convert_tokens_to_ids
    batch = encode(task, merged, "test", 1, seed=0)
    assert batch.tokens.tolist() == [[ids("["), ids("a"), 0], [ids("["), ids("["), ids("a")]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.last.tolist() == [1, 2]
    assert batch.answer.tolist() == [ids("]Ċ"), ids("]")]
    assert batch.other.tolist() == [ids("]"), ids("]Ċ")]
    assert batch.labels.tolist() == [0, 1]
    assert batch.orientation.tolist() == [1.0, -1.0]
    assert batch.dropped == 0

    batch = encode(task, plain, "test", 1, seed=0)  # the shared `]` joins the prompt
    assert batch.tokens.tolist() == [[ids("["), ids("a"), ids("]"), 0], [ids("["), ids("["), ids("a"), ids("]")]]
    assert batch.answer.tolist() == [ids("Ċ"), ids("]")]


@pytest.mark.parametrize("name", NAMES)
def test_encoded_rows_decode_to_their_pairs(name: str) -> None:
    task, tokenizer, n = load_task(name), byte_tokenizer(), 16
    pairs, batch = task.pairs("test", n, seed=2), encode(task, tokenizer, "test", n, seed=2)
    assert len(batch) == 2 * n
    assert torch.equal(batch.answer[:n], batch.other[n:])
    assert torch.equal(batch.other[:n], batch.answer[n:])
    assert torch.equal(batch.labels[:n], 1 - batch.labels[n:])
    assert batch.labels[:n].tolist() == [pair.label for pair in pairs]
    assert torch.equal(batch.last + 1, batch.attention_mask.sum(1))
    expected = (1.0 - 2.0 * batch.labels) if task.oriented else torch.zeros(2 * n)
    assert torch.equal(batch.orientation, expected)
    assert task.oriented == (name != "class_init")
    for row, text, right, wrong in [
        *((row, pair.clean, pair.answer, pair.other) for row, pair in enumerate(pairs)),
        *((row + n, pair.corrupt, pair.other, pair.answer) for row, pair in enumerate(pairs)),
    ]:
        prompt = str(tokenizer.decode(batch.tokens[row, : int(batch.last[row]) + 1]))
        assert prompt.startswith(text)
        assert (text + right).startswith(prompt + str(tokenizer.decode([int(batch.answer[row])])))
        assert (text + wrong).startswith(prompt + str(tokenizer.decode([int(batch.other[row])])))
        assert batch.answer[row] != batch.other[row]


def test_padding_is_the_pad_token_where_there_is_one(tmp_path: Path) -> None:
    task = own_task(tmp_path, line("a", "[a", split="val"))
    tokenizer = byte_tokenizer(pad="!")
    assert encode(task, tokenizer, "val", 1, 0).tokens[0].tolist() == tokenizer.convert_tokens_to_ids(["a", "!"])


def test_answers_that_one_token_cannot_tell_apart(tmp_path: Path) -> None:
    task = own_task(tmp_path, line("a", "b", ")", "))", split="test"))
    with pytest.raises(ValueError) as error:
        encode(task, byte_tokenizer(), "test", 1, seed=0)
    expected = "task 'own' does not fit this tokenizer: the answers ')' and '))' after 'a' cannot be told apart"
    assert str(error.value) == f"{expected} by one token (tokens [')'] and [')', ')'])"


def test_answers_that_straddle_the_end_of_the_prompt(tmp_path: Path) -> None:
    task = own_task(tmp_path, line("a", "b", ")", "]", split="test"))
    with pytest.raises(ValueError, match=r"the answer '\]' straddles the end of the prompt 'a' \(tokens \['a\]'\]\)"):
        encode(task, byte_tokenizer(("a", "]")), "test", 1, seed=0)


def test_answers_whose_tokens_depend_on_the_text(tmp_path: Path) -> None:
    """Digits are split in threes: after `12` the answer `345` begins with `3`, after `ab` with the token `34`."""
    task = own_task(tmp_path, line("12", "ab", "345", "x", split="test"))
    with pytest.raises(ValueError, match="the answer tokens after '12' are not those after 'ab'"):
        encode(task, byte_tokenizer(("3", "4"), split=r"\p{N}{1,3}"), "test", 1, seed=0)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer([inspect.getsource(module) for module in (argparse, ast, inspect, textwrap)], 1024)


@pytest.mark.parametrize("name", NAMES)
def test_the_suite_fits_a_tokenizer_of_its_kind_of_code(name: str, trained: PreTrainedTokenizerFast) -> None:
    task = load_task(name)
    for split in SPLITS:
        batch = encode(task, trained, split, 200, seed=0, context=64)
        assert batch.dropped <= 20
        if task.oriented:
            of_first = batch.answer[batch.labels == 0]
            assert (of_first == of_first[0]).all()


def test_misfits_of_a_built_in_task_are_replaced_and_counted() -> None:
    """With `e:` one token, every loop variable that ends in e straddles; the rest of the split still fits."""
    task, tokenizer = load_task("for_while"), byte_tokenizer(("e", ":"))
    batch = encode(task, tokenizer, "train", 100, seed=0)
    assert batch.dropped > 0
    assert len(batch) == 200
    assert batch.labels[:100].sum() == 50
    ends = batch.tokens[torch.arange(200), batch.last]
    assert tokenizer.convert_tokens_to_ids("e") not in ends.tolist()
    rows = [tuple(row) for row in batch.tokens.tolist()]
    assert len(set(rows)) == 200


def test_a_built_in_task_that_does_not_fit_says_so_with_an_example() -> None:
    tokenizer = byte_tokenizer(*((chr(letter), ":") for letter in range(ord("a"), ord("z") + 1)))
    with pytest.raises(ValueError, match=r"'for_while' does not fit this tokenizer: 0 of \d+ pairs of split 'val' fit"):
        encode(load_task("for_while"), tokenizer, "val", 8, seed=0)


def test_a_prompt_longer_than_the_context() -> None:
    task, tokenizer = load_task("for_while"), byte_tokenizer()
    longest = encode(task, tokenizer, "val", 8, seed=0).tokens.shape[1]
    assert encode(task, tokenizer, "val", 8, seed=0, context=longest).tokens.shape[1] == longest
    with pytest.raises(ValueError, match=f"'for_while': a prompt has {longest} tokens; .* allows {longest - 1}"):
        encode(task, tokenizer, "val", 8, seed=0, context=longest - 1)


def test_own_pairs_keep_their_direction_and_orientation_needs_two_completions(tmp_path: Path) -> None:
    task = own_task(tmp_path, line(), line("b(", "b["), line("c[", "c(", "]", ")"), line("d(", "d[", split="shift"))
    assert task.own and task.oriented
    assert task.size("train") == 2 and task.size("val") == 1 and task.size("shift") == 1
    drawn = [pair for split in ("train", "val", "shift") for pair in task.pairs(split, task.size(split), seed=0)]
    assert {(pair.clean, pair.label) for pair in drawn} == {("a(", 0), ("b(", 0), ("c[", 1), ("d(", 0)}
    varied = own_task(tmp_path, line(), line("b{", "b[", "}", "]"))
    assert not varied.oriented
    assert encode(varied, byte_tokenizer(), "train", 1, seed=0).orientation.tolist() == [0.0, 0.0]
    assert varied.fingerprint != task.fingerprint
    with pytest.raises(ValueError, match="'own' has no pairs in 'test'; splits with pairs: train, val"):
        varied.pairs("test", 1, seed=0)


def test_the_deal_of_lines_without_a_split_does_not_depend_on_their_order(tmp_path: Path) -> None:
    lines = [line(f"{letter}(", f"{letter}[") for letter in "abcdefgh"]
    forward, backward = own_task(tmp_path, *lines), own_task(tmp_path, *reversed(lines))
    for split, size in (("train", 4), ("val", 2), ("test", 2)):
        assert {*forward.pairs(split, size, seed=0)} == {*backward.pairs(split, size, seed=0)}


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be a JSON object, got list"),
        ({"clean": "a(", "corrupt": "a[", "answer": ")"}, "line 2: field 'other' must be a text .* got None"),
        (line(clean=""), "line 2: field 'clean' must be a text that is not empty, got ''"),
        ({**line(), "answer": 3}, "line 2: field 'answer' must be a text .* got 3"),
        (line(corrupt="a("), r"line 2: field 'corrupt' equals 'clean': 'a\('"),
        (line(other=")"), "line 2: field 'other' equals 'answer'"),
        (line(split="dev"), "line 2: field 'split' is 'dev'; allowed: train, val, test, shift"),
        (line(splt="val"), "line 2: unknown field 'splt'; allowed: clean"),
        (line("x[", "x(", "]", ")"), "line 2: field 'clean' repeats the pair of line 1"),
    ],
)
def test_faults_of_an_own_file_name_file_line_and_field(tmp_path: Path, faulty: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"own\.jsonl, {message}") as error:
        own_task(tmp_path, line("x(", "x["), faulty)
    assert "\n" not in str(error.value)


def test_an_own_file_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"own\.jsonl: no pairs; one JSON object per line"):
        own_task(tmp_path, "", "  ")


def test_loss_and_difference_by_hand(tmp_path: Path) -> None:
    batch = encode(own_task(tmp_path, line(split="test")), byte_tokenizer(), "test", 1, seed=0)
    logits = torch.zeros(2, 300)
    assert task_loss(logits, batch).tolist() == pytest.approx([math.log(2)] * 2)  # chance
    logits[0, batch.answer[0]] = 3.0
    logits[0, batch.other[0]] = 1.0
    logits[1, batch.other[1]] = 1.0
    assert logit_difference(logits, batch).tolist() == [2.0, -1.0]
    expected = [-math.log(math.exp(3) / (math.exp(3) + math.e)), -math.log(1 / (1 + math.e))]
    assert task_loss(logits, batch).tolist() == pytest.approx(expected)


def test_select_and_to_act_on_every_tensor() -> None:
    batch = encode(load_task("class_init"), byte_tokenizer(), "train", 6, seed=0)
    rows = torch.tensor([7, 0])
    chosen = batch.select(rows)
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(chosen, field.name), value[rows])
            assert getattr(batch.to("meta"), field.name).device.type == "meta"
    assert len(batch.select(slice(0, 6))) == 6

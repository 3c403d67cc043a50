"""Pairs as tokens: the answer token found by hand, fit, spellings, padding, and smaller batches."""

import argparse
import dataclasses
import inspect
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from distill.circuits.task_fit import find_rows
from distill.circuits.tasks import (
    SPLITS,
    MisfitError,
    Pair,
    Task,
    TaskBatch,
    batches,
    encode,
    load_task,
    logit_difference,
    spelled,
    task_loss,
    task_names,
)
from distill.data.tokens import train_tokenizer
from distill.model import DenseModel, load_tokenizer
from distill.model.transformer import Architecture, SparseTransformer

NAMES = task_names("all")
LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]


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


def own_task(folder: Path, *lines: dict) -> Task:
    path = folder / "own.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return load_task(path)


def line(clean: str, corrupt: str, answer: str = ")", other: str = "]", split: str = "test") -> dict:
    return {"clean": clean, "corrupt": corrupt, "answer": answer, "other": other, "split": split}


# --- the answer token ------------------------------------------------------------------------------------------------


def test_encode_by_hand(tmp_path: Path) -> None:
    """`]` and `]]` before a new line: told apart at once where `]Ċ` is a token, one token later where it is not."""
    task = own_task(tmp_path, line("[a", "[[a", "]\n", "]]\n"))
    merged, plain = byte_tokenizer(("]", "Ċ")), byte_tokenizer()
    ids = merged.convert_tokens_to_ids
    batch = encode(task, merged, "test", 1, seed=0)
    assert batch.tokens.tolist() == [[ids("["), ids("a"), 0], [ids("["), ids("["), ids("a")]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.last.tolist() == [1, 2]
    assert batch.aligned.tolist() == [False]
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
    task, tokenizer, n = load_task(name), byte_tokenizer(), 8
    pairs, batch = task.pairs("test", n, seed=2), encode(task, tokenizer, "test", n, seed=2)
    assert len(batch) == 2 * n and batch.dropped == 0
    assert torch.equal(batch.answer[:n], batch.other[n:]) and torch.equal(batch.other[:n], batch.answer[n:])
    assert torch.equal(batch.labels[:n], 1 - batch.labels[n:])
    assert batch.labels[:n].tolist() == [pair.label for pair in pairs]
    assert torch.equal(batch.last + 1, batch.attention_mask.sum(1))
    expected = (1.0 - 2.0 * batch.labels) if task.oriented else torch.zeros(2 * n)
    assert torch.equal(batch.orientation, expected)
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
    task = own_task(tmp_path, line("a", "[a"))
    tokenizer = byte_tokenizer(pad="!")
    assert encode(task, tokenizer, "test", 1, 0).tokens[0].tolist() == tokenizer.convert_tokens_to_ids(["a", "!"])


def test_loss_and_difference_by_hand(tmp_path: Path) -> None:
    batch = encode(own_task(tmp_path, line("a(", "a[")), byte_tokenizer(), "test", 1, seed=0)
    logits = torch.zeros(2, 300)
    assert task_loss(logits, batch).tolist() == pytest.approx([math.log(2)] * 2)  # chance
    logits[0, batch.answer[0]] = 3.0
    logits[0, batch.other[0]] = 1.0
    logits[1, batch.other[1]] = 1.0
    assert logit_difference(logits, batch).tolist() == [2.0, -1.0]
    expected = [-math.log(math.exp(3) / (math.exp(3) + math.e)), -math.log(1 / (1 + math.e))]
    assert task_loss(logits, batch).tolist() == pytest.approx(expected)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_answers_that_one_token_cannot_tell_apart(tmp_path: Path) -> None:
    task = own_task(tmp_path, line("a", "b", ")", "))"))
    with pytest.raises(MisfitError) as error:
        encode(task, byte_tokenizer(), "test", 1, seed=0)
    where = f"{tmp_path / 'own.jsonl'}, line 1: task 'own' does not fit this tokenizer: "
    expected = "the answers ')' and '))' after 'a' cannot be told apart by one token (tokens [')'] and [')', ')'])"
    assert str(error.value) == where + expected


def test_answers_that_straddle_the_end_of_the_prompt(tmp_path: Path) -> None:
    task = own_task(tmp_path, line("c", "d"), line("a", "b"))
    message = r"line 2: .* the answer '\]' straddles the end of the prompt 'a' \(tokens \['a\]'\]\)"
    with pytest.raises(MisfitError, match=message):
        encode(task, byte_tokenizer(("a", "]")), "test", 2, seed=0)


def test_answers_whose_tokens_depend_on_the_text(tmp_path: Path) -> None:
    """Digits are split in threes: after `12` the answer `345` begins with `3`, after `ab` with the token `34`."""
    task = own_task(tmp_path, line("12", "ab", "345", "x"))
    with pytest.raises(MisfitError, match="the answer tokens after '12' are not those after 'ab'"):
        encode(task, byte_tokenizer(("3", "4"), split=r"\p{N}{1,3}"), "test", 1, seed=0)


def test_prompts_that_a_tokenizer_cannot_tell_apart() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.model = models.BPE(vocab={"?": 0, "x": 1, "y": 2}, merges=[], unk_token="?")
    (found,) = find_rows([Pair("a", "b", "x", "y")], tokenizer)
    assert found == "the prompts 'a' and 'b' are the same tokens"
    assert find_rows([], tokenizer) == []


def test_misfits_of_a_built_in_task_are_replaced_and_counted() -> None:
    """With `s:` one token, every name that ends in s straddles; the rest of the split still fits."""
    task, tokenizer = load_task("var_if"), byte_tokenizer(("s", ":"))
    batch = encode(task, tokenizer, "train", 100, seed=0)
    assert batch.dropped > 0
    assert len(batch) == 200 and batch.labels[:100].sum() == 50
    ends = batch.tokens[torch.arange(200), batch.last]
    assert tokenizer.convert_tokens_to_ids("s") not in ends.tolist()
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 200


def test_a_built_in_task_that_does_not_fit_says_so_with_an_example() -> None:
    tokenizer = byte_tokenizer(*((letter, ":") for letter in LETTERS))
    with pytest.raises(MisfitError, match=r"'var_if' does not fit this tokenizer: 0 of \d+ pairs of split 'val' fit"):
        encode(load_task("var_if"), tokenizer, "val", 8, seed=0)


def test_a_prompt_longer_than_the_context() -> None:
    task, tokenizer = load_task("for_while"), byte_tokenizer()
    longest = encode(task, tokenizer, "val", 8, seed=0).tokens.shape[1]
    assert encode(task, tokenizer, "val", 8, seed=0, context=longest).tokens.shape[1] == longest
    with pytest.raises(MisfitError, match=f"'for_while': a prompt has {longest} tokens; .* allows {longest - 1}"):
        encode(task, tokenizer, "val", 8, seed=0, context=longest - 1)
    with pytest.raises(ValueError, match="n: 0 pairs"):
        encode(task, tokenizer, "val", 0, 0)


def test_another_spelling_is_taken_where_the_first_does_not_fit() -> None:
    """With every letter and a colon one token, `while x` cannot be asked for its colon, but for ` >`."""
    task, plain, glued = load_task("for_while"), byte_tokenizer(), byte_tokenizer(*((x, ":") for x in LETTERS))
    assert spelled(task, plain) is task
    assert spelled(task, glued) is task.others[0]
    batch = encode(task, glued, "val", 8, seed=0)
    answers = {str(glued.decode([one])) for one in batch.answer.tolist()}
    assert answers == {"i", ">"}  # after the shared blank
    assert batch.dropped == 0 and task.others[0].name == task.name
    assert torch.equal(batch.labels, encode(task, plain, "val", 8, seed=0).labels)
    hopeless = byte_tokenizer(*((x, ":") for x in LETTERS), *((x, "Ġ") for x in LETTERS))
    assert spelled(task, hopeless) is task


def test_only_pairs_of_equal_length_if_asked_for(tmp_path: Path) -> None:
    task, tokenizer = load_task("class_init"), byte_tokenizer()
    assert not encode(task, tokenizer, "test", 20, seed=0).aligned.all()
    batch = encode(task, tokenizer, "test", 20, seed=0, aligned=True)
    assert batch.aligned.all() and batch.dropped > 0
    own = own_task(tmp_path, line("a", "[a"), line("b", "c"))
    assert encode(own, tokenizer, "test", 1, seed=0, aligned=True).aligned.tolist() == [True]
    with pytest.raises(MisfitError, match="1 of 2 pairs of split 'test' fit, 2 asked; .* differ in their number of"):
        encode(own, tokenizer, "test", 2, seed=0, aligned=True)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """The shipped one, one trained on other code, and one of GPT-2's kind with every merge the prompts allow."""
    own = [
        pair.clean + pair.answer + "\n" + pair.corrupt + pair.other
        for name in NAMES
        for split in SPLITS
        for pair in load_task(name).pairs(split, 12, seed=1)
    ]
    greedy = Tokenizer(models.BPE())
    greedy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    greedy.train_from_iterator(
        own, trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    )
    return {
        "shipped": load_tokenizer("sparse"),
        "code": train_tokenizer([inspect.getsource(argparse), inspect.getsource(inspect)], 700),
        "greedy": PreTrainedTokenizerFast(tokenizer_object=greedy, eos_token="!"),
    }


def test_the_shipped_models_share_a_tokenizer() -> None:
    assert load_tokenizer("sparse").get_vocab() == load_tokenizer("dense_gpt2").get_vocab()


@pytest.mark.parametrize("kind", ["shipped", "code", "greedy"])
@pytest.mark.parametrize("name", NAMES)
def test_the_suite_fits(name: str, kind: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    task = load_task(name)
    assert spelled(task, tokenizers[kind]) is task
    for split in SPLITS if kind == "greedy" else ("test", "shift"):
        batch = encode(task, tokenizers[kind], split, 200 if kind == "shipped" else 24, seed=0, context=100)
        assert batch.dropped <= 5
        if task.oriented:
            of_first = batch.answer[batch.labels == 0]
            assert (of_first == of_first[0]).all()


# --- batches ---------------------------------------------------------------------------------------------------------


def tiny(kind: Literal["gpt2", "none", "added"], vocab: int) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=vocab, n_positions=96)
        return DenseModel(GPT2LMHeadModel(config).eval()).double()
    plan = Architecture(
        vocab_size=vocab, context=96, n_layer=2, d_model=16, d_head=8, position=kind, topk_fraction=0.25
    )
    return SparseTransformer.build(plan).eval().double()


@pytest.mark.parametrize("kind", ["gpt2", "none", "added"])
@torch.no_grad()
def test_padding_does_not_change_the_logits_of_the_answer(kind: Literal["gpt2", "none", "added"]) -> None:
    """Whatever stands in the padding, to the last bit; and as if the prompt ran alone, to rounding."""
    tokenizer = byte_tokenizer()
    batch = encode(load_task("single_double_quote"), tokenizer, "shift", 6, seed=0)
    assert len(set(batch.last.tolist())) > 2  # there is padding
    model, rows = tiny(kind, len(tokenizer)), torch.arange(len(batch))
    padded = model.run(batch.tokens)[rows, batch.last]
    noise = torch.randint(0, 256, batch.tokens.shape, generator=torch.Generator().manual_seed(1))
    other = torch.where(batch.attention_mask.bool(), batch.tokens, noise)
    assert not torch.equal(other, batch.tokens)
    assert torch.equal(model.run(other)[rows, batch.last], padded)
    masked = model.run(batch.tokens, attention_mask=batch.attention_mask)[rows, batch.last]
    torch.testing.assert_close(masked, padded, rtol=0, atol=1e-12)
    for row, last in enumerate(batch.last.tolist()):
        alone = model.run(batch.tokens[row : row + 1, : last + 1])[0, -1]
        torch.testing.assert_close(alone, padded[row], rtol=0, atol=1e-12)


def numbered(lengths: list[int]) -> TaskBatch:
    """A batch whose pair i is made of the token i, its clean prompt of lengths[i] tokens, its corrupt of one more."""
    n = len(lengths)
    last = torch.tensor([length - 1 for length in lengths] + lengths)
    tokens = torch.arange(n).repeat(2)[:, None].repeat(1, max(lengths) + 1)
    mask = (torch.arange(tokens.shape[1]) <= last[:, None]).long()
    labels = torch.tensor([0] * n + [1] * n)
    answer, other = labels + 100, 101 - labels
    return TaskBatch(tokens=tokens * mask, attention_mask=mask, last=last, answer=answer, other=other,
                     orientation=1.0 - 2.0 * labels, labels=labels)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12), pairs=st.integers(1, 5), seed=st.integers(0, 9))
def test_no_pair_comes_twice_in_an_epoch(lengths: list[int], pairs: int, seed: int) -> None:
    batch = numbered(lengths)
    per_epoch = -(-len(lengths) // pairs)
    drawn = list(islice(batches(batch, pairs, seed), 3 * per_epoch))
    for epoch in range(3):
        seen: list[int] = []
        for one in drawn[epoch * per_epoch : (epoch + 1) * per_epoch]:
            half = len(one) // 2
            assert 1 <= half <= pairs
            assert torch.equal(one.tokens[:half, 0], one.tokens[half:, 0])  # both members of each pair
            assert one.tokens.shape[1] == int(one.last.max()) + 1  # no padding that nobody needs
            assert one.labels.tolist() == [0] * half + [1] * half
            seen += one.tokens[:half, 0].tolist()
        assert sorted(seen) == list(range(len(lengths)))
    again = list(islice(batches(batch, pairs, seed), 3 * per_epoch))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(drawn, again, strict=True))


def test_pairs_of_one_length_go_together_in_another_order_each_epoch() -> None:
    batch = numbered([1, 4] * 8)
    drawn = list(islice(batches(batch, 4, seed=0), 40))
    assert all(len(set(one.last[:4].tolist())) == 1 for one in drawn)
    assert len({tuple(one.tokens[:4, 0].tolist()) for one in drawn}) > 10
    assert len({tuple(one.tokens[:4, 0].tolist()) for one in islice(batches(batch, 4, seed=1), 40)}) > 10
    with pytest.raises(ValueError, match="pairs: got 0; allowed: 1 and more"):
        batches(batch, 0, seed=0)


def test_select_take_and_to_act_on_every_tensor() -> None:
    batch = encode(load_task("class_init"), byte_tokenizer(), "train", 6, seed=0)
    rows = torch.tensor([7, 0])
    chosen, taken = batch.select(rows), batch.take(torch.tensor([3, 1]))
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(chosen, field.name), value[rows])
            assert getattr(batch.to("meta"), field.name).device.type == "meta"
            if value.dim() == 1:
                assert torch.equal(getattr(taken, field.name), value[torch.tensor([3, 1, 9, 7])])
    assert len(batch.select(slice(0, 6))) == 6
    width = int(taken.last.max()) + 1
    assert torch.equal(taken.tokens, batch.tokens[torch.tensor([3, 1, 9, 7]), :width])

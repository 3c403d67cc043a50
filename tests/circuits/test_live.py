"""A watch inside `generate`: what it sees, when it stops, what it steers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, StoppingCriteriaList

from distill.circuits.editing import Change, ModelEdit
from distill.circuits.live import LiveWatch, tapped
from distill.circuits.watch import Watch
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.model.run import Runnable
from distill.model.sites import Edit, Record

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture
def sparse() -> SparseTransformer:
    return SparseTransformer.build(Architecture(vocab_size=17, context=16, n_layer=2, d_model=16, d_head=4)).eval()


@pytest.fixture
def gpt2() -> DenseModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=17, n_positions=16, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return DenseModel(GPT2LMHeadModel(config).eval())


def watch_of(model: Runnable, **options: object) -> Watch:
    """Over two numbers of a model, uncalibrated."""
    given = {"names": ("0.mlp.post_act.1", "1.attn.act_in.2"), **options}
    return Watch(
        model=model.fingerprint(), model_name="", task="", mean=torch.zeros(2), spread=torch.ones(2),
        effect=torch.ones(2), slope=torch.tensor([1.0, -2.0]), **given,
    )  # fmt: skip


def stream_watch(model: Runnable, **options: object) -> Watch:
    rows = {"1.resid_in": torch.eye(2, 16), "final_resid": torch.ones(1, 16)}
    places = {"1.resid_in": torch.tensor([0, 1]), "final_resid": torch.tensor([2])}
    three = Watch(
        model=model.fingerprint(), model_name="", task="", names=("a", "b", "c"), mean=torch.zeros(3),
        spread=torch.ones(3), effect=torch.ones(3), slope=torch.ones(3), rows=rows, places=places,
        offset=torch.zeros(3),
    )  # fmt: skip
    return replace(three, **options)


def generate(model: SparseTransformer | DenseModel, tokens: int = 6, **options: object) -> Tensor:
    hf = model.hf if isinstance(model, DenseModel) else model
    mask = torch.ones_like(PROMPT)
    return hf.generate(
        PROMPT, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=16, **options
    )


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_logging_changes_nothing_and_sees_what_a_run_sees(
    kind: str, cached: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    plain = generate(model)
    watch = watch_of(model) if kind == "sparse" else stream_watch(model)
    with LiveWatch(watch, model) as live:
        found = generate(model, use_cache=cached, stopping_criteria=StoppingCriteriaList([live]))
    assert torch.equal(found, plain)
    scores = watch.score(model, plain[:, :-1])
    assert [(event.row, event.position) for event in live.events if event.row == 1] == [(1, i) for i in range(8)]
    for event in live.events:
        assert event.strength == pytest.approx(float(scores.strength[event.row, event.position]), abs=1e-4)
        assert event.lean == pytest.approx(float(scores.lean[event.row, event.position]), abs=1e-4)
    assert torch.equal(generate(model), plain) and "run" not in vars(model)


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
def test_a_flag_stops_its_sequence_alone(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    plain = generate(model)
    watch = watch_of(model) if kind == "sparse" else stream_watch(model)
    strength = watch.score(model, plain[:, :-1]).strength[:, 3:]
    # Between the highest of the tokens generated in the one row and in the other.
    highest = strength.max(1).values
    row = int(highest.argmax())
    watch = replace(watch, threshold=float(highest.mean()))
    place = int((strength[row] > watch.threshold).int().argmax())
    with LiveWatch(watch, model, action="stop") as live:
        found = generate(model, stopping_criteria=StoppingCriteriaList([live]))
    kept = 3 + place + 2  # the flagged token, and the one that was made of it
    assert torch.equal(found[row, :kept], plain[row, :kept]) and not bool(found[row, kept:].any())
    assert torch.equal(found[1 - row, : plain.shape[1]], plain[1 - row, : found.shape[1]])
    with LiveWatch(replace(watch, threshold=-1.0), model, action="stop", prompt=True) as live:
        assert generate(model, stopping_criteria=StoppingCriteriaList([live])).shape[1] == 4


def test_steering_is_in_force_after_the_flag(sparse: SparseTransformer) -> None:
    edit = ModelEdit(changes=(Change(node="1.mlp.act_in.3", value=8.0), Change(node="0.attn.q.1", competition=False)))
    watch = replace(watch_of(sparse), threshold=-1.0)
    with LiveWatch(watch, sparse, action="steer", steer=edit.tap(sparse), prompt=True) as live, torch.no_grad():
        first = sparse(PROMPT[:, :2]).logits
        # As `generate` without a cache does it: the whole text again, and one token more.
        second = sparse(PROMPT).logits
    with torch.no_grad():
        assert torch.equal(first, sparse.run(PROMPT[:, :2])) and bool(live.raised.all())
        torch.testing.assert_close(second, sparse.run(PROMPT, tap=edit.tap(sparse)))
    assert [event.position for event in live.events] == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("cached", [True, False])
def test_a_second_text_is_refused_until_the_watch_is_told(
    kind: str, length: int, cached: bool, request: pytest.FixtureRequest
) -> None:
    """Of whatever length, one token and one more than were read included; plugged in or not."""
    model = request.getfixturevalue(kind)
    hf = model.hf if isinstance(model, DenseModel) else model
    watch = watch_of(model) if kind == "sparse" else stream_watch(model)
    other = torch.full((2, length), 7)
    options = {"max_new_tokens": 2, "do_sample": False, "use_cache": cached, "eos_token_id": 16, "pad_token_id": 0}
    with LiveWatch(watch, model) as live:
        generate(model, use_cache=cached)  # reads 3 + 5
        before = live.events
        with pytest.raises(ValueError, match="a live watch follows one text"):
            hf.generate(other, attention_mask=torch.ones_like(other), **options)
        assert live.events == before
        live.restart()
        found = hf.generate(other, attention_mask=torch.ones_like(other), **options)
    scores = watch.score(model, found[:, :-1])
    strength = [event.strength for event in live.events if event.row == 0]
    assert strength == pytest.approx(scores.strength[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
def test_the_same_text_goes_on_and_chunks_make_one_prompt(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    watch = watch_of(model) if kind == "sparse" else stream_watch(model)
    plain = generate(model)
    with LiveWatch(watch, model) as live:
        stopping = StoppingCriteriaList([live])
        assert torch.equal(generate(model, prefill_chunk_size=2, stopping_criteria=stopping), plain)
    scores = watch.score(model, plain[:, :-1])
    found = [(event.position, event.strength) for event in live.events if event.row == 1]
    assert found == [(place, pytest.approx(one, abs=1e-4)) for place, one in enumerate(scores.strength[1].tolist())]
    with LiveWatch(replace(watch, threshold=-1.0), model) as live:
        generate(model, tokens=1, prefill_chunk_size=2, stopping_criteria=StoppingCriteriaList([live]))
    assert not bool(live.raised.any()), "flags on the prompt do not count, in whatever chunks it is read"


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
def test_beams_that_are_exchanged_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    watch = watch_of(model) if kind == "sparse" else stream_watch(model)
    with LiveWatch(watch, model) as live, pytest.raises(ValueError, match="goes on with another text"):
        generate(model, num_beams=4, stopping_criteria=StoppingCriteriaList([live]))


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
def test_padding_is_neither_flagged_nor_logged(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    watch = replace(watch_of(model) if kind == "sparse" else stream_watch(model), threshold=-1.0)
    hf = model.hf if isinstance(model, DenseModel) else model
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    with LiveWatch(watch, model) as live:
        hf.generate(
            PROMPT, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=16,
            stopping_criteria=StoppingCriteriaList([live]),
        )  # fmt: skip
    assert [event.position for event in live.events if event.row == 0] == [2, 3]
    assert [event.position for event in live.events if event.row == 1] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["sparse", "gpt2"])
def test_what_others_run_meanwhile_is_not_watched(kind: str, request: pytest.FixtureRequest) -> None:
    """As `Watch.score` does, on the model that is watched; every pass of it is above the threshold."""
    model = request.getfixturevalue(kind)
    watch = replace(watch_of(model) if kind == "sparse" else stream_watch(model), threshold=-1.0)
    if isinstance(model, DenseModel):  # read where `run` passes a hook too
        watch = replace(watch, rows={"final_resid": torch.eye(3, 16)}, places={"final_resid": torch.arange(3)})
    alone = watch.score(model, PROMPT)
    with LiveWatch(watch, model) as live:
        text = generate(model, tokens=1)
        before = live.events
        assert torch.equal(watch.score(model, PROMPT).strength, alone.strength)
        assert live.events == before and len(before) == PROMPT.numel() and not bool(live.raised.any())
    assert text.shape == (2, 4)


def test_embeddings_instead_of_tokens_are_refused(gpt2: DenseModel) -> None:
    with LiveWatch(stream_watch(gpt2), gpt2), pytest.raises(ValueError, match="allowed are input_ids"):
        gpt2.hf(inputs_embeds=torch.zeros(1, 2, 16))


def test_a_dense_stream_is_steered_where_hooks_reach(gpt2: DenseModel) -> None:
    push = torch.linspace(-2, 2, 16)
    edits = Edit({"1.resid_in": lambda x: x + push, "final_resid": lambda x: 2 * x})
    with torch.no_grad(), tapped(gpt2, edits):
        found = gpt2.hf(PROMPT).logits
        torch.testing.assert_close(found, gpt2.run(PROMPT, tap=edits), msg="the wrapper calls the same modules")
    record = Record()
    with torch.no_grad(), tapped(gpt2, record):
        gpt2.hf(PROMPT)
    assert set(record.values) == {"0.resid_in", "0.resid_mid", "1.resid_in", "1.resid_mid", "final_resid"}
    plain = Record(set(record.values))
    with torch.no_grad():
        gpt2.run(PROMPT, tap=plain)
    for site, value in plain.values.items():
        torch.testing.assert_close(record.values[site], value)


def test_what_is_refused(sparse: SparseTransformer, make_planted: Callable[..., SparseTransformer]) -> None:
    watch = watch_of(sparse)
    for options in ({"action": "steer"}, {"steer": Record()}):
        with pytest.raises(ValueError, match="they go together"):
            LiveWatch(watch, sparse, **options)
    with tapped(sparse, Record()), pytest.raises(ValueError, match="tapped already"), tapped(sparse, Record()):
        pass
    assert "run" not in vars(sparse)
    with pytest.raises(ValueError, match="watch: made for model"):
        LiveWatch(watch, make_planted(0))

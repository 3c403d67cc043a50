"""Controls: the same prompts with answers that nothing can know, or that no rule gives."""

import json
from pathlib import Path

import pytest

from distill.circuits.task_controls import UNRELATED
from distill.circuits.tasks import SPLITS, encode, load_task, nonsense, shuffled, spelled, task_names
from distill.model import load_tokenizer

NAMES = task_names("all")


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_asks_the_same_prompts_for_unrelated_words(name: str) -> None:
    task, control = load_task(name), nonsense(load_task(name))
    assert control.name == f"{name}_nonsense" and control.oriented
    assert control.fingerprint != task.fingerprint
    for split in SPLITS:
        for real, other in zip(task.pairs(split, 20, seed=7), control.pairs(split, 20, seed=7), strict=True):
            assert (real.clean, real.corrupt, real.label) == (other.clean, other.corrupt, other.label)
            assert (other.answer, other.other) == (UNRELATED[0][other.label], UNRELATED[0][1 - other.label])


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_fits_the_shipped_tokenizer_with_one_answer_a_class(name: str) -> None:
    tokenizer, control = load_tokenizer("sparse"), nonsense(load_task(name))
    assert spelled(control, tokenizer) is control
    batch = encode(control, tokenizer, "test", 30, seed=0)
    assert len(set(batch.answer[batch.labels == 0].tolist())) == 1
    assert len(set(batch.answer[batch.labels == 1].tolist())) == 1
    assert batch.orientation.abs().min() == 1


def test_shuffled_exchanges_about_half_of_the_answers_the_same_in_every_draw() -> None:
    task, control = load_task("for_while"), shuffled(load_task("for_while"), 3)
    assert control.name == "for_while_shuffled3"
    real, other = task.pairs("test", 400, seed=0), control.pairs("test", 400, seed=0)
    kept = [one == two for one, two in zip(real, other, strict=True)]
    assert 150 < sum(kept) < 250  # 400 fair coins: five standard deviations
    for one, two, same in zip(real, other, kept, strict=True):
        assert (one.clean, one.corrupt) == (two.clean, two.corrupt)
        assert same or (two.answer, two.other, two.label) == (one.other, one.answer, 1 - one.label)
    answers = {frozenset({(p.clean, p.answer), (p.corrupt, p.other)}) for p in control.pairs("test", 800, seed=1)}
    assert all(
        frozenset({(p.clean, p.other), (p.corrupt, p.answer)}) not in answers for p in other
    )  # no pair has its answers exchanged in another draw
    assert shuffled(task, 4).pairs("test", 100, seed=0) != control.pairs("test", 100, seed=0)
    assert [other.name for other in control.others] == [control.name]


def test_controls_by_name(tmp_path: Path) -> None:
    assert load_task("ioi:nonsense").pairs("val", 5, 0) == nonsense(load_task("ioi")).pairs("val", 5, 0)
    assert load_task("ioi:shuffled12").pairs("val", 5, 0) == shuffled(load_task("ioi"), 12).pairs("val", 5, 0)
    assert load_task("ioi:shuffled").name == "ioi_shuffled0"
    line = {"clean": "a(", "corrupt": "a[", "answer": ")", "other": "]", "split": "test"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    own = load_task(f"{tmp_path / 'own.jsonl'}:nonsense")
    assert own.name == "own_nonsense" and own.own
    (pair,) = own.pairs("test", 1, seed=0)
    assert (pair.clean, pair.corrupt, pair.answer, pair.other) == ("a(", "a[", *UNRELATED[0])
    with pytest.raises(ValueError, match=r"no such file: .*gone\.jsonl"):
        load_task(f"{tmp_path / 'gone.jsonl'}:nonsense")

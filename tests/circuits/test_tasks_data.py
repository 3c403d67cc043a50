"""The data of the built-in tasks: what holds for every template, filler and pair."""

import json
import re
import textwrap
from importlib import resources
from itertools import combinations

import pytest

from distill.circuits.task_document import document
from distill.circuits.tasks import SPLITS, Family, Pair, load_task, task_names

NAMES = task_names("all")
DATA = resources.files("distill.circuits") / "task_data"
SLOT = r"\$\{?(\w+)\}?"


def data_of(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def families(name: str, split: str) -> list[Family]:
    found = [source for source in load_task(name).splits[split] if isinstance(source, Family)]
    assert found
    return found


def by_class(pair: Pair) -> tuple[str, str]:
    return (pair.clean, pair.corrupt) if pair.label == 0 else (pair.corrupt, pair.clean)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_family_template_or_filler(name: str) -> None:
    data = data_of(name)
    assert tuple(data["splits"]) == SPLITS
    assert data["name"] == name and data["shift_change"]
    for one, two in combinations(data["splits"].values(), 2):
        assert not one["families"].keys() & two["families"].keys()
        templates = [{"\n".join(lines) for lines in split["families"].values()} for split in (one, two)]
        assert not templates[0] & templates[1]
        fillers = [{entry for entries in split["fillers"].values() for entry in entries} for split in (one, two)]
        assert not fillers[0] & fillers[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_split_has_three_families_and_nothing_that_is_not_used(name: str) -> None:
    data, parts = data_of(name), set()
    for content in data["splits"].values():
        assert len(content["families"]) >= 3
        entries = [entry for listed in content["fillers"].values() for entry in listed]
        assert len(entries) == len(set(entries))  # an entry stands in one list
        texts = ["\n".join(lines) for lines in content["families"].values()]
        chosen = [(slots := set(re.findall(SLOT, text))) & data["parts"].keys() for text in texts]
        assert all(len(part) == 1 for part in chosen)
        parts |= set().union(*chosen)
        texts += [text for part in set().union(*chosen) for text in data["parts"][part]]
        texts += [text for spelling in data["spellings"] for text in spelling["completions"]]
        slots = {slot.rstrip("0123456789") for text in texts for slot in re.findall(SLOT, text)}
        assert content["fillers"].keys() == slots - data["parts"].keys()
        assert content.get("ends", {}).keys() <= content["families"].keys()
    assert parts == data["parts"].keys()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_200_different_pairs_that_differ_in_one_place(name: str, split: str) -> None:
    """Cut the class-dependent part out of both texts, and the same is left."""
    pairs = load_task(name).pairs(split, 200, seed=0)
    assert len({frozenset((pair.clean, pair.corrupt)) for pair in pairs}) == 200
    written = [[re.escape(re.sub(SLOT, "SLOT", text)) for text in part] for part in data_of(name)["parts"].values()]
    parts = [[re.compile(text.replace("SLOT", r"\w+")) for text in part] for part in written]
    for pair in pairs[:60]:
        first, second = by_class(pair)
        found = [
            (a, b)
            for one, two in parts
            for at in range(len(first) + 1)
            if first[:at] == second[:at] and (a := one.match(first, at)) and (b := two.match(second, at))
        ]
        assert any(first[a.end() :] == second[b.end() :] for a, b in found), (first, second)


@pytest.mark.parametrize("name", NAMES)
def test_both_answers_and_both_directions_are_equally_frequent(name: str) -> None:
    task = load_task(name)
    pairs = task.pairs("test", 100, seed=3)
    assert sum(pair.label for pair in pairs) == 50
    completions = data_of(name)["spellings"][0]["completions"]
    assert task.oriented == ("$" not in "".join(completions))
    if task.oriented:
        assert all((p.answer, p.other) == (completions[p.label], completions[1 - p.label]) for p in pairs)
    else:
        assert all(pair.answer != pair.other for pair in pairs)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", task_names("python"))
def test_completed_pairs_compile(name: str, split: str) -> None:
    """Every prompt with its right completion, in every spelling, is the beginning of a program that compiles."""
    for task in (load_task(name), *load_task(name).others):
        for family in task.splits[split]:
            assert isinstance(family, Family)
            for index in range(0, family.size, family.size // 12 + 1):
                for program, text in zip(family.programs(index), by_class(family.at(index)), strict=True):
                    assert program.startswith(text)
                    body = textwrap.indent(textwrap.dedent(program), "    ")
                    compile(f"def wrapped():\n{body}", name, "exec")


@pytest.mark.parametrize("name", task_names("language"))
def test_language_does_not_claim_to_be_code(name: str) -> None:
    assert all(family.closings is None for split in SPLITS for family in families(name, split))


def test_later_years_are_later() -> None:
    for split in SPLITS:
        for family in families("greater_than", split):
            for index in range(0, family.size, family.size // 20 + 1):
                pair = family.at(index)
                years = [int(year) for year in re.findall(r"\d{4}", pair.clean)]
                assert int(pair.other) < years[-1] < int(pair.answer)
                assert all(int(pair.other) // 100 == int(pair.answer) // 100 == year // 100 for year in years)


def test_the_indirect_object_stands_once() -> None:
    for split in SPLITS:
        for pair in load_task("ioi").pairs(split, 50, seed=0):
            assert pair.clean.count(pair.answer.strip()) == 1 and pair.clean.count(pair.other.strip()) == 2
            assert pair.corrupt.count(pair.answer.strip()) == 2 and pair.corrupt.count(pair.other.strip()) == 1


def test_brackets_are_counted() -> None:
    """Without the comment line and the text before it, what is open is what is closed."""
    for split in SPLITS:
        for pair in load_task("bracket_counting").pairs(split, 80, seed=0):
            for text, completion in ((pair.clean, pair.answer), (pair.corrupt, pair.other)):
                whole = re.sub(r"#.*\n", "", text + completion)
                assert whole.count("[") == whole.count("]")


def test_the_document_beside_the_data_is_current() -> None:
    assert (DATA / "README.md").read_text() == document([load_task(name) for name in NAMES]) + "\n"

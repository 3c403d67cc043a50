"""The generated idioms: they compile, repeat by seed, vary, and keep the rules they are there to teach."""

import json
import keyword
import re
import time
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distill
from distill.circuits import load_task, task_names
from distill.data.idioms import READ_STEMS, WRITE_STEMS, document, documents
from distill.data.words import ADJECTIVES, NOUNS, VERBS, WORDS

SAMPLE = list(islice(documents(3), 1000))
TEXT = "\n".join(SAMPLE)


@settings(deadline=None)
@given(index=st.integers(0, 10**9), seed=st.integers(-(2**40), 2**40))
def test_every_document_compiles(index: int, seed: int) -> None:
    text = document(index, seed)
    compile(text, "idiom", "exec")
    assert text.endswith("\n") and text.isascii() and text.strip()


def test_stream_is_a_function_of_index_and_seed() -> None:
    assert list(islice(documents(3), 20)) == [document(index, 3) for index in range(20)]
    assert document(5, 3) != document(5, 4)
    assert document(5, 3) != document(6, 3)


def test_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="index -1"):
        document(-1)


def test_documents_do_not_repeat() -> None:
    assert len(set(SAMPLE)) > 0.99 * len(SAMPLE)


def test_word_lists_hold_hundreds_of_usable_names() -> None:
    for words, least in ((NOUNS, 300), (ADJECTIVES, 100), (VERBS, 150), (WORDS, 200)):
        assert len(words) == len(set(words)) >= least
    for name in (*NOUNS, *ADJECTIVES, *VERBS):
        assert name.isidentifier() and not keyword.iskeyword(name)


def test_no_word_is_a_filler_of_a_task() -> None:
    """A model must do a task by its rule, so the names a task puts in never stand in generated text as names."""
    folder = Path(distill.__file__).parent / "circuits" / "task_data"
    own = {*NOUNS, *ADJECTIVES, *VERBS, *WORDS}
    tasks = sorted(folder.glob("*.json"))
    assert tasks
    for path in tasks:
        splits = json.loads(path.read_text())["splits"].values()
        fillers = {word for split in splits for pool in split["fillers"].values() for word in pool}
        assert not fillers & own, f"{path.name}: take these from distill/data/words.py"


def test_strings_close_with_the_quote_that_opened_them() -> None:
    ends = re.findall(r"""(?:print|\w)\((['"])[^'"\n]*(['"])\)""", TEXT)
    assert {opening for opening, _ in ends} == {"'", '"'}
    assert all(opening == closing for opening, closing in ends) and len(ends) > 150


def test_variables_grow_as_they_were_made() -> None:
    seen = {"set": 0, "string": 0}
    for text in SAMPLE:
        kinds: dict[str, str] = {}
        for line in text.splitlines():
            if made := re.match(r"\s*(\w+) = (set\(\)|''|\"\")$", line):
                kinds[made[1]] = "set" if made[2] == "set()" else "string"
            elif assigned := re.match(r"\s*(\w+) = ", line):
                kinds.pop(assigned[1], None)
            elif grown := re.match(r"\s*(\w+)(\.add\(| \+= ['\"])", line):
                kind = kinds.get(grown[1])
                if kind is not None:
                    assert (kind == "set") == (grown[2] == ".add("), text
                    seen[kind] += 1
    assert min(seen.values()) > 150


def test_arguments_are_stored_under_their_own_name() -> None:
    bodies = re.findall(r"def __init__\(self, (.*)\):\n((?:\s+self\.\w+ = .*\n)+)", TEXT)
    assert len(bodies) > 150
    for parameters, body in bodies:
        names = {parameter.split("=")[0] for parameter in re.split(r", (?=\w+(?:=|,|$))", parameters)}
        for field, value in re.findall(r"self\._?(\w+) = (\w+)$", body, re.M):
            if field in names:
                assert field == value


def test_defaults_are_none_for_all_or_for_no_parameter_mostly() -> None:
    heads = re.findall(r"def \w+\((?:self, )?(\w+(?:=None)?(?:, \w+(?:=None)?)+)\):", TEXT)
    even = [head for head in heads if head.count("=None") in (0, head.count(",") + 1)]
    assert len(heads) > 150 and len(even) > 0.85 * len(heads)
    assert {"=None" in head for head in even} == {True, False}


def test_file_names_tell_the_mode() -> None:
    opened = re.findall(r"""open\(['"]([\w.]+)['"], ['"](\w)['"]\)""", TEXT)
    assert len(opened) > 50
    for name, mode in opened:
        stems = READ_STEMS if mode == "r" else WRITE_STEMS
        assert any(stem in name for stem in stems), name


@pytest.mark.parametrize(
    "pattern",
    [
        r"for \w+, \w+ in enumerate\(",
        r"for \w+ in range\(",
        r"while True:",
        r"return True",
        r"while \w+:",
        r"elif .*:",
        r"else:",
        r"(\w+), (\w+) = \2, \1\n",
        r"= lambda \w+",
        r"with open\(.*\) as \w+:",
        r"print\(f['\"][^{]*\{",
        r" = \S+ if .* else ",
        r" = \[\[.*\]\]\n",
        r" = \[[^\[\]]*\]\n",
        r"if \w+ == .*:",
        r"def \w+\(.*\w=None\):",
        r"['\"]: \d+, ['\"]",
    ],
)
def test_every_choice_is_frequent(pattern: str) -> None:
    assert len(re.findall(pattern, TEXT)) > 30


def test_distance_between_making_and_growing_varies() -> None:
    distances = set()
    for made in re.finditer(r"( *)(\w+) = set\(\)\n((?:.*\n){1,12}?)\s*\2\.add\(", TEXT):
        distances.add(made[3].count("\n"))
    assert len(distances) >= 6


def test_generating_is_fast() -> None:
    fastest = 0.0
    for seed in range(3):
        start = time.process_time()
        size = sum(map(len, islice(documents(seed), 100)))
        fastest = max(fastest, size / (time.process_time() - start))
    # Above 10 MB/s; the type checks that a test run puts around every call take twenty times as long.
    assert fastest > 0.2e6


def test_no_prompt_of_a_task_is_ever_generated() -> None:
    """What is asked of a model is not what it was trained on word for word."""
    for name in task_names():
        for pair in load_task(name).pairs("test", 40, 0):
            assert pair.clean not in TEXT and pair.corrupt not in TEXT, f"{name}: {pair.clean!r}"

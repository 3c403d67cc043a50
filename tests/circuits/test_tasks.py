"""The task suite by name: what there is, and how pairs are drawn."""

import pytest

from distill.circuits.tasks import KINDS, Family, Listed, Pair, Source, Task, load_task, task_names

PYTHON = [
    "bracket_brace",
    "bracket_counting",
    "class_init",
    "else_elif",
    "enumerate_range",
    "final_kwarg",
    "for_while",
    "fstring_brace",
    "if_equals",
    "if_ternary",
    "indent_for",
    "lambda_func",
    "set_or_string",
    "set_or_string_fixedvarname",
    "single_double_quote",
    "var_if",
    "var_swap",
    "while_return_true",
    "with_as",
    "with_open",
]
LANGUAGE = ["gendered_pronoun", "greater_than", "ioi", "subject_verb_agreement"]


def test_the_suite_has_twenty_tasks_of_python_and_four_of_language() -> None:
    assert task_names() == task_names("python") == PYTHON
    assert task_names("language") == LANGUAGE
    assert task_names("all") == sorted(PYTHON + LANGUAGE)
    assert {load_task(name).kind for name in PYTHON} == {"python"}
    assert KINDS == ("python", "language")
    with pytest.raises(ValueError, match="kind: got 'code'; allowed: python, language, all"):
        task_names("code")


def test_draws_depend_on_split_and_seed_alone_and_grow_from_the_front() -> None:
    task = load_task("for_while")
    assert task.pairs("train", 40, seed=5) == task.pairs("train", 40, seed=5)
    assert task.pairs("train", 90, seed=5)[:40] == task.pairs("train", 40, seed=5)
    assert task.pairs("train", 40, seed=5) != task.pairs("train", 40, seed=6)
    assert not set(task.pairs("train", 40, seed=5)) & set(task.pairs("val", 40, seed=5))


def test_a_whole_split_can_be_drawn_without_repeats() -> None:
    task = load_task("subject_verb_agreement")
    held = task.size("val")
    assert len({(p.clean, p.corrupt) for p in task.pairs("val", held, 0)}) == held
    message = rf"n: {held + 1} pairs asked of split 'val'.*'subject_verb_agreement'; it holds 1 to {held}"
    with pytest.raises(ValueError, match=message):
        task.pairs("val", held + 1, seed=0)
    with pytest.raises(ValueError, match="n: 0 pairs"):
        task.pairs("val", 0, seed=0)


def test_families_take_turns_until_each_is_used_up() -> None:
    short = Listed(listed=(Pair("a", "b", "x", "y"),))
    long = Listed(listed=tuple(Pair(f"c{i}", f"d{i}", "x", "y") for i in range(5)))
    task = Task(name="t", kind="own", description="", choice="", shift_change="", classes=("a", "b"), oriented=True,
                own=True, fingerprint="", splits={"test": (short, long)})  # fmt: skip
    drawn = task.pairs("test", 6, seed=0)
    assert drawn.index(short.listed[0]) <= 1
    assert {pair.clean for pair in drawn} == {"a", "c0", "c1", "c2", "c3", "c4"}


def hand_family() -> Family:
    return Family(
        name="hand",
        text="  $open$n1, $n2",
        part="open",
        variants=("[", "[["),
        completions=("]", "]]"),
        fillers={"n": ("1", "2", "3"), "unused": ("x",)},
        closings=("\n", "\n$indent$n2\n"),
    )


def test_a_family_counts_and_writes_its_pairs_by_hand() -> None:
    family = hand_family()
    assert family.slots == ("n1", "n2")
    assert family.size == 3 * 2  # two slots of one list never hold the same entry
    texts = ["  [1, 2", "  [2, 1", "  [3, 1", "  [1, 3", "  [2, 3", "  [3, 2"]
    assert [family.at(index).clean for index in range(6)] == texts
    assert family.at(0).corrupt == "  [[1, 2"
    assert family.at(0).turned() == Pair("  [[1, 2", "  [1, 2", "]]", "]", 1)
    assert isinstance(family, Source) and isinstance(Listed(listed=()), Source)


def test_a_family_writes_whole_programs_by_hand() -> None:
    assert hand_family().programs(0) == ("  [1, 2]\n", "  [[1, 2]]\n  2\n")
    bare = Family(name="bare", text="$p", part="p", variants=("a", "b"), completions=("", ""), fillers={})
    with pytest.raises(ValueError, match="closings: template family 'bare' has none"):
        bare.programs(0)


def test_unknown_names_and_splits() -> None:
    with pytest.raises(ValueError, match="unknown task 'quotes'; known: bracket_brace, bracket_counting"):
        load_task("quotes")
    with pytest.raises(ValueError, match="unknown task 'for_while:other'"):
        load_task("for_while:other")
    with pytest.raises(ValueError, match="no pairs in 'dev'; splits with pairs: train, val, test, shift"):
        load_task("for_while").pairs("dev", 1, seed=0)
    with pytest.raises(ValueError, match=r"no such file: missing\.jsonl"):
        load_task("missing.jsonl")

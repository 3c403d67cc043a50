"""Watching a stream of text: what is taken, what is refused before anything is loaded, what is kept in memory."""

import io
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.circuits.ablation import Means
from distill.circuits.editing import constants
from distill.circuits.monitor import check_asked, evaluation, show, texts_of
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, load_task
from distill.circuits.watch import Watch, node_effects, watch_nodes
from distill.model import SparseTransformer

ASKED = {"fpr": 0.05, "signal": "strength", "shown": True, "colour": False, "written": {}}


class Piece(str):
    """A text that one can see go."""


@pytest.fixture
def watch() -> Watch:
    one = torch.ones(1)
    return Watch(model="", model_name="m", task="t", names=("0.mlp.act_in.1",), mean=one, spread=one, effect=one,
                 slope=one, threshold=0.5)  # fmt: skip


def test_a_text_a_file_and_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(texts_of("print('hello.py')")) == ["print('hello.py')"]
    assert list(texts_of("a\0b")) == ["a\0b"] and list(texts_of("x" * 5000)) == ["x" * 5000]
    (tmp_path / "one.py").write_text("é = 1\n", encoding="utf-8")
    assert list(texts_of(str(tmp_path / "one.py"))) == ["é = 1\n"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb"))
    assert list(texts_of("-")) == ["a\n", "b"]


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="input: is empty"):
        texts_of("")
    with pytest.raises(ValueError, match="is a folder"):
        texts_of(str(tmp_path))
    with pytest.raises(ValueError, match="there is no file 'gone.py'"):
        texts_of("gone.py")
    (tmp_path / "raw.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="raw.txt is not UTF-8 .* at byte 2"):
        texts_of(str(tmp_path / "raw.txt"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\n\xff\n"), encoding="utf-8"))
    with pytest.raises(ValueError, match="standard input is not UTF-8"):
        list(texts_of("-"))


def test_what_will_not_do_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    check_asked(**ASKED)
    for options, words in (
        ({"fpr": 1.0}, "fpr: got 1.0"),
        ({"signal": "noise"}, "signal: got 'noise'"),
        ({"shown": False, "colour": True}, "colour: there is no text"),
        ({"shown": False, "written": {"html": tmp_path / "page.html"}}, "html: there is no text"),
        ({"written": {"save": tmp_path / "watch.bin"}}, "names ending in"),
        ({"written": {"evaluate": tmp_path}}, "evaluate: .* is a folder"),
        ({"written": {"html": Path(__file__) / "page.html"}}, "is a file, so nothing can be written"),
    ):
        with pytest.raises(ValueError, match=words):
            check_asked(**{**ASKED, **options})


def test_nothing_is_kept_of_a_stream_unless_for_a_page(
    watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def records(kept: bool) -> Iterator[dict[str, object]]:
        before: list[weakref.ref[Piece]] = []
        for n in range(5):
            piece = Piece(f"<{n}>")
            before.append(weakref.ref(piece))
            yield {"token": piece, "strength": n / 4, "lean": 0.0}
            del piece
            if n:
                assert (before[n - 1]() is not None) == kept

    for colour in (False, True):
        show(records(False), watch, colour=colour, page=None)
        show(records(True), watch, colour=colour, page=tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert page.count('class="flag"') == 2 and "&lt;4&gt;" in page
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0]) == {"token": "<0>", "strength": 0.0, "lean": 0.0}


def test_the_page_of_a_broken_off_stream_holds_what_was_read(watch: Watch, tmp_path: Path) -> None:
    def records() -> Iterator[dict[str, object]]:
        yield {"token": "read", "strength": 1.0, "lean": 0.0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(records(), watch, colour=True, page=tmp_path / "page.html")
    assert ">read</span>" in (tmp_path / "page.html").read_text()


def test_nobody_reads_any_more(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        show([{"token": "a", "strength": 1.0, "lean": 0.0}] * 3, watch, colour=False, page=None)


@pytest.fixture
def subject(
    planted: SparseTransformer,
    planted_means: Means,
    make_windows: Callable[..., Tensor],
    word_tokenizer: PreTrainedTokenizerFast,
) -> Subject:
    return Subject(name="planted", model=planted, tokenizer=word_tokenizer, sample=make_windows(), means=planted_means)


@pytest.fixture
def task(make_task_file: Callable[..., Path], tmp_path: Path) -> Task:
    return load_task(str(make_task_file(tmp_path / "planted.jsonl")))


def test_rates_are_told_on_windows_that_the_calibration_never_saw(
    subject: Subject, task: Task, make_prompts: Callable[..., TaskBatch], choose: Callable[..., dict[str, Tensor]]
) -> None:
    """One half of the windows is of other words than the other, and a head of the sample would be of one half alone."""
    sample = subject.sample.clone()
    sample[: len(sample) // 2] = 2
    mixed = replace(subject, sample=sample)
    effects = node_effects(subject.model, make_prompts(16, 1), constants(subject.means))
    made = watch_nodes(subject, choose(subject.model), effects, "planted", provenance={"windows": 16})
    rows = torch.linspace(0, len(sample) - 1, 16).round().long()
    watch = made.calibrated(subject.model, sample[rows, :-1], fpr=0.2, signal="strength")
    found = evaluation(watch, mixed, task, pairs=4)
    assert found["rates"]["0.2"] == pytest.approx(0.2, abs=0.06) and "code" not in found
    with pytest.raises(ValueError, match="calibrated on other windows"):
        evaluation(watch, subject, task, pairs=4)
    alone = replace(subject, sample=sample[:1])
    one = replace(made, provenance={"windows": 1}).calibrated(
        subject.model, sample[:1, :-1], fpr=0.2, signal="strength"
    )
    with pytest.raises(ValueError, match="all of the 1 held-out windows"):
        evaluation(one, alone, task, pairs=4)

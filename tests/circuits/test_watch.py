"""Watches: what is read, scores by hand, calibration, files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.artifact import ArtifactError, load_tensors, save_tensors
from distill.circuits.ablation import Means
from distill.circuits.answers import answer_difference
from distill.circuits.circuit import CircuitMismatchError
from distill.circuits.editing import constants
from distill.circuits.subject import Subject
from distill.circuits.tasks import TaskBatch
from distill.circuits.watch import (
    NodeGauge,
    StreamGauge,
    Watch,
    calibration_rows,
    node_effects,
    readings,
    watch_nodes,
)
from distill.model import SparseTransformer
from distill.model.sites import Edit, Record


@pytest.fixture
def subject(
    planted: SparseTransformer,
    planted_means: Means,
    make_windows: Callable[..., Tensor],
    word_tokenizer: PreTrainedTokenizerFast,
) -> Subject:
    return Subject(name="planted", model=planted, tokenizer=word_tokenizer, sample=make_windows(), means=planted_means)


@pytest.fixture
def watch(subject: Subject, make_prompts: Callable[..., TaskBatch], choose: Callable[..., dict[str, Tensor]]) -> Watch:
    effects = node_effects(subject.model, make_prompts(16, 1), constants(subject.means))
    made = watch_nodes(subject, choose(subject.model), effects, "planted", provenance={"windows": 32})
    return made.calibrated(subject.model, subject.sample[:32], fpr=0.1, signal="strength")


def test_gauges_read_what_a_record_holds(planted: SparseTransformer, make_windows: Callable[..., Tensor]) -> None:
    tokens = make_windows()[:5]
    record = Record()
    with torch.no_grad():
        planted.run(tokens, tap=record)
    names = ("0.attn.resid_delta.3", "0.attn.act_in.1", "0.attn.resid_delta.7")
    found = readings(planted, NodeGauge(names), tokens, rows=2)
    expected = [record.values["0.attn.resid_delta"][..., 3], record.values["0.attn.act_in"][..., 1],
                record.values["0.attn.resid_delta"][..., 7]]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected, -1))
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    places = {"0.resid_mid": torch.tensor([2, 0]), "final_resid": torch.tensor([1])}
    offset = torch.tensor([0.5, 0.0, -1.0])
    gauge = StreamGauge(places, {"0.resid_mid": rows, "final_resid": rows[:1]}, offset)
    found = readings(planted, gauge, tokens)
    middle = record.values["0.resid_mid"] @ rows.T
    torch.testing.assert_close(found[..., 2], middle[..., 0] - 1.0)
    torch.testing.assert_close(found[..., 0], middle[..., 1] + 0.5)
    torch.testing.assert_close(found[..., 1], record.values["final_resid"] @ rows[0])


def test_scores_by_hand() -> None:
    one = Watch(
        model="", model_name="", task="", names=("a", "b"), mean=torch.tensor([1.0, 0.0]),
        spread=torch.tensor([2.0, 0.5]), effect=torch.tensor([3.0, 1.0]), slope=torch.tensor([-1.0, 2.0]),
        threshold=1.0,
    )  # fmt: skip
    # z is (1, -1), then (0, 20): the latter counts as 3 towards strength, and in full towards the lean.
    found = one.scores(torch.tensor([[3.0, -0.5], [1.0, 10.0]]))
    assert found.strength.tolist() == pytest.approx([1.0, 0.75]) and found.lean.tolist() == pytest.approx([-3.0, 40.0])
    assert one.flags(found).tolist() == [False, False]
    assert replace(one, signal="lean").flags(found).tolist() == [True, True]


def test_effects_are_those_of_moving_a_node(
    planted: SparseTransformer, planted_means: Means, make_prompts: Callable[..., TaskBatch]
) -> None:
    batch = make_prompts(8, 1)
    values = constants(planted_means)
    effects = node_effects(planted, batch, values)
    sign = 1.0 - 2.0 * batch.labels
    rows, step = torch.arange(len(batch)), 1e-2

    def moved(x: Tensor) -> Tensor:
        x = x.clone()
        x[rows, batch.last, 3] += step
        return x

    with torch.no_grad():
        change = answer_difference(planted, batch, Edit({"0.attn.resid_delta": moved})) - answer_difference(
            planted, batch
        )
        record = Record({"0.attn.resid_delta"})
        planted.run(batch.tokens, tap=record)
    slope = change / step * sign
    assert float(effects.gradient["0.attn.resid_delta"][3]) == pytest.approx(float(slope.mean()), rel=0.05)
    away = record.values["0.attn.resid_delta"][rows, batch.last, 3] - values["0.attn.resid_delta"][3]
    worth = float((slope * sign * sign * away * sign).mean())
    assert float(effects.worth["0.attn.resid_delta"][3]) == pytest.approx(worth, rel=0.05)
    assert float(effects.worth["0.attn.resid_delta"][3]) == float(effects.worth["0.attn.resid_delta"].max()) > 0


def test_the_lean_tells_the_two_classes_apart(
    watch: Watch, planted: SparseTransformer, make_prompts: Callable[..., TaskBatch]
) -> None:
    batch = make_prompts(12, 5)
    lean = watch.score(planted, batch.tokens).lean[torch.arange(len(batch)), batch.last]
    assert float(lean[batch.labels == 0].min()) > float(lean[batch.labels == 1].max())


def test_the_threshold_is_exceeded_at_the_stated_rate(watch: Watch, subject: Subject) -> None:
    flags = watch.flags(watch.score(subject.model, subject.sample[:32]))
    assert float(flags.double().mean()) == pytest.approx(0.1, abs=0.02)
    lean = watch.calibrated(subject.model, subject.sample[:32], fpr=0.2, signal="lean")
    assert float(lean.flags(lean.score(subject.model, subject.sample[:32])).double().mean()) == pytest.approx(
        0.2, abs=0.03
    )
    # Calibrated twice on the same text is calibrated once: the slope is per spread.
    torch.testing.assert_close(lean.slope, watch.slope)


def test_files(watch: Watch, tmp_path: Path) -> None:
    loaded = Watch.load(watch.save(tmp_path / "one.watch.safetensors"))
    assert loaded.names == watch.names and loaded.threshold == watch.threshold and loaded.provenance == {"windows": 32}
    assert torch.equal(loaded.slope, watch.slope) and loaded.offset is None
    rows = {"final_resid": torch.ones(2, 16)}
    places = {"final_resid": torch.tensor([0, 1])}
    two = {name: getattr(watch, name)[:2] for name in ("mean", "spread", "effect", "slope")}
    stream = replace(watch, names=("a", "b"), rows=rows, places=places, offset=torch.zeros(2), **two)
    again = Watch.load(stream.save(tmp_path / "two.watch.safetensors"))
    assert torch.equal(again.rows["final_resid"], rows["final_resid"]) and again.places["final_resid"].tolist() == [
        0,
        1,
    ]
    with pytest.raises(ValueError, match="names ending in"):
        watch.save(tmp_path / "one.safetensors")
    with pytest.raises(ArtifactError):
        Watch.load(tmp_path / "none.watch.safetensors")


Spoil = Callable[[dict[str, Tensor], dict[str, object]], object]
WRONG: dict[str, tuple[Spoil, str]] = {
    "field missing": (lambda tensors, head: head.pop("fpr"), "holds no 'fpr'"),
    "field of another kind": (lambda tensors, head: head.update(task=7), "task is 7, allowed is a text"),
    "rate": (lambda tensors, head: head.update(fpr=1.5), "allowed are"),
    "signal": (lambda tensors, head: head.update(signal="noise"), "signal 'noise'"),
    "name of no node": (lambda tensors, head: head["names"].__setitem__(0, "nowhere"), "nowhere"),
    "name that is no text": (lambda tensors, head: head["names"].__setitem__(0, 3), "allowed are names of nodes"),
    "tensor missing": (lambda tensors, head: tensors.pop("slope"), "slope is no row of"),
    "shape": (lambda tensors, head: tensors.update(mean=tensors["mean"][:1]), "mean is no row of"),
    "whole numbers": (lambda tensors, head: tensors.update(effect=tensors["effect"].long()), "effect is no row of"),
    "not finite": (lambda tensors, head: tensors["slope"].__setitem__(0, float("nan")), "slope is no row of"),
    "no spread": (lambda tensors, head: tensors["spread"].__setitem__(0, 0.0), "spread must be above 0"),
    "rows without places": (lambda tensors, head: tensors.update({"rows/final_resid": torch.ones(2, 16)}), "rows and"),
    "offset without rows": (
        lambda tensors, head: tensors.update(offset=torch.zeros(len(tensors["mean"]))), "rows and places",
    ),
    "place twice": (
        lambda tensors, head: tensors.update(
            {"rows/final_resid": torch.ones(len(tensors["mean"]), 16),
             "places/final_resid": torch.zeros(len(tensors["mean"]), dtype=torch.long),
             "offset": torch.zeros(len(tensors["mean"]))}
        ), "rows and places",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_a_file_holds_is_checked(what: str, watch: Watch, tmp_path: Path) -> None:
    """Sealed anew, as somebody else's writer would have done it."""
    spoil, words = WRONG[what]
    good, bad = watch.save(tmp_path / "good.watch.safetensors"), tmp_path / "bad.watch.safetensors"
    tensors, head = load_tensors(good, kind="watch")
    spoil(tensors, head)
    save_tensors(bad, tensors, head)
    with pytest.raises(ArtifactError, match=words):
        Watch.load(bad)


def test_windows_of_the_calibration_are_spread_and_leave_some(subject: Subject, watch: Watch) -> None:
    assert [part.tolist() for part in calibration_rows(9, 3)] == [[0, 4, 8], [1, 2, 3, 5, 6, 7]]
    assert [part.tolist() for part in calibration_rows(1, 3)] == [[0], []]
    chosen, rest = calibration_rows(7, 100)
    assert len(chosen) == 3 and sorted([*chosen.tolist(), *rest.tolist()]) == list(range(7))


@given(total=st.integers(1, 400), windows=st.integers(1, 400))
def test_calibration_and_judgement_share_no_window(total: int, windows: int) -> None:
    chosen, rest = calibration_rows(total, windows)
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(total))
    assert len(chosen) == max(1, min(windows, total // 2))
    assert total == 1 or (int(chosen[0]) == 0 and (len(chosen) == 1 or int(chosen[-1]) == total - 1))


def test_what_is_refused(watch: Watch, subject: Subject, make_planted: Callable[..., SparseTransformer]) -> None:
    with pytest.raises(CircuitMismatchError, match="load the model it was made for"):
        watch.score(make_planted(7), subject.sample[:2])
    for options, words in (({"fpr": 0.0}, "fpr: got 0.0"), ({"signal": "noise"}, "signal: got 'noise'")):
        with pytest.raises(ValueError, match=words):
            watch.calibrated(subject.model, subject.sample[:2], **{"fpr": 0.1, "signal": "lean", **options})
    with pytest.raises(ValueError, match="no node of the circuit that can be read has any effect"):
        replace(watch, effect=torch.zeros_like(watch.effect)).calibrated(
            subject.model, subject.sample[:2], fpr=0.1, signal="lean"
        )

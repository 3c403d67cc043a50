"""The account of an edit: what is measured, random edits of equal size, the choice of nodes."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.answers import CHANCE
from distill.circuits.edit_account import (
    Account,
    Measures,
    Text,
    Yardstick,
    account,
    away_from_answers,
    choose,
    random_edits,
    task_difference,
    text_losses,
)
from distill.circuits.editing import Change, Cut, ModelEdit, constants, plan
from distill.circuits.tasks import TaskBatch
from distill.model import SparseTransformer
from distill.model.sites import split_node


def words(model: SparseTransformer, make_windows: Callable[..., Tensor], batch: TaskBatch) -> Text:
    return away_from_answers(make_windows(1)[:8], batch)


def test_ablating_the_planted_path_takes_the_task_away(
    planted: SparseTransformer,
    planted_means: Means,
    make_prompts: Callable[..., TaskBatch],
    make_windows: Callable[..., Tensor],
) -> None:
    batch = make_prompts(24, 1)
    text = words(planted, make_windows, batch)
    edit = plan("ablate", ["0.attn.act_in.2"], constants(planted_means))
    yardstick = Yardstick(batch, {"same": batch}, text)
    controls = random_edits(planted, edit, planted_means, 3, seed=0)
    found = account(planted, edit, controls, yardstick)
    assert found.before.task < 0.1 and found.before.accuracy == 1
    assert found.after.task > 0.6 and found.after.others["same"] == found.after.task
    # The task stands in as another task here: all that the model knew of it is lost.
    assert found.after.lost(found.before)["same"] == pytest.approx(
        (found.after.task - found.before.task) / (CHANCE - found.before.task)
    )
    assert len(found.random) == 3 and set(found.summary()) >= {"random median", "random least", "random most"}
    assert found.after == yardstick.measure(planted, edit.tap(planted)) or found.after.task == pytest.approx(
        yardstick.measure(planted, edit.tap(planted)).task, abs=1e-5
    )
    assert "random most" in found.table() and json.loads(json.dumps(found.to_json()))["prompts"] == 48


def test_losses_by_hand(
    planted: SparseTransformer, make_prompts: Callable[..., TaskBatch], make_windows: Callable[..., Tensor]
) -> None:
    batch = make_prompts(6, 1)
    tokens = make_windows(1)[:3]
    away = torch.zeros(3, 11, dtype=torch.bool)
    away[1, 4] = True
    every, one = text_losses(planted, Text(tokens=tokens, away=away, what=""), rows=2)
    with torch.no_grad():
        logs = planted.run(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    assert every == pytest.approx(-float(logs.mean()), abs=1e-5) and one == pytest.approx(-float(logs[1, 4]), abs=1e-5)
    measured = Yardstick(batch, {}, Text(tokens=tokens, away=away, what="")).measure(planted)
    difference = task_difference(planted, batch)
    assert measured.plain == pytest.approx(float(torch.nn.functional.softplus(-difference).mean()))
    assert measured.task <= measured.plain + 1e-9
    assert not bool(away_from_answers(torch.tensor([[0, 5, 6, 1]]), batch).away[0, :2].any())


def test_what_the_model_never_knew_is_not_lost() -> None:
    known = {"task": 0.0, "plain": 0.0, "accuracy": 1.0, "text": 2.0, "away": 2.0}
    before = Measures(**known, others={"done": 0.1, "hardly": 0.5})
    after = Measures(**{**known, "task": CHANCE, "text": 2.5}, others={"done": 0.1 + (CHANCE - 0.1) / 2, "hardly": 0.6})
    assert after.lost(before) == {"done": pytest.approx(0.5)}
    found = Account(edit=ModelEdit(), before=before, after=after, random=(), away="", prompts=1, tokens=1).summary()
    assert found["after"]["lost"] == pytest.approx(0.5) and found["after"]["text"] == pytest.approx(0.5)
    assert set(found) == {"before", "after"} and math.isclose(found["before"]["worst"], 0)


def test_without_another_task_nothing_is_said_of_loss() -> None:
    """0% would read as a finding."""
    known = {"task": 0.0, "plain": 0.0, "accuracy": 1.0, "text": 2.0, "away": 2.0}
    one = Measures(**known, others={"hardly": 0.5})
    found = Account(edit=ModelEdit(), before=one, after=one, random=(one, one), away="", prompts=1, tokens=1)
    rows = found.summary()
    assert {row["lost"] for row in rows.values()} == {row["worst"] for row in rows.values()} == {None}
    assert rows["random median"]["task"] == 0.0 and json.loads(json.dumps(found.to_json()))["summary"]["after"]
    assert found.table().count("none") == 10


def test_random_edits_are_matched(planted: SparseTransformer, planted_means: Means) -> None:
    values = constants(planted_means)
    size = planted_means.magnitude
    edit = ModelEdit(
        changes=(
            Change(node="0.mlp.act_in.5", value=float(values["0.mlp.act_in"][5] + 2 * size["0.mlp.act_in"][5])),
            Change(node="0.mlp.post_act.3", factor=-0.5, value=0.0),
        ),
        cuts=(Cut(source="0.attn.act_in.0", target="0.attn.v.0", value=float(values["0.attn.act_in"][0])),),
    )
    for one in random_edits(planted, edit, planted_means, 4, seed=1):
        assert [split_node(change.node)[0] for change in one.changes] == ["0.mlp.act_in", "0.mlp.post_act"]
        read, neuron = one.changes
        channel = split_node(read.node)[1]
        assert read.value == pytest.approx(
            float(values["0.mlp.act_in"][channel] + 2 * size["0.mlp.act_in"][channel]), abs=1e-5
        )
        assert (neuron.factor, neuron.value) == (-0.5, 0.0)
        (cut,) = one.cuts
        assert (cut.source, cut.target) != ("0.attn.act_in.0", "0.attn.v.0") and cut.target.startswith("0.attn.v.")
        one.check(planted)
    assert random_edits(planted, edit, planted_means, 2, seed=1) == random_edits(
        planted, edit, planted_means, 2, seed=1
    )


def test_the_choice_finds_the_planted_node_among_others(
    planted: SparseTransformer,
    planted_means: Means,
    make_prompts: Callable[..., TaskBatch],
    make_windows: Callable[..., Tensor],
) -> None:
    batch, values = make_prompts(16, 2), constants(planted_means)
    names = [f"0.mlp.act_in.{c}" for c in range(6)] + ["0.attn.act_in.2", "0.mlp.post_act.1"]
    text = words(planted, make_windows, batch)
    chosen = choose(planted, names, lambda some: plan("ablate", some, values), batch, text, most=3, enough=0.8)
    assert chosen == ("0.attn.act_in.2",)
    with pytest.raises(ValueError, match="can be edited like this exactly"):
        choose(planted, [], lambda some: plan("ablate", some, values), batch, text)

"""The scorecard: the planted circuit is faithful, false ones are not, and each is told in words."""

import json
from dataclasses import replace

import pytest

from distill.circuits.circuit import CircuitMismatchError
from distill.circuits.faithfulness import Check, Limits
from distill.circuits.scorecard import CHECKS, FAST, Evidence, Scorecard, check_free, few_pairs, judge, summary
from distill.circuits.versus import versus

QUICK = Limits(sets=20, draws=8, random_circuits=8, subsets=6, ascent_steps=8, interchange_draws=2, worst_steps=2)


@pytest.fixture
def evidence(make_prompts, make_windows):
    return Evidence(test=make_prompts(24, 5), shift=make_prompts(16, 7, 14), others={}, corpus=make_windows(3))


@pytest.fixture
def make_circuit(choose, planted, planted_means, planted_names):
    from distill.circuits.answers import Calibration
    from distill.circuits.circuit import Circuit

    def make(names=planted_names, model=planted):
        return Circuit(
            model=model.fingerprint(), model_name="planted", task="opener", nodes=choose(model, names), scores={},
            means=planted_means, calibration=Calibration(), losses={"full": 0.01}, target=0.15,
        )  # fmt: skip

    return make


def record(name: str, verdict: str, reason: str = "of a reason", p: float | None = None) -> Check:
    return Check(name=name, value=1.0, control=(2.0,), threshold=3.0, verdict=verdict, reason=reason, n=4, p=p)


def card(*checks: Check) -> Scorecard:
    about = {"counts": {"nodes": 7.0, "edges_pruned": 4.0}, "target": 0.15, "objective": "paper"}
    return Scorecard(circuit="one.planted", model="planted", task="one", checks=checks, limits=QUICK, seed=0,
                     about=about, seconds={})  # fmt: skip


def test_the_planted_circuit_passes_everything(planted, make_circuit, evidence):
    found = judge(planted, make_circuit(), evidence, limits=QUICK, full=True)
    assert [check.name for check in found.checks] == [name for name in CHECKS if name not in ("controls", "stability")]
    assert {check.name: check.verdict for check in found.checks if check.verdict != "pass"} == {}
    assert found.verdict.startswith("faithful within tested limits: 10 checks, none against it")
    assert set(found.seconds) == {check.name for check in found.checks}


def test_a_false_circuit_is_told_apart_in_words(planted, make_circuit, planted_names, evidence):
    asking = ("0.attn.act_in.1", "0.attn.act_in.2", "0.attn.q.0", "0.attn.k.0")
    even = make_circuit(tuple(name for name in planted_names if name not in asking))
    found = judge(planted, even, evidence, limits=QUICK, name="even")
    assert [check.name for check in found.checks] == list(FAST)
    assert {"sufficiency", "role", "shift"} <= set(found.flags)
    assert found.verdict.startswith("suspicious because ") and "attends evenly" in found.verdict
    idle = judge(planted, make_circuit(("0.mlp.post_act.1",)), evidence, limits=QUICK)
    assert idle.verdict.startswith("artefact because without the circuit")


def test_the_file_says_it_all(planted, make_circuit, evidence, tmp_path):
    found = judge(planted, make_circuit(), replace(evidence, shift=None), limits=QUICK, seed=3, name="mine")
    written = json.loads(found.save(tmp_path / "scorecard.json").read_text())
    assert written["circuit"] == "mine" and written["model"] == "planted" and written["task"] == "opener"
    for check in written["checks"]:
        assert {"name", "value", "control", "threshold", "verdict", "n", "seed", "p", "p_corrected"} <= set(check)
    assert written["checks"][-1]["verdict"] == "skipped" and written["checks"][-1]["value"] is None
    assert written["limits"]["sets"] == 20 and written["seed"] == 3
    assert written["untested"] == [name for name in CHECKS if name not in FAST or name == "shift"]
    counts = written["about"]["counts"]
    assert {name: type(value) for name, value in counts.items()} == {
        "nodes": int, "edges_induced": int, "edges_pruned": int, "edges_embed": int, "edges_null": float,
    }  # fmt: skip
    assert counts["edges_pruned"] == 4 and written["about"]["losses"] == {"full": 0.01}
    again = judge(planted, make_circuit(), replace(evidence, shift=None), limits=QUICK, seed=3, name="mine")
    assert [check.to_json() for check in again.checks] == [check.to_json() for check in found.checks]


def test_verdicts_in_words():
    fine = card(record("sufficiency", "pass"), record("shift", "skipped"))
    assert fine.verdict.startswith("faithful within tested limits: 1 checks, none against it; not tested: ablations,")
    assert fine.flags == () and fine.head == "faithful within tested limits"
    assert fine.untested == tuple(name for name in CHECKS if name != "sufficiency")
    flagged = card(record("sufficiency", "pass"), record("role", "flag", "of its role"))
    assert flagged.verdict == "suspicious because of its role [role]"
    artefact = card(record("role", "flag", "of its role"), record("controls", "artefact", "of noise"))
    assert artefact.verdict == "artefact because of noise [controls]; of its role [role]"
    open_one = card(record("necessity", "pass", p=0.2), record("shift", "pass", p=0.001))
    assert open_one.chances == pytest.approx({"necessity": 0.2, "shift": 0.002})
    assert "chance is not excluded for necessity (p 0.2); not tested: " in open_one.verdict
    every = card(*(record(name, "pass") for name in CHECKS))
    assert every.untested == () and every.verdict == "faithful within tested limits: 12 checks, none against it"


def test_what_is_not_tested_does_not_speak_for_a_circuit():
    none = card(record("sufficiency", "skipped"), record("shift", "skipped"))
    assert none.head == "not tested" and none.untested == CHECKS and none.to_json()["untested"] == list(CHECKS)
    assert none.verdict.startswith("not tested: 0 checks")


def test_tables():
    printed = card(record("role", "flag", "of its role", p=0.01)).table()
    assert "7 nodes, 4 edges pruned" in printed and "verdict: suspicious" in printed
    row = next(line for line in printed.splitlines() if line.startswith("role")).split()
    assert row == ["role", "1", "2", "3", "0.01", "4", "flag"]
    rows = summary([card(record("role", "flag")), card(record("role", "pass"))]).splitlines()
    assert rows[1].endswith("1 of 1, suspicious: role") and rows[2].endswith("0 of 1, faithful within tested limits")


def test_only_a_scorecard_of_the_same_task_and_model_is_overwritten(make_circuit, tmp_path):
    path, circuit = tmp_path / "scorecard.json", make_circuit()
    check_free(path, circuit)
    card(record("role", "pass")).save(path)
    check_free(path, replace(circuit, task="one"))
    with pytest.raises(ValueError, match="is the scorecard of a circuit of 'one' in 'planted'"):
        check_free(path, circuit)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"scorecard.json"):
            check_free(path, circuit)


def test_fewer_pairs_of_long_prompts(make_prompts):
    batch = make_prompts(4, 0)  # 10 tokens
    assert few_pairs(batch, Limits(few_pairs=16, few_tokens=640)) == 16
    assert few_pairs(batch, Limits(few_pairs=16, few_tokens=200)) == 10
    assert few_pairs(batch, Limits(few_pairs=16, few_tokens=20)) == 8


def test_another_model_is_refused(make_planted, make_circuit, evidence):
    with pytest.raises(CircuitMismatchError):
        judge(make_planted(1), make_circuit(), evidence)


def test_two_circuits_side_by_side(planted, make_circuit, planted_names, make_prompts):
    # Three more nodes, which two weights join.
    one, other = make_circuit(), make_circuit((*planted_names, "0.attn.act_in.6", "0.attn.v.1", "0.attn.resid_delta.8"))
    batch = make_prompts(8, 5)
    cards = [replace(card(record("role", "pass")), circuit=name) for name in ("one", "other")]
    both = versus(cards, [planted, planted], [one, other], [batch, batch])
    assert both.shared == {"jaccard_nodes": 7 / 10, "jaccard_edges": 4 / 6, "nodes_in_both": 7.0}
    assert both.transfer is not None and max(both.transfer.values()) < 0.01 and len(both.transfer) == 4
    assert "jaccard nodes 0.7" in both.table() and "loss of one on the prompts of other" in both.table()
    assert json.dumps(both.to_json())


def test_circuits_of_different_models_share_no_nodes(planted, make_planted, make_circuit, make_prompts):
    second = make_planted(1)
    cards, batch = [card(record("role", "pass")), card(record("role", "flag"))], make_prompts(4, 5)
    both = versus(cards, [planted, second], [make_circuit(), make_circuit(model=second)], [batch, batch])
    assert both.shared is None and both.transfer is None and "different models" in both.table()
    with pytest.raises(ValueError, match="circuits: got 1; allowed are two"):
        versus(cards[:1], [planted], [make_circuit()], [batch])


@pytest.mark.gpu
def test_a_gpu_finds_the_same(planted, make_circuit, evidence):
    circuit = make_circuit()
    here = judge(planted, circuit, evidence, limits=QUICK, full=True)
    there = judge(planted.to("cuda"), circuit, evidence, limits=QUICK, full=True)
    assert [check.verdict for check in there.checks] == [check.verdict for check in here.checks]
    values = {check.name: check.value for check in here.checks if check.name != "adversarial"}
    found = {check.name: check.value for check in there.checks if check.name != "adversarial"}
    assert found == pytest.approx(values, abs=1e-3)

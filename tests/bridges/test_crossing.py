"""What is added to a comparison about a student's circuit and its dense model's, on two small models joined by the
identity."""

import json
from dataclasses import replace

import pytest
import torch

from bridges import Bridges, CompareConfig, Comparison, Lineup, add_crossings, add_subspaces, known_circuits
from bridges.compare import _is_wanted, empty_losses
from bridges.crossing import correspondence
from bridges.interchange import interchange
from bridges.report import bridge_lines, crossing_lines
from bridges.transport import UNRELATED
from distill.circuits import Circuit, PruneConfig, Subject, Task, encode, node_means
from distill.circuits.answers import Calibration
from distill.circuits.task_files import read_lines
from distill.data.tokens import train_tokenizer
from distill.model import Architecture, SparseTransformer

CONFIG = CompareConfig(subspaces=3, able=0.69)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "quotes.jsonl"
    lines = [
        {"clean": f"f('{word}", "corrupt": f'f("{word}', "answer": "')", "other": '")', "split": split}
        for split, words in (("train", "abcd"), ("val", "efgh"), ("test", "ijkl"))
        for word in words
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return read_lines(path)


def subject(name: str, seed: int) -> Subject:
    text = "f('a b')\nf(\"a b\")\nfor item in items:\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=262)
    shape = Architecture(vocab_size=262, context=24, n_layer=1, d_model=8, d_head=8, topk_fraction=None)
    model = SparseTransformer.build(shape, seed=seed).eval()
    sample = torch.tensor(tokenizer(text).input_ids)[: 8 * 17].view(8, 17)
    return Subject(name=name, model=model, tokenizer=tokenizer, sample=sample, means=node_means(model, sample[:, :-1]))


def circuit_of(one: Subject, task: Task, share: float = 0.15) -> Circuit:
    generator = torch.Generator().manual_seed(0)
    return Circuit(
        model=one.model.fingerprint(),
        model_name=one.name,
        task=task.name,
        nodes={site: torch.rand(width, generator=generator) < share for site, width in one.model.widths.items()},
        scores={site: torch.zeros(width) for site, width in one.model.widths.items()},
        means=one.means,
        calibration=Calibration(),
        losses={},
        target=0.15,
        provenance={"config": vars(PruneConfig())},
    )


@pytest.fixture(scope="module")
def lineup() -> Lineup:
    torch.set_num_threads(1)
    teacher, sparse = subject("dense_gpt2", 0), subject("sparse", 1)
    student = Subject(**{**vars(teacher), "name": "student"})
    return Lineup(subjects=[sparse, subject("dense", 2), teacher, student], bridges=Bridges.identity(1, 8))


def started(lineup: Lineup, task: Task) -> Comparison:
    names = ("sparse", "dense_gpt2", "student")
    subjects = {one.name: one for one in lineup.subjects}
    rows = {task.name: {name: {"loss_full": 0.1} for name in subjects}}
    circuits = {(task.name, name): circuit_of(subjects[name], task) for name in names}
    return Comparison(record={"tasks": rows}, circuits=circuits)


def test_a_model_and_its_copy_correspond(lineup: Lineup, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    # Models that nobody trained are right by chance.
    monkeypatch.setattr("bridges.interchange.ACCURATE", 0.0)
    comparison = add_crossings(started(lineup, task), lineup, [task], CONFIG)
    row = comparison.record["tasks"][task.name]
    found = row["correspondence"]
    # The same channels on both sides.
    known = [value for value in found["overlap"].values() if value is not None]
    assert known and known == pytest.approx([1.0] * len(known))
    assert 0 < found["caused"] <= 1 and found["caused_random"] == sorted(found["caused_random"])
    crossed = row["interchange"]
    assert crossed["pairs"] == 4 and crossed["skipped"] == 0 and len(crossed["sites"]) == 3
    for one in crossed["sites"]:
        assert one["ceiling"] == pytest.approx(1.0, abs=1e-3)
        assert len(one["controls"]) == 20 and one["unrelated_ceiling"] is not None
    json.dumps(row, allow_nan=False)
    lines = crossing_lines(comparison.record)
    assert any("interchange" in line for line in lines) and any("heads and neurons" in line for line in lines)


def test_pairs_passed_over_in_drawing_are_counted(lineup: Lineup, task: Task) -> None:
    teacher = lineup.subjects[2]
    batch = replace(encode(task, teacher.tokenizer, "test", 4, 0, context=24), dropped=3)
    live = {"0.resid_in": torch.ones(8, dtype=torch.bool)}
    found = interchange(teacher.model, teacher.model, Bridges.identity(1, 8), batch, live)
    assert found.pairs == 4 and found.skipped == 3


def test_planted_parts_cause_all_and_random_ones_their_share(lineup: Lineup, task: Task) -> None:
    """Two neurons alone write the channels that the student's circuit lives in: they cause all that happens there, and
    as many neurons at random cause, on average, their number's share."""
    one = subject("dense_gpt2", 3)
    planted, channels = [3, 7], [0, 2, 5]
    write = one.model.matrices()["0.mlp.post_act", "0.mlp.resid_delta"]
    others = ~torch.isin(torch.arange(write.shape[1]), torch.tensor(planted))
    for channel in channels:
        write[channel, others] = 0.0
    means = node_means(one.model, one.sample[:, :-1])
    one = Subject(**{**vars(one), "means": means})
    none = {site: torch.zeros(width, dtype=torch.bool) for site, width in one.model.widths.items()}
    ours = replace(
        circuit_of(one, task), nodes=none | {"0.mlp.resid_delta": torch.isin(torch.arange(8), torch.tensor(channels))}
    )
    batch = encode(task, one.tokenizer, "test", 4, 0, context=24)
    active = {site: torch.ones(8, dtype=torch.bool) for site in ("0.resid_in", "0.resid_mid", "final_resid")}

    def caused(neurons: list[int]) -> dict:
        mask = torch.isin(torch.arange(32), torch.tensor(neurons))
        theirs = replace(ours, nodes=none | {"0.mlp.post_act": mask})
        return correspondence(one, Bridges.identity(1, 8), batch, theirs, ours, active, seed=0)

    whole = caused(planted)
    assert whole["units"] == 2 and whole["caused"] == pytest.approx(1.0) and whole["p"] < 0.02
    drawn = [caused([i, i + 1])["caused"] for i in range(0, 32, 2)]
    assert sum(drawn) == pytest.approx(1.0)
    apart = caused([10, 11])
    assert apart["caused"] == 0.0 and apart["p"] == 1.0


def test_the_unrelated_student_stands_beside_the_subspaces(lineup: Lineup, task: Task) -> None:
    comparison = add_subspaces(started(lineup, task), lineup, [task], CONFIG)
    tests = comparison.record["tasks"][task.name]["bridge"]
    mine = [one for one in tests if one["test"] in ("sufficiency", "necessity")]
    assert mine and all(UNRELATED in one["other"] for one in mine)
    assert bridge_lines(comparison.record)


def test_without_a_bridge_nothing_crosses(lineup: Lineup, task: Task) -> None:
    alone = Lineup(subjects=lineup.subjects, bridges=None)
    row = add_crossings(started(lineup, task), alone, [task], CONFIG).record["tasks"][task.name]
    assert row["interchange"] is None and row["correspondence"] is None


def test_the_empty_model_is_calibrated_on_training_prompts(lineup: Lineup, task: Task) -> None:
    one = lineup.subjects[0]
    batch = encode(task, one.tokenizer, "test", 4, 0, context=24)
    config = CompareConfig(prune=PruneConfig(train_pairs=4))
    found = empty_losses(one, task, batch, config)
    assert found["loss_empty"] is not None and found["loss_empty_calibrated"] is not None
    assert found["loss_empty_calibrated"] <= found["loss_empty"] + 0.05


def test_circuits_that_are_known_are_taken_only_where_they_fit(
    lineup: Lineup, task: Task, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("circuits")
    started(lineup, task).save(folder)
    known = known_circuits(folder)
    assert set(known) == {(task.name, name) for name in ("sparse", "dense_gpt2", "student")}
    sparse, dense = lineup.subjects[:2]
    (circuit,) = known[task.name, "sparse"]
    assert _is_wanted(circuit, sparse, PruneConfig(target=0.15))
    assert not _is_wanted(circuit, dense, PruneConfig(target=0.15))
    assert not _is_wanted(circuit, sparse, PruneConfig(target=0.1))
    # One that was made before there was a setting had its default; ablation values of other text are other values.
    settings = {name: value for name, value in circuit.provenance["config"].items() if name != "screen"}
    old = replace(circuit, provenance={**circuit.provenance, "config": settings})
    assert _is_wanted(old, sparse, PruneConfig(target=0.15))
    assert not _is_wanted(old, sparse, PruneConfig(target=0.15, screen=PruneConfig().screen + 1))
    elsewhere = replace(sparse, means=replace(sparse.means, data="0" * 64))
    assert not _is_wanted(circuit, elsewhere, PruneConfig(target=0.15))

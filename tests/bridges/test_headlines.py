"""Published results rerun: the measures by hand."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from bridges import CompareConfig
from bridges.headlines import HEADLINES, Found, Setting, command_line, family_names, save, table
from bridges.headlines.baselines import _picture, baselines
from bridges.headlines.circuits import _interval, bars, edges, necessity
from bridges.headlines.models import _wider, frontier, kurtosis
from distill.artifact import read_record
from distill.circuits import PruneConfig, Subject, Task, encode, node_means, prune
from distill.circuits.task_files import read_lines
from distill.circuits.tasks import logit_difference
from distill.data.tokens import train_tokenizer
from distill.model import Architecture, SparseTransformer


def test_kurtosis_by_hand() -> None:
    # Two values alike: fourth moment 1, variance 1. One of four: deviations (3, -1, -1, -1) / 4.
    rows = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    one = (81 + 3) / 4 / (12 / 4) ** 2
    assert kurtosis(rows).tolist() == pytest.approx([1.0, one, 0.0])


def test_kurtosis_of_a_normal_distribution_is_three() -> None:
    x = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(x).tolist() == pytest.approx([3.0] * 4, abs=0.1)


def test_wider_pairs() -> None:
    points = {
        "narrow": {"width": 64.0, "nonzeros": 1000.0},
        "wide": {"width": 128.0, "nonzeros": 1050.0},
        "dense": {"width": 256.0, "nonzeros": 9000.0},
    }
    assert _wider(points) == [(points["wide"], points["narrow"])]


def test_interval_of_ratios() -> None:
    assert _interval(np.log([2.0])) == pytest.approx((2.0, 2.0))
    low, high = _interval(np.log([2.0, 4.0, 8.0]))
    assert 2.0 <= low < 4.0 < high <= 8.0


def test_outcomes_are_saved_with_their_rules(tmp_path: Path) -> None:
    found = Found(ours="so it is", holds=None, record={"x": 1.5})
    save("kurtosis", found, tmp_path, {"seconds": 1.0})
    record = read_record(tmp_path / "kurtosis.json", what="result")
    assert record["rule"] == HEADLINES["kurtosis"].rule and record["numbers"] == {"x": 1.5} and record["holds"] is None
    assert not (tmp_path / "kurtosis.png").exists()
    assert "| so it is | not measured | 1 | `do it` |" in table({"kurtosis": (found, 1.2)}, {"kurtosis": "do it"})
    slow = Found(ours="so it is", holds=True, record={}, searching=60.2)
    assert "| so it is | yes | 1 (60) | `do it` |" in table({"kurtosis": (slow, 1.2)}, {"kurtosis": "do it"})
    json.loads((tmp_path / "kurtosis.json").read_text())


def test_the_command_says_what_differs(tmp_path: Path) -> None:
    usual = CompareConfig()
    asked = CompareConfig(prune=PruneConfig(steps=7, freeze_norms=not usual.prune.freeze_norms), targets=(0.5, 0.1))
    norms = "--prune.no-freeze-norms" if usual.prune.freeze_norms else "--prune.freeze-norms"
    said = command_line("do", asked, usual).split()
    assert said[0] == "do" and norms in said and " ".join(said).endswith("--targets 0.5 0.1")
    assert said[said.index("--prune.steps") + 1] == "7" and len(said) == 7
    assert command_line("do", usual, usual) == "do"


def test_bars_are_as_many_as_sizes() -> None:
    (axes,) = bars({"a": [10, 0], "b": [5, 7]}, ["x", "y"]).axes
    assert [patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle)] == [10, 1, 5, 7]


def test_a_ratio_at_the_end_of_its_interval_is_drawn() -> None:
    one = {"edge_ratio_geomean": 3.0, "edge_ratio_interval": (3.0000000000000004, 3.0000000000000004)}
    none = {"edge_ratio_geomean": 2.0, "edge_ratio_interval": None}
    row = {"what": "a model", "gap": 0.0, "targets": {"asked": one, "relative": none}}
    (axes,) = _picture({"dense": row}, 0.15).axes
    assert len(axes.containers) == 2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "quotes.jsonl"
    lines = [
        {"clean": f"f('{word}x", "corrupt": f'f("{word}x', "answer": "')", "other": '")', "split": split}
        for split, words in (("train", "abcd"), ("val", "efgh"), ("test", "ijkl"))
        for word in words
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return read_lines(path)


TENSORS = ("tokens", "attention_mask", "last", "answer", "other", "orientation", "labels")


def subject(name: str, task: Task, seed: int, *, width: int = 8, kept: float = 1.0) -> Subject:
    """A model that has learned the task, with that share of its weights."""
    text = "f('a b')\nf(\"a b\")\nfor item in items:\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=262)
    shape = Architecture(vocab_size=262, context=24, n_layer=1, d_model=width, d_head=8, topk_fraction=None)
    model = SparseTransformer.build(shape, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(one.shape, generator=generator) < kept for one in model.matrices().values()]
    batches = [encode(task, tokenizer, split, 4, 0, context=24) for split in ("train", "val", "test")]
    batch = replace(batches[0], **{key: torch.cat([getattr(one, key) for one in batches]) for key in TENSORS})
    optimiser = torch.optim.Adam([one for key, one in model.named_parameters() if key != "bigram"], lr=0.1)
    for _ in range(30):
        last = model.run(batch.tokens)[torch.arange(len(batch)), batch.last]
        loss = torch.nn.functional.softplus(-logit_difference(last, batch)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for one, mask in zip(model.matrices().values(), masks, strict=True):
            one.mul_(mask)
    sample = torch.tensor(tokenizer(text).input_ids)[: 8 * 17].view(8, 17)
    return Subject(name=name, model=model, tokenizer=tokenizer, sample=sample, means=node_means(model, sample[:, :-1]))


@pytest.fixture(scope="module")
def subjects(task: Task) -> dict[str, Subject]:
    torch.set_num_threads(1)
    return {
        "sparse": subject("sparse", task, 1, kept=0.4),
        "dense": subject("dense", task, 2),
        "wide": subject("wide", task, 3, width=16),
        "thin": subject("thin", task, 4, kept=0.4),
    }


@pytest.fixture
def setting(task: Task, subjects: dict[str, Subject], tmp_path: Path) -> Setting:
    prune = PruneConfig(steps=3, clean_up=2, edge_clean_up=0, target=0.4, train_pairs=4, val_pairs=4)
    return Setting(
        sparse=(subjects["sparse"],),
        dense=(subjects["dense"],),
        family=(subjects["wide"], subjects["thin"]),
        tasks=(task,),
        config=CompareConfig(prune=prune, random_sets=2, test_pairs=4, empty=0.01),
        circuits=tmp_path / "circuits",
    )


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Model and target of every search for a circuit."""
    made: list[tuple[str, float]] = []

    def noted(model, task, tokenizer, means, config, **options):
        made.append((model.fingerprint(), round(config.target, 6)))
        return prune(model, task, tokenizer, means, config, **options)

    # By name the package has its function `compare`, not the module.
    monkeypatch.setattr(import_module("bridges.compare"), "prune", noted)
    return made


def test_a_circuit_is_searched_for_once_by_whatever_result(
    setting: Setting, searched: list[tuple[str, float]], subjects: dict[str, Subject]
) -> None:
    found = edges(setting, "paper")
    assert len(searched) == 2 and found.searching > 0
    necessity(setting)
    assert len(searched) == 2
    frontier(setting)
    assert {mark for mark, _ in searched} == {one.model.fingerprint() for one in subjects.values()}
    assert len(searched) == 4
    baselines(setting)
    relative = searched[4:]
    edges(setting, "paper", relative=True)
    # The relative targets of the two pairs may be one.
    assert len(searched) == 4 + len(relative) and len(relative) in (3, 4)
    assert all(target != 0.4 for _, target in relative)
    # What lies in the folder is known to a later run as well.
    again = replace(setting, sparse=setting.sparse)
    assert edges(again, "paper").record["edge_ratio_geomean"] == found.record["edge_ratio_geomean"]
    assert len(searched) == 4 + len(relative) == len(list(setting.circuits.iterdir()))


def test_every_dense_model_is_set_against_the_sparse_one(setting: Setting, subjects: dict[str, Subject]) -> None:
    found = baselines(setting)
    rows = found.record["dense"]
    assert set(rows) == {"dense", "wide"}  # thin is sparse
    for name, row in rows.items():
        alone = replace(setting, dense=(replace(subjects[name], name="dense"),), family=(), circuits=setting.circuits)
        for level, relative in (("asked", False), ("relative", True)):
            record = edges(alone, "paper", relative=relative).record
            assert row["targets"][level]["edge_ratio_geomean"] == record["edge_ratio_geomean"]
            assert row["targets"][level]["tasks_counted"] == record["tasks_counted"]
            assert row["gap"] == record["matched"]["gap"]
    assert rows["wide"]["what"] == "the same code without AbsTopK, D=16, L=1"
    assert found.record["table"].count("\n") == 1 + 2 * len(rows) and found.figure is not None
    assert all(row["targets"]["asked"]["tasks_counted"] == ["quotes"] for row in rows.values())
    json.dumps(found.record, allow_nan=False)


def test_a_dense_model_that_misses_the_target_has_no_eligible_task(setting: Setting, searched: list) -> None:
    hard = replace(setting.config, prune=replace(setting.config.prune, target=1e-7))
    found = baselines(replace(setting, config=hard, family=()))
    asked = found.record["dense"]["dense"]["targets"]["asked"]
    assert asked["tasks_eligible"] == [] and asked["edge_ratio_geomean"] is None and found.holds is None
    assert all(target > 1e-7 for _, target in searched)


def test_further_models_are_not_taken_for_arms() -> None:
    assert family_names(["a/wide", "sparse", "b/dense_2", "dense_gpt2"]) == {
        "wide": "a/wide", "other_sparse": "sparse", "other_dense_2": "b/dense_2", "dense_gpt2": "dense_gpt2",
    }  # fmt: skip
    with pytest.raises(ValueError, match="family: a/wide and b/wide have one name"):
        family_names(["a/wide", "b/wide"])

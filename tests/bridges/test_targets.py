"""Targets of the dense model: read back they train the same student to the bit; those of another training do not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridges import BridgeConfig, BridgeObjective, Bridges, Fit, fit_bridges
from bridges.targets import LiveTeacher, Seen, StoredTeacher, TargetPlan, write_targets
from distill.artifact import ArtifactError
from distill.data.tokens import Sampler, TokenData
from distill.model import DenseModel, SparseTransformer, residual_sites
from distill.training.trainer import TrainConfig

SITES = residual_sites(2)
TRAINING = TrainConfig(steps=4, batch=4, context=12, kept=0.5, accumulate=2, eval_every=0, save_every=0)


@pytest.fixture
def data() -> TokenData:
    ids = np.random.default_rng(0).integers(0, 29, 900)
    return TokenData.from_arrays(ids[:700], ids[700:], vocab_size=29)


def test_stored_targets_train_to_the_bit_what_the_dense_model_itself_trains(
    dense: DenseModel, student: SparseTransformer, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridges.targets.FILE_BYTES", 8_000)  # several files
    config, calls, live = BridgeConfig(nmse_sites="sample", kl_top=5), [], LiveTeacher.__call__

    def counted(self: LiveTeacher, *arguments: Any) -> Seen:
        calls.append(self)
        return live(self, *arguments)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)

    def fit(name: str, **options: Any) -> Fit:
        new = SparseTransformer.build(student.architecture, seed=1)
        return fit_bridges(dense, new, data, config, TRAINING, tmp_path / name, dense_name="a", judged=2, **options)

    one, two = fit("live"), fit("stored", targets=tmp_path / "targets")
    assert len(list((tmp_path / "targets").glob("step-*.safetensors"))) > 1
    for name in ("student", "bridges"):
        values = getattr(two, name).state_dict()
        assert all(torch.equal(value, values[key]) for key, value in getattr(one, name).state_dict().items())
    assert two.metrics == one.metrics
    assert len(calls) == 2 * TRAINING.steps * TRAINING.accumulate  # of the second training only the writing


def plan_of(model: DenseModel, /, **changes: Any) -> TargetPlan:
    plan = TargetPlan(
        dense=model.fingerprint(),
        data="d",
        order=0,
        batch=4,
        context=12,
        accumulate=1,
        precision="float32",
        top=3,
        sites="all",
        deal=None,
        n_layer=2,
        d_model=16,
        vocab_size=29,
        steps=4,
    )
    return replace(plan, **changes)


def written(dense: DenseModel, data: TokenData, folder: Path, /, **changes: Any) -> Sampler:
    batches = Sampler(data.train, batch=4, context=12, seed=0)
    write_targets(folder, dense, batches, plan_of(dense, **changes), lambda step: SITES)
    return batches


def test_a_share_of_the_rows_gets_its_own_targets(dense: DenseModel, data: TokenData, tmp_path: Path) -> None:
    batches = written(dense, data, tmp_path)
    stored = StoredTeacher(tmp_path, plan_of(dense, steps=3))  # more steps are there than are needed
    tokens = batches.rows(2, 1, 2)[:, :-1]  # the second of two processes
    mine, live = stored(tokens, 2, SITES[1:3]), LiveTeacher(dense, top=3)(tokens, 2, SITES[1:3])
    assert set(mine.residuals) == set(SITES[1:3])
    assert live.reference.kept is not None and mine.reference.kept is not None
    assert torch.equal(mine.reference.kept.sort(-1).values, live.reference.kept.sort(-1).values)
    for site, value in live.residuals.items():
        torch.testing.assert_close(mine.residuals[site], value)
    bytes_of = sum(path.stat().st_size for path in tmp_path.glob("step-*.safetensors"))
    assert 4 * plan_of(dense).step_bytes <= bytes_of < 4 * plan_of(dense).step_bytes + 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "e"}, "data 'd', needed are those of 'e'"),
        ({"dense": "e"}, "dense '.*', needed are those of 'e'"),
        ({"top": None}, "top 3, needed are those of None"),
        ({"steps": 5}, "steps 4, needed are 5"),
        ({"precision": "bfloat16"}, "precision 'float32', needed"),
    ],
)
def test_targets_of_another_training_are_refused_by_the_field(
    dense: DenseModel, data: TokenData, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    written(dense, data, tmp_path)
    with pytest.raises(ArtifactError, match=message):
        StoredTeacher(tmp_path, plan_of(dense, **change))
    with pytest.raises(ArtifactError, match=message):
        written(dense, data, tmp_path, **change)


def test_foreign_text_and_files_are_refused(
    dense: DenseModel, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridges.targets.FILE_BYTES", 1)  # a file a step
    batches = written(dense, data, tmp_path / "one")
    stored = StoredTeacher(tmp_path / "one", plan_of(dense))
    with pytest.raises(ArtifactError, match="are of other text than the training has at step 1"):
        stored(batches.rows(0, 0, 1)[:, :-1], 1, SITES)
    with pytest.raises(ArtifactError, match="does not hold the stream at 9.resid_in of step 1"):
        stored(batches.rows(1, 0, 1)[:, :-1], 1, ("9.resid_in",))
    written(dense, data, tmp_path / "two", data="e")
    name = "step-00000001.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(ArtifactError, match="belongs to other targets"):
        StoredTeacher(tmp_path / "one", plan_of(dense))(batches.rows(1, 0, 1)[:, :-1], 1, SITES)
    (tmp_path / "one" / name).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        StoredTeacher(tmp_path / "one", plan_of(dense))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ArtifactError, match="holds other files"):
        written(dense, data, tmp_path / "other")


def test_an_interrupted_writing_goes_on_and_a_full_disk_is_seen_before(
    dense: DenseModel, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridges.targets.FILE_BYTES", 1)
    written(dense, data, tmp_path)
    paths = sorted(tmp_path.glob("step-*.safetensors"))
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    written(dense, data, tmp_path)
    assert [path.read_bytes() for path in paths] == before
    monkeypatch.setattr("bridges.targets.shutil.disk_usage", lambda folder: type("", (), {"free": 10})())
    with pytest.raises(ValueError, match=r"targets: take 0\.0 GiB, .* has room for 0\.0"):
        written(dense, data, tmp_path / "new")
    assert not (tmp_path / "new" / "targets.json").exists()
    assert json.loads((tmp_path / "targets.json").read_text())["steps"] == 4


def test_passes_that_are_computed_again_are_not_kept(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    kept = {}
    for recompute in (False, True):
        counted = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal counted
            counted += tensor.numel() * tensor.element_size()
            return tensor

        objective = BridgeObjective(dense, student, bridges, BridgeConfig(sites="all", recompute=recompute))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            objective(windows, 0)
        kept[recompute] = counted
    assert kept[True] < 0.5 * kept[False]


def test_the_dense_model_in_bfloat16_stays_within_a_hundredth(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    terms, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        config = BridgeConfig(sites="all", dense_precision=precision)
        student.zero_grad()
        loss, terms[precision] = BridgeObjective(dense, student, bridges, config)(windows, 0)
        assert loss.dtype == torch.float32
        loss.backward()
        gradients[precision] = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    for name in ("ce", "kl", "nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d"):
        assert float(terms["bfloat16"][name]) == pytest.approx(float(terms["float32"][name]), rel=0.01)
    assert float(torch.cosine_similarity(gradients["float32"], gradients["bfloat16"], dim=0)) > 0.999
    assert not torch.equal(gradients["float32"], gradients["bfloat16"])


def test_a_training_in_bfloat16_can_keep_its_dense_model_in_float32(
    dense: DenseModel, student: SparseTransformer, bridges: Bridges, windows: Tensor
) -> None:
    objective = BridgeObjective(dense, student, bridges, BridgeConfig(dense_precision="float32"))
    with torch.autocast("cpu", torch.bfloat16):
        seen = objective.teacher(windows[:, :-1], 0, SITES)
    plain = LiveTeacher(dense, top=None)(windows[:, :-1], 0, SITES)
    assert torch.equal(seen.reference.log_p, plain.reference.log_p)


def test_a_step_asks_for_no_more_streams_than_its_terms_need() -> None:
    assert BridgeConfig().reads == "all"
    assert BridgeConfig(nmse_sites="sample").reads == "sample"
    assert BridgeConfig(nmse=0.0).reads == "sample" and BridgeConfig(nmse=0.0, sites="all").reads == "all"
    assert BridgeConfig(nmse=0.0, kl_d2s=0.0).read_sites(3, SITES) == ()
    config = BridgeConfig(nmse_sites="sample", seed=3)
    assert config.read_sites(7, SITES) == (config.site(7, SITES),)

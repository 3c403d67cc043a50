"""Storage faults: files cut or with a changed bit, full and read-only disks. Nothing wrong is loaded without a word."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill import artifact, load_model
from distill.artifact import ArtifactError, Provenance, fingerprint, read_manifest
from distill.training.checkpoint import checkpoints
from distill.training.trainer import TrainConfig, train

Recipe = Callable[[str, Sequence[object]], int]
DATA = np.tile(np.arange(12, dtype=np.uint16), 60)
CONFIG = TrainConfig(steps=12, batch=4, context=6, save_every=4, keep_best=False)


def faults(known: Any, folder: Path, change: Callable[[bytes], bytes]) -> list[str]:
    """Reads after each change of each file; what was read although it is not what was written."""
    known.write(folder)
    whole = fingerprint(known.read(folder))
    wrong = []
    for path in known.targets(folder):
        raw = path.read_bytes()
        changed = change(raw)
        if changed != raw:
            path.write_bytes(changed)
            try:
                found = fingerprint(known.read(folder))
            except ValueError as error:
                assert str(error).strip()
            else:
                if known.sealed and found != whole:
                    wrong.append(path.name)
            path.write_bytes(raw)
    assert fingerprint(known.read(folder)) == whole
    return wrong


@pytest.mark.parametrize(
    "tenth", [pytest.param(n, marks=[pytest.mark.slow] if n not in (0, 9) else []) for n in range(10)]
)
def test_files_cut_at_every_tenth_are_refused(known: Any, tenth: int, tmp_path: Path) -> None:
    assert faults(known, tmp_path, lambda raw: raw[: len(raw) * tenth // 10]) == []


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n > 1 else []) for n in range(50)])
def test_a_changed_bit_is_noticed(
    known: Any, seed: int, tmp_path: Path, flip: Callable[[bytes, random.Random], bytes]
) -> None:
    assert faults(known, tmp_path, lambda raw: flip(raw, random.Random(seed))) == []


@pytest.mark.parametrize("place", range(len("seal")))
@pytest.mark.parametrize("bit", range(8))
def test_a_seal_under_a_changed_name_is_noticed(place: int, bit: int, tmp_path: Path) -> None:
    artifact.write_record(tmp_path / "a.json", {"verdict": "holds", "sha": "0" * 64})
    raw = (tmp_path / "a.json").read_bytes()
    at = raw.index(b'"seal"') + 1 + place
    (tmp_path / "a.json").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
    with pytest.raises(ArtifactError):
        artifact.read_record(tmp_path / "a.json", what="card")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.unembed = nn.Embedding(12, 4), nn.Linear(4, 12)


def training(folder: Path, *, resume: bool = False) -> Net:
    net = Net()

    def objective(tokens: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        logits = net.unembed(net.embed(tokens[:, :-1]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}

    origin = Provenance(kind="run", command="test", config={}, seed=0, data="abc")
    train(net, objective, DATA, CONFIG, folder, sparse={}, resume=resume, provenance=origin)
    return net


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut", "flip", "gone"])
def test_of_a_damaged_checkpoint_the_one_before_is_named_and_usable(file: str, fault: str, tmp_path: Path) -> None:
    whole = training(tmp_path / "run")
    before, last = checkpoints(tmp_path / "run")
    raw = (last / file).read_bytes()
    if fault == "gone":
        (last / file).unlink()
    else:
        middle = len(raw) // 2
        changed = raw[:middle] if fault == "cut" else raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
        (last / file).write_bytes(changed)
    with pytest.raises(ArtifactError) as error:
        training(tmp_path / "run", resume=True)
    assert str(last) in str(error.value)
    assert f"{before} before it is whole: delete {last} to go on from there" in str(error.value)
    shutil.rmtree(last)
    resumed = training(tmp_path / "run", resume=True)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_full_disk_leaves_the_checkpoint_before_it(
    small_disk: Any, recipe: Recipe, errors: Any, texts: Path, tiny: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    disk, remount = small_disk
    argv = ["--corpus", texts, *tiny, "--config.kept", "0.25"]
    assert recipe("train_sparse", [*argv, "--out", tmp_path / "elsewhere"]) == 0
    sizes = set()
    for size in ("64k", "600k", "2200k", "3300k"):  # part of the tokens, of a checkpoint, of the next ones
        remount(f"size={size}")
        capsys.readouterr()
        status = recipe("train_sparse", [*argv, "--out", disk / "run", "--resume"])
        printed = capsys.readouterr().err
        assert status == 2, printed
        assert "No space left on device" in "".join(errors(printed)) and len(errors(printed)) == 1
        assert "Traceback" not in printed
        whole = checkpoints(disk / "run")
        for path in whole:
            read_manifest(path, "run")
        assert not list(disk.rglob(".*partial*"))
        sizes.add(len(whole))
    assert max(sizes) >= 1, "no checkpoint fitted before the disk was full"
    remount("size=16m")
    assert recipe("train_sparse", [*argv, "--out", disk / "run", "--resume"]) == 0
    assert load_model(disk / "run").fingerprint() == load_model(tmp_path / "elsewhere").fingerprint()


def test_a_read_only_disk_is_one_line(
    small_disk: Any, recipe: Recipe, errors: Any, texts: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    disk, remount = small_disk
    remount("ro")
    (task,) = (["--task", "for_while"],)
    lines = {
        "train_sparse": ["--corpus", texts, *tiny, "--out", disk / "run"],
        "prune_circuit": [*task, "--prune.steps", "1", "--no-checks", "--out", disk / "circuits"],
        "sweep_circuits": ["--model", "sparse", *task, "--out", disk / "sweep"],
        "convert": ["to-openai", "sparse", "--nearest", "--out", disk / "theirs"],
    }
    for name, argv in lines.items():
        capsys.readouterr()
        assert recipe(name, argv) == 2, name
        said = errors(capsys.readouterr().err)
        assert len(said) == 1 and "read-only file system" in said[0].lower(), name
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("number", [28, 5])
def test_a_failed_flush_leaves_what_was_there(
    at: int, number: int, formats: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may tell of its fault only when it is flushed: here at flush number `at`, of files, folder and parent."""
    formats["report"].write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sync, calls = artifact.sync, 0

    def failing(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(number, "fault", str(path))
        sync(path)

    monkeypatch.setattr(artifact, "sync", failing)
    origin = Provenance(kind="report", command="b", config={}, seed=2, data=None)
    folder = tmp_path / "report"
    with pytest.raises(OSError, match="fault"), artifact.fresh_folder(folder, origin, replace=True) as place:
        (place / "comparison.json").write_text(json.dumps({"edges": 1}))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if calls <= 5:
        assert after == before
    else:  # the new one has its name already; it is whole
        assert json.loads((folder / "comparison.json").read_text()) == {"edges": 1}
    read_manifest(folder, "report")

"""A reader sees a whole artifact or none, and notices whatever happened to it since."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill import artifact
from distill.artifact import ArtifactError, Provenance

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def origin(kind: str = "report", **extra: Any) -> Provenance:
    return Provenance(kind=kind, command="test", config={"rate": 0.1, "out": Path("a")}, seed=0, data=None, extra=extra)


def write(path: Path, text: str = "one", kind: str = "report", replace: bool = False) -> None:
    with artifact.fresh_folder(path, origin(kind), replace=replace) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "text.txt").write_text(text)


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def python(code: str, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    with artifact.fresh_folder(out, origin(note="x")) as folder:
        (folder / "text.txt").write_text("abc")
        assert not out.exists() and folder.parent == out.parent
        assert folder.name == f".a.partial-{os.getpid()}"
    manifest = artifact.read_manifest(out, kind="report")
    sha_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["files"] == {"text.txt": {"bytes": 3, "sha256": sha_abc}}
    assert manifest["format_version"] == artifact.FORMAT_VERSION
    assert manifest["provenance"]["config"] == {"rate": 0.1, "out": "a"}
    assert manifest["provenance"]["extra"] == {"note": "x"}
    assert manifest["versions"]["torch"] == version("torch")
    assert names(out.parent) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_failed_body_leaves_what_was_there(tmp_path: Path, error: type[BaseException], replace: bool) -> None:
    if replace:
        write(tmp_path / "a", "old")
    with pytest.raises(error), artifact.fresh_folder(tmp_path / "a", origin(), replace=replace) as folder:
        (folder / "text.txt").write_text("half")
        raise error
    assert names(tmp_path) == (["a"] if replace else [])
    if replace:
        artifact.read_manifest(tmp_path / "a")
        assert (tmp_path / "a" / "deep" / "text.txt").read_text() == "old"


def test_existing_path_needs_replace(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(ArtifactError, match="/a: exists already"):
        write(tmp_path / "a", "new")
    write(tmp_path / "a", "new", replace=True)
    artifact.read_manifest(tmp_path / "a")
    assert (tmp_path / "a" / "deep" / "text.txt").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_path_taken_while_writing_is_not_lost(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="exists already"),
        artifact.fresh_folder(tmp_path / "a", origin()),
    ):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").touch()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["mine"]


def test_swap_without_the_kernels_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    write(tmp_path / "a", "old")
    write(tmp_path / "a", "new", replace=True)
    assert (tmp_path / "a" / "deep" / "text.txt").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / ".a.aside")
    with pytest.raises(ArtifactError, match="exists already"):
        write(tmp_path / "a", "new")
    assert (tmp_path / "a" / "deep" / "text.txt").read_text() == "old"
    write(tmp_path / ".a.aside", "older")
    write(tmp_path / "a", "new", replace=True)
    assert names(tmp_path) == ["a"]


def test_replace_deletes_nothing_but_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="no manifest.json"):
        write(tmp_path / "home", replace=True)
    with pytest.raises(ArtifactError, match="is no folder"):
        write(tmp_path / "home" / "thesis.txt", replace=True)
    write(tmp_path / "model", kind="model")
    with pytest.raises(ArtifactError, match="kind 'model', needed is 'report'"):
        write(tmp_path / "model", replace=True)
    with pytest.raises(ArtifactError, match="no manifest.json"):
        artifact.remove_folder(tmp_path / "home", "run")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"
    artifact.remove_folder(tmp_path / "model", "model")
    artifact.remove_folder(tmp_path / "model", "model")
    assert names(tmp_path) == ["home"]


def test_replace_takes_an_empty_folder_and_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", replace=True)
    assert (tmp_path / "link").is_symlink()
    artifact.read_manifest(tmp_path / "real")


def test_same_path_twice_at_once(tmp_path: Path) -> None:
    with artifact.fresh_folder(tmp_path / "a", origin()):
        with pytest.raises(ArtifactError, match="already writing"):
            write(tmp_path / "a")
        artifact.write_json(tmp_path / "b", 1)
    artifact.read_manifest(tmp_path / "a")


def test_body_may_not_leave_links_or_a_manifest(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="manifest.json is written"),
        artifact.fresh_folder(tmp_path / "a", origin()) as f,
    ):
        (f / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="x is a link"), artifact.fresh_folder(tmp_path / "a", origin()) as f:
        (f / "x").symlink_to("/etc/passwd")
    assert names(tmp_path) == []


def test_killed_writer_leaves_nothing_that_loads_and_is_cleared(tmp_path: Path) -> None:
    code = """
import sys, time
from distill.artifact import Provenance, fresh_folder
with fresh_folder(sys.argv[1], Provenance(kind="report", command="c", config={}, seed=None, data=None)) as folder:
    (folder / "half").write_text("x")
    print(folder.name, flush=True)
    time.sleep(60)
"""
    writer = python(code, tmp_path / "a")
    assert writer.stdout is not None
    partial = writer.stdout.readline().strip()
    assert names(tmp_path) == [partial]
    write(tmp_path / "b")
    with pytest.raises(ArtifactError, match=f"a: is being written by another run .process {writer.pid}"):
        write(tmp_path / "a")
    artifact.clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([partial, "b"])
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    artifact.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["b"]
    write(tmp_path / "a")
    assert names(tmp_path) == ["a", "b"]


def test_leftovers_of_the_same_process_id_are_cleared(tmp_path: Path) -> None:
    (tmp_path / f".a.partial-{os.getpid()}").mkdir()
    (tmp_path / f".c.partial-{os.getpid()}").write_text("half")
    (tmp_path / ".a.partial-notes").mkdir()
    write(tmp_path / "a")
    artifact.write_json(tmp_path / "c", 1)
    assert names(tmp_path) == [".a.partial-notes", "a", "c"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 99}, "format 99 is newer than"),
        ({"format_version": 0}, "format_version 0, allowed"),
        ({"format_version": True}, "format_version True, allowed"),
        ({"format_version": "1"}, "format_version '1', allowed"),
        ({"kind": 3}, "holds no 'kind'"),
        ({"kind": "pie"}, "kind 'pie', known are model"),
        ({"files": []}, "'files' must be an object"),
        ({"files": {"deep/text.txt": 3}}, "must hold 'bytes' and 'sha256'"),
        ({"files": {"deep/text.txt": {"bytes": True, "sha256": ""}}}, "must hold 'bytes' and 'sha256'"),
        ({"files": {"/etc/passwd": {}}}, "leads out of the folder"),
        ({"files": {"deep/../../b": {}}}, "leads out of the folder"),
        ({"files": {"..\\b": {}}}, "leads out of the folder"),
        ({"files": {"a\0b": {}}}, "leads out of the folder"),
        ({"files": {"": {}}}, "leads out of the folder"),
        ({"files": {"gone": {"bytes": 1, "sha256": ""}}}, "gone: is missing"),
    ],
)
def test_manifest_that_lies(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(tmp_path / "a")
    edit_manifest(tmp_path / "a", **changes)
    with pytest.raises(ArtifactError, match=said):
        artifact.read_manifest(tmp_path / "a", verify=False)


def test_manifest_missing_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="b: no such folder"):
        artifact.read_manifest(tmp_path / "b")
    with pytest.raises(ArtifactError, match="manifest.json: no such manifest"):
        artifact.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="no artifact of distill-bridges"):
        artifact.read_manifest(tmp_path)
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="kind 'report', needed is 'bridge'"):
        artifact.read_manifest(tmp_path / "a", kind="bridge")


def test_changed_files_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    text = tmp_path / "a" / "deep" / "text.txt"
    text.write_text("two")
    artifact.read_manifest(tmp_path / "a", verify=False)
    with pytest.raises(ArtifactError, match="text.txt: its sha256"):
        artifact.read_manifest(tmp_path / "a")
    text.write_text("on")
    with pytest.raises(ArtifactError, match="has 2 bytes, the manifest says 3"):
        artifact.read_manifest(tmp_path / "a", verify=False)
    (tmp_path / "outside").write_text("one")
    text.unlink()
    text.symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="link out of the folder"):
        artifact.read_manifest(tmp_path / "a")


def test_manifest_of_a_growing_folder(tmp_path: Path) -> None:
    with artifact.lock(tmp_path):
        artifact.write_manifest(tmp_path, origin("run"))
        (tmp_path / "metrics.jsonl").touch()
        assert artifact.read_manifest(tmp_path, kind="run")["files"] == {}
        artifact.write_manifest(tmp_path, origin("run"))
    assert list(artifact.read_manifest(tmp_path)["files"]) == ["metrics.jsonl"]


def test_provenance_takes_known_kinds_only() -> None:
    with pytest.raises(ArtifactError, match="kind: got 'pie', allowed are model"):
        origin("pie")


@quick
@given(value=JSON)
def test_json_round_trip(tmp_path: Path, value: Any) -> None:
    artifact.write_json(tmp_path / "a.json", value)
    assert artifact.read_json(tmp_path / "a.json", what="value") == value


def test_json_keeps_order_and_plain_forms(tmp_path: Path) -> None:
    @dataclass
    class Config:
        width: int
        out: Path

    artifact.write_json(tmp_path / "a", {"z": np.float32(0.5), "a": Config(2, Path("x")), "n": np.int64(3)})
    assert (tmp_path / "a").read_text() == '{\n "z": 0.5,\n "a": {\n  "width": 2,\n  "out": "x"\n },\n "n": 3\n}\n'
    with pytest.raises(TypeError, match="set cannot be written"):
        artifact.write_json(tmp_path / "a", {1})
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], np.float32("nan")])
def test_json_cannot_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ArtifactError, match="a.json: cannot be written as JSON"):
        artifact.write_json(tmp_path / "a.json", value)
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        artifact.append_line(tmp_path / "a.json", {"x": value})
    with pytest.raises(ArtifactError, match="metadata cannot be written as JSON"):
        artifact.save_tensors(tmp_path / "a.json", {}, {"kind": "x", "value": value})
    assert names(tmp_path) == []


def test_json_nested_in_itself(tmp_path: Path) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        artifact.write_json(tmp_path / "a", value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "task is not JSON"),
        (b"", "task is not JSON"),
        (b"\xff\xfe\xfd", "task is not JSON"),
        (b"NaN", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"9" * 5000, "task is not JSON"),
        (b"[" * 100_000, "task is nested too deep"),
        (b'{"a":' * 100_000, "task is nested too deep"),
        (b" " * 200_001, "task of 200001 bytes, allowed are 200000"),
    ],
    ids=range(9),
)
def test_json_that_is_none(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    limit = 200_000 if raw.startswith(b" ") else artifact.MAX_JSON_BYTES
    with pytest.raises(ArtifactError, match=f"a.json: {said}" if said[0] == "t" else said):
        artifact.read_json(tmp_path / "a.json", what="task", max_bytes=limit)


def test_json_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such task file"):
        artifact.read_json(tmp_path / "a.json", what="task")
    with pytest.raises(ArtifactError, match="no such task file"):
        artifact.read_json(tmp_path, what="task")


def test_lines_survive_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    artifact.append_line(path, {"step": 1})
    artifact.append_line(path, {"step": 2})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    artifact.append_line(path, {"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    path.write_bytes(b'{"torn')
    artifact.append_line(path, {"step": 1})
    assert path.read_text() == '{"step": 1}\n'


@quick
@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
        max_size=3,
    ),
    extra=JSON,
)
def test_tensors_round_trip(tmp_path: Path, shapes: dict[str, Any], extra: Any) -> None:
    tensors = {name: torch.randn(shape).mul(3).to(dtype) for name, (shape, dtype) in shapes.items()}
    artifact.save_tensors(tmp_path / "a", tensors, {"kind": "means", "extra": extra})
    loaded, metadata = artifact.load_tensors(tmp_path / "a", kind="means")
    assert loaded.keys() == tensors.keys() and metadata["extra"] == extra
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert metadata["format_version"] == artifact.FORMAT_VERSION
    assert metadata["versions"]["torch"] == version("torch")


def test_tensors_with_shared_memory_and_gradients(tmp_path: Path) -> None:
    tied = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    artifact.save_tensors(tmp_path / "a", {"a": tied, "b": tied, "t": tied.T}, origin("circuit").record())
    loaded, metadata = artifact.load_tensors(tmp_path / "a", kind="circuit")
    assert torch.equal(loaded["b"], tied) and torch.equal(loaded["t"], tied.T)
    assert metadata["command"] == "test" and metadata["config"]["out"] == "a"


def test_tensors_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="metadata.kind"):
        artifact.save_tensors(tmp_path / "a", {}, {})
    with pytest.raises(ArtifactError, match="tensor 'x' has layout torch.sparse_coo"):
        artifact.save_tensors(tmp_path / "a", {"x": torch.eye(2).to_sparse()}, {"kind": "x"})
    with pytest.raises(ArtifactError, match="no such circuit file"):
        artifact.load_tensors(tmp_path / "a", kind="circuit")
    artifact.save_tensors(tmp_path / "a", {}, {"kind": "means"})
    with pytest.raises(ArtifactError, match="kind 'means', needed is 'circuit'"):
        artifact.load_tensors(tmp_path / "a", kind="circuit")


def test_tensor_file_cut_or_damaged_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artifact.save_tensors(path, {"x": torch.arange(4.0), "y": torch.ones(2)}, {"kind": "means"})
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError):
            artifact.load_tensors(path, kind="means")
    for place in (-1, -24):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="changed or damaged"):
            artifact.load_tensors(path, kind="means")


def header(distill: str | None) -> bytes:
    text = json.dumps({} if distill is None else {"__metadata__": {"distill": distill}}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"GGUF" * 50, "no readable means file"),
        (struct.pack("<Q", 2**60) + b"{}", "no readable means file"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "no readable means file"),
        (header(None), "holds no 'kind'"),
        (header("{"), "no readable means file"),
        (header("NaN"), "NaN is no JSON number"),
        (header("[" * 100_000), "no readable means file"),
        (header('{"kind": "means", "format_version": 7}'), "format 7 is newer"),
        (header('{"kind": "means", "format_version": 1}'), "changed or damaged"),
    ],
    ids=range(9),
)
def test_tensor_file_by_somebody_else(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ArtifactError, match=said):
        artifact.load_tensors(tmp_path / "a", kind="means")


def test_fingerprint_of_equal_values() -> None:
    ones = torch.ones(2, 2)
    assert artifact.fingerprint({"a": ones, "b": (1, None)}) == artifact.fingerprint({"b": [1, None], "a": ones.T})
    assert artifact.fingerprint({"a": Path("x")}) == artifact.fingerprint({"a": "x"})
    assert artifact.fingerprint({"a": np.ones(2)}) == artifact.fingerprint({"a": torch.ones(2, dtype=torch.float64)})
    assert artifact.fingerprint({"a": np.int64(3)}) == artifact.fingerprint({"a": 3})
    assert len(artifact.fingerprint({})) == 64


def test_fingerprint_tells_values_apart() -> None:
    values: list[Any] = [
        1,
        1.0,
        True,
        "1",
        None,
        "None",
        [],
        {},
        "",
        ["ab", "c"],
        ["a", "bc"],
        [["a"], "bc"],
        float("nan"),
    ]
    values += [
        torch.ones(2),
        torch.ones(2, 1),
        torch.ones(1, 2),
        torch.ones(2).half(),
        torch.ones(2).int(),
        torch.ones(0),
    ]
    values += [torch.tensor(1.0), torch.tensor(float("nan")), {"a": {"b": 1}}, {"a": 1, "b": 1}]
    assert len({artifact.fingerprint({"x": value}) for value in values}) == len(values)


def test_fingerprint_refuses_the_rest() -> None:
    with pytest.raises(ArtifactError, match=r"value.a\[1\]: a fingerprint takes tensors.*got set"):
        artifact.fingerprint({"a": [1, {2}]})


def test_lock_between_two_processes(tmp_path: Path) -> None:
    code = """
import sys
from distill.artifact import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = python(code, tmp_path / "run")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(
            ArtifactError, match=rf"/run: in use by another run \(process {holder.pid} on {socket.gethostname()}\)"
        ),
        artifact.lock(tmp_path / "run"),
    ):
        pass
    holder.kill()
    holder.communicate()
    with artifact.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
        with artifact.lock(tmp_path / "run"):  # the same run, at another place of its work
            pass
        with ThreadPoolExecutor(1) as other, pytest.raises(ArtifactError, match=f"process {os.getpid()}"):
            other.submit(lambda: artifact.lock(tmp_path / "run").__enter__()).result()
    with artifact.lock(tmp_path / "run"):
        pass


def test_a_locked_folder_is_not_deleted(tmp_path: Path) -> None:
    write(tmp_path / "a", kind="run")
    with artifact.lock(tmp_path / "a"), ThreadPoolExecutor(1) as other:
        with pytest.raises(ArtifactError, match="a: in use by another run"):
            other.submit(artifact.remove_folder, tmp_path / "a", "run").result()
        artifact.read_manifest(tmp_path / "a")
        artifact.remove_folder(tmp_path / "a", "run")
        with artifact.lock(tmp_path / "a"):  # ours still, though the folder is another
            pass
    assert not (tmp_path / "a").exists()


def test_versions_and_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    found = artifact.versions()
    assert set(found) == {"distill-bridges", "python", "torch", "transformers", "numpy"}
    assert found["numpy"] == np.__version__
    monkeypatch.setattr(artifact, "_PACKAGES", ("no-such-package",))
    assert artifact.versions()["no-such-package"] == "not installed"
    assert artifact.default_out("quickstart") == Path("runs/quickstart")


def test_tensors_are_as_readable_as_other_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    artifact.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "means"})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode

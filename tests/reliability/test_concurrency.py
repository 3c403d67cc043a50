"""Two runs and one folder: the second is refused by name, whatever became of the first; a sweep does each job once."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill.artifact import ArtifactError, Provenance, fresh_folder, lock
from distill.circuits import Circuit

ROOT = Path(__file__).parents[2]
HOLDER = "import sys\nfrom distill.artifact import lock\nwith lock(sys.argv[1]):\n    print(1, flush=True)\n    input()"
FORKED = """
import os, sys, time
from pathlib import Path
from distill.artifact import Provenance, fresh_folder, lock
run, report = map(Path, sys.argv[1:])
origin = Provenance(kind="report", command="a", config={}, seed=1, data=None)
with lock(run), fresh_folder(report, origin):
    child = os.fork()
    if not child:
        try:
            with lock(run):
                os.write(1, b"taken\\n")
        except ValueError as error:
            os.write(1, f"{error}\\n".encode())
        time.sleep(600)
    os.write(1, f"{child}\\n".encode())
    time.sleep(600)
"""
SHARED = """
import importlib.util, os, sys
from distill.circuits import sweep as sweeps
from distill.command import run
prune = sweeps.prune
def noted(model, task, tokenizer, means, config, **more):
    with open(sys.argv[1], "a") as file:
        file.write(f"{task.name} {config.seed} {os.getpid()}\\n")
    return prune(model, task, tokenizer, means, config, **more)
sweeps.prune = noted
spec = importlib.util.spec_from_file_location("sweep_circuits", sys.argv[2])
recipe = sys.modules["sweep_circuits"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
raise SystemExit(recipe.main(sys.argv[3:]))
"""
Recipe = Callable[[str, Sequence[object]], int]


def test_the_second_run_in_a_folder_is_refused_by_name_until_the_first_is_dead(
    recipe: Recipe, texts: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    errors: Callable[[str], list[str]],
) -> None:  # fmt: skip
    """A stranger's process holds the folder and is killed; its lock file with its name stays behind."""
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "1\n"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in ([], ["--resume"], ["--overwrite"]):
        capsys.readouterr()
        assert recipe("train_sparse", ["--corpus", texts, *tiny, "--out", out, *more]) == 2
        (said,) = errors(capsys.readouterr().err)
        assert said == f"error: {out}: in use by another run (process {holder.pid} on {socket.gethostname()})"
    assert recipe("sweep_circuits", ["--model", "sparse", "--task", "for_while", "--out", out]) == 2
    assert f"process {holder.pid}" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (out / ".lock").read_text() == f"{holder.pid} on {socket.gethostname()}\n"
    assert recipe("train_sparse", ["--corpus", texts, *tiny, "--out", out, "--resume"]) == 0


def test_a_run_under_way_is_not_overwritten(recipe: Recipe, texts: Path, tiny: list[str], tmp_path: Path) -> None:
    argv = ["--corpus", texts, *tiny, "--out", tmp_path / "run"]
    assert recipe("train_sparse", argv) == 0
    listed = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "1\n"
        assert recipe("train_sparse", [*argv, "--overwrite"]) == 2
        assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == listed
    finally:
        holder.kill()
        holder.communicate()
    with lock(tmp_path / "run"):
        pass


def test_a_forked_child_has_no_lock_of_its_parent_and_leaves_none(tmp_path: Path) -> None:
    """It is refused while its parent lives; once that is killed others go on, though the child lives still."""
    run, report = tmp_path / "run", tmp_path / "report"
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKED, str(run), str(report)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert parent.stdout is not None
        one, two = sorted((parent.stdout.readline(), parent.stdout.readline()), key=len)
        child = int(one)
        assert f"{run}: in use by another run (process {parent.pid} on " in two
        with pytest.raises(ArtifactError, match=f"written by another run .process {parent.pid}"):
            write_report(report)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)
        with lock(run):
            write_report(report)
        assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
        assert json.loads((report / "manifest.json").read_text())["kind"] == "report"
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def write_report(folder: Path) -> None:
    with fresh_folder(folder, Provenance(kind="report", command="b", config={}, seed=2, data=None)) as place:
        (place / "index.html").write_text("<html></html>")


def test_a_child_that_walks_out_of_what_its_parent_holds_changes_nothing(tmp_path: Path) -> None:
    """As one does that raises; the parent holds the folder still, and what it writes is there."""
    parent, status = os.getpid(), 1
    origin = Provenance(kind="report", command="b", config={}, seed=2, data=None)
    try:
        with lock(tmp_path / "run"), lock(tmp_path / "run"), fresh_folder(tmp_path / "a", origin) as place:
            (place / "index.html").write_text("mine")
            child = os.fork()
            if not child:
                raise InterruptedError
            _, ended = os.waitpid(child, 0)
            with ThreadPoolExecutor(1) as thread, pytest.raises(ArtifactError, match=f"process {parent} on"):
                thread.submit(lambda: lock(tmp_path / "run").__enter__()).result()
    except InterruptedError:
        status = 0
    finally:
        if os.getpid() != parent:
            os._exit(status)
    assert ended == 0
    assert (tmp_path / "a" / "index.html").read_text() == "mine"


@pytest.mark.slow
def test_a_sweep_shared_by_four_processes_does_each_job_once(tmp_path: Path) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("planted", ROOT / "tests" / "circuits" / "conftest.py")
    assert spec is not None and spec.loader is not None
    planted = module_from_spec(spec)
    spec.loader.exec_module(planted)
    planted.folder(tmp_path / "planted", planted.build(0, stray=0.1))
    planted.task_file(tmp_path / "opener.jsonl")
    (tmp_path / "shared.py").write_text(SHARED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", str(port)]
    argv = ["--model", tmp_path / "planted", "--task", tmp_path / "opener.jsonl", "--seeds", *range(10), "--device",
            "cpu", "--prune.steps", "8", "--prune.val-pairs", "8", "--prune.verify-pairs", "8", "--no-checks",
            "--out", tmp_path / "out"]  # fmt: skip
    script = [tmp_path / "shared.py", tmp_path / "log", ROOT / "recipes" / "sweep_circuits.py"]
    done = subprocess.run(
        [sys.executable, *map(str, [*launcher, *script, *argv])],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    noted = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert Counter(seed for _, seed, _ in noted) == {str(seed): 1 for seed in range(10)}
    assert len({process for _, _, process in noted}) == 4
    records = json.loads((tmp_path / "out" / "sweep.json").read_text())["records"]
    assert [record["seed"] for record in records] == list(range(10))
    for record in records:
        circuit = Circuit.load(tmp_path / "out" / f"{record['name']}.circuit.safetensors")
        assert circuit.n_nodes == record["nodes"]

"""Kills a job at random moments, resumes it, and holds what comes out against the same job left alone.

    python tests/reliability/killed.py training FOLDER SEED KILLS

Jobs: training, bridges, sweep, or some of them with commas between; each is a recipe on tiny models. Trials go on until
there were so many kills; each is a folder of its own: the job is killed by SIGKILL up to three times, in every other
trial by itself at a random operation on its files (so in the middle of a save), in the others from outside after a
random share of its processor time, and then runs to the end. Everything that is imported is imported once; every
attempt is a fork. Prints one line of JSON for each job; status 1 where anything differs.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from distill.artifact import read_manifest
from distill.circuits import Circuit
from distill.command import seed_everything

TESTS = Path(__file__).parents[1]
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Events of Python's audit that touch files."""
TIMES = ("tokens_per_second", "seconds", "created")
"""What may differ."""
TINY = ["--architecture.d-model", "16", "--architecture.d-head", "8", "--architecture.n-layer", "1",
        "--architecture.context", "32", "--config.context", "32", "--config.batch", "4", "--vocab-size", "300",
        "--config.log-every", "2", "--config.eval-every", "8", "--config.save-every", "6", "--device", "cpu",
        "--config.steps", "32"]  # fmt: skip
FIT = ["--student.d-model", "16", "--student.d-head", "8", "--config.context", "32", "--config.batch", "4",
       "--config.steps", "16", "--config.save-every", "4", "--config.eval-every", "8", "--config.kept", "0.25",
       "--device", "cpu"]  # fmt: skip


def load(path: Path) -> ModuleType:
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = {name: load(TESTS.parent / "recipes" / f"{name}.py") for name in
           ("train_sparse", "train_dense", "fit_bridges", "sweep_circuits")}  # fmt: skip
PLANTED = load(TESTS / "circuits" / "conftest.py")


def texts(place: Path) -> str:
    place.mkdir(parents=True)
    for n in range(40):
        lines = [f"for i in range({n * i}):\n    print('value {n}', i)\n    call(\"name {n}\")\n" for i in range(5)]
        (place / f"{n}.py").write_text("".join(lines))
    return str(place)


class Job:
    """A recipe's command line, and what it leaves."""

    def __init__(self, kind: str, base: Path) -> None:
        self.kind, self.base, self.inputs = kind, base, base / "inputs"

    def prepare(self) -> None:
        words = texts(self.inputs / "texts")
        if self.kind == "bridges":
            argv = ["--kind", "gpt2", "--corpus", words, *TINY, "--out", str(self.inputs / "gpt2")]
            assert RECIPES["train_dense"].main(argv) == 0
        if self.kind == "sweep":
            PLANTED.folder(self.inputs / "planted", PLANTED.build(0, stray=0.1))
            PLANTED.task_file(self.inputs / "opener.jsonl")

    def run(self, out: Path) -> int:
        words, resume = str(self.inputs / "texts"), ["--resume"]
        if self.kind == "training":
            argv = ["--corpus", words, *TINY, "--config.kept", "0.25", *resume]
            return RECIPES["train_sparse"].main([*argv, "--out", str(out)])
        if self.kind == "bridges":
            argv = ["--dense", str(self.inputs / "gpt2"), "--corpus", words, *FIT, *resume]
            return RECIPES["fit_bridges"].main([*argv, "--out", str(out)])
        argv = ["--model", str(self.inputs / "planted"), "--task", str(self.inputs / "opener.jsonl")]
        argv += ["--seeds", "0", "1", "2", "--prune.steps", "12", "--prune.val-pairs", "8", "--prune.verify-pairs", "8"]
        return RECIPES["sweep_circuits"].main([*argv, "--no-checks", "--device", "cpu", "--out", str(out)])

    def left(self, out: Path) -> dict[str, Any]:
        """All that the job wrote, by name, without times."""
        if self.kind != "sweep":
            read_manifest(out)
            read_manifest(out / "model", "model")
        found: dict[str, Any] = {}
        for path in sorted(out.rglob("*")):
            name = path.relative_to(out).as_posix()
            if not path.is_file() or path.name in (".lock", "manifest.json") or path.suffix == ".png":
                continue
            if path.name.endswith(".circuit.safetensors"):
                circuit = Circuit.load(path)
                found[name] = timeless([circuit.to_json(), {k: v.tolist() for k, v in circuit.scores.items()}])
            elif path.suffix == ".json":
                found[name] = timeless(json.loads(path.read_text()))
            elif path.suffix == ".jsonl":
                found[name] = timeless([json.loads(line) for line in path.read_text().splitlines()])
            else:
                found[name] = path.read_bytes()
        return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        # A seal is of everything, times included.
        return {name: timeless(one) for name, one in value.items() if name not in (*TIMES, "seal")}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def forked(work: Callable[[], int], log: Path) -> int:
    """Starts `work` in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        # A fresh process draws its generators' states anew; nothing uses them, but checkpoints hold them.
        seed_everything(0)
        status = work()
    finally:
        sys.stderr.flush()
        os._exit(status)


def counted(out: Path, stop: int) -> list[int]:
    """Counts operations on files of `out` and those named like it; this process dies at number `stop` (0: never)."""
    count = [0]

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in OPERATIONS and any(isinstance(one, str | Path) and out.name in str(one) for one in given):
            count[0] += 1
            if count[0] == stop:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def spent(child: int) -> float:
    """Processor seconds of a process."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 1e9
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def attempt(job: Job, out: Path, log: Path, *, operation: int = 0, seconds: float = 0.0) -> bool:
    """One attempt, killed at an operation or after some seconds of processor time; whether it was killed."""

    def work() -> int:
        if operation:
            counted(out, operation)
        return job.run(out)

    child = forked(work, log)
    while seconds:
        if spent(child) >= seconds:
            os.kill(child, signal.SIGKILL)
            break
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit(f"{job.kind}: an attempt ended with {os.WEXITSTATUS(status)}:\n{log.read_text()[-3000:]}")
    return False


def alone(job: Job, out: Path, log: Path) -> tuple[float, int]:
    """The job from start to end: its processor seconds, and how often it touched its files."""
    told = job.base / "told.json"

    def work() -> int:
        count, begun = counted(out, 0), time.process_time()
        status = job.run(out)
        told.write_text(json.dumps([time.process_time() - begun, count[0]]))
        return status

    _, status = os.waitpid(forked(work, log), 0)
    if status:
        raise SystemExit(f"{job.kind}: ended with {status} when left alone:\n{log.read_text()[-3000:]}")
    seconds, operations = json.loads(told.read_text())
    return seconds, operations


def main(kind: str, base: Path, seed: int, wanted_kills: int) -> int:
    begun = time.time()
    draw = random.Random(seed)
    job, log = Job(kind, base), base / "log.txt"
    base.mkdir(parents=True, exist_ok=True)
    _, status = os.waitpid(forked(lambda: job.prepare() or 0, log), 0)
    assert status == 0, log.read_text()[-3000:]
    seconds, operations = alone(job, base / "whole", log)
    wanted = job.left(base / "whole")
    kills = in_files = trial = 0
    while kills < wanted_kills:
        trial += 1
        out = base / f"cut{trial}"
        for _ in range(3):
            at_file = trial % 2 == 0
            moment = {"operation": draw.randint(1, operations)} if at_file else {"seconds": draw.uniform(0.01, seconds)}
            killed = attempt(job, out, log, **moment)  # pyright: ignore[reportArgumentType]
            kills += killed
            in_files += killed and at_file
            if killed and draw.random() < 0.6:
                break
        assert not attempt(job, out, log)
        found = job.left(out)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                print(f"{kind}, seed {seed}, trial {trial}: {name} differs", file=sys.stderr)
                return 1
        litter = list(base.rglob(".*partial-*"))
        assert not litter, litter
        for place in base.glob(f"{out.name}*"):
            shutil.rmtree(place)
    record = {"job": kind, "seed": seed, "trials": trial, "kills": kills, "in_files": in_files,
              "operations": operations, "files": len(wanted), "seconds": round(time.time() - begun, 1)}  # fmt: skip
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    jobs, folder, seed, kills = sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    raise SystemExit(max(main(kind, folder / kind, seed, kills) for kind in jobs))

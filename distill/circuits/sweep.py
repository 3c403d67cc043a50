"""Sweeps: circuits for many models, tasks and seeds at once, by as many processes as torchrun or accelerate start.

    torchrun --nproc_per_node 4 recipes/sweep_circuits.py --model sparse dense --task for_while --seeds 0 1 2

Each process takes a stretch of the jobs, in which jobs of one model lie together. Each job ends with files of its own,
so that a sweep that was broken off goes on where it stood: circuits that lie there are taken, and it is an error if
another model or other settings made them.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from distill.artifact import lock, read_record, versions, write_record
from distill.circuits.circuit import SUFFIX, Circuit, CircuitMismatchError
from distill.circuits.faithfulness import Limits
from distill.circuits.prune import prune
from distill.circuits.scorecard import scorecard
from distill.circuits.selection import TargetError
from distill.circuits.settings import PruneConfig
from distill.circuits.subject import Subject, load_subject
from distill.circuits.tasks import Task, load_task
from distill.command import several_on_cpus

RECORD = ".sweep.json"
"""Ending of a job's record, beside its circuit."""
SUMMARY = "sweep.json"
COLUMNS = ("nodes", "edges_induced", "edges_pruned", "circuit", "verify", "test", "seconds", "verdict")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is pruned, and how."""

    models: tuple[str, ...]
    """Folders, short names or hub names."""
    tasks: tuple[str, ...]
    """Names, or JSONL files."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of masks and prompts, in place of that of `prune`."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """How each circuit is searched for."""
    checks: bool = True
    """Whether each circuit gets its scorecard, from the checks that take seconds."""
    corpus: tuple[str, ...] = ()
    """Text to measure ablation values on, for models that bring none."""
    device: str = "auto"
    """Where models go; with several processes auto gives each its own device."""

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"{name}: got {list(values)}; allowed are one or more, each once")
        labels = [Path(model).name for model in self.models]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"models: two are called {label!r}; files are named after them, so rename one")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One circuit to be found."""

    model: str
    task: Task
    config: PruneConfig

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.task.name}.{Path(self.model).name}.{self.config.seed}"


def sweep(config: SweepConfig, out: Path) -> list[dict[str, Any]]:
    """Finds a circuit for every model, task and seed, in `out`; returns a record for each, in every process.

    A task that a model cannot do at the target keeps a record with the reason. Writes per job `{task}.{model}.{seed}` +
    `.circuit.safetensors` and `.sweep.json`, and in the end `sweep.json` with all records. CircuitMismatchError for a
    circuit that lies there already and is of another model; ValueError for one that was made with other settings.
    """
    state = PartialState(cpu=config.device == "cpu" or several_on_cpus())
    jobs = [
        Job(model=model, task=load_task(task), config=replace(config.prune, seed=seed))
        for model, task, seed in product(config.models, config.tasks, config.seeds)
    ]
    out.mkdir(parents=True, exist_ok=True)
    worker = _Worker(config, out, str(state.device) if state.num_processes > 1 else config.device)
    # One lock for all processes of a sweep: two sweeps must not write into one folder.
    with lock(out) if state.is_main_process else nullcontext():
        bar = tqdm(total=len(jobs), desc="circuits", unit="circuit", disable=not state.is_main_process)
        with bar, state.split_between_processes(jobs) as mine:
            records = []
            for job in cast(list[Job], mine):
                bar.set_postfix_str(job.name)
                records.append(worker.run(job))
                bar.n = sum((out / f"{one.name}{RECORD}").is_file() for one in jobs)
                bar.refresh()
            state.wait_for_everyone()
            bar.n = len(jobs)
            bar.refresh()
        every = gather_object(records)
        if state.is_main_process:
            write_record(out / SUMMARY, {"records": every, "config": asdict(config), "versions": versions()})
    state.wait_for_everyone()
    return every


class _Worker:
    """One process: keeps the model of its last job."""

    def __init__(self, config: SweepConfig, out: Path, device: str) -> None:
        self.config, self.out, self.device = config, out, device
        self.model, self.subject = "", None

    def run(self, job: Job) -> dict[str, Any]:
        """The record of a job, found or done."""
        if self.subject is None or self.model != job.model:
            self.subject = load_subject(job.model, corpus=self.config.corpus, device=self.device)
            self.model = job.model
        fingerprint = self.subject.model.fingerprint()
        files = self.out / f"{job.name}{RECORD}", self.out / f"{job.name}{SUFFIX}"
        if files[0].is_file():
            return _taken(job, fingerprint, *files)
        record = {"name": job.name, "task": job.task.name, "model": self.subject.name, "fingerprint": fingerprint}
        record |= {"seed": job.config.seed, "config": asdict(job.config), "checks": self.config.checks}
        record |= self._search(job, self.subject, files[1])
        write_record(files[0], record)
        return record

    def _search(self, job: Job, subject: Subject, file: Path) -> dict[str, Any]:
        began = time.perf_counter()
        corpus: Int[Tensor, "n T"] = subject.sample[:, :-1]
        found: dict[str, Any] = dict.fromkeys(COLUMNS)
        try:
            circuit = prune(
                subject.model,
                job.task,
                subject.tokenizer,
                subject.means,
                job.config,
                model_name=subject.name,
                corpus=corpus,
            )
        except TargetError as error:
            return found | {"reason": str(error)}
        seconds = round(time.perf_counter() - began, 2)
        found |= {"reason": "", **circuit.losses, **circuit.counts(subject.model), "target": circuit.target}
        found |= {"label": circuit.provenance["label"], "seconds": seconds}
        if self.config.checks:
            card = scorecard(subject, job.task, circuit, limits=Limits(), seed=job.config.seed, name=job.name)
            card.save(self.out / f"{job.name}.scorecard.json")
            test = next(check.value for check in card.checks if check.name == "sufficiency")
            found |= {"verdict": card.head, "flags": list(card.flags), "test": test}
        circuit.save(file)
        return found


def _taken(job: Job, fingerprint: str, record: Path, circuit: Path) -> dict[str, Any]:
    """The record of a job that was done before."""
    found = read_record(record, what="record of a sweep")
    if found["fingerprint"] != fingerprint:
        raise CircuitMismatchError(
            f"out: {record} belongs to a model with fingerprint {found['fingerprint'][:12]}, but {job.model!r} has "
            f"{fingerprint[:12]}; choose another folder"
        )
    changed = [name for name, value in asdict(job.config).items() if found["config"].get(name) != value]
    if changed:
        was, now = found["config"].get(changed[0]), getattr(job.config, changed[0])
        raise ValueError(
            f"out: {record} was made with other settings ({changed[0]} {was!r}, now {now!r}); choose another folder"
        )
    if not found["reason"] and Circuit.load(circuit).model != fingerprint:
        raise CircuitMismatchError(f"out: {circuit} is a circuit of another model than {record} says; delete both")
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each circuit of a sweep: sizes, losses in nats, seconds, and what its scorecard says."""
    width = max(len(record["name"]) for record in records) + 2
    lines = [f"{'circuit':<{width}}" + "".join(f"{name:>14}" for name in COLUMNS[:-1]) + "  scorecard"]
    for record in records:
        if record["reason"]:
            lines.append(f"{record['name']:<{width}}  {record['reason']}")
            continue
        numbers = "".join(_cell(record[name]) for name in COLUMNS[:-1])
        notes = [note for note in (record["verdict"], record["label"]) if note]
        lines.append(f"{record['name']:<{width}}{numbers}  {'; '.join(notes)}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return f"{'-':>14}"
    return f"{value:>14,}" if isinstance(value, int) else f"{value:>14.3g}"

"""Ways to prune, at equal loss: edges and seconds on the shipped sparse and dense models.

    python tests/benchmarks/bench_pruning.py --out pruning.json
    python tests/benchmarks/bench_pruning.py --out pruning.json --tasks if_equals --models sparse

Four ways, with equal optimiser steps a run:

- constraint: the default settings, one run;
- coefficient: the centre of the source's search [G A.5], one run;
- search: the best of 16 random settings around that centre, all their seconds counted;
- attribution: no learning, integrated gradients over nodes.

Sizes are induced edges, of the smallest node set on a run's way whose loss on the *test* split meets the target (0.15
nats, or where a model misses that ln 2 - 0.83 (ln 2 - its loss)), once with the clean-up for all, once without it for
all: of the ranking alone. For the search the best run is picked as a user could, by its size at the goal on validation
prompts, and once more (search on test) by these very sizes, which nobody could know. Runs that are in the file are not
done again. The default is 190 runs, half an hour on two quiet cores; the last line is the summary.
"""

import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine
from tqdm import tqdm

from distill import command
from distill.artifact import read_json, write_json
from distill.circuits import PruneConfig, load_subject, load_task
from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.edges import edge_total, induced_edge_set
from distill.circuits.estimators import as_nodes
from distill.circuits.judge import Judge
from distill.circuits.objectives import observe
from distill.circuits.prune import split_prompts
from distill.circuits.search import Search
from distill.circuits.selection import TargetError, first, ranking, smallest
from distill.circuits.settings import RELATIVE, Goal
from distill.circuits.subject import Subject
from distill.circuits.tasks import TaskBatch, encode

LN2 = math.log(2)
TIGHTER, LOOSER = (1.0, 0.7, 0.5), (1.0, 1.4, 2.0)
"""Goals on validation prompts, as multiples of the usual one: tighter ones where a run misses the target on the test
split,
looser ones as long as it does better."""
WAYS = ("constraint", "coefficient", "search", "attribution")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of bench_pruning."""

    models: tuple[str, ...] = ("sparse", "dense")
    """Models to prune; targets are common to those that are given."""
    tasks: tuple[str, ...] = ("single_double_quote", "if_equals", "while_return_true", "var_if", "else_elif")
    """Tasks to prune them on."""
    ways: tuple[str, ...] = WAYS
    """Which ways to take."""
    draws: int = 16
    """Random settings of the search."""
    steps: int = PruneConfig().steps
    """Optimiser steps a run."""
    test_pairs: int = 64
    """Pairs of test prompts at whose loss sizes are compared."""
    processes: int = 2
    """Runs at once, one thread each."""
    out: Path = Path("runs/bench_pruning.json")
    """JSON file of all runs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run."""

    model: str
    task: str
    way: str
    draw: int
    target: float
    options: Options

    @property
    def name(self) -> str:
        """Its key in the file."""
        return f"{self.model} {self.task} {self.way} {self.draw}"

    @property
    def config(self) -> PruneConfig:
        """Its settings."""
        common = PruneConfig(steps=self.options.steps, target=self.target, edge_clean_up=0)
        if self.way == "constraint":
            return common
        if self.way == "attribution":
            return replace(common, estimator="attribution", screen=16)
        centre = replace(
            common, controller="coefficient", screen=0, k_coef=1e-4, lr=3e-3, weight_decay=1e-3, beta2=0.95,
            warmup=0.05,
            init_bias=0.1, init_noise=1e-2, shrink=0.0,
        )  # fmt: skip
        return centre if self.way == "coefficient" else around(centre, self.draw)


def around(centre: PruneConfig, draw: int) -> PruneConfig:
    """Settings drawn log-uniformly around the centre: the price and the rate by up to ten, the others by up to
    three."""
    luck = np.random.RandomState(draw)

    def times(value: float, most: float) -> float:
        return float(value * most ** luck.uniform(-1, 1))

    return replace(
        centre,
        k_coef=times(centre.k_coef, 10),
        lr=times(centre.rate, 10),
        weight_decay=times(centre.weight_decay, 10),
        init_noise=times(centre.init_noise, 3),
        init_bias=times(centre.init_bias, 3),
        beta2=1 - times(1 - centre.beta2, 3),
        warmup=times(centre.warmup, 3),
    )


@lru_cache
def subject_of(name: str) -> Subject:
    """A model; each process loads it once."""
    return load_subject(name)


def test_batch(subject: Subject, task: str, pairs: int) -> TaskBatch:
    """Prompts at whose loss sizes are compared."""
    found = load_task(task)
    return encode(found, subject.tokenizer, "test", min(pairs, found.size("test")), 0, context=subject.model.context)


def target_of(task: str, options: Options) -> float:
    """The common target of the models: 0.15, or where one of them misses it, the relative one of the worst."""
    losses = []
    for name in options.models:
        subject = subject_of(name)
        val = split_prompts(load_task(task), subject.tokenizer, PruneConfig(), context=subject.model.context).val
        with frozen(subject.model), torch.no_grad():
            for batch in (val, test_batch(subject, task, options.test_pairs)):
                losses.append(float(two_way_loss(answer_difference(subject.model, batch))))
    worst = max(losses)
    return 0.15 if worst <= 0.15 else LN2 - RELATIVE * (LN2 - worst)


def perform(run: Run) -> dict[str, Any]:
    """One run, and the sizes of what it found at the target on the test split."""
    torch.set_num_threads(1)
    subject, config = subject_of(run.model), run.config
    split = split_prompts(load_task(run.task), subject.tokenizer, config, context=subject.model.context)
    with frozen(subject.model):
        clock, ticks = time.perf_counter(), time.process_time()
        search = Search(subject.model, split.train, split.val, None, subject.means, config)
        full = search.judge.full()
        # Room under the target as the default settings have it; under a relative one, only what is above the model.
        room = run.target if run.target == 0.15 else run.target - full
        goal = run.target - config.headroom * room
        if config.screen:
            search.screen(Goal(task=goal))
        search.learn(Goal(task=goal), config.steps)
        path = clean(search, goal)
        spent = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - ticks}
        batch = test_batch(subject, run.task, run.options.test_pairs)
        test = Judge(subject.model, search.masks, observe(subject.model, batch, search.means, config), config)
        off = ranked(search, test, run.target)
        on = cleaned(search, test, run.target, goal, path) or off
        at_goal = {} if not path else {"goal": size(search, test, path[-1])}
    return {"config": asdict(config), "full": full, **spent, "on": on, "off": off, **at_goal}


def clean(search: Search, goal: float) -> list[torch.Tensor]:
    """What `prune` does after learning; the sets on the way. Empty where the goal is out of reach."""
    try:
        kept, _ = search.discretise([Goal(task=goal)])
    except TargetError:
        return []
    return search.clean_up(kept, Goal(task=goal))


def ranked(search: Search, test: Judge, target: float) -> dict[str, Any] | None:
    """The smallest set of the ranking alone that meets the target on the test split."""
    count = smallest(search.scores, lambda kept: test.task_alone(kept) <= target)
    return None if count is None else size(search, test, first(ranking(search.scores), count))


def cleaned(search: Search, test: Judge, target: float, goal: float, path: list[torch.Tensor]) -> dict[str, Any] | None:
    """The smallest set on the way of a clean-up that meets the target on the test split; None where none does."""
    every: list[torch.Tensor] = []
    for tighter in TIGHTER:
        way = path if tighter == 1 else clean(search, tighter * goal)
        # Where most of the model is left nothing was found, and further goals would cost minutes.
        if way and int(search.masks.count[way[-1]].sum()) > search.total // 2:
            break
        for looser in LOOSER[1:]:
            if way and test.task_alone(way[-1]) <= target:
                way = way + search.clean_up(way[-1], Goal(task=tighter * looser * goal))
        every += way
        met = [kept for kept in every if test.task_alone(kept) <= target]
        if met:
            return min((size(search, test, kept) for kept in met), key=lambda one: one["edges"])
    return None


def size(search: Search, test: Judge, kept: torch.Tensor) -> dict[str, Any]:
    """Nodes, induced edges and test loss of a set."""
    nodes = as_nodes(search.masks, kept)
    edges = edge_total(induced_edge_set(search.model, nodes))
    return {"nodes": int(search.masks.count[kept].sum()), "edges": edges, "test": test.task_alone(kept)}


def runs_of(options: Options) -> list[Run]:
    """All runs; first those that need but one, then one draw of the search after the other."""
    targets = {task: target_of(task, options) for task in options.tasks}
    draws = {way: options.draws if way == "search" else 1 for way in options.ways}
    runs = [
        Run(model=model, task=task, way=way, draw=draw, target=targets[task], options=options)
        for model in options.models
        for task in options.tasks
        for way in options.ways
        for draw in range(draws[way])
    ]
    return sorted(runs, key=lambda run: (run.way == "search", run.draw))


def table(runs: Sequence[Run], found: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each model, task and way, then the geometric means."""
    lines = [
        f"{'model':8}{'task':22}{'way':14}{'target':>8}"
        f"{'edges':>9}{'nodes':>8}{'uncleaned':>11}{'seconds':>9}{'CPU s':>8}"
    ]
    totals: dict[str, list[tuple[float, float, float]]] = {}
    for model, task in dict.fromkeys((run.model, run.task) for run in runs):
        rows = {}
        for way in dict.fromkeys(run.way for run in runs):
            done = [
                found[run.name]
                for run in runs
                if (run.model, run.task, run.way) == (model, task, way) and run.name in found
            ]
            if done:
                rows[way] = best(done)
            if way == "search" and done:
                rows["search on test"] = best(done, on_test=True)
        for way, row in rows.items():
            target = next(run.target for run in runs if run.task == task)
            lines.append(
                f"{model:8}{task:22}{way:14}{target:8.3f}{row['edges'] or 0:9,}{row['nodes'] or 0:8,}"
                f"{row['uncleaned'] or 0:11,}{row['seconds']:9.1f}{row['cpu_seconds']:8.1f}"
            )
        # A row where one way has no circuit would favour the others: it counts for none.
        if all(row["edges"] for row in rows.values()):
            for way, row in rows.items():
                totals.setdefault(way, []).append((row["edges"], row["uncleaned"], row["cpu_seconds"]))
    means = {
        way: [math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*rows, strict=True)]
        for way, rows in totals.items()
    }
    parts = [
        f"{way} {edges:.0f} edges ({off:.0f} uncleaned) in {cpu:.1f} CPU s" for way, (edges, off, cpu) in means.items()
    ]
    counted = len(next(iter(totals.values()), []))
    return [*lines, f"geometric means over {counted} model-task pairs: {'; '.join(parts) or 'nothing yet'}"]


def best(done: Sequence[dict[str, Any]], *, on_test: bool = False) -> dict[str, Any]:
    """The smallest of several runs at the goal on validation prompts, and the seconds of all of them.

    With `on_test` the smallest on the test prompts that it is judged by, with and without clean-up by itself.
    """
    met = [run for run in done if run["on"]]
    if not on_test and len(done) > 1:
        met = sorted((run for run in met if "goal" in run), key=lambda run: run["goal"]["edges"])[:1]
    on = min((run["on"] for run in met), key=lambda one: one["edges"], default=None)
    off = min((run["off"]["edges"] for run in (done if on_test else met) if run["off"]), default=None)
    return {
        "edges": None if on is None else max(on["edges"], 1),
        "nodes": None if on is None else on["nodes"],
        "uncleaned": None if off is None else max(off, 1),
        "seconds": sum(run["seconds"] for run in done),
        "cpu_seconds": sum(run["cpu_seconds"] for run in done),
    }


def bench_pruning(options: Options) -> None:
    """Run what is not in the file, save after each, print."""
    torch.set_num_threads(1)
    runs = runs_of(options)
    found: dict[str, dict[str, Any]] = {}
    if options.out.is_file():
        found = read_json(options.out, what="runs of the benchmark")["runs"]
    # What was run with other settings is run again.
    left = [run for run in runs if found.get(run.name, {}).get("config") != asdict(run.config)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        waiting = {pool.submit(perform, run): run for run in left}
        for done in tqdm(as_completed(waiting), total=len(left), desc="runs", unit="run"):
            found[waiting[done].name] = done.result()
            write_json(
                options.out,
                {"machine": machine(), "options": asdict(options) | {"out": str(options.out)}, "runs": found},
            )
    print("\n".join(table(runs, found)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark on a command line; returns the exit status."""
    return command.run(bench_pruning, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

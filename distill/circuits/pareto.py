"""The Pareto curve of one task in one model: the smallest circuit at each of several target losses, from one search.

The strictest target comes first, as masks are learned more easily from many nodes to few: what is left out has a
gradient only as long as its neighbours are there. Every later target goes on from the masks, the prices and the circuit
that the one before ended with, for a share of the steps, so that a curve of ten targets costs about as much as three
circuits. It never rises: where going on from the masks finds nothing smaller, the circuit before, cleaned up further,
is taken.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from distill.artifact import versions, write_record
from distill.circuits.ablation import Means
from distill.circuits.answers import frozen
from distill.circuits.circuit import SUFFIX, Circuit
from distill.circuits.prune import aims, as_circuit, check_inputs, guarded, split_prompts
from distill.circuits.search import Found, Search
from distill.circuits.selection import TargetError
from distill.circuits.settings import PruneConfig, require
from distill.circuits.tasks import Task
from distill.model.run import Runnable

TARGETS = (0.5, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
"""Target losses in nats, those of the source's figures among them."""
AGAIN = 0.25
"""Share of the steps that each target after the first one is learned for."""


@dataclass(frozen=True, kw_only=True)
class Pareto:
    """Circuits of one task in one model, by target."""

    model: str
    """What a person calls the model."""
    task: str
    """Name of the task."""
    rows: tuple[dict[str, Any], ...]
    """For each target, the largest first: losses and sizes, or the reason why there is no circuit."""
    circuits: dict[float, Circuit]
    """Circuits by target."""
    config: dict[str, Any]
    """How they were searched for."""

    def record(self) -> dict[str, Any]:
        """What `pareto.json` holds."""
        return {
            "model": self.model,
            "task": self.task,
            "rows": list(self.rows),
            "config": self.config,
            "versions": versions(),
        }

    def save(self, folder: Path) -> None:
        """Writes {task}.{model}.pareto.json and .png, and one circuit for each target, into an existing folder."""
        name = f"{self.task}.{self.model}"
        write_record(folder / f"{name}.pareto.json", self.record())
        plot([self], folder / f"{name}.pareto.png")
        for target, circuit in self.circuits.items():
            circuit.save(folder / f"{name}.{target:g}{SUFFIX}")

    def table(self) -> str:
        """The curve as text, a row for each target."""
        lines = [f"{self.task} in {self.model}", _line(*COLUMNS)]
        for row in self.rows:
            if row["reason"]:
                lines.append(f"{row['target']:>8.3g}  {row['reason']}")
                continue
            lines.append(_line(*(row[name] for name in COLUMNS)) + (f"  {row['label']}" if row["label"] else ""))
        return "\n".join(lines)


COLUMNS = ("target", "circuit", "verify", "nodes", "edges_induced", "edges_pruned", "seconds")


def _line(*cells: Any) -> str:
    return "".join(f"{cell:>15}" if isinstance(cell, str | int) else f"{cell:>15.3g}" for cell in cells)


def pareto(
    model: Runnable,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    means: Means,
    targets: Sequence[float],
    config: PruneConfig,
    *,
    model_name: str = "",
    corpus: Int[Tensor, "n T"] | None = None,
) -> Pareto:
    """The smallest circuits of `model` for `task` at each target loss, in nats, from one warm-started search.

    Arguments as in `prune`; the target of `config` is replaced by each of `targets`. Targets out of reach keep a row
    with the reason. ValueError for no targets, and for a `goal` or relative target in `config`; else as
    `prune_batches`.
    """
    require(len(set(targets)) == len(targets) > 0, "targets", list(targets), "one or more different numbers above 0")
    require(
        not config.relative and config.goal is None, "relative", config.relative, "targets as they are, and no goal"
    )
    settings = {target: replace(config, target=target) for target in sorted(targets)}
    split = split_prompts(task, tokenizer, config, context=model.context)
    fingerprint = check_inputs(model, task.name, split.train, split.val, means)
    rows: dict[float, dict[str, Any]] = {}
    circuits: dict[float, Circuit] = {}
    with frozen(model), guarded(model, split, means, config, corpus):
        search = Search(model, split.train, split.val, split.verify, means, config, corpus)
        last: Found | None = None
        for target in tqdm(settings, desc=f"{task.name}, targets", unit="target", leave=False):
            began = time.perf_counter()
            try:
                last = _next(search, settings[target], last)
            except TargetError as error:
                rows[target] = {"target": target, "reason": str(error)}
                continue
            seconds = {"circuit": round(time.perf_counter() - began, 2)}
            circuit = as_circuit(search, last, target, model_name, task.name, fingerprint, seconds)
            circuits[target] = circuit
            rows[target] = {
                "target": target,
                "reason": "",
                **circuit.losses,
                **circuit.counts(model),
                "label": circuit.provenance["label"],
                "goal": last.goal.task,
                "seconds": seconds["circuit"],
            }
    return Pareto(
        model=model_name or fingerprint[:12],
        task=task.name,
        rows=tuple(rows[target] for target in sorted(rows, reverse=True)),
        circuits=circuits,
        config={**circuits_config(config), "targets": list(targets)},
    )


def circuits_config(config: PruneConfig) -> dict[str, Any]:
    """The settings but for the target, which has no one value."""
    return {name: value for name, value in vars(config).items() if name != "target"}


def _next(search: Search, config: PruneConfig, last: Found | None) -> Found:
    """The circuit for the next target: from the masks, or from the last circuit, whichever is smaller."""
    search.config = config
    target, goals = aims(search, config)
    if last is None and config.screen:
        search.screen(goals[0])
    search.learn(goals[0], config.steps if last is None else max(1, round(AGAIN * config.steps)))
    if last is None:
        return search.find(goals, target)
    further = search.finish(last.kept, goals[0], target, last.nodes_before)
    try:
        anew = search.find(goals, target)
    except TargetError:
        return further
    return min(further, anew, key=search.size)


def plot(curves: Sequence[Pareto], path: Path) -> None:
    """Edges and nodes of circuits against the task loss that they were asked to meet, one line for each curve."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, size, words in zip(
        figure.subplots(1, 2), ("edges_induced", "nodes"), ("edges between kept nodes", "nodes"), strict=True
    ):
        for curve in curves:
            found = [row for row in curve.rows if not row["reason"]]
            sizes = [max(row[size], 1) for row in found]
            axes.plot([row["target"] for row in found], sizes, marker="o", label=f"{curve.task}, {curve.model}")
        axes.set(xscale="log", yscale="log", xlabel="target task loss, nats", ylabel=words)
        axes.grid(alpha=0.3)
    if curves:
        figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)

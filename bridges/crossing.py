"""What a student's circuit and its dense model's have to do with each other, task by task.

`add_crossings` puts interchange through the bridge and node correspondence, with their controls, into a comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from bridges.compare import CompareConfig, Comparison
from bridges.correspondence import causal_map, heads_and_neurons, live_overlap
from bridges.interchange import Other, interchange
from bridges.lineup import STUDENT, TEACHER, Lineup
from bridges.maps import Bridges
from bridges.ratios import SPARSE
from bridges.subspace import live_channels
from bridges.transport import PAIRS, active_channels, random_channels, spread, unrelated_bridges, unrelated_live
from distill.circuits.circuit import Circuit
from distill.circuits.subject import Subject
from distill.circuits.tasks import MisfitError, Task, TaskBatch, encode

CONTROLS = 20
"""Random channel sets that an interchange is read against."""
DRAWS = 200
"""Random sets of dense parts that a correspondence is read against."""


def add_crossings(comparison: Comparison, lineup: Lineup, tasks: Sequence[Task], config: CompareConfig) -> Comparison:
    """Adds `tasks.{task}.interchange` and `tasks.{task}.correspondence` for each task with a student's circuit.

    The first is `Interchanges.to_json`; the second `correspondence`, which needs a circuit of the dense model too. None
    where there is no bridge or no circuit. The unrelated student is the comparison's own sparse model.
    """
    teacher, student = lineup.subject(TEACHER), lineup.subject(STUDENT)
    rows = {name: {**row, "interchange": None, "correspondence": None} for name, row in _rows(comparison).items()}
    chosen = [task for task in tasks if (task.name, STUDENT) in comparison.circuits]
    if lineup.bridges is not None and teacher is not None and student is not None and chosen:
        active = active_channels(student.model, spread(student.sample)[:, :-1])
        stranger = unrelated_bridges(lineup)
        for task in tqdm(chosen, desc="crossings", unit="task", delay=2):
            ours = comparison.circuits[task.name, STUDENT]
            theirs = comparison.circuits.get((task.name, TEACHER))
            other = _other(comparison, lineup, task, stranger)
            rows[task.name]["interchange"] = _interchange(
                teacher, student, lineup.bridges, task, ours, active, other, config
            )
            if theirs is not None:
                batch = _pairs(teacher, task, "test", config)
                rows[task.name]["correspondence"] = correspondence(
                    teacher, lineup.bridges, batch, theirs, ours, active, seed=config.prune.seed
                )
    record: dict[str, Any] = {**comparison.record, "tasks": rows}
    return replace(comparison, record=record)


def _rows(comparison: Comparison) -> dict[str, Any]:
    return dict(comparison.record["tasks"])


def _pairs(subject: Subject, task: Task, split: str, config: CompareConfig, *, aligned: bool = False) -> TaskBatch:
    pairs, seed = min(PAIRS, task.size(split)), config.prune.seed
    return encode(task, subject.tokenizer, split, pairs, seed, context=subject.model.context, aligned=aligned)


def _other(comparison: Comparison, lineup: Lineup, task: Task, bridges: Bridges | None) -> Other | None:
    sparse = lineup.subject(SPARSE)
    if bridges is None or sparse is None:
        return None
    return Other(model=sparse.model, bridges=bridges, live=unrelated_live(comparison, task.name))


def _interchange(
    teacher: Subject,
    student: Subject,
    bridges: Bridges,
    task: Task,
    circuit: Circuit,
    active: Mapping[str, Tensor],
    other: Other | None,
    config: CompareConfig,
) -> dict[str, Any]:
    model, seed = student.model, config.prune.seed
    live = live_channels(circuit.nodes, n_layer=model.n_layer, d_model=model.d_model)
    try:
        batch = _pairs(teacher, task, "test", config, aligned=True)
    except MisfitError:
        # Too few pairs of equal length: those that there are have to do.
        batch = _pairs(teacher, task, "test", config)
    classes = _pairs(teacher, task, "train", config) if task.splits.get("train") else None
    return interchange(
        teacher.model,
        model,
        bridges,
        batch,
        live,
        controls=random_channels(live, active, CONTROLS, seed=seed),
        classes=classes,
        other=other,
        protect_first=teacher.means.protect_first,
    ).to_json()


def correspondence(
    teacher: Subject,
    bridges: Bridges,
    batch: TaskBatch,
    theirs: Circuit,
    ours: Circuit,
    active: Mapping[str, Bool[Tensor, " S"]],
    *,
    seed: int,
) -> dict[str, Any]:
    """How far the dense circuit and the student's point to the same parts (METHODS 6.5).

    `overlap`: `subspace_overlap` by site, `overlap_random`: its median with as many random active channels. `caused`:
    of all that ablating single heads and neurons of the dense model does to the live channels of the student's circuit
    (`causal_map`, squared), the share that those of the dense circuit have; `caused_random`: quantiles 5%, 50%, 95% of
    that share for as many random heads and neurons of the same layers; `p`: (1 + draws at least as large) / (1 +
    draws).
    """
    model = teacher.model
    live = live_channels(ours.nodes, n_layer=model.n_layer, d_model=bridges.shape.d_sparse)
    units = heads_and_neurons(model)
    changes = causal_map(model, bridges, batch, teacher.means, units)
    inside = torch.tensor([bool(theirs.nodes[one.location][list(one.channels)].any()) for one in units])
    weight = torch.stack([
        (row * live[one.after(model.n_layer)].cpu()).square().sum() for one, row in zip(units, changes, strict=True)
    ])  # fmt: skip
    share, drawn = unit_share(weight, inside, [one.location for one in units], seed=seed)
    overlaps = live_overlap(theirs.nodes, live, bridges)
    random = [live_overlap(theirs.nodes, one, bridges) for one in random_channels(live, active, CONTROLS, seed=seed)]
    return {
        "overlap": overlaps,
        "overlap_random": {site: _median([one[site] for one in random]) for site in overlaps},
        "units": int(inside.sum()),
        "caused": share,
        "caused_random": [float(value) for value in np.quantile(drawn, (0.05, 0.5, 0.95))],
        "p": (1 + sum(value >= share for value in drawn)) / (1 + len(drawn)),
    }


def unit_share(
    weight: Float[Tensor, " units"], inside: Bool[Tensor, " units"], places: Sequence[str], *, seed: int
) -> tuple[float, list[float]]:
    """The share of the weight that some units have, and the shares of random sets, as many of each place."""
    total = float(weight.sum()) or 1.0
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.tensor([i for i, one in enumerate(places) if one == place]) for place in dict.fromkeys(places)]
    drawn = []
    for _ in range(DRAWS):
        picked = [
            group[torch.randperm(len(group), generator=generator)[: int(inside[group].sum())]] for group in groups
        ]
        drawn.append(float(weight[torch.cat(picked)].sum()) / total)
    return float(weight[inside].sum()) / total, drawn


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None

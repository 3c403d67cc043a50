"""Published results on circuits: their size, that they are needed, and what finds them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from bridges.figures import new_figure
from bridges.headlines.setting import Found, Headline, Setting, searching
from bridges.report import table
from distill.circuits.answers import CHANCE
from distill.circuits.circuit import Circuit

QUOTE = "single_double_quote"


def edges(setting: Setting, objective: str, *, relative: bool = False) -> Found:
    """Size of dense circuits over that of sparse ones (METHODS 6.1, 6.7)."""
    found = setting.sizes(objective, relative=relative)
    record = found.record
    print(table(record))
    ratio, interval = record["edge_ratio_geomean"], record["edge_ratio_interval"]
    counted = record["tasks_counted"]
    if ratio is None:
        said = "no task counts: " + "; ".join(record["left_out"].values())
        return Found(ours=said, holds=None, record=record, searching=searching(found))
    between = (
        "no interval from one task and one seed" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
    )
    gap = record["matched"]["gap"]
    targets = [record["tasks"][task]["target"] for task in counted]
    ours = (
        f"{ratio:.2f} ({between}) times the edges in dense at task losses of {_range(targets)}, {len(counted)} tasks "
        f"of {len(record['tasks_eligible'])} eligible; nodes {record['node_ratio_geomean']:.2f}, edges after the edge "
        f"stage {record['pruned_edge_ratio_geomean']:.2f}, null {record['null_ratio_geomean']:.2f}; held-out loss of "
        f"dense {gap:+.1%}"
    )
    sizes = {one.name: [record["tasks"][task][one.name]["edges_induced"] for task in counted] for one in setting.pair}
    return Found(
        ours=ours,
        holds=interval[0] > 1 if interval is not None and record["matched"]["holds"] else None,
        record=record,
        figure=bars(sizes, counted),
        searching=searching(found),
    )


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"


def bars(sizes: Mapping[str, Sequence[int]], tasks: Sequence[str]) -> Figure:
    """Edges of circuits by task, a bar for each of the labels; no edge stands as one."""
    figure = new_figure(1.5 + 0.9 * len(tasks), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(sizes)
    for place, (label, values) in enumerate(sizes.items()):
        offset = (place - (len(sizes) - 1) / 2) * width
        axes.bar(np.arange(len(tasks)) + offset, [max(value, 1) for value in values], width, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("edges between kept nodes")
    axes.set_xticks(range(len(tasks)), list(tasks), rotation=30, ha="right", fontsize=8)
    axes.legend(fontsize=8)
    return figure


def necessity(setting: Setting) -> Found:
    """Task loss with only the circuit ablated, against as many random nodes."""
    comparison = setting.sizes("paper")
    record = comparison.record
    rows = {
        (task, one.name): row[one.name]
        for task, row in record["tasks"].items()
        for one in setting.pair
        if row[one.name]["nodes"] is not None
    }
    kept = {
        f"{task}.{name}": {key: row[key] for key in ("loss_full", "loss_without_circuit", "loss_without_random_median")}
        for (task, name), row in rows.items()
    }
    if not kept:
        return Found(ours="no circuit to ablate", holds=None, record=kept)
    destroyed = [row["loss_without_circuit"] >= CHANCE for row in kept.values()]
    harder = [row["loss_without_circuit"] > row["loss_without_random_median"] for row in kept.values()]
    losses = [float(np.median([row[key] for row in kept.values()])) for key in next(iter(kept.values()))]
    ours = (
        f"at chance or worse in {sum(destroyed)} of {len(kept)} circuits, harder hit than by random nodes in "
        f"{sum(harder)}; medians {losses[0]:.3f} whole, {losses[1]:.2f} without circuit, {losses[2]:.3f} without as "
        "many random nodes"
    )
    figure = new_figure(7.0, 0.8 + 0.22 * len(kept))
    axes = figure.subplots()
    for place, (key, label) in enumerate(
        (
            ("loss_full", "whole"),
            ("loss_without_random_median", "without random nodes"),
            ("loss_without_circuit", "without circuit"),
        )
    ):
        axes.scatter([row[key] for row in kept.values()], range(len(kept)), label=label, s=18, zorder=2 + place)
    axes.axvline(CHANCE, color="grey", linewidth=1)
    axes.set_yticks(range(len(kept)), list(kept), fontsize=7)
    axes.set_xlabel("task loss, nats (line: chance)")
    axes.legend(fontsize=7)
    return Found(ours=ours, holds=all(destroyed), record=kept, figure=figure, searching=searching(comparison))


def quote(setting: Setting) -> Found:
    """The circuit that closes a quote, cleaned down to edges."""
    found = setting.sizes("paper")
    circuit = found.circuits.get((QUOTE, setting.sparse[0].name))
    if circuit is None or not found.record["tasks"][QUOTE][setting.sparse[0].name]["meets_target"]:
        return Found(ours=f"no circuit of {QUOTE} in {setting.sparse[0].name} meets the target", holds=None, record={})
    counts = circuit.counts(setting.sparse[0].model)
    loss = found.record["tasks"][QUOTE][setting.sparse[0].name]["loss_circuit"]
    ours = (
        f"{counts['nodes']} nodes, {counts['edges_pruned']} edges after the edge stage ({counts['edges_induced']} "
        f"between kept nodes), task loss {loss:.3f} on unseen prompts; nothing removed by hand"
    )
    record = {**counts, "loss_circuit": loss, "nodes_kept": _named(circuit)}
    return Found(ours=ours, holds=counts["nodes"] <= 24 and counts["edges_pruned"] <= 18, record=record)


def _named(circuit: Circuit) -> dict[str, list[int]]:
    return {location: mask.nonzero().flatten().tolist() for location, mask in circuit.nodes.items() if mask.any()}


def learned(setting: Setting) -> Found:
    """Edges found by attribution alone over those found by learned masks, in the sparse model."""
    subject = setting.sparse[0]
    ranked = replace(setting.config.prune, estimator="attribution", screen=16, objective="paper")
    ways = {
        "learned": replace(
            setting.config, prune=replace(setting.config.prune, objective="paper", clean_up=0, edge_clean_up=0)
        ),
        "attribution": replace(setting.config, prune=replace(ranked, clean_up=0, edge_clean_up=0)),
    }
    sizes: dict[str, dict[str, int]] = {}
    took = 0.0
    for way, config in ways.items():
        found = setting.compared([subject], config)
        took += searching(found)
        for task, row in found.record["tasks"].items():
            if row[subject.name].get("meets_target"):
                sizes.setdefault(task, {})[way] = max(1, row[subject.name]["edges_induced"])
    both = {task: size for task, size in sizes.items() if len(size) == len(ways)}
    if not both:
        return Found(ours="no task on which both circuits meet the target", holds=None, record=sizes)
    logs = np.log([size["attribution"] / size["learned"] for size in both.values()])
    low, high = _interval(logs)
    ours = (
        f"attribution takes {math.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f}) times the edges of learned masks, "
        f"{len(both)} tasks, no clean-up on either side"
    )
    figure = bars({way: [size[way] for size in both.values()] for way in ways}, list(both))
    return Found(ours=ours, holds=low > 1 if len(both) > 1 else None, record=sizes, figure=figure, searching=took)


def _interval(logs: np.ndarray) -> tuple[float, float]:
    """95% interval of a geometric mean over tasks; without width for a single one."""
    if len(logs) < 2:
        return math.exp(logs[0]), math.exp(logs[0])
    found = bootstrap((logs,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return math.exp(found.low), math.exp(found.high)


CIRCUITS = (
    Headline(
        name="edges",
        source="[G Fig. 2]",
        claim="dense circuits have about 16 times the edges of sparse ones at equal pretraining loss (16 to 24 times)",
        rule="the interval of the ratio lies above 1, at held-out losses within 1%",
        rerun=lambda setting: edges(setting, "paper"),
    ),
    Headline(
        name="edges_relative",
        source="[G Fig. 2], ours",
        claim="the same at the source's operating point, ln 2 - 0.83 (ln 2 - loss of the full models) for every task",
        rule="the interval of the ratio lies above 1, at held-out losses within 1%",
        rerun=lambda setting: edges(setting, "paper", relative=True),
    ),
    Headline(
        name="edges_faithful",
        source="ours",
        claim="the same ratio, of circuits that also answer as the model does when what was pruned comes back in part",
        rule="the interval of the ratio lies above 1, at held-out losses within 1%",
        rerun=lambda setting: edges(setting, "faithful"),
    ),
    Headline(
        name="necessity",
        source="[G Fig. 32]",
        claim="ablating only the circuit destroys the task",
        rule="the task loss is at chance or worse without any of the circuits",
        rerun=necessity,
    ),
    Headline(
        name="quote",
        source="[G Fig. 4]",
        claim="the quote circuit, cleaned by hand: 12 nodes (q and k apart), 9 edges",
        rule="at most twice as many of both, without any handwork",
        rerun=quote,
    ),
    Headline(
        name="learned",
        source="[G Fig. 31]",
        claim="learned masks find circuits of far fewer edges than attribution at every loss",
        rule="the interval of the ratio lies above 1",
        rerun=learned,
    ),
)

"""Figures of a comparison: sizes by layer and location, the bridge's tests over sites, sizes along the targets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bridges.ratios import DENSE, SPARSE, arm_of
from distill.circuits.circuit import Circuit
from distill.circuits.masks import Nodes
from distill.model.sites import KINDS, kind_of, layer_of

COLOURS = {SPARSE: "#2f6db5", DENSE: "#d2691e", "dense_gpt2": "#8a5a2b", "student": "#5a9bd4"}
GREY = "#9a9d96"


def plot_locations(circuits: Mapping[tuple[str, str], Circuit], path: Path) -> None:
    """Kept nodes by layer and location, a panel for each task and model. ValueError for no circuits."""
    if not circuits:
        raise ValueError("circuits: got none; allowed are one or more")
    tasks = list(dict.fromkeys(task for task, _ in circuits))
    models = list(dict.fromkeys(model for _, model in circuits))
    figure = new_figure(2.4 + 2.1 * len(models), 0.5 + 1.9 * len(tasks))
    grid = figure.subplots(len(tasks), len(models), squeeze=False)
    for row, task in enumerate(tasks):
        for column, model in enumerate(models):
            axes = grid[row][column]
            if (task, model) in circuits:
                _heat(axes, node_counts(circuits[task, model].nodes))
            else:
                axes.text(0.5, 0.5, "no circuit", ha="center", va="center", color=GREY, transform=axes.transAxes)
                axes.set_xticks([])
            axes.set_yticks(range(len(KINDS)), KINDS if column == 0 else [""] * len(KINDS), fontsize=7)
            if row == 0:
                axes.set_title(model, fontsize=9)
            if column == 0:
                axes.set_ylabel(task, fontsize=8)
    figure.savefig(path, dpi=110)


def node_counts(nodes: Nodes) -> np.ndarray:
    """Kept nodes, (kinds, layers)."""
    counts = np.zeros((len(KINDS), 1 + max(layer_of(location) for location in nodes)), int)
    for location, mask in nodes.items():
        counts[KINDS.index(kind_of(location)), layer_of(location)] = int(mask.sum())
    return counts


def _heat(axes: Axes, counts: np.ndarray) -> None:
    axes.imshow(np.sqrt(counts), cmap="Blues", aspect="auto", vmin=0, vmax=max(1.0, float(np.sqrt(counts.max())) * 1.4))
    for (kind, layer), count in np.ndenumerate(counts):
        if count:
            axes.text(layer, kind, str(count), ha="center", va="center", fontsize=7)
    axes.set_xticks(range(counts.shape[1]), [f"layer {layer}" for layer in range(counts.shape[1])], fontsize=7)
    axes.tick_params(length=0)


def plot_bridge(tasks: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Interchange and the bridged subspace over residual sites, a row for each task, with bands of their controls.

    `tasks` are the rows of a comparison; ValueError where none has an interchange.
    """
    shown = {name: row for name, row in tasks.items() if (row.get("interchange") or {}).get("sites")}
    if not shown:
        raise ValueError(
            "tasks: none has an interchange; allowed are comparisons with a bridge and a student's circuit"
        )
    figure = new_figure(12.5, 1.5 + 2.6 * len(shown))
    grid = figure.subplots(len(shown), 3, squeeze=False)
    for (name, row), (left, middle, right) in zip(shown.items(), grid, strict=True):
        _interchange_axes(left, row["interchange"]["sites"])
        _subspace_axes(middle, row.get("bridge") or [], "sufficiency")
        _subspace_axes(right, row.get("bridge") or [], "necessity")
        left.set_ylabel(f"{name}\nshare of the way", fontsize=9)
        for axes in (middle, right):
            axes.set_ylabel("task loss, nats", fontsize=9)
    for axes, title in zip(
        grid[0], ("interchange through the bridge", "only the subspace kept", "the subspace removed"), strict=True
    ):
        axes.set_title(title, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("residual site: layer, before attention (in) or MLP (mid)", fontsize=8)
    # One entry for each colour and line, wherever it is drawn first.
    keys: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            keys.setdefault(label, handle)
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


MINE, STRANGER = "the circuit's", "unrelated student's circuit"


def _interchange_axes(axes: Axes, sites: Sequence[Mapping[str, Any]]) -> None:
    names = [one["site"] for one in sites]
    _band(axes, [one["controls"] for one in sites], GREY, "random channels, 5-95%")
    for key, words, colour, line in (
        ("ceiling", "all channels", COLOURS["student"], ":"),
        ("effect", MINE, COLOURS[SPARSE], "o-"),
        ("unrelated", STRANGER, COLOURS[DENSE], "s-"),
        ("class_means", "difference of class means", "#7d4fb8", "--"),
    ):
        values = [np.nan if one[key] is None else one[key] for one in sites]
        if not np.all(np.isnan(values)):
            axes.plot(range(len(names)), values, line, label=words, linewidth=1.3, color=colour, markersize=4)
    axes.axhline(0, color=GREY, linewidth=0.8)
    _site_axis(axes, names)


def _subspace_axes(axes: Axes, tests: Sequence[Mapping[str, Any]], test: str) -> None:
    mine = [one for one in tests if one["test"] == test and one["site"] != "all"]
    if not mine:
        axes.set_axis_off()
        return
    _band(axes, [one["controls"] for one in mine], "#6f746d", "random subspaces, 5-95%")
    _band(axes, [one.get("families", {}).get("channels", []) for one in mine], "#d9b36c", "images of random channels")
    axes.plot(range(len(mine)), [one["loss"] for one in mine], "o-", color=COLOURS[SPARSE], label=MINE, markersize=4)
    for name, words, colour, line in (
        ("unrelated", STRANGER, COLOURS[DENSE], "s-"),
        ("principal", "first principal components", "#4b5158", "-."),
    ):
        values = [one["other"].get(name, np.nan) for one in mine]
        if not np.all(np.isnan(values)):
            axes.plot(range(len(mine)), values, line, color=colour, linewidth=1.1, label=words, markersize=3)
    axes.axhline(np.log(2), color=GREY, linewidth=0.8, linestyle=":", label="chance")
    axes.axhline(mine[0]["loss_full"], color="#2c7a4b", linewidth=0.8, linestyle=":", label="dense model left alone")
    _site_axis(axes, [one["site"] for one in mine])


def _band(axes: Axes, controls: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """5% to 95% of the controls at every site; nothing where there are none."""
    if any(controls):
        low, high = (np.array([np.quantile(one or [np.nan], q) for one in controls]) for q in (0.05, 0.95))
        axes.fill_between(range(len(controls)), low, high, color=colour, alpha=0.35, linewidth=0, label=label)


def _site_axis(axes: Axes, names: Sequence[str]) -> None:
    short = [name.replace("resid_", "").replace("final_resid", "final") for name in names]
    axes.set_xticks(range(len(names)), short, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25)


def plot_size_loss(curves: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Edges against target loss along Pareto curves, sparse against dense, a panel for each task.

    Solid: all edges between kept nodes; dotted: those left after the edge stage. `curves` are the rows of `Pareto` by
    (task, model); ValueError for none.
    """
    if not curves:
        raise ValueError("curves: got none; allowed are one or more")
    tasks = list(dict.fromkeys(task for task, _ in curves))
    figure = new_figure(1.2 + 3.6 * len(tasks), 3.4)
    grid = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(grid, tasks, strict=True):
        for (of, model), rows in curves.items():
            met = [row for row in rows if not row["reason"]]
            if of == task and met:
                targets = [row["target"] for row in met]
                colour = COLOURS.get(arm_of(model) or model)
                for size, line, words in (
                    ("edges_induced", "o-", model),
                    ("edges_pruned", ".:", f"{model}, edges cut"),
                ):
                    if all(row.get(size) is not None for row in met):
                        sizes = [max(row[size], 1) for row in met]
                        axes.plot(targets, sizes, line, color=colour, label=words, linewidth=1.2)
        axes.set(xscale="log", yscale="log", xlabel="target task loss, nats")
        axes.set_title(task, fontsize=9)
        targets = sorted({row["target"] for rows in curves.values() for row in rows})
        axes.set_xticks(targets, [f"{target:g}" for target in targets], fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("edges")
    grid[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, without pyplot: importing this must not change how a notebook draws."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

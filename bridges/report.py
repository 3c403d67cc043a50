"""A comparison for people: the printed table, the figure, and a page that opens from disk."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bridges.compare import Comparison
from bridges.figures import plot_bridge, plot_locations, plot_size_loss
from bridges.ratios import DENSE, SPARSE, arm_of
from distill.artifact import Provenance, fresh_folder, write_json
from distill.circuits.subject import Subject

COLUMNS = ("task", "model", "full", "empty", "circuit", "calibr.", "target", "nodes", "edges", "without", "random")
EDGES_SHOWN = 200


def write_report(
    comparison: Comparison, subjects: Sequence[Subject], folder: Path, provenance: Provenance, title: str
) -> None:
    """Writes comparison.json, its figures, index.html and the circuits into `folder`, over an earlier report.

    Figures: comparison.png (sizes and necessity), locations.png (nodes by layer and location), and where they were
    measured bridge.png (interchange and subspaces over sites) and size_loss.png (edges along the targets).
    """
    with fresh_folder(folder, provenance, replace=True) as place:
        write_json(place / "comparison.json", comparison.record)
        comparison.save(place)
        plot(comparison.record, place / "comparison.png")
        if comparison.circuits:
            plot_locations(comparison.circuits, place / "locations.png")
        tasks = comparison.record["tasks"]
        if any((row.get("interchange") or {}).get("sites") for row in tasks.values()):
            plot_bridge(tasks, place / "bridge.png")
        if curves := {
            (task, name): rows for task, row in tasks.items() for name, rows in row.get("curves", {}).items()
        }:
            plot_size_loss(curves, place / "size_loss.png")
        page = page_of(comparison, subjects, (place / "comparison.png").read_bytes(), title)
        (place / "index.html").write_text(page, encoding="utf-8")


def table(record: Mapping[str, Any]) -> str:
    """The comparison as text: held-out losses, a row per task and model, the ratios."""
    losses = ", ".join(f"{name} {model['heldout_loss']:.3f}" for name, model in record["models"].items())
    widths = [max([least, *(len(name) + 2 for name in record[key])]) for key, least in (("tasks", 22), ("models", 12))]
    lines = [f"held-out loss, nats per token: {losses}", "", _line(COLUMNS, widths)]
    for task, row in record["tasks"].items():
        for name in record["models"]:
            lines.append(_line(_cells(task, name, row), widths))
            if note := row[name]["reason"] or row[name].get("label"):
                lines.append(f"{'':24}{note}")
    return "\n".join([*lines, "", *said(record)])


def said(record: Mapping[str, Any]) -> list[str]:
    """All that a comparison comes to, in sentences."""
    parts = (summary, budget_lines, specificity_lines, basis_lines, bridge_lines, crossing_lines)
    return [line for part in parts for line in part(record)]


def summary(record: Mapping[str, Any]) -> list[str]:
    """What the comparison comes to, in sentences."""
    counted = record["tasks_counted"]
    lines = []
    if record["matched"]:
        gap, holds = record["matched"]["gap"], record["matched"]["holds"]
        lines.append(f"held-out loss of dense against sparse: {gap:+.1%}, {'matched' if holds else 'NOT matched'} (1%)")
    lines += [f"{task} is left out of the ratio: {reason}" for task, reason in record["left_out"].items()]
    lines += [f"objective: {record['objective']} (task loss, all else at its mean); losses in nats, chance 0.693"]
    if not counted:
        return [*lines, "no task counts for the ratio: none is met by both circuits and needs a circuit in both models"]
    return [
        *lines,
        f"edges dense / sparse: {record['edge_ratio_geomean']:.2f} (geometric mean over {len(counted)} tasks: "
        f"{', '.join(counted)}{_between(record)}); {_edge_stage(record)}nodes {record['node_ratio_geomean']:.2f}, "
        f"blindly drawn nodes {record['null_ratio_geomean']:.2f}",
    ]


def _between(record: Mapping[str, Any]) -> str:
    """The interval of the ratio in words."""
    found, over = record.get("edge_ratio_interval"), record.get("interval_over", {})
    if found is None:
        return ""
    seeds = "" if max(over[SPARSE], over[DENSE]) < 2 else f" x {over[SPARSE]} sparse x {over[DENSE]} dense seeds"
    return f"; 95% over tasks{seeds} {found[0]:.2f} to {found[1]:.2f}"


def _edge_stage(record: Mapping[str, Any]) -> str:
    """The ratio of the edges that the edge stage left, which is on or off for both sides alike."""
    ratio = record.get("pruned_edge_ratio_geomean")
    on = record.get("config", {}).get("prune", {}).get("edge_clean_up", 0) > 0
    return f"after cutting edges {ratio:.2f}, " if on and ratio is not None else "no edges cut, "


def budget_lines(record: Mapping[str, Any]) -> list[str]:
    """What twice the pruning budget changes, a line; none where it was not looked at."""
    found = record.get("budget")
    if not found or not found["models"]:
        return []
    moves = ", ".join(
        f"{name} {one['moved']:+.0%} (most in one circuit {one['worst']:+.0%}; after cutting edges "
        f"{one['moved_pruned']:+.0%})"
        for name, one in found["models"].items()
    )
    held = "within" if found["holds"] else "NOT within"
    ratio = found["edge_ratio_geomean"]
    then = "" if ratio is None else f", and the ratio is {ratio:.2f} then"
    return [f"twice the pruning budget moves edges by {moves}: {held} {found['limit']:.0%}{then}"]


def specificity_lines(record: Mapping[str, Any]) -> list[str]:
    """What losing a circuit of the pair does elsewhere (METHODS 6.8), a line for each task."""
    lines = []
    for task, row in record["tasks"].items():
        parts = []
        for name in record["models"]:
            damage = row[name].get("damage")
            if arm_of(name) is None or not damage:
                continue
            others = {key.removeprefix("damage_other_"): value for key, value in damage.items() if "_other_" in key}
            worst = max(others, key=lambda one: others[one], default=None)
            elsewhere = "" if worst is None else f", {worst} {others[worst]:.3f} at most"
            parts.append(f"{name} {damage['damage_task']:.3f}{elsewhere}, text {damage['damage_corpus']:.3f} a token")
        if parts:
            lines.append(f"{task}: the loss rises without its circuit, nats, in {'; in '.join(parts)}")
    return lines


def basis_lines(record: Mapping[str, Any]) -> list[str]:
    """Sizes in the dense model's own basis against its heads' singular vectors, a line."""
    found = record.get("basis")
    if not found or found["edge_ratio_geomean"] is None:
        return []
    return [
        f"the bridged dense model as it is has {found['edge_ratio_geomean']:.2f} times the edges and "
        f"{found['node_ratio_geomean']:.2f} times the nodes that it has with its heads in the basis of their singular "
        f"vectors (geometric mean over {len(found['tasks'])} tasks)"
    ]


def crossing_lines(record: Mapping[str, Any]) -> list[str]:
    """Interchange through the bridge, node correspondence and agreement of losses, a line each."""
    lines = []
    for task, row in record["tasks"].items():
        crossed = row.get("interchange") or {}
        if best := crossed.get("best"):
            site = next(one for one in crossed["sites"] if one["site"] == best["site"])
            control = f", random channels {np.median(best['controls']):.2f}" if best["controls"] else ""
            control += "" if best["p"] is None else f", p {best['p']:.2f}"
            for key, words in (("unrelated", "unrelated student"), ("class_means", "class means")):
                control += "" if best[key] is None else f", {words} {best[key]:.2f}"
            above = best["above_unrelated"]
            against = "" if above is None else f", {'more' if above else 'NOT more'} than the unrelated student's"
            lines.append(
                f"{task}: interchange of the circuit's {site['channels']} channels goes {best['effect']:.2f} of the "
                f"way at its best site, {best['site']}{against} (all channels "
                f"{site['ceiling']:.2f}; each at its best site{control}; {crossed['pairs']} pairs, "
                f"{crossed['skipped']} passed over, of unequal length or tokens that do not fit)"
            )
        elif crossed and crossed["accuracy"] is None:
            lines.append(f"{task}: no interchange, none of {crossed['skipped']} pairs has prompts of equal length")
        elif crossed:
            lines.append(f"{task}: no interchange, the dense model is right on {crossed['accuracy']:.0%} only")
        if found := row.get("correspondence"):
            low, middle, high = found["caused_random"]
            lines.append(
                f"{task}: the {found['units']} heads and neurons of the dense circuit cause {found['caused']:.0%} of "
                f"what the bridge reads in the student's (as many random ones {middle:.0%}, {low:.0%} to {high:.0%}; "
                f"p {found['p']:.3f})"
            )
    for one in record.get("agreement", []):
        if one["pearson_log"] is not None:
            lines.append(
                f"losses token by token, {one['models'][0]} and {one['models'][1]}: correlation of logs "
                f"{one['pearson_log']:.3f}, of ranks {one['spearman']:.3f}; same error {one['same_error'] or 0:.0%}"
            )
    return lines


def bridge_lines(record: Mapping[str, Any]) -> list[str]:
    """The bridged subspace test in sentences, all sites together: one line per task and test."""
    lines = []
    for task, row in record["tasks"].items():
        for test in row.get("bridge") or []:
            if test["site"] != "all":
                continue
            kept = "kept alone" if test["test"] == "sufficiency" else "taken out"
            control = f", random subspaces {np.median(test['controls']):.3f}" if test["controls"] else ""
            chances = ", ".join(f"{family} p {p:.2f}" for family, p in test["p"].items())
            single = [one for one in row["bridge"] if one["test"] == test["test"] and one["site"] != "all" and one["p"]]
            above = sum(one["verdict"] == "above chance" for one in single)
            apart = f"; one site at a time: above chance at {above} of {len(single)}" if single else ""
            lines.append(
                f"{task}: the student's circuit in the dense model, its subspace {kept} "
                f"({test['share']:.0%} of the width): loss {test['loss']:.3f}, model {test['loss_full']:.3f}"
                f"{control}: {test['verdict']} ({chances}){apart}"
            )
    return lines


def _cells(task: str, name: str, row: Mapping[str, Any]) -> list[str]:
    one = row[name]
    numbers = [one[key] for key in ("loss_full", "loss_empty", "loss_circuit", "loss_calibrated")]
    numbers.append(one.get("target", row["target"]))
    sizes = [one["nodes"], one["edges_induced"]]
    damage = [one["loss_without_circuit"], one["loss_without_random_median"]]
    return [task, name, *map(_number, numbers), *map(_number, sizes), *map(_number, damage)]


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{cells[0]:<{widths[0]}}{cells[1]:<{widths[1]}}" + "".join(f"{cell:>9}" for cell in cells[2:])


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Edges and nodes per task and model as bars, and what taking the circuit out does."""
    tasks, models = list(record["tasks"]), list(record["models"])
    # Without pyplot: importing this module must not change how a notebook draws.
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, key, title in zip(
        axes,
        ("edges_induced", "nodes", "loss_without_circuit"),
        ("edges of the circuit", "nodes of the circuit", "task loss without the circuit (nats)"),
        strict=True,
    ):
        places = np.arange(len(tasks))
        for offset, name in enumerate(models):
            values = [record["tasks"][task][name][key] for task in tasks]
            heights = [np.nan if value is None else value for value in values]
            width = 0.8 / len(models)
            axis.bar(places + (offset - (len(models) - 1) / 2) * width, heights, width, label=name)
            if key == "loss_without_circuit":
                randoms = [record["tasks"][task][name]["loss_without_random_median"] for task in tasks]
                heights = [np.nan if value is None else value for value in randoms]
                axis.plot(places + (offset - (len(models) - 1) / 2) * width, heights, "k_", markersize=8)
        axis.set_xticks(places, tasks, rotation=25, ha="right")
        axis.set_title(title)
        axis.margins(y=0.15)
        if key != "loss_without_circuit":
            # Not a plain logarithm: a circuit may have no edges, and no model a circuit.
            axis.set_yscale("symlog", linthresh=1)
    axes[2].axhline(np.log(2), color="grey", linewidth=0.8, linestyle=":")
    axes[2].set_title("task loss without the circuit\n(mark: without random nodes; dotted: chance)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=110)


def page_of(comparison: Comparison, subjects: Sequence[Subject], figure: bytes, title: str) -> str:
    """One HTML page with everything inside: table, figure, circuits, provenance. Nothing in it runs."""
    record = comparison.record
    by_name = {subject.name: subject for subject in subjects}
    circuits = []
    for (task, name), circuit in comparison.circuits.items():
        edges = circuit.to_json(by_name[name].model)["edges"]
        edges = sorted(edges, key=lambda edge: -abs(edge[2]))
        rows = "".join(f"<tr><td>{_e(a)}</td><td>{_e(b)}</td><td>{w:+.4f}</td></tr>" for a, b, w in edges[:EDGES_SHOWN])
        more = f"<p>the {EDGES_SHOWN} largest of {len(edges)} edges</p>" if len(edges) > EDGES_SHOWN else ""
        circuits.append(
            f"<details><summary>{_e(task)} in {_e(name)}: {circuit.n_nodes} nodes, {len(edges)} edges</summary>"
            f"<p class=nodes>{_e(' '.join(circuit.node_names))}</p>{more}"
            f"<table><tr><th>from</th><th>to</th><th>weight</th></tr>{rows}</table></details>"
        )
    picture = base64.b64encode(figure).decode()
    kept = {key: record[key] for key in ("config", "versions", "seed", "objective")}
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{STYLE}</style></head><body><h1>{_e(title)}</h1>"
        f"{''.join(f'<p>{_e(line)}</p>' for line in said(record))}{_html_table(record)}"
        f'<img alt="edges, nodes and necessity per task and model" src="data:image/png;base64,{picture}">'
        f"<h2>Circuits</h2>{''.join(circuits)}<h2>How this was made</h2>"
        f"<pre>{_e(json.dumps(kept, indent=1, default=str))}</pre></body></html>"
    )


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
tr.pair td { background: #f4f8ff } .reason { color: #a04000; text-align: left }
img { max-width: 100% } details { margin: .4rem 0 } summary { cursor: pointer }
.nodes, pre { font: 12px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap }
"""


def _html_table(record: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in COLUMNS)
    rows = []
    for task, row in record["tasks"].items():
        for name in record["models"]:
            kind = " class=pair" if arm_of(name) is not None else ""
            rows.append(f"<tr{kind}>" + "".join(f"<td>{_e(cell)}</td>" for cell in _cells(task, name, row)) + "</tr>")
            if note := row[name]["reason"] or row[name].get("label"):
                rows.append(f"<tr><td colspan={len(COLUMNS)} class=reason>{_e(note)}</td></tr>")
    losses = "".join(
        f"<tr><td>{_e(name)}</td><td>{model['heldout_loss']:.3f}</td><td>{model['weights']:,}</td>"
        f"<td>{model['density']:.2%}</td><td>{model['nodes']:,}</td></tr>"
        for name, model in record["models"].items()
    )
    models = "<tr><th>model</th><th>held-out loss</th><th>weights</th><th>density</th><th>nodes</th></tr>" + losses
    return f"<table>{models}</table><table><tr>{head}</tr>{''.join(rows)}</table>"


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)

"""The sparse model against every dense one at hand: widths, with and without AbsTopK, other shapes (METHODS 6.7)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bridges.figures import new_figure
from bridges.headlines.models import is_sparse
from bridges.headlines.setting import Found, Headline, Setting, searching
from bridges.ratios import DENSE, MATCHED, matched, ratios
from distill.circuits.subject import Subject
from distill.model import SparseTransformer

TARGETS = ("asked", "relative")
"""The target loss that was asked for, and the relative one."""
KEPT = ("tasks_eligible", "tasks_counted", "left_out", "edge_ratio_geomean", "edge_ratio_interval",
        "pruned_edge_ratio_geomean", "node_ratio_geomean", "null_ratio_geomean")  # fmt: skip
"""What a row of the table has of `ratios`."""


def baselines(setting: Setting) -> Found:
    """The ratio of edges of each dense model to the sparse one, at the target asked for and at the relative one.

    At the former a task is eligible where both full models meet it as it is. All circuits are of the paper objective.
    """
    words = setting.sparse[0].tokenizer.get_vocab()
    dense = [
        one for one in (*setting.dense, *setting.family) if not is_sparse(one) and one.tokenizer.get_vocab() == words
    ]
    target = setting.config.prune.target
    prune = replace(setting.config.prune, objective="paper")
    # No search where a full model misses the target: such a task is not eligible.
    strict = replace(setting.config, prune=prune, relative=False, able=min(setting.config.able, target))
    asked = setting.compared([*setting.sparse, *dense], strict)
    sparse = [one.name for one in setting.sparse]
    rows: dict[str, dict[str, Any]] = {}
    took = searching(asked)
    for one in dense:
        pair = {name: asked.record["models"][name] for name in sparse} | {DENSE: asked.record["models"][one.name]}
        level = setting.sizes("paper", relative=True, subjects=[*setting.sparse, replace(one, name=DENSE)])
        took += searching(level)
        found = {
            "asked": ratios(_against(asked.record["tasks"], sparse, one.name), strict.empty, seed=prune.seed),
            "relative": level.record,
        }
        rows[one.name] = {
            "what": described(one),
            "width": one.model.d_model,
            "heldout_loss": pair[DENSE]["heldout_loss"],
            **(matched(pair) or {}),
            "targets": {name: {key: found[name][key] for key in KEPT} for name in TARGETS},
        }
    lines = table(rows, target)
    print(lines)
    close = {name: row for name, row in rows.items() if row["holds"]}
    intervals = [row["targets"][name]["edge_ratio_interval"] for row in close.values() for name in TARGETS]
    record = {
        "sparse": {name: asked.record["models"][name] for name in sparse}, "target": target, "dense": rows,
        "smallest_matched": min(close, key=lambda name: close[name]["width"], default=None), "table": lines,
    }  # fmt: skip
    known = [interval for interval in intervals if interval is not None]
    return Found(
        ours=_said(rows) or "no dense model of the same tokenizer",
        holds=all(low > 1 for low, _ in known) if known and len(known) == len(intervals) else None,
        record=record,
        figure=_picture(rows, target) if rows else None,
        searching=took,
    )


def described(subject: Subject) -> str:
    """What a dense model is, in words."""
    model = subject.model
    if not isinstance(model, SparseTransformer):
        return f"{model.hf.config.model_type}, D={model.d_model}, L={model.n_layer}"
    topk = "with" if model.architecture.topk_fraction is not None else "without"
    return f"the same code {topk} AbsTopK, D={model.d_model}, L={model.n_layer}"


def _against(rows: Mapping[str, Mapping[str, Any]], sparse: Sequence[str], name: str) -> dict[str, dict[str, Any]]:
    """The rows of a comparison with one dense model alone, as the pair's."""
    return {
        task: {"target": row["target"], **{one: row[one] for one in sparse}, DENSE: row[name]}
        for task, row in rows.items()
    }


def table(rows: Mapping[str, Mapping[str, Any]], target: float) -> str:
    """The ratios as a table of Markdown, a line for each dense model and target."""
    lines = ["| dense model | what | held-out loss (gap) | target | tasks (eligible) | edges | after the edge stage | "
             "nodes | null |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in rows.items():
        for level, one in row["targets"].items():
            interval = one["edge_ratio_interval"]
            between = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
            others = (_number(one[f"{key}_geomean"]) for key in ("pruned_edge_ratio", "node_ratio", "null_ratio"))
            lines.append(
                f"| {name} | {row['what']} | {row['heldout_loss']:.3f} ({row['gap']:+.1%}) | "
                f"{f'{target:g}' if level == 'asked' else level} | {len(one['tasks_counted'])} "
                f"({len(one['tasks_eligible'])}) | {_number(one['edge_ratio_geomean'])}{between} | "
                f"{' | '.join(others)} |"
            )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _said(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{name} (loss {row['gap']:+.1%}) "
        + " and ".join(
            f"{_number(one['edge_ratio_geomean'])} over {len(one['tasks_counted'])} tasks"
            for one in row["targets"].values()
        )
        for name, row in rows.items()
    )


def _picture(rows: Mapping[str, Mapping[str, Any]], target: float) -> Figure:
    """Ratios with their intervals, a line for each dense model."""
    figure = new_figure(6.4, 1.2 + 0.5 * len(rows))
    axes = figure.subplots()
    for shift, level in ((-0.12, "asked"), (0.12, "relative")):
        found = {place: row["targets"][level] for place, row in enumerate(rows.values())}
        found = {place: one for place, one in found.items() if one["edge_ratio_geomean"] is not None}
        middle = [one["edge_ratio_geomean"] for one in found.values()]
        sides = [one["edge_ratio_interval"] or (math.nan, math.nan) for one in found.values()]
        # Where all tasks have one ratio, rounding can put it a bit outside of its interval.
        errors = [np.maximum([value - low for value, (low, _) in zip(middle, sides, strict=True)], 0),
                  np.maximum([high - value for value, (_, high) in zip(middle, sides, strict=True)], 0)]  # fmt: skip
        places = [place + shift for place in found]
        label = f"at {target:g}" if level == "asked" else "at the relative target"
        axes.errorbar(middle, places, xerr=errors, fmt="o", capsize=3, label=label)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="edges dense / sparse, geometric mean over tasks, 95% interval")
    axes.set_yticks(range(len(rows)), [f"{name}\n{row['what']}, {row['gap']:+.1%}" for name, row in rows.items()],
                    fontsize=7)  # fmt: skip
    axes.legend(fontsize=7)
    return figure


BASELINES = (
    Headline(
        name="baselines",
        source="[G Fig. 2], ours",
        claim="about 16 times, against one dense baseline; here against every dense model of --dense and --family with "
        "the tokenizer of the sparse one",
        rule=f"the interval of the ratio lies above 1, at both targets, for every dense model of held-out loss within "
        f"{MATCHED:.0%}",
        rerun=baselines,
    ),
)

"""Published results on whole models: what they can do, how large their circuits are, and how their activations look."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from bridges.agreement import agreement, token_losses
from bridges.compare import sample_for
from bridges.figures import new_figure
from bridges.headlines.setting import Found, Headline, Setting, searching
from bridges.metrics import batches, evaluating
from bridges.ratios import arm_of
from distill.circuits.subject import Subject
from distill.circuits.task_table import evaluate_all
from distill.model.run import Runnable
from distill.model.sites import Record
from distill.training.evaluate import heldout_loss

DONE = 0.3
"""Task loss in nats that the upper end of a done task's interval stays under."""
ASKED = 12
"""Tasks of Python that the best sparse model is to do."""
SHARES = 4
"""Different kept shares that a rank correlation is taken over, at least."""
WINDOWS = 64
"""Held-out windows that activations are looked at on."""


def tasks(setting: Setting) -> Found:
    """Tasks that each model does, bigram tasks not counted."""
    record = {one.name: evaluate_all(one, setting.tasks) for one in setting.every}
    done = {
        name: [
            row["task"]
            for row in found["tasks"]
            if row["fits"] and row["needs_circuit"] and row["splits"]["test"]["loss"]["high"] < DONE
        ]
        for name, found in record.items()
    }
    counts = ", ".join(f"{name} {len(found)}" for name, found in done.items())
    best = max(len(done[one.name]) for one in (*setting.sparse, *setting.family) if is_sparse(one))
    return Found(ours=f"of {len(setting.tasks)} tasks: {counts}", holds=best >= ASKED, record={"done": done, **record})


def frontier(setting: Setting) -> Found:
    """Held-out loss against circuit size, over all models, on the tasks that all of them do."""
    comparison = setting.compared(setting.every, setting.config)
    record = comparison.record
    names = [one.name for one in setting.every]
    rows = record["tasks"]
    shared = [task for task, row in rows.items() if all(row[name].get("meets_target") for name in names)]
    if not shared:
        said = "no task on which the circuits of all models meet the target"
        return Found(ours=said, holds=None, record=record, searching=searching(comparison))
    points: dict[str, dict[str, float]] = {}
    for one in setting.every:
        sizes = [math.log(max(1, rows[task][one.name]["edges_induced"])) for task in shared]
        described = record["models"][one.name]
        points[one.name] = {
            "heldout_loss": described["heldout_loss"],
            "edges": math.exp(float(np.mean(sizes))),
            "width": one.model.d_model,
            "nonzeros": round(described["density"] * described["weights"]),
        }
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    for name, point in points.items():
        axes.scatter(point["heldout_loss"], point["edges"], s=30)
        label = f"{name}: D={point['width']:.0f}, {point['nonzeros'] / 1e3:,.0f}k"
        axes.annotate(
            label, (point["heldout_loss"], point["edges"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )
    axes.set(yscale="log", xlabel="held-out loss, nats per token", ylabel="edges, geometric mean over tasks")
    wider = _wider(points)
    better = [a["heldout_loss"] <= b["heldout_loss"] and a["edges"] <= b["edges"] for a, b in wider]
    said = "; ".join(
        f"{name} {point['heldout_loss']:.3f}, {point['edges']:.0f} edges" for name, point in points.items()
    )
    return Found(
        ours=f"{said}; {len(shared)} tasks",
        holds=all(better) if better else None,
        record={"points": points, "tasks": shared},
        figure=figure,
        searching=searching(comparison),
    )


def _wider(points: dict[str, dict[str, float]]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Pairs of a wider and a narrower model whose non-zeros are within a tenth of each other."""
    found = list(points.values())
    return [
        (a, b)
        for a in found
        for b in found
        if a["width"] > b["width"] and abs(math.log(a["nonzeros"] / b["nonzeros"])) < math.log(1.1)
    ]


@torch.no_grad()
def mean_kurtosis(model: Runnable, windows: Int[Tensor, "n T1"]) -> float:
    """Kurtosis of the final residual stream over its channels, mean over tokens (3 for a normal distribution).

    High where a few channels carry most of a token. Position 0, where dense models keep a sink, is left out.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for part in batches(windows, 8, model):
            record = Record(["final_resid"])
            model.run(part[:, :-1], tap=record)
            values = kurtosis(record.values["final_resid"][:, 1:].double())
            total, count = total + float(values.sum()), count + values.numel()
    return total / count


def kurtosis(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows"]:
    """Fourth central moment over the squared variance, of each row; 0 for a constant row."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return torch.where(variance > 0, centred.pow(4).mean(-1) / variance.square().clamp_min(1e-300), 0.0)


def kurtoses(setting: Setting) -> Found:
    """Kurtosis of the final residual against the share of weights that is kept."""
    rows: dict[str, dict[str, float]] = {}
    for one in setting.every:
        matrices = list(one.model.matrices().values())
        kept = sum(int(m.count_nonzero()) for m in matrices) / sum(m.numel() for m in matrices)
        found = mean_kurtosis(one.model, one.sample[:WINDOWS])
        rows[one.name] = {"kept": kept, "kurtosis": found, "log_kurtosis": math.log(found)}
    said = ", ".join(f"{name} {row['log_kurtosis']:.2f} (kept {row['kept']:.3g})" for name, row in rows.items())
    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    for name, row in rows.items():
        axes.scatter(row["kept"], row["log_kurtosis"])
        axes.annotate(name, (row["kept"], row["log_kurtosis"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="share of weights kept", ylabel="log of mean kurtosis, final residual")
    kept, values = ([row[key] for row in rows.values()] for key in ("kept", "log_kurtosis"))
    enough = len({round(share, 3) for share in kept}) >= SHARES
    falls = float(np.corrcoef(rankdata(kept), rankdata(values))[0, 1]) if enough else None
    record: dict[str, Any] = {"models": rows, "spearman": falls}
    return Found(
        ours=f"log of mean kurtosis: {said}",
        holds=None if falls is None else falls < -0.5,
        record=record,
        figure=figure,
    )


def token_agreement(setting: Setting) -> Found:
    """Correlation of log losses token by token, of sparse with dense against dense with dense."""
    subjects = [one for one in setting.every if one.tokenizer.get_vocab() == setting.sparse[0].tokenizer.get_vocab()]
    windows = sample_for(subjects[0], subjects, setting.config)
    windows = windows[:: max(1, len(windows) // WINDOWS)]
    shown = {one.name: token_losses(one.model, windows) for one in subjects}
    pairs = {f"{a} {b}": agreement(shown[a], shown[b], windows[:, 1:].cpu()) for a in shown for b in shown if a < b}
    mixed, alike = (
        [value for name, found in pairs.items() if _arms(name) == kinds and (value := found["pearson_log"]) is not None]
        for kinds in (["dense", "sparse"], ["dense", "dense"])
    )
    losses = {one.name: heldout_loss(one.model, windows) for one in subjects}
    ours = f"sparse with dense {_spread(mixed)}, two seeds of dense {_spread(alike)}"
    holds = None if not (mixed and alike) else float(np.mean(alike) - np.mean(mixed)) < 0.05
    return Found(ours=ours, holds=holds, record={"pairs": pairs, "heldout_loss": losses})


def _arms(pair: str) -> list[str]:
    """The arms of two models, in alphabetical order; models beside the arms keep their names."""
    return sorted(arm_of(name) or name for name in pair.split())


def is_sparse(subject: Subject) -> bool:
    """Whether most of a model's weights between nodes are zero, or it is one of the pair's sparse ones."""
    matrices = list(subject.model.matrices().values())
    return arm_of(subject.name) == "sparse" or 2 * sum(int(m.count_nonzero()) for m in matrices) < sum(
        m.numel() for m in matrices
    )


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured (no such two models)"
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


MODELS = (
    Headline(
        name="tasks",
        source="[G Table 1]",
        claim="sparse models do the twenty tasks of Python",
        rule=f"a sparse model does {ASKED} with the upper end of its loss under {DONE}, bigram tasks not counted",
        rerun=tasks,
    ),
    Headline(
        name="frontier",
        source="[G Fig. 3]",
        claim="wider models of equal non-zeros are better in both, held-out loss and circuit size",
        rule="each wider one of two models with equal non-zeros is at least as good in both",
        rerun=frontier,
    ),
    Headline(
        name="kurtosis",
        source="[G Fig. 10]",
        claim="kurtosis of the final residual rises as weights get sparser: log mean 2.25 to 4.25",
        rule=f"rank correlation with the kept share below -0.5, over {SHARES} different shares or more",
        rerun=kurtoses,
    ),
    Headline(
        name="agreement",
        source="[G Fig. 33]",
        claim="log losses per token correlate at 0.93 between sparse and dense, at 0.94 between two dense models",
        rule="sparse with dense less than 0.05 under two seeds of dense",
        rerun=token_agreement,
    ),
)

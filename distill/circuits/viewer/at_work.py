"""Where in held-out text a circuit is at work: the scores of `distill.circuits.watch` on some windows of a page."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.circuits.circuit import Circuit
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task
from distill.circuits.viewer.activations import rounded
from distill.circuits.watch import CLIP, make_watch

PAIRS = 32
"""Training pairs that the nodes' effects on the task are measured on."""
FPR = 0.05
"""Share of the tokens of held-out text that are marked."""


def at_work(
    subject: Subject, circuit: Circuit, task: Task, windows: Int[Tensor, "n T"], *, count: int
) -> dict[str, Any]:
    """Strength and lean of a circuit at every token of `count` of the windows, spread over them.

    Without training prompts, and where no node has an effect on the answers, there are no rows, and `reason` says why.
    """
    found: dict[str, Any] = {"target": circuit.target, "reason": "", "rows": []}
    if "train" not in task.splits:
        return {**found, "reason": f"task {task.name} has no training prompts to measure effects on"}
    try:
        watch = make_watch(subject, circuit, task, fpr=FPR, pairs=min(PAIRS, task.size("train")), windows=len(windows))
    except ValueError as error:
        return {**found, "reason": str(error)}
    picked = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long().tolist()
    scores = watch.score(subject.model, windows[picked])
    return {
        **found,
        "fpr": FPR,
        "threshold": float(watch.threshold),
        "largest": CLIP,
        "rows": [
            {"window": window, "strength": rounded(strength), "lean": rounded(lean)}
            for window, strength, lean in zip(picked, scores.strength, scores.lean, strict=True)
        ],
    }

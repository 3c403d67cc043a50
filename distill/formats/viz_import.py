"""Circuits out of the payloads of OpenAI's viewer: which nodes are kept, as a `Circuit` of this package.

A payload says which channels are kept, and the losses. It does not say what ablated nodes are set to: that is measured
here, as the mean over held-out text of the model it belongs to.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from distill.artifact import ArtifactError
from distill.circuits.answers import Calibration
from distill.circuits.circuit import Circuit
from distill.circuits.subject import Subject
from distill.formats.viz import DOUBLED, their_config
from distill.model.run import Runnable
from distill.model.sites import FINAL_SITE
from distill.model.torch_file import check_stored, load_torch

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHAPE = ("n_layer", "n_head", "d_head", "d_model", "d_mlp", "vocab_size")
"""Options in which a payload's model and the one given have to agree."""


def read_viz(path: str | Path) -> dict[str, Any]:
    """A payload as it is. ArtifactError for a file that is damaged, holds more than plain data, or is no payload."""
    payload = load_torch(path, what="viewer payload")
    if not isinstance(payload, dict) or not isinstance(payload.get("circuit_data"), dict):
        raise ArtifactError(f"{path}: holds no 'circuit_data', so it is no payload of the viewer")
    return payload


def kept_nodes(payload: dict[str, Any], model: Runnable, path: str | Path) -> dict[str, Bool[Tensor, "width"]]:
    """The kept nodes by location, in the order of the run; what a payload keeps of `final_resid` is no node here.

    ArtifactError naming the file and the location: one that the model does not have, channels that are no list of whole
    numbers within its width, or the same one twice; and a model of another shape.
    """
    _check_model(payload, model, path)
    widths = model.widths
    nodes = {location: torch.zeros(width, dtype=torch.bool) for location, width in widths.items()}
    for location, value in payload["circuit_data"].items():
        if location not in widths and location != FINAL_SITE:
            raise ArtifactError(f"{path}: circuit_data has {location!r}; allowed are {', '.join(widths)}, {FINAL_SITE}")
        index = check_stored(path, f"circuit_data.{location}", value)
        if index.dim() != 1 or (index.dtype not in INTEGERS and index.numel()):
            raise ArtifactError(
                f"{path}: circuit_data.{location} is {index.dtype} of shape {tuple(index.shape)}; "
                "allowed are whole numbers on one axis"
            )
        if location == FINAL_SITE or not index.numel():
            continue
        index, width = index.long(), widths[location]
        if int(index.min()) < 0 or int(index.max()) >= width or len(index.unique()) != len(index):
            raise ArtifactError(
                f"{path}: circuit_data.{location} names channels {int(index.min())} to {int(index.max())}, "
                f"{len(index)} in all; allowed are 0 to {width - 1}, each once"
            )
        nodes[location][index] = True
    return nodes


def _check_model(payload: dict[str, Any], model: Runnable, path: str | Path) -> None:
    importances = payload.get("importances")
    theirs = importances.get("beeg_model_config") if isinstance(importances, dict) else None
    if not isinstance(theirs, dict):
        return
    ours = their_config(model)
    for name in SHAPE:
        if theirs.get(name) is not None and theirs[name] != ours[name]:
            raise ArtifactError(
                f"{path}: was made for a model with {name} {theirs[name]}, the one given has {ours[name]}"
            )


def import_viz(path: str | Path, subject: Subject, *, task: str, target: float, command: str) -> Circuit:
    """The circuit of a payload in the model it belongs to.

    Arguments:
        path: their `viz_data.pt`.
        subject: the model, with its ablation values.
        task: name of the task, which a payload does not hold (its folder does).
        target: task loss that was asked for, in nats.
        command: what to record as the command that made it.

    Losses are the payload's, in nats per prompt: `full` and `circuit`. Scores are 1 for kept nodes and -1 for others.
    ArtifactError as `read_viz` and `kept_nodes`.
    """
    payload = read_viz(path)
    nodes = kept_nodes(payload, subject.model, path)
    importances = payload.get("importances")
    found = importances if isinstance(importances, dict) else {}
    names = {"full": "loss", "circuit": "interv_loss"}
    losses = {ours: _number(path, theirs, found[theirs]) for ours, theirs in names.items() if theirs in found}
    left_out = payload["circuit_data"].get(FINAL_SITE)
    return Circuit(
        model=subject.model.fingerprint(),
        model_name=subject.name,
        task=task,
        nodes=nodes,
        scores={location: mask.float() * 2 - 1 for location, mask in nodes.items()},
        means=subject.means,
        calibration=Calibration(),
        losses=losses,
        target=target,
        provenance={
            "command": command,
            "label": "imported from a payload of OpenAI's viewer",
            "file": Path(path).name,
            "final_resid_left_out": 0 if left_out is None else int(left_out.numel()),
        },
    )


def _number(path: str | Path, name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArtifactError(f"{path}: importances.{name} is {value!r}; allowed are finite numbers")
    return value / DOUBLED

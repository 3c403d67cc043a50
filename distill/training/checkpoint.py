"""Checkpoints: everything a training needs to go on as if it had never stopped.

`checkpoints/step-00000100/` holds `weights.safetensors` (trained parameters and buffers; frozen ones do not change),
`moments.safetensors` (the optimiser's state), `candidates.safetensors` (of the candidate mode) and `state.json` (step,
configuration, random state, position in streamed data, held-out loss). A folder appears whole or not at all, so a
killed process or a full disk leaves the one before it. Tensors that are spread over processes are stored whole.
"""

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.artifact import (
    MANIFEST,
    ArtifactError,
    Provenance,
    fresh_folder,
    load_tensors,
    read_json,
    read_manifest,
    remove_folder,
    save_tensors,
    write_json,
)

WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"
CANDIDATES = "candidates.safetensors"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps of the run in `folder` lies."""
    return folder / "checkpoints" / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"checkpoints/step-*/{MANIFEST}"))


def newest_checkpoint(folder: Path) -> Path | None:
    """Where a run goes on from, whole or not; none where there is none."""
    return max(folder.glob("checkpoints/step-*"), default=None)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of lowest held-out loss among those at the target fraction; none where there is none.

    While the kept fraction is above its target a model has a lower loss than the sparse one that it becomes.
    """
    found = []
    for path in checkpoints(folder):
        state = read_json(path / STATE, what="training state")
        loss = state.get("heldout_loss") if isinstance(state, dict) and state.get("at_target") else None
        if isinstance(loss, int | float):
            found.append((loss, path))
    return min(found)[1] if found else None


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    *,
    candidates: Mapping[str, Tensor],
    state: Mapping[str, Any],
    provenance: Provenance,
    keep: int,
    keep_best: bool = False,
) -> Path:
    """Write a checkpoint, then delete all but the `keep` newest.

    Arguments:
        folder: the run.
        step: optimiser steps done.
        tensors: weights and moments, of `whole_tensors`.
        candidates: tensors that `load_checkpoint` shall give back (`CandidateTraining.tensors`).
        state: JSON values that `load_checkpoint` shall give back; `heldout_loss` and `at_target` say which is best.
        provenance: of the run.
        keep: checkpoints that stay, 1 and more.
        keep_best: whether `best_checkpoint` stays too.

    Returns the checkpoint's folder. Raises `ArtifactError` or `OSError` when it cannot be written; the earlier ones
    stay as they are then.
    """
    path = checkpoint_path(folder, step)
    origin = replace(provenance, kind="run", extra={**provenance.extra, "step": step})
    with fresh_folder(path, origin, replace=True) as fresh:
        save_tensors(fresh / WEIGHTS, tensors[0], {"kind": "weights"})
        save_tensors(fresh / MOMENTS, tensors[1], {"kind": "moments"})
        save_tensors(fresh / CANDIDATES, dict(candidates), {"kind": "candidates"})
        write_json(fresh / STATE, {"step": step, **state, "random": random_state()})
    best = best_checkpoint(folder) if keep_best else None
    for old in checkpoints(folder)[:-keep]:
        if old != best:
            remove_folder(old, "run")
    return path


def whole_tensors(modules: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments for a checkpoint. Where tensors are spread over processes, all of these have to call it."""
    weights, moments = _state_tensors(modules), _moments(modules, optimizer)
    return {n: whole(t) for n, t in weights.items()}, {n: whole(t) for n, t in moments.items()}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over processes, which all have to call this; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, on the device of `model` and spread as that is."""
    tensor = tensor.to(model.device)
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    # Every process has read all of it, so each takes its own part.
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def load_checkpoint(
    path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put weights, moments and random state back, in place.

    Returns the content of `state.json`, `step` and what was saved with it, and the tensors of the candidates. Raises
    `ArtifactError` for a checkpoint that is damaged (the message names the newest whole one before it) or belongs to
    other modules, before anything is changed.
    """
    try:
        weights, moments, candidates, state = _read(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_way_back(path)}") from error
    current = _state_tensors(modules)
    if {n: t.shape for n, t in current.items()} != {n: t.shape for n, t in weights.items()}:
        names = sorted(set(current) ^ set(weights)) or [n for n in current if current[n].shape != weights[n].shape]
        raise ArtifactError(f"{path / WEIGHTS}: was made by other modules, they differ in {names[0]!r}")
    by_name = dict(modules.named_parameters())
    if strangers := {key.rpartition("/")[0] for key in moments} - by_name.keys():
        raise ArtifactError(f"{path / MOMENTS}: holds moments of {min(strangers)!r}, which is no parameter")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(_like(weights[name], tensor))
    optimizer.state.clear()
    for key, tensor in moments.items():
        name, _, slot = key.rpartition("/")
        optimizer.state[by_name[name]][slot] = _like(tensor, by_name[name])
    try:
        restore_random_state(state["random"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ArtifactError(f"{path / STATE}: 'random' is no random state ({error})") from None
    return state, candidates


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, moments, candidates and state of a checkpoint, each as it was written. `ArtifactError` otherwise."""
    read_manifest(path, "run")
    weights, _ = load_tensors(path / WEIGHTS, kind="weights")
    moments, _ = load_tensors(path / MOMENTS, kind="moments")
    candidates, _ = load_tensors(path / CANDIDATES, kind="candidates")
    state = read_json(path / STATE, what="training state")
    if not isinstance(state, dict) or type(state.get("step")) is not int or "random" not in state:
        raise ArtifactError(f"{path / STATE}: holds no 'step' and 'random'")
    return weights, moments, candidates, state


def _way_back(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    for before in sorted(path.parent.glob("step-*"), reverse=True):
        if before.name < path.name:
            with suppress(ArtifactError):
                read_manifest(before, "run")
                return f"{before} before it is whole: delete {path} to go on from there"
    return "no checkpoint before it is whole"


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global generators (CUDA's where it runs), as JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in devices],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned; anything else raises KeyError, TypeError, ValueError or RuntimeError."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(text) for text in state["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _state_tensors(modules: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and buffers by name."""
    trained = {name: p.detach() for name, p in modules.named_parameters() if p.requires_grad}
    return trained | dict(modules.named_buffers())


def _moments(modules: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `{parameter}/{slot}`; parameters that never had a gradient have none."""
    return {
        f"{name}/{slot}": value
        for name, parameter in modules.named_parameters()
        if parameter in optimizer.state
        for slot, value in optimizer.state[parameter].items()
    }

"""Ablation values: what a node is set to when it is not in the circuit.

Section 2.2 of [G] sets a pruned node to its mean activation over the pretraining distribution, taken with the whole
model running. The mean is one number per node, except in models with positional embeddings, whose activations depend
on the position for reasons that have nothing to do with the task: there it is one number per position and node.

The mean absolute activation is measured along the way: controls draw random nodes that are as active as a circuit's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from distill.artifact import fingerprint, load_tensors, save_tensors
from distill.model.run import Runnable
from distill.model.sites import residual_sites

SINK_RATIO = 10.0
"""Position 0 is protected from this multiple of the median residual norm on (attention sinks of dense models)."""


class NonFiniteError(ValueError):
    """An activation is infinite or not a number; the message names the first place in the run."""


class MeansMismatchError(ValueError):
    """Saved means belong to another model or to other data."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Ablation values of every node of one model, on one sample of its pretraining distribution."""

    values: Mapping[str, Tensor]
    """Mean activation by node location: (width,), or (T, width) where means are per position."""
    magnitude: Mapping[str, Tensor]
    """Mean absolute activation by node location, (width,)."""
    model: str
    """Fingerprint of the model."""
    data: str
    """Fingerprint of the windows of tokens."""
    tokens: int
    """Number of tokens averaged over."""
    protect_first: bool = False
    """Whether position 0 is never ablated, as the residual norm there dwarfs that of the other positions."""

    @property
    def per_position(self) -> bool:
        """Whether there is one mean per position."""
        return next(iter(self.values.values())).dim() == 2

    def at(self, location: str, length: int) -> Float[Tensor, "rows width"]:
        """The mean activations at `location` for a run over `length` tokens: one row, or one per position.

        ValueError for an unknown location and where means per position do not reach `length`.
        """
        if location not in self.values:
            raise ValueError(f"location: no means for {location!r}; there are {', '.join(self.values)}")
        value = self.values[location]
        if value.dim() == 1:
            return value[None]
        if length > value.shape[0]:
            raise ValueError(
                f"length: {length} tokens, but means per position were measured up to {value.shape[0]}; "
                "measure them on longer windows"
            )
        return value[:length]

    def to(self, device: torch.device | str) -> "Means":
        """The same means on another device."""
        if next(iter(self.values.values())).device == torch.device(device):
            return self
        moved = {location: value.to(device) for location, value in self.values.items()}
        return replace(self, values=moved)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file that names the model and the data it was measured with."""
        tensors = {f"mean/{name}": value.cpu().contiguous() for name, value in self.values.items()}
        tensors |= {f"magnitude/{name}": value.cpu().contiguous() for name, value in self.magnitude.items()}
        save_tensors(Path(path), tensors, {"kind": "means", "model": self.model, **self.head()})

    def head(self) -> dict[str, Any]:
        """What files of means and of circuits keep beside the tensors."""
        return {"data": self.data, "tokens": self.tokens, "protect_first": self.protect_first}

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None, data: str | None = None) -> "Means":
        """Reads what `save` wrote.

        `model` and `data` are fingerprints to insist on; None takes what is there. MeansMismatchError where they
        differ, ArtifactError for a file that is no file of means.
        """
        tensors, metadata = load_tensors(Path(path), kind="means")
        for name, wanted in (("model", model), ("data", data)):
            if wanted is not None and metadata[name] != wanted:
                raise MeansMismatchError(
                    f"{name}: the means in {path} were measured with {name} {metadata[name][:12]}, "
                    f"but {wanted[:12]} is in use; measure them anew"
                )
        split: dict[str, dict[str, Tensor]] = {"mean": {}, "magnitude": {}}
        for name, value in tensors.items():
            what, _, location = name.partition("/")
            split[what][location] = value
        return cls(
            values=split["mean"],
            magnitude=split["magnitude"],
            model=metadata["model"],
            data=metadata["data"],
            tokens=metadata["tokens"],
            protect_first=metadata["protect_first"],
        )


class _Sums:
    """A tap that adds up activations in float64, so that memory does not grow with the number of windows."""

    def __init__(self, widths: Mapping[str, int], residual: tuple[str, ...], length: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.sum = {location: torch.zeros(length, width, **options) for location, width in widths.items()}
        self.magnitude = {location: torch.zeros(width, **options) for location, width in widths.items()}
        self.norm = {site: torch.zeros(length, **options) for site in residual}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.sum:
            self.sum[site] += x.sum(0, dtype=torch.float64)
            self.magnitude[site] += x.abs().sum((0, 1), dtype=torch.float64)
        elif site in self.norm:
            self.norm[site] += x.norm(dim=-1).sum(0, dtype=torch.float64)
        return x

    def sink_ratio(self) -> float:
        """Largest ratio, over residual sites, of the mean norm at position 0 to the median over positions."""
        return max(float(norm[0] / norm.median().clamp_min(1e-30)) for norm in self.norm.values())


def as_tokens(windows: Int[Tensor, "n T"] | np.ndarray) -> Int[Tensor, "n T"]:
    """Windows of tokens as int64, from memory maps too. ValueError unless there is at least one token."""
    tokens = windows if isinstance(windows, Tensor) else torch.from_numpy(np.asarray(windows, dtype=np.int64))
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"windows: shape {tuple(tokens.shape)}; allowed are (n, T) with at least one token")
    return tokens.long()


def windows_fingerprint(windows: Int[Tensor, "n T"] | np.ndarray) -> str:
    """sha256 (hex) of windows of tokens, as `Means.data` holds it."""
    return fingerprint({"windows": as_tokens(windows)})


def node_means(
    model: Runnable, windows: Int[Tensor, "n T"] | np.ndarray, *, per_position: bool | None = None, batch: int = 16
) -> Means:
    """Mean activation of every node over `windows` of pretraining text, the whole model running [G 2.2].

    `per_position` gives one mean per position; None does so for models with positional embeddings. `batch` is the
    number of windows run at once; memory beyond the model's is one batch and the sums. Means are over tokens.
    NonFiniteError names the first location with an activation that is not finite; ValueError for no windows.
    """
    tokens = as_tokens(windows)
    device = next(model.parameters()).device
    length = tokens.shape[1]
    sums = _Sums(model.widths, residual_sites(model.n_layer), length, device)
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in tqdm(range(0, len(tokens), batch), desc="means", unit="batch", delay=2, leave=False):
            model.run(tokens[start : start + batch].to(device), tap=sums, stop="final_resid")
    model.train(training)
    for location, total in sums.sum.items():
        if not bool(total.isfinite().all()):
            raise NonFiniteError(f"{location}: activations are not finite on the windows given; the model is broken")
    split = model.has_positions if per_position is None else per_position
    count = tokens.numel()
    values = {
        location: (total / len(tokens) if split else total.sum(0) / count).float()
        for location, total in sums.sum.items()
    }
    return Means(
        values=values,
        magnitude={location: (total / count).float() for location, total in sums.magnitude.items()},
        model=model.fingerprint(),
        data=windows_fingerprint(tokens),
        tokens=count,
        protect_first=sums.sink_ratio() > SINK_RATIO,
    )

"""Ablation values: what a node is set to when it is not in the circuit.

Section 2.2 of [G] sets a pruned node to its mean activation over the pretraining distribution, taken with the whole
model running. The mean is one number per node, except in models with positional embeddings, whose activations depend
on the position for reasons that have nothing to do with the task: there it is one number per position and node.

The mean absolute activation is measured along the way: controls draw random nodes that are as active as a circuit's.

Three other values stand beside it, and all are used alike, through `Means.at`: the mean over the task's own prompts
(`task_means`), zero (`zeros`), and *resample*: what the nodes are at one token of the corpus, another one for each
prompt and position and the same one for all nodes (`Resampled`). `FreezeNorms` keeps the norms at the full model's
scales, so that a pruned residual stream, which is shorter, is not made up for by a larger gain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from distill.artifact import ArtifactError, fingerprint, load_tensors, save_tensors
from distill.circuits.tasks import TaskBatch
from distill.fields import check_fields
from distill.model.run import Runnable
from distill.model.sites import residual_sites

ABLATIONS = ("mean", "task", "resample", "zero")
"""Ablation values by name: mean over the corpus, mean over the task's prompts, resample, zero."""
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
    kind: str = "mean"
    """Which of `ABLATIONS` these are."""

    @property
    def per_position(self) -> bool:
        """Whether there is one mean per position."""
        return next(iter(self.values.values())).dim() == 2

    def at(self, location: str, length: int) -> Float[Tensor, "*rows width"]:
        """What nodes at `location` are set to in a run over `length` tokens: one row, or one per position.

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

    def rows(self, chosen: Int[Tensor, "n"] | slice) -> "Means":
        """The values for some rows of a batch only: the same ones, unless each row has its own (`Resampled`)."""
        return self

    def to(self, device: torch.device | str) -> "Means":
        """The same means on another device."""
        if next(iter(self.values.values())).device == torch.device(device):
            return self
        moved = {location: value.to(device) for location, value in self.values.items()}
        return replace(self, values=moved)

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Writes one safetensors file that names the model and the data it was measured with.

        `half` rounds to float16 (3 digits) for a file of half the size; ArtifactError for values beyond its range.
        """
        tensors = {f"mean/{name}": value for name, value in self.values.items()}
        tensors |= {f"magnitude/{name}": value for name, value in self.magnitude.items()}
        tensors = {name: (value.half() if half else value).cpu().contiguous() for name, value in tensors.items()}
        if beyond := [name for name, value in tensors.items() if half and not bool(value.isfinite().all())]:
            raise ArtifactError(f"{path}: {beyond[0]} has values beyond float16's 65504")
        save_tensors(Path(path), tensors, {**self.head(), "kind": "means", "ablation": self.kind, "model": self.model})

    def head(self) -> dict[str, Any]:
        """What files of means and of circuits keep beside the tensors."""
        record = {"data": self.data, "tokens": self.tokens, "protect_first": self.protect_first}
        return record if self.kind == "mean" else {**record, "kind": self.kind}

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None, data: str | None = None) -> "Means":
        """Reads what `save` wrote.

        `model` and `data` are fingerprints to insist on; None takes what is there. MeansMismatchError where they
        differ, ArtifactError for a file that is no file of means.
        """
        tensors, metadata = load_tensors(Path(path), kind="means")
        check_fields(path, metadata, {"model": str, "data": str, "tokens": int, "protect_first": bool})
        for name, wanted in (("model", model), ("data", data)):
            if wanted is not None and metadata[name] != wanted:
                raise MeansMismatchError(
                    f"{name}: the means in {path} were measured with {name} {metadata[name][:12]}, "
                    f"but {wanted[:12]} is in use; measure them anew"
                )
        split: dict[str, dict[str, Tensor]] = {"mean": {}, "magnitude": {}}
        for name, value in tensors.items():
            what, _, location = name.partition("/")
            if what not in split:
                raise ArtifactError(f"{path}: holds {name!r}; allowed are tensors mean/... and magnitude/...")
            split[what][location] = value.float() if value.dtype == torch.float16 else value
        check_means(path, split["mean"], split["magnitude"])
        kind = metadata.get("ablation", "mean")
        if kind not in ABLATIONS:
            raise ArtifactError(f"{path}: ablation is {kind!r}, allowed are {', '.join(ABLATIONS)}")
        return cls(
            values=split["mean"],
            magnitude=split["magnitude"],
            model=metadata["model"],
            data=metadata["data"],
            tokens=metadata["tokens"],
            protect_first=metadata["protect_first"],
            kind=kind,
        )


def check_means(path: str | Path, values: Mapping[str, Tensor], magnitude: Mapping[str, Tensor]) -> None:
    """ArtifactError where tensors out of a file are no ablation values: of the same nodes, finite, in one form."""
    if not values or values.keys() != magnitude.keys():
        raise ArtifactError(f"{path}: holds means of {len(values)} locations, magnitudes of {len(magnitude)}")
    forms = {value.shape[:-1] for value in values.values()}
    for location, value in values.items():
        size = magnitude[location]
        whole = value.is_floating_point() and size.is_floating_point() and value.dim() in (1, 2) and len(forms) == 1
        if not whole or size.shape != value.shape[-1:]:
            shapes = f"{value.dtype} {tuple(value.shape)}, magnitude {size.dtype} {tuple(size.shape)}"
            raise ArtifactError(f"{path}: means of {location} are {shapes}; allowed are numbers of one form everywhere")
        if not bool(value.isfinite().all()):
            raise ArtifactError(f"{path}: means of {location} are not finite")


@dataclass(frozen=True, kw_only=True)
class Resampled(Means):
    """Ablation by resampling: `values` hold activations at N corpus tokens, (N, width), or where they depend on the
    position at N windows, (N, T, width); `index` says which of the N each position of each prompt gets."""

    index: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    """(rows, T) int64."""

    @property
    def per_position(self) -> bool:
        return next(iter(self.values.values())).dim() == 3

    def at(self, location: str, length: int) -> Float[Tensor, "*rows width"]:
        if location not in self.values:
            raise ValueError(f"location: no means for {location!r}; there are {', '.join(self.values)}")
        if length > self.index.shape[1]:
            raise ValueError(f"length: {length} tokens, but values were drawn for {self.index.shape[1]}")
        value, index = self.values[location], self.index[:, :length]
        if value.dim() == 2:
            return value[index]
        return value[index, torch.arange(length, device=index.device)]

    def rows(self, chosen: Int[Tensor, "n"] | slice) -> "Means":
        return replace(self, index=self.index[chosen])

    def to(self, device: torch.device | str) -> "Means":
        if self.index.device == torch.device(device):
            return self
        moved = {location: value.to(device) for location, value in self.values.items()}
        return replace(self, values=moved, index=self.index.to(device))


class FreezeNorms:
    """A tap that sets every norm's 1/sigma to given values, as `answers.frozen_norms` finds them in the full model.

    `scales` by site, `{i}.attn.norm_scale`, `{i}.mlp.norm_scale`: (rows, T, 1); `final.norm_scale`: (rows, 1), at the
    last token. The centring of a LayerNorm, which is linear, is not touched.
    """

    wants = frozenset({"norm_scale"})

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        self.scales = dict(scales)

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if not site.endswith(".norm_scale"):
            return x
        scale = self.scales[site].to(x)
        return scale if x.dim() == 2 else scale[:, : x.shape[1]]

    def rows(self, chosen: Int[Tensor, "n"] | slice) -> "FreezeNorms":
        """The scales for some rows of the batch only."""
        return FreezeNorms({site: scale[chosen] for site, scale in self.scales.items()})


class _Sums:
    """A tap that adds up activations in float64, so that memory does not grow with the number of windows."""

    def __init__(self, widths: Mapping[str, int], residual: tuple[str, ...], length: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.sum = {location: torch.zeros(length, width, **options) for location, width in widths.items()}
        self.magnitude = {location: torch.zeros(width, **options) for location, width in widths.items()}
        self.norm = {site: torch.zeros(length, **options) for site in residual}
        self.weight: Tensor | None = None
        """(rows, T, 1): which positions of which rows count; None counts all."""

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.sum:
            counted = x if self.weight is None else x * self.weight
            self.sum[site] += counted.sum(0, dtype=torch.float64)
            self.magnitude[site] += counted.abs().sum((0, 1), dtype=torch.float64)
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


def cached_means(model: Runnable, windows: Int[Tensor, "n T"] | np.ndarray, folder: Path) -> Means:
    """`node_means`, kept in `folder` in a file whose name holds the fingerprints of the model and of the windows."""
    key = fingerprint({"model": model.fingerprint(), "windows": windows_fingerprint(windows)})
    path = folder / f"{key[:24]}.safetensors"
    if path.is_file():
        return Means.load(path, model=model.fingerprint(), data=windows_fingerprint(windows))
    means = node_means(model, windows)
    folder.mkdir(parents=True, exist_ok=True)
    means.save(path)
    return means


def zeros(means: Means) -> Means:
    """Zero as the ablation value of every node."""
    values = {location: torch.zeros_like(value) for location, value in means.values.items()}
    return replace(means, values=values, kind="zero")


def task_means(model: Runnable, batch: TaskBatch, means: Means, *, rows: int = 64) -> Means:
    """Mean activation of every node over the prompts of a task, both members of each pair, padding left out.

    One mean per position where `means` have that (positions that no prompt reaches keep the corpus mean). `rows` is
    the number of prompts run at once; `magnitude` stays that of the corpus. NonFiniteError names a broken location.
    """
    device = next(model.parameters()).device
    length = batch.tokens.shape[1]
    sums = _Sums(model.widths, (), length, device)
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(batch), rows):
            part = batch.select(slice(start, start + rows)).to(device)
            sums.weight = (torch.arange(length, device=device) <= part.last[:, None])[..., None]
            model.run(part.tokens, tap=sums, stop="final_resid")
    model.train(training)
    at_position = (torch.arange(length) <= batch.last[:, None]).sum(0).to(device)
    values: dict[str, Tensor] = {}
    for location, total in sums.sum.items():
        if not bool(total.isfinite().all()):
            raise NonFiniteError(f"{location}: activations are not finite on the task's prompts")
        if means.per_position:
            values[location] = means.values[location].clone().to(device)
            values[location][:length] = (total / at_position[:, None].clamp_min(1)).float()
        else:
            values[location] = (total.sum(0) / at_position.sum()).float()
    return replace(means, values=values, kind="task", tokens=int(at_position.sum()), data=fingerprint(_tokens(batch)))


def _tokens(batch: TaskBatch) -> dict[str, Tensor]:
    return {"tokens": batch.tokens.cpu(), "last": batch.last.cpu()}


def resampled(
    model: Runnable,
    windows: Int[Tensor, "n T"] | np.ndarray,
    batch: TaskBatch,
    means: Means,
    *,
    pool: int = 1024,
    seed: int = 0,
) -> Resampled:
    """Draws for each position of each prompt of `batch` one corpus token whose activations ablated nodes take.

    Drawn from about `pool` tokens of `windows`, evenly spread over them; where `means` are per position, from the same
    position of another window. NonFiniteError names a broken location, ValueError for windows shorter than a prompt.
    """
    tokens = as_tokens(windows)
    length = batch.tokens.shape[1]
    if means.per_position and tokens.shape[1] < length:
        raise ValueError(f"windows: {tokens.shape[1]} tokens long, but prompts have up to {length}")
    used = tokens[:, :length] if means.per_position else tokens
    number = min(len(used), max(1, -(-pool // used.shape[1])))
    used = used[torch.linspace(0, len(used) - 1, number).long()]
    kept: dict[str, Tensor] = {}

    def keep(site: str, x: Tensor, /) -> Tensor:
        if site in model.widths:
            kept[site] = x.detach()
        return x

    training = model.training
    model.eval()
    with torch.no_grad():
        model.run(used.to(next(model.parameters()).device), tap=keep, stop="final_resid")
    model.train(training)
    for location, value in kept.items():
        if not bool(value.isfinite().all()):
            raise NonFiniteError(f"{location}: activations are not finite on the windows given; the model is broken")
    values = {location: value if means.per_position else value.flatten(0, 1) for location, value in kept.items()}
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(next(iter(values.values()))), tuple(batch.tokens.shape), generator=generator)
    return Resampled(
        values=values,
        magnitude=means.magnitude,
        model=means.model,
        data=windows_fingerprint(tokens),
        tokens=used.numel(),
        protect_first=means.protect_first,
        kind="resample",
        index=index.to(next(iter(values.values())).device),
    )

"""Is a circuit at work? A score for every token that a model reads.

    watch = make_watch(subject, circuit, task, fpr=0.05)
    scores = watch.score(subject.model, tokens)
    scores.strength, scores.lean, watch.flags(scores)           # each (B, T)

Node c of the circuit has a value x_c at every token, and over a corpus a mean and a spread (standard deviation) of it:
z_c = (x_c - mean_c) / spread_c. What the node does to the task is measured on training prompts at the last token, where
the answer is given: with F the logit of the first class's answer less that of the second class's,

    slope_c  = spread_c * mean of dF/dx_c                                           logits per spread
    effect_c = max(0, mean of s * dF/dx_c * (x_c - mean_c)),  s = 1 where the first class is right, else -1    logits

both to first order in the whole model. Then at every token

    strength = sum_c effect_c min(|z_c|, 3) / sum_c effect_c             how far the nodes that decide the task are from
                                                                         what they usually are, in spreads, 0 to 3
    lean     = sum_c slope_c z_c                                         towards which answer they stand, in logits

A token is flagged where the signal (strength, or |lean|) is above a threshold that a share `fpr` of corpus tokens
exceeds. The corpus holds text on which the circuit is rightly at work: `fpr` is the rate of all flags there, the right
ones among them.

What is read are nodes of the model itself, or linear read-outs of its residual stream (`rows`): a dense model is
watched by those rows of its bridge's encoders that belong to its student's circuit, without the encoders' AbsTopK,
which would need all rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.artifact import ArtifactError, load_tensors, save_tensors
from distill.circuits.ablation import as_tokens, windows_fingerprint
from distill.circuits.answers import answer_difference, frozen
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.editing import constants
from distill.circuits.masks import Nodes
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.fields import check_fields
from distill.model.run import Runnable
from distill.model.sites import Record, node_locations, split_node

SUFFIX = ".watch.safetensors"
CLIP = 3.0
"""Spreads beyond which a node counts no more towards strength: rare nodes have heavy tails."""
PLAIN = ("model", "model_name", "task", "signal", "fpr", "threshold", "data", "provenance")
"""Fields of a watch that a file holds as they are."""
Signal = Literal["strength", "lean"]
SIGNALS: tuple[Signal, ...] = ("strength", "lean")


@runtime_checkable
class Gauge(Protocol):
    """A tap that reads some numbers at every token."""

    def __call__(self, site: str, x: Tensor, /) -> Tensor: ...

    @property
    def complete(self) -> bool:
        """Whether a run has passed every place that is read."""
        ...

    def take(self) -> Float[Tensor, "B T n"]:
        """What was read, in the order of the names; the gauge is empty afterwards."""
        ...


class _Gauge:
    """What both gauges share: places, and which of the numbers each of them gives."""

    def __init__(self, places: Mapping[str, Int[Tensor, "k"]]) -> None:
        self.places = places
        order = torch.cat(list(places.values())).argsort()
        self.order = None if torch.equal(order, torch.arange(len(order))) else order
        self.read: dict[str, Tensor] = {}

    @property
    def complete(self) -> bool:
        return len(self.read) == len(self.places)

    def take(self) -> Float[Tensor, "B T n"]:
        values = torch.cat([self.read[site] for site in self.places], -1)
        self.read = {}
        return values if self.order is None else values[..., self.order.to(values.device)]


class NodeGauge(_Gauge):
    """Reads nodes of a model by name, behind AbsTopK."""

    def __init__(self, names: Sequence[str]) -> None:
        where = [split_node(name) for name in names]
        sites = list(dict.fromkeys(location for location, _ in where))
        places = {site: torch.tensor([i for i, (one, _) in enumerate(where) if one == site]) for site in sites}
        super().__init__(places)
        self.channels = {site: torch.tensor([channel for one, channel in where if one == site]) for site in sites}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.channels:
            self.read[site] = x.detach()[..., self.channels[site].to(x.device)].float()
        return x


class StreamGauge(_Gauge):
    """Reads the residual stream at some sites by rows: x . row + offset."""

    def __init__(
        self, places: Mapping[str, Int[Tensor, "k"]], rows: Mapping[str, Float[Tensor, "k D"]], offset: Tensor
    ) -> None:
        super().__init__(places)
        self.rows = dict(rows)
        self.offset = {site: offset[index] for site, index in places.items()}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.rows:
            rows = self.rows[site].to(x.device)
            offset = self.offset[site].to(x.device)
            self.read[site] = torch.nn.functional.linear(x.detach().to(rows.dtype), rows, offset)
        return x


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The score of every token."""

    strength: Float[Tensor, "*tokens"]
    """How far the circuit's nodes are from what they usually are, in spreads, weighted by effect; 0 to 3."""
    lean: Float[Tensor, "*tokens"]
    """Towards the first class's answer (above 0) or the second's, in logits, to first order."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What every node of a model does to a task, by location, (width,)."""

    gradient: Mapping[str, Tensor]
    """Mean of dF/dx at the last token."""
    worth: Mapping[str, Tensor]
    """Mean of s dF/dx (x - mean) at the last token, in logits."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How to tell from some nodes whether a circuit is at work; see the module's docstring."""

    model: str
    """Fingerprint of the model that is watched."""
    model_name: str
    task: str
    """Name of the task."""
    names: tuple[str, ...]
    """The circuit's nodes."""
    mean: Float[Tensor, " n"]
    spread: Float[Tensor, " n"]
    effect: Float[Tensor, " n"]
    slope: Float[Tensor, " n"]
    signal: str = "strength"
    """What a token is flagged by."""
    fpr: float = 0.05
    """Share of corpus tokens above the threshold."""
    threshold: float = float("inf")
    data: str = ""
    """Fingerprint of the corpus windows."""
    rows: Mapping[str, Float[Tensor, "k D"]] = field(default_factory=dict)
    """Read-outs of the residual stream by site; empty where nodes of the model itself are read."""
    places: Mapping[str, Int[Tensor, "k"]] = field(default_factory=dict)
    """For each site which of the names its rows are."""
    offset: Float[Tensor, " n"] | None = None
    """What is added to each read-out."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def gauge(self) -> Gauge:
        """A fresh tap that reads what the scores are made of."""
        if not self.rows:
            return NodeGauge(self.names)
        assert self.offset is not None
        return StreamGauge(self.places, self.rows, self.offset)

    def scores(self, values: Float[Tensor, "*tokens n"]) -> Scores:
        """Scores from what a gauge has read."""
        z = (values - self.mean.to(values)) / self.spread.to(values)
        effect = self.effect.to(values)
        strength = z.abs().clamp_max(CLIP) @ effect / effect.sum().clamp_min(1e-30)
        return Scores(strength=strength, lean=z @ self.slope.to(values))

    def of(self, scores: Scores) -> Float[Tensor, "*tokens"]:
        """The signal that flags go by: the strength, or the size of the lean."""
        return scores.strength if self.signal == "strength" else scores.lean.abs()

    def flags(self, scores: Scores) -> Bool[Tensor, "*tokens"]:
        """Which tokens are above the threshold."""
        return self.of(scores) > self.threshold

    def score(self, model: Runnable, tokens: Int[Tensor, "B T"], *, rows: int = 16) -> Scores:
        """Scores of every token of some sequences, on the CPU. CircuitMismatchError for another model."""
        self.check(model)
        return self.scores(readings(model, self.gauge(), tokens, rows=rows))

    def check(self, model: Runnable) -> None:
        """CircuitMismatchError unless the watch was made for this model."""
        found = model.fingerprint()
        if found != self.model:
            raise CircuitMismatchError(
                f"watch: made for model {self.model_name!r} with fingerprint {self.model[:12]}, but the model given "
                f"has {found[:12]}; load the model it was made for"
            )

    def calibrated(self, model: Runnable, windows: Int[Tensor, "n T"], *, fpr: float, signal: str) -> "Watch":
        """The same with mean, spread and threshold measured on windows of text.

        ValueError as `check_flags`, and where no node has any effect on the task.
        """
        check_flags(fpr, signal)
        tokens = as_tokens(windows)
        values = readings(model, self.gauge(), tokens).flatten(0, -2).double()
        mean, old = values.mean(0), self.spread.double()
        spread = values.std(0, correction=0).clamp_min(1e-6)
        # The slope is one per spread: it follows the spread it is measured in, unless that is of another model.
        ratio = spread / old if not self.rows else torch.ones_like(spread)
        known = replace(self, mean=mean.float(), spread=spread.float(), slope=(self.slope.double() * ratio).float())
        if float(known.effect.sum()) <= 0:
            raise ValueError("watch: no node of the circuit that can be read has any effect on the task's answers")
        signals = replace(known, signal=signal).of(known.scores(values.float()))
        return replace(
            known,
            signal=signal,
            fpr=fpr,
            threshold=float(torch.quantile(signals.double(), 1 - fpr)),
            data=windows_fingerprint(tokens),
        )

    def save(self, path: str | Path) -> Path:
        """Writes one file; the name must end in `.watch.safetensors`. Returns the path."""
        path = check_name(path)
        tensors = {name: getattr(self, name) for name in ("mean", "spread", "effect", "slope")}
        tensors |= {f"rows/{site}": rows for site, rows in self.rows.items()}
        tensors |= {f"places/{site}": index for site, index in self.places.items()}
        tensors |= {} if self.offset is None else {"offset": self.offset}
        head = {"kind": "watch", "names": list(self.names), **{name: getattr(self, name) for name in PLAIN}}
        save_tensors(path, tensors, head)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Watch":
        """Reads what `save` wrote. ArtifactError for anything else."""
        tensors, head = load_tensors(Path(path), kind="watch")
        check_watch(path, tensors, head)
        try:
            return cls(
                mean=tensors["mean"],
                spread=tensors["spread"],
                effect=tensors["effect"],
                slope=tensors["slope"],
                rows=_under("rows", tensors),
                places=_under("places", tensors),
                offset=tensors.get("offset"),
                **{name: head[name] for name in PLAIN},
                names=tuple(head["names"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: is no whole watch, {error} is missing or of the wrong kind") from error


def check_flags(fpr: float, signal: str) -> None:
    """ValueError for a rate outside (0, 1) and an unknown signal."""
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: got {fpr}, allowed are numbers above 0 and below 1")
    if signal not in SIGNALS:
        raise ValueError(f"signal: got {signal!r}, allowed are {', '.join(SIGNALS)}")


def check_name(path: str | Path) -> Path:
    """The path; ValueError where it is no name for a watch's file."""
    if not Path(path).name.endswith(SUFFIX):
        raise ValueError(f"path: {Path(path).name!r} is no name for a watch; allowed are names ending in {SUFFIX}")
    return Path(path)


def calibration_rows(total: int, windows: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"]]:
    """Of a sample of `total` windows those that a watch is calibrated on, spread over it, and all others.

    `windows` are asked for; at most half of the sample is taken, so that something is left to judge by, but one.
    """
    count = max(1, min(windows, total // 2))
    chosen = torch.linspace(0, total - 1, count).round().long()
    rest = torch.ones(total, dtype=torch.bool)
    rest[chosen] = False
    return chosen, rest.nonzero()[:, 0]


def check_watch(path: str | Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
    """ArtifactError where what a file holds is no watch: fields, shapes, ranges."""
    kinds = {name: str for name in PLAIN} | {"fpr": float, "threshold": float, "provenance": dict, "names": list}
    check_fields(path, head, kinds)
    names, n = head["names"], len(head["names"])
    for name in names:
        if not isinstance(name, str):
            raise ArtifactError(f"{path}: names holds {name!r}, allowed are names of nodes")
    if head["signal"] not in SIGNALS or not 0 < head["fpr"] < 1:
        raise ArtifactError(
            f"{path}: signal {head['signal']!r} at a rate of {head['fpr']}; allowed are {SIGNALS}, 0 to 1"
        )
    wanted = {name: (n,) for name in ("mean", "spread", "effect", "slope")}
    wanted |= {"offset": (n,)} if "offset" in tensors else {}
    for name, shape in wanted.items():
        one = tensors.get(name)
        if one is None or one.shape != shape or not one.is_floating_point() or not bool(one.isfinite().all()):
            raise ArtifactError(f"{path}: {name} is no row of {n} finite numbers")
    if n == 0 or bool((tensors["spread"] <= 0).any()):
        raise ArtifactError(f"{path}: spread must be above 0, for one node or more")
    rows, places = _under("rows", tensors), _under("places", tensors)
    fits = rows.keys() == places.keys() and bool(rows) == ("offset" in tensors)
    fits = fits and all(one.dim() == 1 and one.dtype == torch.int64 for one in places.values())
    seen = torch.cat(list(places.values())).tolist() if fits and places else list(range(n))
    fits = fits and sorted(seen) == list(range(n))
    fits = fits and all(row.dim() == 2 and row.is_floating_point() and len(row) == len(places[site])
                        and bool(row.isfinite().all()) for site, row in rows.items())  # fmt: skip
    if not fits:
        raise ArtifactError(f"{path}: rows and places do not say where each of the {n} numbers is read")
    if not rows:
        for name in names:
            try:
                split_node(name)
            except ValueError as error:
                raise ArtifactError(f"{path}: {error}") from error


def _under(folder: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by what stands behind `folder/` in their names."""
    return {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{folder}/")}


@torch.no_grad()
def readings(model: Runnable, gauge: Gauge, tokens: Int[Tensor, "B T"], *, rows: int = 16) -> Float[Tensor, "B T n"]:
    """What a gauge reads of some sequences, on the CPU; `rows` of them are run at once."""
    device = next(model.parameters()).device
    found = []
    for part in tokens.split(rows):
        model.run(part.to(device), tap=gauge, stop="final_resid")
        found.append(gauge.take().cpu())
    return torch.cat(found)


def node_effects(model: Runnable, batch: TaskBatch, means: Mapping[str, Float[Tensor, "width"]]) -> Effects:
    """What each node does to the task's answers, to first order, at the last token of the prompts.

    `means` hold one number per node (`distill.circuits.editing.constants`). Means are over prompts.
    """
    record = _Leaves(node_locations(model.n_layer))
    rows = torch.arange(len(batch))
    with torch.enable_grad(), frozen(model):
        sign = 1.0 - 2.0 * batch.labels
        device = next(model.parameters()).device
        first = answer_difference(model, batch, record) * sign.to(device)
        gradients = torch.autograd.grad(first.sum(), list(record.values.values()), allow_unused=True)
    gradient: dict[str, Tensor] = {}
    worth: dict[str, Tensor] = {}
    for (location, value), found in zip(record.values.items(), gradients, strict=True):
        # Unused is a node that nothing reads.
        slope = torch.zeros(len(batch), value.shape[-1]) if found is None else found[rows, batch.last].float().cpu()
        away = value.detach()[rows, batch.last].float().cpu() - means[location].cpu()
        gradient[location] = slope.mean(0)
        worth[location] = (slope * away * sign[:, None]).mean(0)
    return Effects(gradient=gradient, worth=worth)


class _Leaves(Record):
    """A record of what has to have gradients, also where no weight has any."""

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in (self.sites or ()):
            x = x if x.requires_grad else x.detach().requires_grad_()
        return super().__call__(site, x)


def watch_nodes(
    subject: Subject, nodes: Nodes, effects: Effects, task: str, *, provenance: Mapping[str, Any] | None = None
) -> Watch:
    """A watch over some nodes that has still to be calibrated; its spread is 1."""
    picked = [(location, channel) for location, mask in nodes.items() for channel in mask.nonzero()[:, 0].tolist()]
    if not picked:
        raise ValueError("circuit: has no node that could be watched")

    def gathered(values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([values[location][channel] for location, channel in picked])

    return Watch(
        model=subject.model.fingerprint(),
        model_name=subject.name,
        task=task,
        names=tuple(f"{location}.{channel}" for location, channel in picked),
        mean=torch.zeros(len(picked)),
        spread=torch.ones(len(picked)),
        effect=gathered(effects.worth).clamp_min(0),
        slope=gathered(effects.gradient),
        provenance=provenance or {},
    )


def make_watch(
    subject: Subject,
    circuit: Circuit,
    task: Task,
    *,
    fpr: float = 0.05,
    signal: str = "strength",
    pairs: int = 48,
    windows: int = 128,
    seed: int = 0,
) -> Watch:
    """A watch over a circuit in its own model, calibrated on `windows` of the model's held-out sample, spread over it
    (`calibration_rows`).

    Effects are those on `pairs` training pairs. CircuitMismatchError for another model; ValueError as `calibrated`.
    """
    circuit.check(subject.model)
    batch = encode(task, subject.tokenizer, "train", pairs, seed, context=subject.model.context)
    effects = node_effects(subject.model, batch, constants(subject.means))
    rows, _ = calibration_rows(len(subject.sample), windows)
    made = {"pairs": pairs, "windows": len(rows), "seed": seed}
    watch = watch_nodes(subject, circuit.nodes, effects, circuit.task, provenance=made)
    return watch.calibrated(subject.model, subject.sample[rows, :-1], fpr=fpr, signal=signal)

"""Steering a dense model by a node of its sparse student [G A.4]: does what the node stands for move the dense model?

The student reads a prompt and its counterfactual. The difference of a read node's activation at every token, carried
through the bridge, is added to the dense model's read at the same place, times a strength; several nodes are added up.
The outcome is how likely the dense model finds the counterfactual's answer. Random directions of the same length are
the control, and the difference of the dense model's own reads, as directions of the same length, says what so small a
change can do there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor

from bridges.maps import Bridges, check_bridges
from bridges.metrics import evaluating
from distill.circuits.answers import answer_difference, answer_logits
from distill.circuits.tasks import TaskBatch
from distill.model.anatomy import NormParts, anatomy
from distill.model.run import Runnable
from distill.model.sites import Edit, Record, layer_of, node_name, split_node

NODE, RANDOM, READS = "node", "random", "reads"
"""Names of the curves: the carried node; random directions; the difference of the dense model's own reads."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Outcome of some nodes, together, at several strengths."""

    nodes: tuple[str, ...]
    """Names of the student's nodes, at reads."""
    strengths: tuple[float, ...]
    """0 leaves the dense model as it is, 1 adds the whole difference."""
    prompts: int
    """Prompts that the means are over."""
    ceiling: float
    """Mean probability of the same answers where the dense model reads the counterfactual prompts themselves."""
    ratio: float
    """Length of what is added at strength 1 over that of the reads it is added to, root mean square over tokens."""
    probability: Mapping[str, tuple[tuple[float, ...], ...]]
    """For each curve, one or more runs of one value per strength: the mean probability, out of the whole vocabulary,
    of the counterfactual's answer."""
    share: Mapping[str, tuple[tuple[float, ...], ...]]
    """The same of the two answers alone: p(counterfactual's) / (p(counterfactual's) + p(the prompt's own))."""

    @property
    def name(self) -> str:
        """The node, or the first of several and how many more there are."""
        first, *others = self.nodes
        return f"{first} and {len(others)} more" if others else first

    @property
    def monotone(self) -> float:
        """Spearman's rank correlation of strength and probability under the node, in [-1, 1]; 0 where nothing moves."""
        ranks = [rankdata(values) for values in (self.strengths, self.probability[NODE][0])]
        return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(rank) > 0 for rank in ranks) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "name": self.name, "monotone": self.monotone}

    def line(self) -> str:
        """The outcome in a line for people."""
        first, last = self.probability[NODE][0][0], self.probability[NODE][0][-1]
        random = [run[-1] for run in self.probability[RANDOM]]
        return (
            f"{self.name}: P(counterfactual's answer) {first:.3f} -> {last:.3f} at strength {self.strengths[-1]:g}, "
            f"random directions {min(random):.3f} to {max(random):.3f}, the reads' own difference "
            f"{self.probability[READS][0][-1]:.3f}, under the counterfactual itself {self.ceiling:.3f}; of the two "
            f"answers alone {self.share[NODE][0][0]:.3f} -> {self.share[NODE][0][-1]:.3f}; "
            f"added {self.ratio:.2f} of the read's length at strength 1"
        )


def read_site(node: str) -> tuple[str, str, int]:
    """Location, residual site and channel of a read node, `3.attn.act_in.83`. ValueError for any other node."""
    location, channel = split_node(node)
    if not location.endswith("act_in"):
        raise ValueError(f"node: {node} is no read; allowed are nodes at LAYER.attn.act_in and LAYER.mlp.act_in")
    half = "resid_in" if ".attn." in location else "resid_mid"
    return location, f"{layer_of(location)}.{half}", channel


def carried_direction(
    dense: Runnable, student: Runnable, bridges: Bridges, batch: TaskBatch, node: str
) -> Float[Tensor, " D"]:
    """What one unit of a student's read node is in the dense model's read at the same place (METHODS 5).

        (rho_s / rho_d) * gamma_d * (I - 11^T/D) [G_i[:, c] / gamma_s,c]

    with gamma the gains of the norms before the two reads, rho the mean size of the stream over the batch's tokens (its
    root mean square; standard deviation, and centring, where a norm centres), and G_i the linear part of the decoder.

    ValueError for a node that is no read of the student, or whose gain is 0.
    """
    location, site, channel = read_site(node)
    if not 0 <= channel < student.d_model or location not in student.widths:
        raise ValueError(f"node: {node} is none of the student's residual channels; it has {student.d_model} at a read")
    part = "attn" if ".attn." in location else "mlp"
    sides = [anatomy(model).layers[layer_of(location)].norms[part] for model in (dense, student)]
    gain = float(sides[1].gain[channel])
    if gain == 0:
        raise ValueError(f"node: {node} reads nothing, the gain of its norm is 0")
    with torch.no_grad(), evaluating(dense, student):
        rho_d, rho_s = (_size(model, norm, batch, site) for model, norm in zip((dense, student), sides, strict=True))
    direction = bridges.decoder_matrix(site)[:, channel] / gain
    if sides[0].center:
        direction = direction - direction.mean()
    return rho_s / rho_d * sides[0].gain.to(direction) * direction


def _size(model: Runnable, norm: NormParts, batch: TaskBatch, site: str) -> float:
    """Mean root mean square (standard deviation where the norm centres) of the stream over the prompts' tokens."""
    stream = model.run(batch.tokens, stop=site)[_read_tokens(batch)].float()
    if norm.center:
        stream = stream - stream.mean(-1, keepdim=True)
    return float((stream.square().mean(-1) + norm.eps).sqrt().mean())


def _read_tokens(batch: TaskBatch) -> Tensor:
    """Tokens up to the last of each prompt, (R, T)."""
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device) <= batch.last[:, None]


def _turned(x: Tensor) -> Tensor:
    """Row for row what belongs to the counterfactual: halves are clean and corrupt."""
    return torch.cat(x.chunk(2)[::-1])


def rank_reads(student: Runnable, batch: TaskBatch) -> list[str]:
    """The student's residual read nodes, first those whose counterfactual values move its answer most.

    By gradient times difference, summed over tokens: how much less the right answer's logit exceeds the wrong one's.
    Nodes that the norms' gains shut off are left out. `batch`: aligned pairs, on the student's device.
    """
    locations = [name for name in student.widths if name.endswith("act_in")]
    record = _Kept(locations)
    with evaluating(student):
        difference = answer_difference(student, batch, record)
        gradients = torch.autograd.grad(difference.sum(), list(record.values.values()))
    effects: dict[str, float] = {}
    parts = anatomy(student).layers
    for (location, value), gradient in zip(record.values.items(), gradients, strict=True):
        change = (gradient * (_turned(value) - value) * _read_tokens(batch)[..., None]).detach().sum((0, 1))
        gain = parts[layer_of(location)].norms["attn" if ".attn." in location else "mlp"].gain
        for channel in range(student.d_model):
            if gain[channel] != 0:
                effects[node_name(location, channel)] = float(change[channel]) / len(batch)
    return sorted(effects, key=lambda name: effects[name])


class _Kept(Record):
    """A record of what has to have gradients, also where no weight has any."""

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in (self.sites or ()):
            x = x if x.requires_grad else x.detach().requires_grad_()
        return super().__call__(site, x)


@torch.no_grad()
def steer(
    dense: Runnable,
    student: Runnable,
    bridges: Bridges,
    batch: TaskBatch,
    nodes: Sequence[str],
    strengths: Sequence[float],
    *,
    controls: int = 8,
    seed: int = 0,
) -> Steering:
    """Adds strength * direction * (counterfactual - presented activation of each node) to the dense model's reads.

    Arguments:
        dense, student: the models of the bridges.
        batch: aligned pairs (`encode(..., aligned=True)`), each prompt the other's counterfactual.
        nodes: reads of the student, such as `2.mlp.act_in.17`, at one or several places.
        strengths: in the order of the curves.
        controls: sets of random directions. seed: of these.

    ValueError for models that the bridges do not fit, pairs of unequal length, no nodes or strengths, a node given
    twice, and as `carried_direction`.
    """
    check_bridges(bridges, n_layer=dense.n_layer, d_dense=dense.d_model, d_sparse=student.d_model)
    if not bool(batch.aligned.all()):
        raise ValueError("batch: holds pairs of unequal length; allowed are aligned ones, token for token")
    for name, values in (("node", nodes), ("strength", strengths)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: got {list(values)}, allowed are one or more, each once")
    batch = batch.to(next(dense.parameters()).device)
    directions = {node: carried_direction(dense, student, bridges, batch, node) for node in nodes}
    with evaluating(dense, student):
        places = sorted({read_site(node)[0] for node in nodes})
        ours, theirs = (_differences(model, batch, places) for model in (student, dense))
        amounts = {node: ours[read_site(node)[0]][..., read_site(node)[2]] for node in nodes}
        generator = torch.Generator().manual_seed(seed)
        # Each token counts as the node's amount says: where the node does not differ, nothing is added either.
        own = {node: (theirs[read_site(node)[0]] * amounts[node][..., None]).sum((0, 1)) for node in nodes}
        random = [
            {node: torch.randn(len(one), generator=generator).to(one) for node, one in directions.items()}
            for _ in range(controls)
        ]

        def added(chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for node, one in chosen.items():
                place, size = read_site(node)[0], one.norm()
                one = one * (directions[node].norm() / size) if size > 0 else one
                found[place] = found.get(place, 0) + amounts[node][..., None] * one
            return found

        curves = {NODE: [added(directions)], RANDOM: [added(one) for one in random], READS: [added(own)]}
        found = {
            name: [_curve(dense, batch, change, strengths) for change in changes] for name, changes in curves.items()
        }
        record = Record(places)
        logits = answer_logits(dense, batch, record).double()
        # A prompt's own answer is that of its counterfactual's counterfactual.
        ceiling = logits.softmax(-1).gather(-1, batch.answer[:, None]).mean()
        read = _read_tokens(batch)
        lengths = [
            torch.stack([values[place][read].square().sum() for place in places]).sum()
            for values in (curves[NODE][0], record.values)
        ]
    return Steering(
        nodes=tuple(nodes),
        strengths=tuple(float(strength) for strength in strengths),
        prompts=len(batch),
        ceiling=float(ceiling),
        ratio=float((lengths[0] / lengths[1]).sqrt()),
        probability={name: tuple(run[0] for run in runs) for name, runs in found.items()},
        share={name: tuple(run[1] for run in runs) for name, runs in found.items()},
    )


def _differences(model: Runnable, batch: TaskBatch, places: Sequence[str]) -> dict[str, Float[Tensor, "R T width"]]:
    """Counterfactual minus presented activation at every token of the prompts, by location."""
    record = Record(places)
    model.run(batch.tokens, tap=record)
    read = _read_tokens(batch)[..., None]
    return {place: (_turned(value) - value) * read for place, value in record.values.items()}


def _curve(
    dense: Runnable, batch: TaskBatch, added: Mapping[str, Float[Tensor, "R T D"]], strengths: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean probability and mean share of the counterfactual's answer at each strength."""
    rows = torch.arange(len(batch), device=batch.tokens.device)
    probability, share = [], []
    for strength in strengths:
        tap = Edit({place: partial(_plus, strength * change) for place, change in added.items()})
        logits = answer_logits(dense, batch, tap).double()
        probability.append(float(logits.softmax(-1)[rows, batch.other].mean()))
        share.append(float(torch.sigmoid(logits[rows, batch.other] - logits[rows, batch.answer]).mean()))
    return tuple(probability), tuple(share)


def _plus(change: Tensor, x: Tensor) -> Tensor:
    return x + change.to(x)


def parse_strengths(text: str) -> tuple[float, ...]:
    """Strengths from FIRST:LAST:NUMBER, evenly spaced. ValueError for anything else."""
    first, last, number = (text.split(":") + [""] * 3)[:3]
    try:
        found = torch.linspace(float(first), float(last), int(number), dtype=torch.float64).tolist()
    except (ValueError, RuntimeError):
        found = []
    if text.count(":") != 2 or len(set(found)) < 2 or not all(map(math.isfinite, found)):
        raise ValueError(f"strength: got {text!r}, allowed is FIRST:LAST:NUMBER with 2 or more, such as 0:1:11")
    return tuple(found)


def plot_steering(results: Mapping[str, Steering], path: str | Path) -> None:
    """A column per task: probability of the counterfactual's answer against strength, and below its share of the two
    answers; random directions as a band, and as a line what the counterfactual prompt itself brings."""
    figure = Figure(figsize=(4.2 * len(results), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(results), squeeze=False, sharex="col")
    for number, (task, found) in enumerate(results.items()):
        for axes, runs in zip(rows[:, number], (found.probability, found.share), strict=True):
            values = torch.tensor(runs[RANDOM])
            if len(values):
                band = values.min(0).values, values.max(0).values
                axes.fill_between(found.strengths, *band, color="0.8", label="random directions")
            axes.plot(found.strengths, runs[READS][0], color="0.5", linestyle="--", label="the reads' own difference")
            axes.plot(found.strengths, runs[NODE][0], color="tab:blue", marker=".", label="nodes, carried over")
        rows[0, number].axhline(found.ceiling, color="k", linewidth=0.8, linestyle=":", label="counterfactual prompt")
        rows[0, number].set_title(f"{task}\n{found.name}", fontsize=9)
        rows[0, number].set_ylim(bottom=0)
        rows[1, number].set_ylim(0, 1)
        rows[1, number].set_xlabel("strength")
    rows[0, 0].legend(fontsize=7)
    rows[0, 0].set_ylabel("probability of the counterfactual's answer")
    rows[1, 0].set_ylabel("its share of the two answers")
    figure.savefig(Path(path), dpi=110)

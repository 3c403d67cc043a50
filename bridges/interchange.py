"""Interchange through the bridge (METHODS 6.4, **ours**): does the dense model take a student's change for its own?

For a pair x, x' of prompts of equal length, the dense stream at site i is patched at every token with

    h_d(x) + G_i (m * (h_s(x') - h_s(x)))

with G_i the linear part of the decoder (a bias would leak) and m the channels that carry the student's circuit there.
The effect is the share of the way from the answer on x to that on x' that the patch goes,

    mean (d(x) - d(patched)) / mean (d(x) + d(x')),   d the logit of the right answer minus the other

0 where the patch does nothing, 1 where it does all that x' would do. Read it against its controls: all channels (the
ceiling), random active channels of equal number whose patch has the same norm, an unrelated student with least-squares
bridges, and the one direction between the class means of the dense stream.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.maps import Bridges
from bridges.metrics import evaluating
from bridges.subspace import recorded_streams
from distill.circuits.tasks import TaskBatch, logit_difference
from distill.model.run import Runnable
from distill.model.sites import FINAL_SITE

ACCURATE = 0.9
"""Least accuracy of the dense model on the aligned prompts for an interchange to say anything."""


@dataclass(frozen=True, kw_only=True)
class Interchange:
    """The effect of the patch at one residual site, and of its controls."""

    site: str
    """Residual site."""
    channels: int
    """Channels of the student that were interchanged."""
    effect: float
    """Share of the way to the other prompt's answer, mean over pairs in both directions."""
    ceiling: float
    """The same with all channels."""
    controls: tuple[float, ...]
    """The same with random active channels, the patch scaled to the same norm."""
    class_means: float | None
    """The same along the difference of the class means of the dense stream alone; None without prompts to fit it."""
    unrelated: float | None = None
    """The same with the circuit of an unrelated student and least-squares bridges; None without one."""
    unrelated_ceiling: float | None = None
    """The same with all channels of the unrelated student."""

    @property
    def p(self) -> float | None:
        """(1 + controls with at least the effect) / (1 + controls); None without controls."""
        if not self.controls:
            return None
        return (1 + sum(one >= self.effect for one in self.controls)) / (1 + len(self.controls))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "controls": list(self.controls), "p": self.p}


@dataclass(frozen=True, kw_only=True)
class Interchanges:
    """The interchange at every site, or why there is none."""

    pairs: int
    """Pairs of equal length that were used, each in both directions."""
    skipped: int
    """Pairs passed over: prompts that differ in length, in the batch or in drawing it, and drawn ones that do not fit
    the tokenizer."""
    accuracy: float | None
    """Accuracy of the dense model on the pairs used; None without any."""
    sites: tuple[Interchange, ...]
    """In the order of the run; () where the dense model is not accurate enough."""

    @property
    def best(self) -> dict[str, Any] | None:
        """The site of the largest effect, and what every control reaches at its own best site; None without sites.

        A best of several sites is read against the best of as many: `controls`, `p`, `unrelated` and `class_means` are
        maxima over sites as `effect` is, each control the same channels at all of them. `above_unrelated`: whether the
        effect is larger than the unrelated student's; None without one.
        """
        if not self.sites:
            return None
        most = max(self.sites, key=lambda one: one.effect)
        controls = [max(values) for values in zip(*(one.controls for one in self.sites), strict=True)]
        others = {
            name: max((value for one in self.sites if (value := getattr(one, name)) is not None), default=None)
            for name in ("unrelated", "class_means")
        }
        stranger = others["unrelated"]
        return {
            "site": most.site,
            "effect": most.effect,
            "controls": controls,
            "p": (1 + sum(one >= most.effect for one in controls)) / (1 + len(controls)) if controls else None,
            **others,
            "above_unrelated": None if stranger is None else most.effect > stranger,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "sites": [one.to_json() for one in self.sites], "best": self.best}


@dataclass(frozen=True, kw_only=True)
class Other:
    """An unrelated student: a sparse model that never saw the dense one, and what least squares reads of it."""

    model: Runnable
    """The model."""
    bridges: Bridges
    """Least-squares bridges between the dense model and it."""
    live: Mapping[str, Bool[Tensor, " S"]] | None
    """Channels that carry its own circuit of the task, by site; None where it has none."""


@torch.no_grad()
def interchange(
    dense: Runnable,
    student: Runnable,
    bridges: Bridges,
    batch: TaskBatch,
    live: Mapping[str, Bool[Tensor, " S"]],
    *,
    controls: Iterable[Mapping[str, Bool[Tensor, " S"]]] = (),
    classes: TaskBatch | None = None,
    other: Other | None = None,
    protect_first: bool = False,
) -> Interchanges:
    """The interchange at each site of `live`, with its controls.

    Arguments:
        batch: pairs of prompts; those of unequal length are skipped and counted.
        live: channels that carry the student's circuit, by site.
        controls: other sets of channels by the same sites, such as `random_channels`.
        classes: other prompts of the task, to take the class means of.
        other: an unrelated student.
        protect_first: leave position 0 alone.
    """
    device = next(dense.parameters()).device
    chosen = batch.aligned.nonzero()[:, 0]
    skipped = batch.dropped + len(batch) // 2 - len(chosen)
    if not len(chosen):
        return Interchanges(pairs=0, skipped=skipped, accuracy=None, sites=())
    batch = batch.take(chosen).to(device)
    masks = list(controls)
    with evaluating(dense, student):
        run = _Patched(dense, batch, protect_first)
        accuracy = float((run.difference > 0).float().mean())
        if accuracy < ACCURATE:
            return Interchanges(pairs=len(chosen), skipped=skipped, accuracy=accuracy, sites=())
        changes = _changes(student, batch)
        others = _changes(other.model, batch) if other is not None else {}
        directions = class_directions(dense, classes.to(device)) if classes is not None else {}
        found = []
        for site, mask in live.items():
            patch = _carried(bridges, site, changes[site], mask)
            drawn = [_like(_carried(bridges, site, changes[site], one[site]), patch) for one in masks]
            along = None if site not in directions else run.effect(site, _along(directions[site], run.change(site)))
            found.append(
                Interchange(
                    site=site,
                    channels=int(mask.sum()),
                    effect=run.effect(site, patch),
                    ceiling=run.effect(site, _carried(bridges, site, changes[site], None)),
                    controls=tuple(run.effect(site, one) for one in drawn),
                    class_means=along,
                    unrelated=_unrelated(run, other, site, others, whole=False),
                    unrelated_ceiling=_unrelated(run, other, site, others, whole=True),
                )
            )
    return Interchanges(pairs=len(chosen), skipped=skipped, accuracy=accuracy, sites=tuple(found))


class _Patched:
    """The dense model on aligned pairs, alone and with a patch at one site."""

    def __init__(self, dense: Runnable, batch: TaskBatch, protect_first: bool) -> None:
        self.dense, self.batch, self.protect_first = dense, batch, protect_first
        self.streams = recorded_streams(dense, batch)
        self.difference = self._answer(FINAL_SITE, self.streams[FINAL_SITE])
        self.way = float((self.difference + turned(self.difference)).mean())

    def _answer(self, site: str, residual: Tensor) -> Float[Tensor, " R"]:
        batch = self.batch
        final = self.dense.run(batch.tokens, start=site, residual=residual, stop=FINAL_SITE)
        rows = torch.arange(len(batch), device=final.device)
        logits = self.dense.readout(final[rows, batch.last], batch.tokens[rows, batch.last])
        return logit_difference(logits.float(), batch)

    def change(self, site: str) -> Float[Tensor, "R T D"]:
        """What the dense stream itself would change by."""
        return turned(self.streams[site]) - self.streams[site]

    def effect(self, site: str, patch: Float[Tensor, "R T D"]) -> float:
        """The effect of adding a patch to the stream."""
        if self.protect_first:
            patch = torch.cat([torch.zeros_like(patch[:, :1]), patch[:, 1:]], 1)
        patched = self._answer(site, self.streams[site] + patch.to(self.streams[site]))
        return float((self.difference - patched).mean()) / self.way


def turned(rows: Float[Tensor, "R *rest"]) -> Float[Tensor, "R *rest"]:
    """Each row's partner in its pair."""
    return rows.roll(len(rows) // 2, 0)


def _changes(model: Runnable, batch: TaskBatch) -> dict[str, Tensor]:
    """h(x') - h(x) at every site."""
    with evaluating(model):
        return {site: turned(stream) - stream for site, stream in recorded_streams(model, batch).items()}


def _carried(bridges: Bridges, site: str, change: Float[Tensor, "R T S"], mask: Tensor | None) -> Tensor:
    chosen = change if mask is None else change * mask.to(change)
    return chosen @ bridges.decoder_matrix(site).to(change).T


def _like(patch: Float[Tensor, "R T D"], other: Float[Tensor, "R T D"]) -> Tensor:
    """A patch scaled to the norm of another one."""
    norm = float(patch.norm())
    return patch * (float(other.norm()) / norm) if norm > 0 else patch


def _along(direction: Float[Tensor, " D"], change: Float[Tensor, "R T D"]) -> Tensor:
    return (change @ direction)[..., None] * direction


def _unrelated(
    run: _Patched, other: Other | None, site: str, changes: Mapping[str, Tensor], *, whole: bool
) -> float | None:
    if other is None or (other.live is None and not whole):
        return None
    mask = None if whole or other.live is None else other.live[site]
    return run.effect(site, _carried(other.bridges, site, changes[site], mask))


@torch.no_grad()
def class_directions(dense: Runnable, batch: TaskBatch) -> dict[str, Float[Tensor, " D"]]:
    """Unit vectors between the means of the dense stream at the last token of prompts of the two classes, by site.

    Sites where the means agree are left out; none where all prompts are of one class.
    """
    with evaluating(dense):
        streams = recorded_streams(dense, batch)
    rows = torch.arange(len(batch), device=batch.last.device)
    first, second = batch.labels == 0, batch.labels == 1
    if not bool(first.any()) or not bool(second.any()):
        return {}
    found = {}
    for site, stream in streams.items():
        last = stream[rows, batch.last]
        direction = last[first].mean(0) - last[second].mean(0)
        if float(direction.norm()) > 1e-9:
            found[site] = direction / direction.norm()
    return found

"""Candidate mode: gradients and moments for the kept entries and some candidates only (**ours**; METHODS: an option).

The source keeps dense gradients and moments, for an entry that is zero now may enter later [G A.2]. In candidate mode
most steps are sampled: each matrix has a `Sample` (the entries that are not zero, and `factor` candidates for each),
its backward pass gives the gradient of these alone, and AdamW and the projection look at nothing else. Every `refresh`
steps, `window` of them are exact, with dense gradients and the optimiser's dense moments; what these say chooses the
next candidates. The annealing while much is kept, and the last share of the steps, are exact too. The weights stay
dense tensors with zeros throughout.

A trainer calls, for every step, `begin` before the forward pass, `squares` (and `gradients`, to average them over
processes) after the backward pass, and `step` after the optimiser's own, which has to leave the sampled matrices
(`parameters`) alone; in the end, `close`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.command import no_type_check
from distill.model import kernels
from distill.model.kernels import AdamStep
from distill.model.kernels.candidates import Sample, keep_largest_, sample_
from distill.model.operations import native
from distill.training.sparsity import project_

Choice = Literal["update", "gradient", "random"]
Newcomers = Literal["window", "zero", "mean"]
Floor = tuple[int, int | None]
"""Non-zeros that each row (0) or column (1) keeps, and which of both; (0, None) is no floor."""


@no_type_check
@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """Which entries are trained beside those that are kept, and when; every value is checked when it is made."""

    factor: float = 2.0
    """Candidates per kept entry, 0 or more."""
    refresh: int = 100
    """Steps from one choice of candidates to the next."""
    window: int = 1
    """Of these so many, the last ones, are exact: dense gradients and moments for every entry."""
    choice: Choice = "gradient"
    """The candidates are the entries with the largest: gradient (first moment), update (first moment over root of the
    second), or random ones."""
    newcomers: Newcomers = "window"
    """Moments of entries that were no candidates before: those gathered in the window, zero, or a first moment of zero
    with the mean second moment of the kept entries."""
    exact_last: float = 0.0
    """Share of the steps, at the end, that are exact, in [0, 1]."""
    below: float = 0.1
    """Kept fraction from which on steps are sampled; while more is kept they are exact. Above 0, up to 1."""

    def __post_init__(self) -> None:
        self._require("factor", 0 <= self.factor < math.inf, "finite numbers from 0")
        self._require("refresh", self.refresh >= 1, "whole numbers from 1")
        self._require("window", 1 <= self.window <= self.refresh, f"whole numbers from 1 to refresh {self.refresh}")
        self._require("choice", self.choice in ("update", "gradient", "random"), "update, gradient, random")
        self._require("newcomers", self.newcomers in ("window", "zero", "mean"), "window, zero, mean")
        self._require("exact_last", 0 <= self.exact_last <= 1, "0 to 1")
        self._require("below", 0 < self.below <= 1, "above 0, up to 1")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {allowed}")

    def sampled(self, step: int, *, steps: int, first: int) -> bool:
        """Whether update `step` (0 first) of `steps` is sampled, where `first` is the first with few entries kept."""
        end = round((1 - self.exact_last) * steps)
        return first <= step < end and (step - first) % self.refresh < self.refresh - self.window


@dataclass(eq=False)
class _Matrix:
    """A matrix that is trained in candidate mode."""

    name: str
    weight: nn.Parameter
    floor: Floor
    group: dict[str, Any]
    """The optimiser's group it belongs to: rate, betas, eps, weight decay."""
    sample: Sample | None = None
    moments: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    """Of the sample: m, v."""
    places: Tensor | None = None
    """Those of the last sample, in a window; None before the first."""
    beyond: float = 1.0
    """Squares of the dense gradient over those of its kept entries, in the last exact step."""


class CandidateTraining:
    """The matrices of one training and their samples."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: CandidateConfig,
        *,
        steps: int,
        kept_after: Callable[[int], float],
        floors: Mapping[str, Floor],
        seed: int = 0,
    ) -> None:
        """
        Arguments:
            parameters: the projected parameters by name; those with two axes take part, and must be used by
                `operations.linear` and `operations.embedding` alone.
            optimizer: an AdamW of them, whose state holds `exp_avg`, `exp_avg_sq` and `step`.
            config: the settings.
            steps: length of the training.
            kept_after: the fraction of entries that stays after so many steps; never rises.
            floors: of each parameter.
            seed: of random candidates.

        Raises `ValueError` for a matrix that is spread over processes.
        """
        for name, weight in parameters.items():
            if isinstance(weight, DTensor):
                raise ValueError(f"{name}: is spread over processes, allowed are whole matrices")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._matrices = [
            _Matrix(name, weight, floors[name], groups[id(weight)])
            for name, weight in parameters.items()
            if weight.dim() == 2
        ]
        self.optimizer, self.config, self.steps, self.seed = optimizer, config, steps, seed
        few = (step for step in range(steps) if kept_after(step + 1) <= config.below)
        # Something exact has to come first: without moments there is nothing to choose by.
        self.first = max(next(few, steps), config.window)
        self.done = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that are sampled now: `step` updates and projects them, nobody else shall."""
        return tuple(m.name for m in self._matrices if m.sample is not None)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The same, themselves."""
        return tuple(m.weight for m in self._matrices if m.sample is not None)

    def begin(self, step: int) -> None:
        """Prepares for update `step` (0 first): chooses candidates, or goes back to dense moments, where it is time."""
        self.done = step
        sampled = self._sampled(step)
        for number, matrix in enumerate(self._matrices):
            if sampled and matrix.sample is None:
                self._enter(matrix, number)
            elif not sampled and matrix.sample is not None:
                self._leave(matrix)
            if matrix.sample is not None:
                matrix.sample.clear_()

    def _sampled(self, step: int) -> bool:
        return self.config.sampled(step, steps=self.steps, first=self.first)

    def gradients(self) -> list[Float[Tensor, " n"]]:
        """The gradients of the sampled matrices: to be averaged in place where several processes share the batch."""
        return [m.sample.gradient for m in self._matrices if m.sample is not None]

    def squares(self) -> float:
        """The sum of squares of the sampled matrices' whole gradients, as it is to be expected: that over the kept
        entries, times what the dense gradient of the last exact step had beyond them."""
        found = (m.beyond * float(m.sample.squares()[1]) for m in self._matrices if m.sample is not None)
        return sum(found, 0.0)

    @torch.no_grad()
    def step(self, scale: float, fraction: float) -> int:
        """AdamW and projection of the sampled matrices, at the rates of their groups in the optimiser.

        To be called after exact steps too, while their gradients are still there.

        Arguments:
            scale: the gradients are multiplied by it.
            fraction: share of a matrix' entries that stay.

        Returns the non-zeros left in them. Raises `RuntimeError` where one has a dense gradient: something used it
        without `operations.linear` or `operations.embedding`, and that gradient would be lost.
        """
        left = 0
        for matrix in self._matrices:
            if matrix.sample is None:
                if self._sampled(self.done + 1):
                    matrix.beyond = _beyond(matrix.weight)
                continue
            if matrix.weight.grad is not None:
                raise RuntimeError(f"{matrix.name}: has a dense gradient, though it is trained on a sample")
            group = matrix.group
            adam = AdamStep(
                rate=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=self.done + 1,
                scale=scale,
            )
            _adamw_(matrix.sample, *matrix.moments, adam)
            left += _project(matrix.sample, matrix.weight, fraction, matrix.floor)
        return left

    def close(self) -> None:
        """Takes all samples off the weights, whose gradients are dense from then on: when the training is over, or
        broken off. What a checkpoint needs is gone then."""
        for matrix in self._matrices:
            sample_(matrix.weight, None)
            matrix.sample = None

    # --- from exact steps to sampled ones and back ---

    @torch.no_grad()
    def _enter(self, matrix: _Matrix, number: int) -> None:
        """Chooses the sample; of the dense moments its places stay."""
        weight = matrix.weight
        state = self.optimizer.state.get(weight) or {}
        slots = ("exp_avg", "exp_avg_sq")
        m, v = (state[slot] if slot in state else torch.zeros_like(weight) for slot in slots)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.done) * 1_009 + number)
        places, m = choose(weight, m, v, self.config, float(matrix.group["eps"]), generator)
        sample, v = self._sample(weight, places), v.reshape(-1)[places]
        kept = sample.values != 0
        if self.config.newcomers != "window" and matrix.places is not None:
            new = ~torch.isin(places, matrix.places, assume_unique=True) & ~kept
            typical = v[kept].mean() if self.config.newcomers == "mean" else 0.0
            m[new], v[new] = 0.0, typical
        matrix.places = None
        self._attach(matrix, sample, m, v)

    @staticmethod
    def _sample(weight: nn.Parameter, places: Tensor) -> Sample:
        return Sample.of(weight, places, compiled=native(weight) and weight.is_contiguous())

    def _attach(self, matrix: _Matrix, sample: Sample, m: Tensor, v: Tensor) -> None:
        matrix.sample, matrix.moments = sample, (m, v)
        matrix.weight.grad = None
        self.optimizer.state.pop(matrix.weight, None)
        sample_(matrix.weight, sample)

    @torch.no_grad()
    def _leave(self, matrix: _Matrix) -> None:
        """Back to dense moments, zero outside the sample."""
        assert matrix.sample is not None
        places = matrix.places = matrix.sample.places()
        dense = []
        for moment in matrix.moments:
            whole = torch.zeros_like(matrix.weight)
            whole.view(-1)[places] = moment
            dense.append(whole)
        self.optimizer.state[matrix.weight] = {
            "step": torch.tensor(float(self.done)),
            "exp_avg": dense[0],
            "exp_avg_sq": dense[1],
        }
        sample_(matrix.weight, None)
        matrix.sample = None

    # --- checkpoints ---

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the weights and the optimiser's state: `{name}/{slot}` to tensor."""
        saved: dict[str, Tensor] = {}
        for matrix in self._matrices:
            saved[f"{matrix.name}/beyond"] = torch.tensor(matrix.beyond, dtype=torch.float64)
            places = matrix.places if matrix.sample is None else matrix.sample.places()
            if places is not None:
                saved[f"{matrix.name}/places"] = places
            if matrix.sample is not None:
                saved[f"{matrix.name}/exp_avg"], saved[f"{matrix.name}/exp_avg_sq"] = matrix.moments
        return saved

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave, after the weights and the optimiser's state; ValueError if it does not fit."""
        for matrix in self._matrices:
            name, weight = matrix.name, matrix.weight
            found = {slot: saved.get(f"{name}/{slot}") for slot in ("beyond", "places", "exp_avg", "exp_avg_sq")}
            places, m, v = (found[slot] for slot in ("places", "exp_avg", "exp_avg_sq"))
            if found["beyond"] is None or (m is None) != (v is None) or (m is not None and places is None):
                raise ValueError(f"{name}: got {sorted(k for k in saved if k.startswith(name))} of its candidates")
            matrix.beyond = float(found["beyond"])
            if places is not None:
                places = places.to(weight.device)
            if places is None or m is None or v is None:
                matrix.places = places
                continue
            self._attach(matrix, self._sample(weight, places), m.to(weight), v.to(weight))


def _beyond(weight: nn.Parameter) -> float:
    """Squares of a dense gradient over those where the weight is not zero."""
    if weight.grad is None:
        return 1.0
    inside = float(weight.grad.reshape(-1)[_nonzero(weight)].norm()) ** 2
    return float(weight.grad.norm()) ** 2 / inside if inside > 0 else 1.0


def _adamw_(sample: Sample, m: Tensor, v: Tensor, adam: AdamStep) -> None:
    """One step on the values and moments of a sample; the weight itself is left as it is."""
    if sample.index is not None:
        kernels.adamw_(sample.values, sample.gradient, m, v, adam)
        return
    first, second = adam.betas
    gradient = sample.gradient * adam.scale
    m.mul_(first).add_(gradient, alpha=1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    size = (v / (1 - second**adam.step)).sqrt_().add_(adam.eps)
    sample.values.mul_(1 - adam.rate * adam.weight_decay)
    sample.values.addcdiv_(m, size, value=-adam.rate / (1 - first**adam.step))


def _project(sample: Sample, weight: nn.Parameter, fraction: float, floor: Floor) -> int:
    if sample.index is not None:
        return keep_largest_(sample, weight, round(fraction * weight.numel()), floor=floor[0], axis=floor[1])
    places, flat = sample.places(), weight.detach().view(-1)
    flat[places] = sample.values
    left = project_(weight, fraction, floor=floor[0], axis=floor[1])
    sample.values.copy_(flat[places])
    return left


def choose(
    weight: Float[Tensor, "o i"],
    m: Float[Tensor, "o i"],
    v: Float[Tensor, "o i"],
    config: CandidateConfig,
    eps: float,
    generator: torch.Generator,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The places of a sample, flat and ascending: all entries that are not zero, and the candidates; and `m` there.

    Arguments:
        weight: the matrix.
        m, v: AdamW's moments of all entries; `m` may be changed, as a dense tensor more is a large one.
        config: `choice` and `factor`.
        eps: AdamW's.
        generator: for random candidates.
    """
    kept = _nonzero(weight)
    saved = m.view(-1)[kept]
    if config.choice == "gradient":
        score = m
    elif config.choice == "update":
        score = v.sqrt().add_(eps)
        torch.div(m, score, out=score)
    else:
        # Away from zero, so that every entry can be chosen.
        score = 1 + torch.rand(weight.shape, generator=generator).to(weight)
    flat = score.view(-1)
    flat[kept] = 0.0
    project_(score, min(1.0, round(config.factor * len(kept)) / score.numel()))
    flat[kept] = 1.0  # whatever the moment there
    places = _nonzero(score)
    at = m.view(-1)[places]
    at[weight.view(-1)[places] != 0] = saved
    return places, at


def _nonzero(x: Float[Tensor, "o i"]) -> Int[Tensor, " n"]:
    """The flat places of the entries that are not zero, ascending."""
    if not (native(x) and x.is_contiguous()):
        return x.reshape(-1).nonzero().reshape(-1)
    pattern = kernels.Pattern.of(x)
    row = torch.repeat_interleave(torch.arange(pattern.rows), pattern.row_start.diff().long())
    return row * pattern.columns + (pattern.by_row & 0xFFFFFFFF)

"""How well a watch tells: areas under the curve, delay of the flag, references above and below.

The upper reference is a logistic probe on the whole residual stream, fitted to labelled tokens; the lower one are
watches over random nodes, as many and as active at every location, weighted by their own effects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor

from distill.circuits.circuit import Circuit
from distill.circuits.code_labels import DOUBLE, OUTSIDE, SINGLE, LabelledCode
from distill.circuits.editing import constants
from distill.circuits.faithfulness.matched import random_sets
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task as Task
from distill.circuits.tasks import TaskBatch, encode
from distill.circuits.watch import Scores, Watch, calibration_rows, node_effects, watch_nodes
from distill.model.run import Runnable
from distill.model.sites import Record, residual_sites


def auroc(positive: Float[Tensor, "n"], negative: Float[Tensor, "m"]) -> float:
    """Chance that a positive scores above a negative, ties half, in [0, 1]. ValueError where either is empty."""
    if not len(positive) or not len(negative):
        raise ValueError(f"scores: got {len(positive)} positive and {len(negative)} negative, needed is one of each")
    ranks = rankdata(torch.cat([positive, negative]).double().numpy())
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True, kw_only=True)
class Delay:
    """Tokens from the first at which something holds to the first flag, over several stretches."""

    stretches: int
    found: float
    """Share of the stretches with a flag before they end."""
    median: float | None
    """Median delay in tokens where there is a flag; 0: at once."""
    p90: float | None

    @classmethod
    def of(cls, waits: Sequence[int | None]) -> "Delay":
        """From the wait of each stretch, None where no flag came."""
        seen = [wait for wait in waits if wait is not None]
        low, high = np.percentile(seen, [50, 90]).tolist() if seen else (None, None)
        return cls(stretches=len(waits), found=len(seen) / max(len(waits), 1), median=low, p90=high)


def waits(flags: Bool[Tensor, "T"], inside: Bool[Tensor, "T"], first: Bool[Tensor, "T"]) -> list[int | None]:
    """For every stretch of `inside`, which begins at a `first`, the tokens up to its first flag, None without one.

    A stretch whose beginning lies before the window is left out.
    """
    found: list[int | None] = []
    counting, count = False, 0
    for flag, within, begins in zip(flags.tolist(), inside.tolist(), first.tolist(), strict=True):
        if within and begins:
            found.append(None)
            counting, count = True, 0
        if not within:
            counting = False
        if counting:
            if flag:
                found[-1], counting = count, False
            count += 1
    return found


# --- the task's own prompts ------------------------------------------------------------------------------------------


def on_prompts(
    watch: Watch, model: Runnable, batch: TaskBatch, corpus: Scores, thresholds: Mapping[float, float]
) -> dict[str, Any]:
    """How the watch does on prompts of one split of its task, the corpus as the other side.

    Returns `at_work`, the area under the curve of the signal at the prompts' last tokens against corpus tokens;
    `which`, that of the lean between prompts of the first and the second class; and by rate of flags (`thresholds`)
    the delay from the first token at which a prompt and its counterfactual differ to the flag.
    """
    found = watch.score(model, batch.tokens)
    rows = torch.arange(len(batch))
    last = Scores(strength=found.strength[rows, batch.last], lean=found.lean[rows, batch.last])
    clean, corrupt = batch.tokens.cpu().chunk(2)
    place = torch.arange(batch.tokens.shape[1])
    differs = (clean != corrupt).int().argmax(1).repeat(2)
    inside = (place >= differs[:, None]) & (place <= batch.last.cpu()[:, None])
    return {
        "prompts": len(batch),
        "at_work": auroc(watch.of(last), watch.of(corpus).flatten()),
        "which": auroc(last.lean[batch.labels == 0], last.lean[batch.labels == 1]),
        "rates": {
            f"{rate:g}": {"delay": vars(_delay(watch.of(found) > threshold, inside, place == differs[:, None]))}
            for rate, threshold in thresholds.items()
        },
    }


def _delay(flags: Bool[Tensor, "n T"], inside: Bool[Tensor, "n T"], first: Bool[Tensor, "n T"]) -> Delay:
    return Delay.of([one for parts in zip(flags, inside, first, strict=True) for one in waits(*parts)])


# --- code ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CodeScore:
    """Areas under the curve on tokens of held-out code."""

    which: float
    """Inside '...' against inside "...", by the lean."""
    inside: float
    """Inside either against outside of strings, by the strength."""

    @classmethod
    def of(cls, scores: Scores, inside: Int[Tensor, "n T"]) -> "CodeScore":
        """From the scores of tokens and their labels; triple-quoted strings and f-strings do not count.

        The lean may have either sign: the task's first class need not be the single quote.
        """
        kind, lean, strength = inside.flatten(), scores.lean.flatten(), scores.strength.flatten()
        single, double, outside = (kind == label for label in (SINGLE, DOUBLE, OUTSIDE))
        which = auroc(lean[single], lean[double])
        return cls(which=which, inside=auroc(strength[single | double], strength[outside]))


def on_code(watch: Watch, model: Runnable, code: LabelledCode, thresholds: Mapping[float, float]) -> dict[str, Any]:
    """Areas under the curve; and by rate of flags (`thresholds`) the share of tokens flagged inside and outside of
    strings, and the delay from a string's first token to the flag."""
    tokens, inside = code.tokens[:, :-1], code.inside[:, :-1]
    scores = watch.score(model, tokens)
    within, begins = (inside == SINGLE) | (inside == DOUBLE), code.since[:, :-1] == 0
    rates = {}
    for rate, threshold in thresholds.items():
        flags = watch.of(scores) > threshold
        rates[f"{rate:g}"] = {
            "inside": float(flags[within].double().mean()),
            "outside": float(flags[inside == OUTSIDE].double().mean()),
            "delay": vars(_delay(flags, within, begins)),
        }
    return {"tokens": tokens.numel(), **vars(CodeScore.of(scores, inside)), "rates": rates}


def random_watches(
    subject: Subject, circuit: Circuit, task: Task, like: Watch, *, count: int, pairs: int = 48, seed: int = 0
) -> list[Watch]:
    """Watches over random node sets like the circuit's, calibrated as `like` on the same windows."""
    batch = encode(task, subject.tokenizer, "train", pairs, seed, context=subject.model.context)
    effects = node_effects(subject.model, batch, constants(subject.means))
    generator = torch.Generator().manual_seed(seed)
    rows, _ = calibration_rows(len(subject.sample), int(like.provenance["windows"]))
    found = []
    for nodes in random_sets(circuit.nodes, subject.means, count, generator):
        watch = weighted(watch_nodes(subject, nodes, effects, circuit.task))
        found.append(watch.calibrated(subject.model, subject.sample[rows, :-1], fpr=like.fpr, signal=like.signal))
    return found


def weighted(watch: Watch) -> Watch:
    """The watch, or where no node of it has any effect one in which each counts alike: no reference shall be lost."""
    return watch if float(watch.effect.sum()) > 0 else replace(watch, effect=torch.ones_like(watch.effect))


# --- the probe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A logistic regression on the residual stream at one site."""

    weight: Float[Tensor, " D"]
    offset: float

    def __call__(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        return x.double() @ self.weight + self.offset


def fit_probe(x: Float[Tensor, "n D"], positive: Bool[Tensor, "n"], *, penalty: float = 1e-3) -> Probe:
    """The weights of least log loss plus penalty / 2 * |weights|^2, channels in spreads, both classes counting alike.

    ValueError unless there are tokens of both classes.
    """
    if not bool(positive.any()) or bool(positive.all()):
        raise ValueError("probe: needed are tokens of both classes")
    mean, spread = x.double().mean(0), x.double().std(0).clamp_min(1e-6)
    data = ((x.double() - mean) / spread).numpy()
    sign = np.where(positive.numpy(), 1.0, -1.0)
    share = np.where(sign > 0, 0.5 / (sign > 0).sum(), 0.5 / (sign < 0).sum())

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (data @ theta[:-1] + theta[-1])
        slope = -share * sign * expit(-margin)
        value = (share * np.logaddexp(0, -margin)).sum() + penalty / 2 * (theta[:-1] ** 2).sum()
        return float(value), np.append(data.T @ slope + penalty * theta[:-1], slope.sum())

    found = minimize(loss, np.zeros(data.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    weight = torch.from_numpy(found[:-1]) / spread
    return Probe(weight=weight, offset=float(found[-1] - weight @ mean))


@torch.no_grad()
def probe_code(model: Runnable, fit: LabelledCode, test: LabelledCode) -> dict[str, Mapping[str, float]]:
    """Areas under the curve of probes by residual site, fitted on some windows of code and tried on others."""
    sides = [_streams(model, code.tokens[:, :-1]) for code in (fit, test)]
    kinds = [code.inside[:, :-1].flatten() for code in (fit, test)]
    found = {}
    for site in residual_sites(model.n_layer):
        scores = {}
        for name, yes, no in (("which", (SINGLE,), (DOUBLE,)), ("inside", (SINGLE, DOUBLE), (OUTSIDE,))):
            parts = [_chosen(side[site], kind, yes, no) for side, kind in zip(sides, kinds, strict=True)]
            probe = fit_probe(*parts[0])
            value, positive = probe(parts[1][0]), parts[1][1]
            scores[name] = auroc(value[positive], value[~positive])
        found[site] = scores
    return found


def _chosen(x: Tensor, kind: Tensor, yes: Sequence[int], no: Sequence[int]) -> tuple[Tensor, Tensor]:
    positive = torch.isin(kind, torch.tensor(yes))
    kept = positive | torch.isin(kind, torch.tensor(no))
    return x[kept], positive[kept]


def _streams(model: Runnable, tokens: Int[Tensor, "n T"], rows: int = 16) -> dict[str, Float[Tensor, "tokens D"]]:
    device = next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    for part in tokens.split(rows):
        record = Record(residual_sites(model.n_layer))
        model.run(part.to(device), tap=record, stop="final_resid")
        for site, x in record.values.items():
            parts.setdefault(site, []).append(x.float().flatten(0, 1).cpu())
    return {site: torch.cat(values) for site, values in parts.items()}

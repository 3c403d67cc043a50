"""What a circuit has to do: the objectives `paper` and `faithful`, on prompts with all that is known of the full model.

*paper* is the task loss with everything outside the circuit ablated [G 2.2]. Pruning to it can pick ablated sets whose
effects cancel out, and can beat the model. *faithful* asks besides that the circuit answers as the model M does, and
goes on doing so when some of what was pruned is brought back:

    1/2 E_r KL(M || C_r) + 1/2 max_r KL(M || C_r),   x_i = a_i + r_i (x_i - a_i) for the nodes i outside the circuit

with KL between the distributions over the two answers, mean over prompts. r is one number per node, shared by a batch;
the average is over shares p, uniform in [0, 1], and r_i = 1 with probability p, else 0 (r_i uniform in [0, 1] would all
but always restore one half). The worst r is followed by gradient ascent. While masks are learned it is one vector that
takes one step of sign(gradient) along with each step of the masks. Node sets are judged with r of 0 and 1 only: C_r is
then the circuit of a larger node set, for which what competes in AbsTopK is defined.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from distill.circuits.ablation import FreezeNorms, Means, resampled, task_means, zeros
from distill.circuits.answers import answer_difference, frozen_norms, take, two_way_loss
from distill.circuits.edges import EdgeSet, EdgeTap
from distill.circuits.estimators import Estimator, as_nodes
from distill.circuits.extraction import extract
from distill.circuits.masks import MaskTap
from distill.circuits.settings import PruneConfig, require
from distill.circuits.standalone import Gates, Standalone
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable
from distill.model.sites import Tap, chain


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts, the model's answers, and what pruned nodes are set to on each."""

    batch: TaskBatch
    means: Means
    """Ablation values."""
    full: Tensor
    """Logit differences of the full model, (rows,), on the CPU."""
    norms: FreezeNorms | None = None
    """The full model's norms, where they are frozen."""

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, pairs: Int[Tensor, "n"]) -> "Prompts":
        """Some pairs, both members of each."""
        rows = torch.cat([pairs, pairs + len(self) // 2])
        return self._rows(take(self.batch, pairs), rows)

    def rows(self, rows: slice) -> "Prompts":
        """Some rows, with the padding as it is."""
        return self._rows(self.batch.select(rows), rows)

    def _rows(self, batch: TaskBatch, rows: Tensor | slice) -> "Prompts":
        norms = None if self.norms is None else self.norms.rows(rows)
        return replace(self, batch=batch, means=self.means.rows(rows), full=self.full[rows], norms=norms)

    def repeated(self, times: int) -> "Prompts":
        """The same prompts several times over, one after the other."""
        rows = torch.arange(len(self)).repeat(times)
        return self._rows(self.batch.select(rows), rows)

    def tap(self, masks: dict[str, Tensor], *, competition: bool, dropped: EdgeTap | None = None) -> Tap:
        """Runs the nodes that these masks keep, without the dropped edges, with norms as they are to be."""
        parts: list[Tap] = [MaskTap(masks, self.means, competition=competition)]
        parts += [] if dropped is None else [dropped]
        parts += [] if self.norms is None else [self.norms]
        return chain(*parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def observe(
    model: Runnable,
    batch: TaskBatch,
    means: Means,
    config: PruneConfig,
    *,
    corpus: Int[Tensor, "n T"] | None = None,
    seed: int = 0,
) -> Prompts:
    """The full model's answers on `batch`, and what pruned nodes are set to there.

    `means` are those of `ablation_means`; `corpus` holds the windows that resample draws from instead, by `seed`.
    ValueError for resample without a corpus.
    """
    device = next(model.parameters()).device
    means = means.to(device)
    if config.ablation == "resample":
        require(corpus is not None, "ablation", "resample", "mean, task, zero where no windows of the corpus are given")
        assert corpus is not None
        means = resampled(model, corpus, batch, means, seed=seed)
    rows = range(0, len(batch), config.rows)
    parts = [batch.select(slice(start, start + config.rows)) for start in rows]
    full = torch.cat([answer_difference(model, part).float().cpu() for part in parts])
    return Prompts(
        batch=batch, means=means, full=full, norms=frozen_norms(model, batch) if config.freeze_norms else None
    )


def ablation_means(model: Runnable, train: TaskBatch, means: Means, config: PruneConfig) -> Means:
    """Ablation values that do not depend on the prompt: `means`, or those over the training prompts, or zeros."""
    if config.ablation == "task":
        return task_means(model, train, means, rows=config.rows)
    return zeros(means) if config.ablation == "zero" else means


def answer_kl(full: Float[Tensor, "n"], circuit: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """KL(model || circuit) between the distributions over the two answers, from logit differences, nats per prompt."""
    p = torch.sigmoid(full)
    right = p * (logsigmoid(full) - logsigmoid(circuit))
    return right + (1 - p) * (logsigmoid(-full) - logsigmoid(-circuit))


class Candidates(Standalone):
    """A module of the nodes still in question, all of which compete for AbsTopK slots, whatever their gates are.

    A node whose gate is 0 must be seen all the same, or the gate would have no gradient worth following.
    """

    def _nodes(self, location: str, z: Float[Tensor, "B T n"], at: Tensor, gates: Gates) -> Float[Tensor, "B T n"]:
        gate = gates.nodes.get(location)
        deviation = super()._nodes(location, z, at, Gates())
        return deviation if gate is None else deviation * gate


class Objective:
    """The losses of one step of learning, by name: `task`, and under faithful `faithful`."""

    def __init__(self, model: Runnable, masks: Estimator, config: PruneConfig) -> None:
        self.model, self.masks, self.config = model, masks, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.worst = torch.rand(len(masks.count), generator=self.generator).to(masks.tau.device)
        """The restoration that gradient ascent follows, in [0, 1] by group."""
        self.module: Candidates | None = None
        """What is run instead of the model, once nodes are out for good."""

    def narrow(self, kept: Bool[Tensor, "groups"], prompts: Prompts) -> None:
        """From here on these groups alone are run, as a module of their own; the others stay ablated.

        `prompts` hold every first token that there will be. Not for the faithful objective, which restores the others.
        """
        head, tensors = extract(
            self.model, as_nodes(self.masks, kept), prompts.means, None, prompts.batch.tokens[:, 0].unique()
        )
        self.module = Candidates(head, {name: value.clone() for name, value in tensors.items()})

    def losses(self, prompts: Prompts, mask: Float[Tensor, "groups"]) -> dict[str, Tensor]:
        """Losses in nats with gradients to `mask`; pruned channels compete for AbsTopK slots here, as in the source.

        Without competition a dropped node would not know what it would be worth: its activation is zeroed before it is
        seen. Under faithful the worst restoration has its gradient in `self.worst.grad` after the backward pass.
        """
        if self.module is not None:
            return {"task": two_way_loss(self._narrowed(self.module, prompts, mask))}
        if self.config.objective == "paper":
            return {"task": two_way_loss(self._run(prompts, mask[None]))}
        self.worst = self.worst.detach().requires_grad_()
        share = torch.rand((), generator=self.generator)
        drawn = (torch.rand(len(mask), generator=self.generator) < share).to(mask)
        restored = torch.stack([mask, mask + (1 - mask) * drawn, mask + (1 - mask) * self.worst])
        # One run for the three: what a run costs beside its arithmetic is paid once.
        task, average, worst = self._run(prompts.repeated(3), restored).chunk(3)
        full = prompts.full.to(mask)
        apart = answer_kl(full, average).mean() / 2 + answer_kl(full, worst).mean() / 2
        return {"task": two_way_loss(task), "faithful": apart}

    def _run(self, prompts: Prompts, masks: Float[Tensor, "sets groups"]) -> Float[Tensor, "n"]:
        """Logit differences; the prompts are dealt in equal stretches to the sets of masks."""
        each = len(prompts) // len(masks)
        spread = {
            location: group[0] if len(masks) == 1 else group.repeat_interleave(each, 0)[:, None]
            for location, group in ((name, masks[:, index]) for name, index in self.masks.index.items())
        }
        return answer_difference(self.model, prompts.batch, prompts.tap(spread, competition=True))

    def _narrowed(self, module: Candidates, prompts: Prompts, mask: Float[Tensor, "groups"]) -> Float[Tensor, "n"]:
        channels = {location: module.channels(location) for location in self.masks.index}
        # Locations that reach no write have no channels in the module, and no gates.
        gates = {location: mask[self.masks.index[location][at]] for location, at in channels.items() if len(at)}
        return module.gated_difference(prompts.batch, Gates(nodes=gates), prompts.norms)

    @torch.no_grad()
    def ascend(self) -> None:
        """One step of the worst restoration, after a backward pass; nothing under paper."""
        if self.worst.grad is not None:
            self.worst = (self.worst + self.config.adversary_step * self.worst.grad.sign()).clamp(0, 1).detach()


@dataclass(frozen=True, kw_only=True)
class Restorations:
    """What is restored of what was pruned, fixed, to judge node sets by."""

    random: Bool[Tensor, "draws groups"]
    """Random ones, of shares spread evenly over [0, 1]; each pair of prompts gets one of them."""
    worst: Bool[Tensor, "groups"]
    """The worst that gradient ascent found."""


def restorations(worst: Float[Tensor, "groups"], *, draws: int, seed: int) -> Restorations:
    """`draws` random restorations, and the worst one with its entries rounded to 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    shares = (torch.arange(draws) + 0.5) / draws
    drawn = torch.rand(draws, len(worst), generator=generator) < shares[:, None]
    return Restorations(random=drawn.to(worst.device), worst=worst.detach() > 0.5)


@torch.no_grad()
def unfaithfulness(
    model: Runnable,
    masks: Estimator,
    prompts: Prompts,
    kept: Bool[Tensor, "groups"],
    restored: Restorations,
    *,
    removed: EdgeSet | None = None,
    rows: int = 256,
) -> float:
    """1/2 E_r KL(M || C_r) + 1/2 KL(M || C_worst) in nats, for the circuit of the groups `kept` without `removed`
    edges.

    Pair i gets random restoration i mod draws, so that one run of the prompts takes the average. `rows` prompts are run
    at once.
    """
    return float(apart(model, masks, prompts, kept[None] | dealt(prompts, restored), removed, rows))


def dealt(prompts: Prompts, restored: Restorations) -> Bool[Tensor, "two_n groups"]:
    """What is restored in each row where the prompts are run twice: a random draw, then the worst."""
    pairs = torch.arange(len(prompts) // 2).repeat(2) % len(restored.random)
    random = restored.random[pairs.to(restored.random.device)]
    return torch.cat([random, restored.worst.expand(len(prompts), -1)])


def apart(
    model: Runnable,
    masks: Estimator,
    prompts: Prompts,
    sets: Tensor,
    removed: EdgeSet | None,
    rows: int,
) -> Float[Tensor, ""]:
    """Mean KL(M || C) on prompts that are run twice over, with a node set (or gates) of its own for each row."""
    doubled = prompts.repeated(2)
    found = []
    for start in range(0, len(doubled), rows):
        part, chosen = doubled.rows(slice(start, start + rows)), sets[start : start + rows]
        spread = {location: chosen[:, index][:, None] for location, index in masks.index.items()}
        dropped = EdgeTap(model, removed, part.means) if removed else None
        difference = answer_difference(model, part.batch, part.tap(spread, competition=False, dropped=dropped))
        found.append(answer_kl(part.full.to(difference), difference))
    return torch.cat(found).mean()

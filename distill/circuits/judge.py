"""Scores of node sets on one fixed batch of held-out prompts.

Pruned channels do not compete for AbsTopK slots here, and the batch stays the same throughout: fresh batches at each
step would make a search accept by luck. Most sets that are judged are small, so they are run as a standalone module of
the nodes that are still in question (`narrow`), which costs a twentieth of the masked model.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from distill.circuits.answers import Calibration, answer_difference, calibrate, two_way_loss
from distill.circuits.edges import EdgeSet, EdgeTap, edge_difference, induced_edge_set
from distill.circuits.estimators import Estimator, as_groups, as_nodes
from distill.circuits.masks import Nodes
from distill.circuits.objectives import Prompts, Restorations, apart, dealt, unfaithfulness
from distill.circuits.settings import Goal, PruneConfig
from distill.circuits.standalone import Standalone, standalone
from distill.circuits.thinning import edge_importance, node_importance
from distill.model.anatomy import anatomy
from distill.model.run import Runnable

SHRUNK = 0.7
"""Share of its nodes below which a module is made anew."""
SMALL = 0.5
"""Largest share of a model's nodes that is run as a module of its own; above it little would be saved."""


def _among(some: Int[Tensor, "2 n"], edges: Int[Tensor, "2 m"]) -> Bool[Tensor, "n"]:
    """Which of some edges of a matrix are among others of it."""
    return torch.isin((some[0] << 32) | some[1], (edges[0] << 32) | edges[1])


class Judge:
    """Losses of node sets, given as groups of the masks, on one fixed batch.

    `restored` says what is restored of the pruned nodes under the faithful objective, on the first `few` pairs; None
    under paper. `runs` counts runs of the model or of a part of it.
    """

    def __init__(
        self,
        model: Runnable,
        masks: Estimator,
        prompts: Prompts,
        config: PruneConfig,
        restored: Restorations | None = None,
    ) -> None:
        self.model, self.masks, self.prompts, self.config, self.restored = model, masks, prompts, config, restored
        self.few = prompts.take(torch.arange(min(config.faithful_pairs, len(prompts) // 2)))
        self.runs = 0
        self.module: Standalone | None = None
        self.inside: Tensor | None = None
        self.last = math.inf
        """The task loss that was judged last."""
        # One value per prompt has no constant to fold in; an activation on the residual stream mixes what is left out.
        self.separable = config.ablation != "resample" and not anatomy(model).obstacles

    def narrow(self, kept: Bool[Tensor, "groups"]) -> None:
        """From here on node sets within `kept` are run as a module of these nodes, where that is cheaper."""
        self.inside = self.module = None
        total = int(self.masks.count.sum())
        if self.separable and int(self.masks.count[kept].sum()) <= SMALL * total:
            nodes = as_nodes(self.masks, kept)
            first = self.prompts.batch.tokens[:, 0].unique()
            self.module = standalone(self.model, nodes, self.prompts.means, first_tokens=first)
            self.inside = kept.clone()

    def shrink(self, kept: Bool[Tensor, "groups"]) -> None:
        """`narrow`, where the module at hand is much larger than `kept`."""
        if self.inside is not None and int(kept.sum()) < SHRUNK * int(self.inside.sum()):
            self.narrow(kept)

    def _module_of(self, kept: Tensor) -> Standalone | None:
        if self.inside is None or bool((kept & ~self.inside).any()):
            self.narrow(kept)
        return None if self.inside is None or bool((kept & ~self.inside).any()) else self.module

    @torch.no_grad()
    def difference(self, kept: Bool[Tensor, "groups"], edges: EdgeSet | None = None) -> Float[Tensor, "n"]:
        """Logit differences of the circuit of these groups, and of these edges only."""
        self.runs += 1
        module, nodes = self._module_of(kept), as_nodes(self.masks, kept)
        if module is not None:
            return self._by_module(module, nodes, edges).float().cpu()
        return self.masked(nodes, edges)

    def _by_module(self, module: Standalone, nodes: Nodes, edges: EdgeSet | None) -> Tensor:
        return module.difference(self.prompts.batch, nodes=nodes, edges=edges, norms=self.prompts.norms)

    @torch.no_grad()
    def masked(self, nodes: Nodes, edges: EdgeSet | None = None, *, competition: bool = False) -> Float[Tensor, "n"]:
        """The same by the masked model."""
        found = []
        removed = None if edges is None else edge_difference(induced_edge_set(self.model, nodes), edges)
        for part in self._parts():
            dropped = None if removed is None else EdgeTap(self.model, removed, part.means)
            tap = part.tap(nodes, competition=competition, dropped=dropped)
            found.append(answer_difference(self.model, part.batch, tap).float().cpu())
        return torch.cat(found)

    def _parts(self) -> list[Prompts]:
        starts = range(0, len(self.prompts), self.config.rows)
        return [self.prompts.rows(slice(start, start + self.config.rows)) for start in starts]

    def full(self) -> float:
        """Task loss of the full model."""
        return float(two_way_loss(self.prompts.full))

    def task_alone(self, kept: Bool[Tensor, "groups"], edges: EdgeSet | None = None) -> float:
        """Task loss as it is: not calibrated, without a margin."""
        return float(two_way_loss(self.difference(kept, edges)))

    def calibration(self, difference: Float[Tensor, "n"]) -> Calibration:
        """Scale and shift fitted on these prompts."""
        return calibrate(difference, self.prompts.batch.orientation)

    def task(self, kept: Bool[Tensor, "groups"], edges: EdgeSet | None = None) -> float:
        """What is held against the goal: task loss, calibrated if asked for, plus the margin."""
        difference = self.difference(kept, edges)
        if self.config.calibrated:
            difference = self.calibration(difference)(difference, self.prompts.batch.orientation)
        each = softplus(-difference)
        self.last = float(each.mean()) + self.config.margin * float(each.std(correction=0)) / math.sqrt(len(each))
        return self.last

    @torch.no_grad()
    def faithful(self, kept: Bool[Tensor, "groups"], edges: EdgeSet | None = None) -> float:
        """Mean of the average and the worst KL from the model's answers under the restorations, in nats."""
        assert self.restored is not None
        self.runs += 1
        removed = None
        if edges is not None:
            removed = edge_difference(induced_edge_set(self.model, as_nodes(self.masks, kept)), edges)
        return unfaithfulness(
            self.model, self.masks, self.few, kept, self.restored, removed=removed, rows=self.config.rows
        )

    def meets(self, kept: Bool[Tensor, "groups"], goal: Goal, edges: EdgeSet | None = None) -> bool:
        """Whether the circuit meets all that the goal asks."""
        if self.task(kept, edges) > goal.task:
            return False
        return goal.faithful is None or self.faithful(kept, edges) <= goal.faithful

    def importance(self, kept: Bool[Tensor, "groups"], goal: Goal) -> Float[Tensor, "groups"]:
        """First-order change on removing each group: of the task loss, and under faithful of both, over their
        limits."""
        self.runs += 1
        nodes, module = as_nodes(self.masks, kept), self._module_of(kept)
        if module is not None:
            found = node_importance(module, self.prompts.batch, nodes, norms=self.prompts.norms)
            total = as_groups(self.masks, found)
        else:
            total = torch.zeros(len(kept))
            for part in self._parts():
                gate = kept.float().requires_grad_()
                tap = part.tap(self.masks.spread(gate), competition=False)
                loss = two_way_loss(answer_difference(self.model, part.batch, tap)) * len(part) / len(self.prompts)
                total -= torch.autograd.grad(loss, gate)[0].cpu()
        if goal.faithful is None:
            return total
        assert self.restored is not None
        gate = kept.float().requires_grad_()
        sets = gate + (1 - gate) * dealt(self.few, self.restored).to(gate)
        change = torch.autograd.grad(apart(self.model, self.masks, self.few, sets, None, self.config.rows), gate)[0]
        return total / goal.task - change.cpu() / goal.faithful

    def edge_importance(self, kept: Bool[Tensor, "groups"], edges: EdgeSet) -> Float[Tensor, "n"]:
        """First-order change of the task loss on removing each edge, in the order of the set."""
        self.runs += 1
        nodes, module = as_nodes(self.masks, kept), self._module_of(kept)
        if module is not None:
            return edge_importance(module, self.prompts.batch, edges, nodes, norms=self.prompts.norms)
        induced = induced_edge_set(self.model, nodes)
        there = {matrix: _among(index, edges[matrix]) for matrix, index in induced.items()}
        total = {matrix: torch.zeros(index.shape[1]) for matrix, index in induced.items()}
        for part in self._parts():
            gates = {matrix: gate.float().requires_grad_() for matrix, gate in there.items() if len(gate)}
            tap = part.tap(nodes, competition=False, dropped=EdgeTap(self.model, induced, part.means, gates))
            loss = two_way_loss(answer_difference(self.model, part.batch, tap)) * len(part) / len(self.prompts)
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            for matrix, gradient in zip(gates, found, strict=True):
                total[matrix] -= 0 if gradient is None else gradient.cpu()
        return torch.cat([total[matrix][there[matrix]] for matrix in edges])

    def report(self, kept: Bool[Tensor, "groups"], edges: EdgeSet | None) -> dict[str, float]:
        """Losses of a circuit: as it is, calibrated, with pruned channels competing, and how far it is from the
        model."""
        difference = self.difference(kept, edges)
        calibrated = self.calibration(difference)(difference, self.prompts.batch.orientation)
        competing = self.masked(as_nodes(self.masks, kept), edges, competition=True)
        losses = {"circuit": difference, "calibrated": calibrated, "competition": competing}
        found = {name: float(two_way_loss(value)) for name, value in losses.items()}
        return found if self.restored is None else {**found, "faithful": self.faithful(kept, edges)}

"""Runs of a model and of a circuit in it that the checks share, so that none is made twice."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.ablation import FreezeNorms, Means, Resampled
from distill.circuits.answers import answer_logits
from distill.circuits.circuit import Circuit
from distill.circuits.edges import (
    EdgeSet,
    EdgeTap,
    chosen_edges,
    edge_difference,
    edge_total,
    edge_union,
    edges_between,
    induced_edge_set,
)
from distill.circuits.masks import MaskTap, Nodes, all_nodes
from distill.circuits.standalone import Standalone, standalone
from distill.circuits.tasks import TaskBatch, logit_difference
from distill.model.anatomy import anatomy
from distill.model.run import Runnable
from distill.model.sites import EXTRAS, Tap, chain

AT_ONCE = 2048
"""Tokens of one run of several node sets. Most of what a small run costs is not arithmetic, and is paid once."""


class Runs:
    """A model with one of its circuits; what was run once is kept.

    CircuitMismatchError for a circuit of another model.
    """

    def __init__(self, model: Runnable, circuit: Circuit) -> None:
        circuit.check(model)
        self.model, self.circuit = model, circuit
        self.device = next(model.parameters()).device
        self.means = circuit.means.to(self.device)
        induced = induced_edge_set(model, circuit.nodes)
        self.edges: EdgeSet = induced if circuit.kept_edges is None else circuit.kept_edges
        """Edges of the circuit."""
        self.dropped = edge_difference(induced, self.edges)
        """Edges that were pruned between nodes of the circuit."""
        self._kept: dict[tuple[str, int, int], tuple[TaskBatch, Tensor]] = {}
        # One value per prompt has no constant to fold in; an activation on the residual stream mixes what is left out.
        self._separable = not isinstance(self.means, Resampled) and not anatomy(model).obstacles
        self._modules: dict[int, tuple[TaskBatch, Standalone]] = {}
        self._parts: dict[tuple[int, int], tuple[TaskBatch, TaskBatch]] = {}

    def first(self, batch: TaskBatch, pairs: int) -> TaskBatch:
        """The first `pairs` pairs of a batch: the same object whenever the same are asked for."""
        if 2 * pairs >= len(batch):
            return batch
        key = (id(batch), pairs)
        if key not in self._parts:
            # The batch is kept beside its part, so that its id stays taken.
            self._parts[key] = (batch, batch.take(torch.arange(pairs)))
        return self._parts[key][1]

    def tap(self, nodes: Nodes | None = None, means: Means | None = None, *, edges: EdgeSet | None = None) -> Tap:
        """A tap that runs only these nodes (by default the circuit's), the others at these ablation values.

        `edges` are those of the circuit that stay (by default all of them). Nodes of the circuit alone have no other
        edges than the circuit; a set with any other node has all the edges between its nodes.
        """
        means = self.means if means is None else means
        if nodes is None and edges is None:
            return self._tap(self.circuit.nodes, self.dropped, means)
        nodes = self.circuit.nodes if nodes is None else nodes
        if not self.holds(nodes):
            return self._tap(nodes, {}, means)
        induced = edges_between(edge_union(self.edges, self.dropped), nodes)
        return self._tap(nodes, edge_difference(induced, self.edges if edges is None else edges), means)

    def holds(self, nodes: Nodes) -> bool:
        """Whether all of these nodes are the circuit's."""
        return not any(bool((mask & ~self.circuit.nodes[location]).any()) for location, mask in nodes.items())

    def parted(self, masks: Mapping[str, Tensor], *, pruned: bool, competition: bool = False) -> Tap:
        """A tap that restores nodes in part, x = a + m (x - a) for masks m in [0, 1], with gradients to the masks.

        `pruned` leaves the edges out that the circuit does. `competition` lets nodes compete for AbsTopK slots that are
        off: else one that is off does not know what it is worth, and gets no true gradient.
        """
        part = (MaskTap if competition else PartTap)(masks, self.means, competition=competition)
        if not pruned or not edge_total(self.dropped):
            return part
        return _PartWithoutEdges(part, EdgeTap(self.model, self.dropped, self.means))

    def _tap(self, nodes: Nodes, dropped: EdgeSet, means: Means) -> Tap:
        mask = MaskTap(nodes, means)
        return chain(mask, EdgeTap(self.model, dropped, means)) if edge_total(dropped) else mask

    def restored(self, draw: Callable[[int], Bool[Tensor, "size"]], groups: Int[Tensor, "rows"] | None = None) -> Tap:
        """The circuit with some of what was pruned back in place: `draw(size)` says which out of `size` things.

        With `groups` the nodes are drawn anew for each group of rows, numbered from 0; edges are the same for all.
        """

        def back(mask: Tensor) -> Tensor:
            if groups is None:
                return mask | draw(len(mask))
            return torch.stack([mask | draw(len(mask)) for _ in range(int(groups.max()) + 1)])[groups][:, None]

        nodes = {location: back(mask) for location, mask in self.circuit.nodes.items()}
        return self._tap(nodes, chosen_edges(self.dropped, ~draw(edge_total(self.dropped))), self.means)

    @torch.no_grad()
    def logits(self, batch: TaskBatch, tap: Tap | None) -> Float[Tensor, "n V"]:
        """Logits over the vocabulary at the last token of each prompt."""
        return answer_logits(self.model, batch, tap).float()

    def full(self, batch: TaskBatch) -> Float[Tensor, "n V"]:
        """Logits of the full model; kept."""
        return self._once("full", batch, lambda: self.logits(batch, None))

    def ours(self, batch: TaskBatch) -> Float[Tensor, "n V"]:
        """Logits of the circuit; kept."""
        return self._once("circuit", batch, lambda: self.logits(batch, self.tap()))

    def empty(self, batch: TaskBatch) -> Float[Tensor, "n V"]:
        """Logits with every node ablated; kept."""
        none = all_nodes(self.model.widths, keep=False)
        return self._once("empty", batch, lambda: self.logits(batch, self.tap(none)))

    def difference(self, batch: TaskBatch, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
        """Logit of the right minus that of the wrong answer, in float64 on the CPU."""
        return logit_difference(logits, batch.to(logits.device)).double().cpu()

    def of(
        self,
        batch: TaskBatch,
        nodes: Nodes | None = None,
        *,
        edges: EdgeSet | None = None,
        means: Means | None = None,
    ) -> Float[Tensor, "n"]:
        """Logit differences of the circuit that consists of these nodes and edges, as `tap` has them.

        A part of the circuit runs as a module of its own where that can be, which costs a fifth of the masked model.
        """
        if means is None and self._separable and (nodes is None or self.holds(nodes)):
            module = self._module(batch)
            with torch.no_grad():
                return module.difference(batch, nodes=nodes, edges=edges).double().cpu()
        return self.difference(batch, self.logits(batch, self.tap(nodes, means, edges=edges)))

    @torch.no_grad()
    def each(
        self, batch: TaskBatch, sets: Sequence[Nodes], *, means: Means | None = None, norms: FreezeNorms | None = None
    ) -> Float[Tensor, "sets n"]:
        """Logit differences of the model with only these nodes, for each of several sets, pruned edges and all.

        `means` are ablation values in place of the circuit's, `norms` hold every norm's scale. Several sets share a
        run, each with its own copy of the prompts.
        """
        means = self.means if means is None else means
        size, found = max(1, AT_ONCE // batch.tokens.numel()), []
        for start in range(0, len(sets), size):
            part = sets[start : start + size]
            rows = torch.arange(len(batch)).repeat(len(part))
            masks = {
                location: torch.stack([nodes[location] for nodes in part]).repeat_interleave(len(batch), 0)[:, None]
                for location in self.circuit.nodes
            }
            mask, copies = MaskTap(masks, means.rows(rows.to(self.device))), batch.select(rows)
            tap = mask if norms is None else chain(mask, norms.rows(rows.to(self.device)))
            found.append(self.difference(copies, self.logits(copies, tap)).view(len(part), -1))
        return torch.cat(found)

    def _module(self, batch: TaskBatch) -> Standalone:
        if id(batch) not in self._modules:
            circuit, first = self.circuit, batch.tokens[:, 0].unique()
            module = standalone(self.model, circuit.nodes, self.means, circuit.kept_edges, first_tokens=first)
            self._modules[id(batch)] = (batch, module)
        return self._modules[id(batch)][1]

    def _once(self, what: str, batch: TaskBatch, run: Callable[[], Tensor]) -> Tensor:
        key = (what, id(batch), len(batch))
        if key not in self._kept:
            self._kept[key] = (batch, run())
        return self._kept[key][1]


class PartTap(MaskTap):
    """A tap that restores nodes in part: x = a + m (x - a) for masks m in [0, 1].

    A node competes for AbsTopK slots as soon as its mask is above 0. For masks of 0 and 1 this is `MaskTap`, which for
    others would scale a node twice.
    """

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        location = site.removesuffix(".pre")
        if location == site or location not in self.masks:
            return super().__call__(site, x)
        return self._protect(x * (self.masks[location] > 0).to(x), x)


class _PartWithoutEdges:
    """Partial masks and dropped edges. A node is masked after it has lost its edges, and loses its own to others as it
    then is; behind a mask, as `EdgeTap` stands otherwise, what a node has lost would not be scaled by the mask."""

    def __init__(self, part: MaskTap, edges: EdgeTap) -> None:
        self.part, self.edges = part, edges
        self.wants = part.wants | edges.wants

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.part.masks:
            # Where there is no AbsTopK nothing has been dropped so far; elsewhere this does nothing.
            x = self.edges(f"{site}.pre", x)
        extra = site.rpartition(".")[2]
        if extra not in EXTRAS or extra in self.part.wants:
            x = self.part(site, x)
        return self.edges(site, x)

"""Thinning out: leaving out nodes and edges of a circuit as long as it still does what it should.

In the order of the code: what each node or edge matters, from one run of the circuit on its own; the loop that removes
anything in growing batches; the same for edges; and what is left hanging afterwards, and whether it can go.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.circuits.ablation import FreezeNorms
from distill.circuits.answers import two_way_loss
from distill.circuits.edges import EdgeSet, chosen_edges, edge_total, edges_between
from distill.circuits.masks import Nodes
from distill.circuits.standalone import Gates, Standalone
from distill.circuits.tasks import TaskBatch
from distill.model.anatomy import anatomy
from distill.model.run import Runnable
from distill.model.sites import kind_of, layer_of


def node_importance(
    module: Standalone,
    batch: TaskBatch,
    nodes: Mapping[str, Bool[Tensor, "width"]],
    edges: EdgeSet | None = None,
    *,
    loss: Callable[[Tensor], Tensor] = two_way_loss,
    norms: FreezeNorms | None = None,
) -> dict[str, Float[Tensor, "width"]]:
    """First-order change of the loss on removing each node: -dJ/dm = -gradient x (activation - mean); 0 at others.

    `loss` is a function of the logit differences, (rows,).
    """
    gates = module.gates(nodes, edges)
    wanted = {location: gate.requires_grad_() for location, gate in gates.nodes.items()}
    found = _gradients(module, batch, gates, list(wanted.values()), loss, norms)
    scores = {location: torch.zeros(len(mask)) for location, mask in nodes.items()}
    for location, gradient in zip(wanted, found, strict=True):
        channels = module.channels(location).cpu()
        scores[location][channels] = torch.where(nodes[location].cpu()[channels], -gradient.float().cpu(), 0.0)
    return scores


def edge_importance(
    module: Standalone,
    batch: TaskBatch,
    edges: EdgeSet,
    nodes: Mapping[str, Bool[Tensor, "width"]] | None = None,
    *,
    loss: Callable[[Tensor], Tensor] = two_way_loss,
    norms: FreezeNorms | None = None,
) -> Float[Tensor, "n"]:
    """First-order change of the loss on removing each edge, in the order of the set, one matrix after the other.

    -dJ/de_ji = -dJ/dz_j W_ji (x_i - a_i), for all edges from one run. `loss` is a function of the logit differences.
    """
    gates = module.gates(nodes, edges)
    blocks = {target: gate.requires_grad_() for target, gate in gates.edges.items()}
    found = dict(zip(blocks, _gradients(module, batch, gates, list(blocks.values()), loss, norms), strict=True))
    scores = []
    for (source, target), index in edges.items():
        if target not in found:
            scores.append(torch.zeros(index.shape[1]))
            continue
        rows, columns = (module.channels(location).cpu() for location in (target, source))
        place = torch.searchsorted(rows, index[0].contiguous()), torch.searchsorted(columns, index[1].contiguous())
        scores.append(-found[target].float().cpu()[place])
    return torch.cat(scores)


def _gradients(
    module: Standalone,
    batch: TaskBatch,
    gates: Gates,
    wanted: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    norms: FreezeNorms | None,
) -> list[Tensor]:
    if not wanted:
        return []
    value = loss(module.gated_difference(batch, gates, norms))
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return [
        torch.zeros_like(gate) if gradient is None else gradient for gate, gradient in zip(wanted, found, strict=True)
    ]


def thin_out(
    kept: Bool[Tensor, "n"],
    score: Callable[[Bool[Tensor, "n"]], Float[Tensor, "n"]],
    meets: Callable[[Bool[Tensor, "n"]], bool],
    *,
    runs: int,
    spent: Callable[[], float] = lambda: 0.0,
) -> Bool[Tensor, "n"]:
    """Removes entries while what is left meets a goal.

    Entries are tried in batches, lowest score first; scores are taken anew after each removal. A batch, a quarter of
    all at first, doubles after a success and halves after a failure, and an entry that fails alone stays for good. Ends
    when every entry left has failed alone, after `runs` calls of `score` and `meets` together, or when `spent`
    reaches 1. What comes back meets the goal, or is `kept` itself.

    Args:
        kept: what to start from; it is taken to meet the goal.
        score: first-order change of the loss on removing each entry of a set; entries outside it are not looked at.
        meets: whether a set meets the goal.
        runs: most calls.
        spent: share of the time there is that has passed.
    """
    kept = kept.clone()
    needed = torch.zeros_like(kept)
    size = max(1, int(kept.sum()) // 4)
    ranked = torch.empty(0, dtype=torch.long)
    while runs > 0 and spent() < 1 and bool((kept & ~needed).any()):
        if not len(ranked):
            runs -= 1
            free = (kept & ~needed).nonzero()[:, 0]
            ranked = free[torch.argsort(score(kept)[free], stable=True)]
            continue
        trial = kept.clone()
        trial[ranked[:size]] = False
        runs -= 1
        if meets(trial):
            kept, ranked = trial, ranked[:0]
            size *= 2
        elif min(size, len(ranked)) == 1:
            needed[ranked[0]] = True
            ranked = ranked[1:]
        else:
            size = max(1, min(size, len(ranked)) // 2)
    return kept


def clean_up_edges(
    edges: EdgeSet,
    score: Callable[[EdgeSet], Float[Tensor, "n"]],
    meets: Callable[[EdgeSet], bool],
    *,
    runs: int,
    spent: Callable[[], float] = lambda: 0.0,
) -> EdgeSet:
    """Removes edges while the circuit meets a goal; see `thin_out`.

    Args:
        edges: the edges to start from.
        score: first-order change of the loss on removing each edge of a set, in its order, one matrix after the other;
            see `edge_importance`.
        meets: whether the circuit with these edges meets the goal.
        runs: most calls of the two.
        spent: share of the time there is that has passed.
    """
    total = edge_total(edges)

    def scores(kept: Tensor) -> Tensor:
        # Of every edge that was there at the start, in that order.
        found = torch.zeros(total)
        found[kept] = score(chosen_edges(edges, kept)).float().cpu()
        return found

    kept = thin_out(
        torch.ones(total, dtype=torch.bool),
        scores,
        lambda trial: meets(chosen_edges(edges, trial)),
        runs=runs,
        spent=spent,
    )
    return chosen_edges(edges, kept)


def drop_dangling(model: Runnable, nodes: Mapping[str, Bool[Tensor, "width"]], edges: EdgeSet) -> tuple[Nodes, EdgeSet]:
    """The nodes that lie on a path of kept edges from the embedding to the logits, and the edges between these.

    What starts a path: a read `act_in.c` whose channel the embedding, the positions, or a kept write before it has
    something in. What goes on: a query, key, value, neuron or write with an edge from a node on the way. What ends one:
    a write `resid_delta.c` whose channel the unembedding, or a kept read after it, looks at. A query or key counts as
    used where a kept value of its head does; a query may lack its key, and the other way round, as the other's ablation
    value stands in for it.

    Leaving these nodes out changes numbers, so the outcome has to be judged anew, as `trim_dangling` does: they may
    have taken slots of AbsTopK; a node without a source left is a constant that need not be its mean, which some
    circuits live on; and beside an attention sink queries and keys decide how much of the *means* of dropped values is
    written, a path that no edge shows.
    """
    nodes = {location: mask.cpu().clone() for location, mask in nodes.items()}
    while True:
        before = {location: mask.clone() for location, mask in nodes.items()}
        edges = edges_between(edges, nodes)
        fed, used = _fed(model, nodes, edges), _used(model, nodes, edges)
        nodes = {location: mask & fed[location] & used[location] for location, mask in nodes.items()}
        if all(torch.equal(mask, before[location]) for location, mask in nodes.items()):
            return nodes, edges


def trim_dangling(
    model: Runnable,
    nodes: Mapping[str, Bool[Tensor, "width"]],
    edges: EdgeSet,
    meets: Callable[[Nodes, EdgeSet], bool],
    *,
    runs: int,
    spent: Callable[[], float] = lambda: 0.0,
) -> tuple[Nodes, EdgeSet]:
    """Drops what `drop_dangling` would, as far as the circuit still meets a goal: at once, or else bit by bit.

    What stays although nothing reaches it is a constant that the circuit needs. `meets` says whether nodes and edges
    meet the goal, `runs` and `spent` are those of `thin_out`; the circuit given is taken to meet it.
    """
    nodes = {location: mask.cpu() for location, mask in nodes.items()}
    clean, joined = drop_dangling(model, nodes, edges)
    hanging = torch.cat([nodes[location] & ~clean[location] for location in nodes])
    if runs < 1 or not bool(hanging.any()):
        return nodes, edges
    if meets(clean, joined):
        return clean, joined

    def leaving(kept: Tensor) -> tuple[Nodes, EdgeSet]:
        parts = kept.split([len(mask) for mask in nodes.values()])
        fewer = {location: clean[location] | part for location, part in zip(nodes, parts, strict=True)}
        return fewer, edges_between(edges, fewer)

    kept = thin_out(
        hanging,
        lambda kept: torch.zeros(len(kept)),
        lambda kept: meets(*leaving(kept)),
        runs=runs - 1,
        spent=spent,
    )
    return leaving(kept)


def _ends(edges: EdgeSet, nodes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which nodes have an edge into them, and which have one out of them."""
    into = {location: torch.zeros_like(mask) for location, mask in nodes.items()}
    out = {location: torch.zeros_like(mask) for location, mask in nodes.items()}
    for (source, target), index in edges.items():
        into[target][index[0]] = True
        out[source][index[1]] = True
    return into, out


def _fed(model: Runnable, nodes: Mapping[str, Tensor], edges: EdgeSet) -> dict[str, Tensor]:
    """Nodes that something reaches. Taken with `_used` again and again, one step along the edges is enough."""
    width = model.d_model
    written = model.embedding().ne(0).any(0).cpu()
    positions = anatomy(model).embed_positions
    if positions is not None:
        written = written | positions.ne(0).any(0).cpu()
    into, _ = _ends(edges, nodes)
    fed: dict[str, Tensor] = {}
    for location, mask in nodes.items():
        if not location.endswith("act_in"):
            fed[location] = into[location]
            continue
        fed[location] = torch.ones_like(mask)  # read-only position channels stand behind the residual ones
        fed[location][:width] = written
        write = location.removesuffix("act_in") + "resid_delta"
        written = written | nodes[write]
    return fed


def _used(model: Runnable, nodes: Mapping[str, Tensor], edges: EdgeSet) -> dict[str, Tensor]:
    """Nodes that something takes up."""
    looked_at = model.unembedding().ne(0).any(0).cpu()
    _, out = _ends(edges, nodes)
    used: dict[str, Tensor] = {}
    for location in reversed(list(nodes)):
        kind = kind_of(location)
        if kind.endswith("resid_delta"):
            used[location] = looked_at.clone()
        elif kind in ("attn.q", "attn.k"):
            heads = (nodes[f"{layer_of(location)}.attn.v"] & used[f"{layer_of(location)}.attn.v"]).view(
                model.n_head, -1
            )
            used[location] = heads.any(1).repeat_interleave(len(nodes[location]) // model.n_head)
        else:
            used[location] = out[location]
        if kind.endswith("act_in"):
            looked_at = looked_at | nodes[location][: model.d_model]
    return used

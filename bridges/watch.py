"""Watching a dense model by its student's circuit: the encoder rows that the circuit needs, and nothing else.

A read of the student is channel c of its stream at a site, a write channel c at the site behind it; the bridge tells
that channel from the dense stream there by one row of its encoder. So the student does not run beside the dense model:
a few dot products per token are all it takes. Effects are the student's own; mean, spread and threshold are measured
on the dense model. Nodes inside the student's sublayers (q, k, v, neurons) are in no stream and are left out.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bridges.maps import Bridges, check_bridges
from distill.circuits.circuit import Circuit
from distill.circuits.editing import constants
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, encode
from distill.circuits.watch import Effects, Watch, node_effects, watch_nodes
from distill.model.anatomy import anatomy
from distill.model.sites import kind_of, layer_of, residual_sites, split_node


def stream_site(node: str, n_layer: int) -> str | None:
    """The residual site at which a node is a channel of the stream; None for a node inside a sublayer."""
    location, _ = split_node(node)
    kind, sites = kind_of(location), residual_sites(n_layer)
    place = sites.index(f"{layer_of(location)}.resid_{'in' if kind.startswith('attn') else 'mid'}")
    if kind.endswith("act_in"):
        return sites[place]
    return sites[place + 1] if kind.endswith("resid_delta") else None


def shadow_watch(
    dense: Subject,
    student: Subject,
    bridges: Bridges,
    circuit: Circuit,
    task: Task,
    *,
    fpr: float = 0.05,
    signal: str = "strength",
    pairs: int = 48,
    windows: int = 128,
    seed: int = 0,
) -> Watch:
    """A watch over a dense model by the circuit of its student, calibrated on the dense model's held-out sample.

    Channels that several nodes stand for are read once, by the effect of the strongest of them. CircuitMismatchError
    unless the circuit is the student's; ValueError where no node is in the stream, and as `Watch.calibrated`.
    """
    circuit.check(student.model)
    model = dense.model
    check_bridges(bridges, n_layer=model.n_layer, d_dense=model.d_model, d_sparse=student.model.d_model)
    batch = encode(task, student.tokenizer, "train", pairs, seed, context=student.model.context)
    windows = max(1, min(windows, len(dense.sample) // 2, len(student.sample)))
    effects = _in_spreads(student, node_effects(student.model, batch, constants(student.means)), windows)
    inner = watch_nodes(student, circuit.nodes, effects, circuit.task)
    chosen: dict[tuple[str, int], int] = {}
    for index in inner.effect.argsort(stable=True).tolist():
        site = stream_site(inner.names[index], model.n_layer)
        channel = split_node(inner.names[index])[1]
        if site is not None and channel < student.model.d_model:
            chosen[site, channel] = index  # the strongest comes last
    if not chosen:
        raise ValueError(
            "circuit: none of its nodes is a channel of the stream; allowed are circuits with reads or writes"
        )
    order = sorted(chosen.values())
    where = {index: key for key, index in chosen.items()}
    rows: dict[str, list[Tensor]] = {}
    places: dict[str, list[int]] = {}
    offset = torch.zeros(len(order))
    for place, index in enumerate(order):
        site, channel = where[index]
        encoder = bridges.encoder(site)
        rows.setdefault(site, []).append(encoder.weight[channel].detach().cpu())
        places.setdefault(site, []).append(place)
        offset[place] = float(encoder.bias[channel].detach())
    watch = Watch(
        model=model.fingerprint(),
        model_name=dense.name,
        task=circuit.task,
        names=tuple(inner.names[index] for index in order),
        mean=torch.zeros(len(order)),
        spread=torch.ones(len(order)),
        effect=inner.effect[order],
        slope=inner.slope[order],
        rows={site: torch.stack(found) for site, found in rows.items()},
        places={site: torch.tensor(found) for site, found in places.items()},
        offset=offset,
        provenance={"pairs": pairs, "windows": windows, "seed": seed, "student": student.model.fingerprint()},
    )
    return watch.calibrated(model, dense.sample[:windows, :-1], fpr=fpr, signal=signal)


def _in_spreads(student: Subject, effects: Effects, windows: int) -> Effects:
    """The gradients per spread of each node over the corpus, as the stream of another model has other units.

    A read stands for its channel of the stream, so a negative gain of the norm in between turns its sign.
    """
    model, sums, squares, count = student.model, {}, {}, 0

    def add(site: str, x: Tensor, /) -> Tensor:
        if site in effects.gradient:
            rows = x.detach().double()
            sums[site] = sums.get(site, 0) + rows.sum((0, 1)).cpu()
            squares[site] = squares.get(site, 0) + rows.square().sum((0, 1)).cpu()
        return x

    device = next(model.parameters()).device
    with torch.no_grad():
        for part in student.sample[:windows, :-1].split(16):
            model.run(part.to(device), tap=add, stop="final_resid")
            count += part.numel()
    parts = anatomy(model).layers
    found = {}
    for location, gradient in effects.gradient.items():
        spread = (squares[location] / count - (sums[location] / count).square()).clamp_min(0).sqrt().float()
        if location.endswith("act_in"):
            gain = parts[layer_of(location)].norms[kind_of(location).split(".")[0]].gain.cpu()
            spread[: len(gain)] *= gain.sign()
        found[location] = gradient * spread
    return replace(effects, gradient=found)

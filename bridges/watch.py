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
from distill.circuits.detection import weighted
from distill.circuits.editing import constants
from distill.circuits.faithfulness.matched import random_sets
from distill.circuits.masks import Nodes
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, encode
from distill.circuits.watch import Effects, Watch, calibration_rows, node_effects, watch_nodes
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
    """A watch over a dense model by the circuit of its student, calibrated on windows of the dense model's held-out
    sample, spread over it (`calibration_rows`).

    Channels that several nodes stand for are read once, by the effect of the strongest of them. CircuitMismatchError
    unless the circuit is the student's; ValueError where no node is in the stream, and as `Watch.calibrated`.
    """
    circuit.check(student.model)
    model = dense.model
    check_bridges(bridges, n_layer=model.n_layer, d_dense=model.d_model, d_sparse=student.model.d_model)
    rows, _ = calibration_rows(len(dense.sample), windows)
    made = {"pairs": pairs, "windows": len(rows), "seed": seed, "student": student.model.fingerprint()}
    effects = _student_effects(student, task, pairs=pairs, windows=len(rows), seed=seed)
    watch = replace(_shadow(dense, student, bridges, circuit.nodes, circuit.task, effects), provenance=made)
    return watch.calibrated(model, dense.sample[rows, :-1], fpr=fpr, signal=signal)


def random_shadows(
    dense: Subject,
    student: Subject,
    bridges: Bridges,
    circuit: Circuit,
    task: Task,
    like: Watch,
    *,
    count: int,
    seed: int = 0,
) -> list[Watch]:
    """Watches over the dense model by random nodes of the student, as many and as active (in the student) at every
    location as the circuit's, calibrated as `like` on the same windows."""
    rows, _ = calibration_rows(len(dense.sample), int(like.provenance["windows"]))
    effects = _student_effects(student, task, pairs=int(like.provenance["pairs"]), windows=len(rows), seed=seed)
    found = []
    for nodes in random_sets(circuit.nodes, student.means, count, torch.Generator().manual_seed(seed)):
        watch = weighted(_shadow(dense, student, bridges, nodes, circuit.task, effects))
        found.append(watch.calibrated(dense.model, dense.sample[rows, :-1], fpr=like.fpr, signal=like.signal))
    return found


def _student_effects(student: Subject, task: Task, *, pairs: int, windows: int, seed: int) -> Effects:
    batch = encode(task, student.tokenizer, "train", pairs, seed, context=student.model.context)
    return _in_spreads(student, node_effects(student.model, batch, constants(student.means)), windows)


def _shadow(dense: Subject, student: Subject, bridges: Bridges, nodes: Nodes, task: str, effects: Effects) -> Watch:
    """The watch over the dense model that some nodes of the student stand for, not yet calibrated."""
    model, inner = dense.model, watch_nodes(student, nodes, effects, task)
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
    return Watch(
        model=model.fingerprint(),
        model_name=dense.name,
        task=task,
        names=tuple(inner.names[index] for index in order),
        mean=torch.zeros(len(order)),
        spread=torch.ones(len(order)),
        effect=inner.effect[order],
        slope=inner.slope[order],
        rows={site: torch.stack(found) for site, found in rows.items()},
        places={site: torch.tensor(found) for site, found in places.items()},
        offset=offset,
    )


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
    rows = torch.linspace(0, len(student.sample) - 1, min(windows, len(student.sample))).round().long()
    with torch.no_grad():
        for part in student.sample[rows, :-1].split(16):
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

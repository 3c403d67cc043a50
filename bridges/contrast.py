"""Editing a dense model along one direction per write: what a student's circuit says of the two classes there.

At a residual site i the circuit's live channels (`bridges.subspace.live_channels`) hold, in the student, something
that differs between prompts of the first and of the second class. Their mean difference over training prompts, carried
over by the decoder, is one direction of the dense stream,

    g = G_i[:, Live] mean of s (h_s - mean h_s)_Live,      s = 1 where the first class is right, else -1

and that direction is taken out of the dense write in front of the site, turned round (`scale` with a factor below 0),
or held (`clamp`, `add`: `value` times g). It costs the model less than all of the channels' own directions, most of
what these hold being other things. A direction is named by its write and the token at which the difference is taken:
`2.mlp.resid_delta@answer` (the last of the prompt) or `0.mlp.resid_delta@difference` (the first at which a prompt and
its counterfactual differ).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.editing import POOL, DirectionEdit, check_config, directed, moving_alike, node_place, write_moments
from bridges.maps import Bridges, check_bridges
from bridges.subspace import live_channels
from distill.circuits.circuit import Circuit
from distill.circuits.edit_account import AnyEdit
from distill.circuits.edit_run import EditConfig, Maker
from distill.circuits.editing import constants
from distill.circuits.faithfulness.matched import random_sets
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.model.run import Runnable
from distill.model.sites import Record

TOKENS = ("answer", "difference")
"""Where the difference of the classes is taken."""


@torch.no_grad()
def contrasts(student: Runnable, batch: TaskBatch) -> dict[str, Float[Tensor, " S"]]:
    """Half the difference of the student's stream between prompts of the two classes, behind every write, by name.

    Means are over prompts, both members of each pair, so that all but the class cancels.
    """
    device = next(student.parameters()).device
    sites = {f"{i}.{part}.resid_delta": node_place(f"{i}.{part}.resid_delta.0", student.n_layer)[0]
             for i in range(student.n_layer) for part in ("attn", "mlp")}  # fmt: skip
    record = Record(set(sites.values()))
    student.run(batch.tokens.to(device), tap=record)
    clean, corrupt = batch.tokens.cpu().chunk(2)
    places = {"answer": batch.last.cpu(), "difference": (clean != corrupt).int().argmax(1).repeat(2)}
    sign, rows = (1.0 - 2.0 * batch.labels.cpu())[:, None], torch.arange(len(batch))
    return {
        f"{write}@{token}": (record.values[site].float().cpu()[rows, places[token]] * sign).mean(0)
        for write, site in sites.items()
        for token in TOKENS
    }


def carry_contrast(
    op: str,
    names: Sequence[str],
    bridges: Bridges,
    means: Mapping[str, Float[Tensor, "D"]],
    found: Mapping[str, Float[Tensor, " S"]],
    live: Mapping[str, Bool[Tensor, " S"]],
    *,
    factor: float | None = None,
    value: float | None = None,
) -> DirectionEdit:
    """The edit of a dense model along the directions of these names; arguments otherwise as `bridges.editing.carry`.

    `found` are `contrasts`, `live` the circuit's live channels by site. ValueError for a name that is none of them.
    """
    columns: dict[str, list[Tensor]] = {}
    for name in names:
        if name not in found:
            raise ValueError(f"nodes: {name!r} is no direction of a contrast; allowed are {', '.join(found)}")
        write = name.partition("@")[0]
        site = node_place(f"{write}.0", bridges.shape.n_layer)[0]
        held = (found[name] * live[site].cpu()).double()
        columns.setdefault(write, []).append(bridges.decoder_matrix(site).double().cpu() @ held)
    return directed(op, names, columns, means, factor=factor, value=value)


def contrast_maker(
    dense: Subject, student: Subject, bridges: Bridges, circuit: Circuit, task: Task, config: EditConfig
) -> Maker:
    """Edits of a dense model by the contrast of its student's circuit, and random ones by the contrast of random nodes.

    These are as many and as active, in the student, as all of the circuit's nodes, at every location; and of `POOL`
    times as many sets those are taken whose edits move the dense model's writes most nearly as much
    (`bridges.editing.moved`). Random nodes differ less between the classes, so that the nearest may still move less.
    CircuitMismatchError unless the circuit is the student's; ValueError for what does not fit together.
    """
    circuit.check(student.model)
    check_config(config)
    model = student.model
    check_bridges(bridges, n_layer=dense.model.n_layer, d_dense=dense.model.d_model, d_sparse=model.d_model)
    if not task.oriented:
        raise ValueError(f"task: the answers of {task.name} vary by pair, so there are no two classes; use nodes")
    batch = encode(task, student.tokenizer, "train", config.pairs, config.seed, context=model.context)
    found, values = contrasts(model, batch), constants(dense.means)

    def maker_of(nodes: Mapping[str, Tensor]) -> Callable[[Sequence[str]], DirectionEdit]:
        live = live_channels(nodes, n_layer=model.n_layer, d_model=model.d_model)
        return partial(_make, config, bridges, values, found, live)

    def random(edit: AnyEdit, count: int) -> list[DirectionEdit]:
        assert isinstance(edit, DirectionEdit), edit
        generator = torch.Generator().manual_seed(config.seed)
        drawn = random_sets(circuit.nodes, student.means, POOL * count, generator)
        pool = [maker_of(nodes)(edit.names) for nodes in drawn]
        return moving_alike(edit, pool, write_moments(dense, list(edit.bases)), count)

    make = maker_of(circuit.nodes)
    there = [name for name in found if make([name]).bases]
    return Maker(candidates=there, make=make, random=random)


def _make(
    config: EditConfig,
    bridges: Bridges,
    values: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    names: Sequence[str],
) -> DirectionEdit:
    options = {"factor": config.factor, "value": config.value}
    return carry_contrast(config.op, names, bridges, values, found, live, **options)

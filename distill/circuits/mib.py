"""Circuits in the form of the MIB benchmark's circuit files (EAP-IG's `Graph.from_json`), as far as they go.

A file there is a graph of whole components with flags that say what is in the circuit: `input`, the heads `a{i}.h{n}`,
the MLPs `m{i}` and `logits`; an edge runs from each component to each later one, into a head apart for q, k and v
(`a0.h1->a2.h0<q>`). Between two components there is only the residual stream, so here:

- a head writes the channels `{i}.attn.resid_delta` that a kept edge reaches from one of its kept `v` channels, an MLP
  those that one reaches from a kept neuron; `input` writes every channel with an entry in the embedding;
- a head reads, for q, k and v apart, the channels `{i}.attn.act_in` from which a kept edge goes into one of its kept
  channels of that kind, an MLP likewise; `logits` reads every channel with an entry in the unembedding;
- an edge is in the circuit where what its parent writes and its child reads meet; its score is the number of channels
  where they do. A component is in the circuit where it writes. `neurons` flags the channels that it writes.

What is lost stands in the file, under `lost`, and in `LOST`.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from distill.artifact import FORMAT_VERSION, write_json
from distill.circuits.circuit import Circuit
from distill.circuits.edges import EdgeSet
from distill.model.run import Runnable

LOST = (
    "which neurons of an MLP are kept: one component there is the whole MLP",
    "which q, k and v channels of a head are kept, and the edges within a component with their weights",
    "which channel of the stream an edge runs through: an edge there is one flag for all of them",
    "reads that no kept edge leads on from, and writes that no kept edge leads to",
    "channels of concatenated positions, which no component writes",
    "what ablated nodes are set to: the benchmark patches in the other prompt of a pair, or its own means",
)
"""What the form has no place for, in words."""


def mib_graph(circuit: Circuit, model: Runnable) -> dict[str, Any]:
    """The circuit as such a graph, in plain values.

    CircuitMismatchError for another model; ValueError for one with grouped keys and values, where a v channel belongs
    to several heads and has no component there.
    """
    edges = circuit.edge_set(model)
    if model.widths["0.attn.v"] != model.n_head * model.d_head:
        raise ValueError(
            f"model: {model.widths['0.attn.v']} v channels for {model.n_head} heads of {model.d_head}; allowed for MIB "
            "are models in which each head has keys and values of its own"
        )
    writes, reads = _writes(model, edges), _reads(model, edges)
    order = list(writes)
    flags = {name: {"in_graph": bool(written.any()), "neurons": written.tolist()} for name, written in writes.items()}
    joined: dict[str, dict[str, Any]] = {}
    for child, (first, read) in reads.items():
        for parent in order[:first]:
            shared = int((writes[parent] & read).sum())
            joined[f"{parent}->{child}"] = {"score": float(shared), "in_graph": shared > 0}
    return {
        "format_version": FORMAT_VERSION,
        "cfg": {
            "n_layers": model.n_layer,
            "n_heads": model.n_head,
            "parallel_attn_mlp": False,
            "d_model": model.d_model,
        },
        "nodes": {**flags, "logits": {"in_graph": True}},
        "edges": joined,
        "model": circuit.model_name,
        "task": circuit.task,
        "lost": list(LOST),
    }


def write_mib(circuit: Circuit, model: Runnable, path: str | Path) -> Path:
    """Writes `mib_graph` as JSON. Returns the path."""
    write_json(path, mib_graph(circuit, model))
    return Path(path)


def _head(index: Tensor, head: int, d_head: int) -> Bool[Tensor, "n"]:
    """Which of some channels of q, k or v belong to a head."""
    return index // d_head == head


def _flags(width: int, channels: Tensor) -> Bool[Tensor, "width"]:
    flags = torch.zeros(width, dtype=torch.bool)
    # Behind the residual channels a read may have those of positions.
    flags[channels[channels < width]] = True
    return flags


def _writes(model: Runnable, edges: EdgeSet) -> dict[str, Bool[Tensor, "D"]]:
    """Residual channels that each component writes, in the order of the run."""
    found = {"input": (model.embedding() != 0).any(0).cpu()}
    for i in range(model.n_layer):
        targets, sources = edges[f"{i}.attn.v", f"{i}.attn.resid_delta"]
        for head in range(model.n_head):
            found[f"a{i}.h{head}"] = _flags(model.d_model, targets[_head(sources, head, model.d_head)])
        found[f"m{i}"] = _flags(model.d_model, edges[f"{i}.mlp.post_act", f"{i}.mlp.resid_delta"][0])
    return found


def _reads(model: Runnable, edges: EdgeSet) -> dict[str, tuple[int, Bool[Tensor, "D"]]]:
    """For each input of a component how many components come before it, and the residual channels that it reads."""
    found: dict[str, tuple[int, Tensor]] = {}
    for i in range(model.n_layer):
        before = 1 + i * (model.n_head + 1)
        for head in range(model.n_head):
            for kind in "qkv":
                targets, sources = edges[f"{i}.attn.act_in", f"{i}.attn.{kind}"]
                mine = sources[_head(targets, head, model.d_head)]
                found[f"a{i}.h{head}<{kind}>"] = before, _flags(model.d_model, mine)
        read = edges[f"{i}.mlp.act_in", f"{i}.mlp.post_act"][1]
        found[f"m{i}"] = before + model.n_head, _flags(model.d_model, read)
    found["logits"] = 1 + model.n_layer * (model.n_head + 1), (model.unembedding() != 0).any(0).cpu()
    return found

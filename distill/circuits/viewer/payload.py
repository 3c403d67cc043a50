"""What a page knows of one circuit, or of the circuits along a Pareto curve, as one JSON value.

`view` is a pure function of the model, the circuits and the task; README.md beside this file describes every field.
Nodes are the union over the circuits of a curve, which are its `points`. Tokens stand as numbers that point into one
list of texts, so that a token's text is there once, as data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.circuits.circuit import Circuit, CircuitMismatchError, names_of
from distill.circuits.edges import EdgeSet, edge_union
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.masks import Nodes
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.circuits.viewer.activations import activations, examples, rounded
from distill.circuits.viewer.at_work import at_work
from distill.circuits.viewer.attention import Span, head_of, heads_of, patterns
from distill.circuits.viewer.describe import descriptions, sentence
from distill.circuits.viewer.edge_table import EdgeTable, edge_table
from distill.circuits.viewer.point import Shared, point
from distill.circuits.viewer.settings import ViewConfig
from distill.model.anatomy import anatomy
from distill.model.run import Runnable
from distill.model.sites import kind_of, layer_of, split_node

FORMAT = 1
"""Version of the JSON."""


def view(
    subject: Subject,
    circuits: Sequence[Circuit],
    task: Task,
    *,
    name: str = "",
    scorecard: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    file: str | None = None,
    config: ViewConfig | None = None,
) -> dict[str, Any]:
    """Everything a page shows of one circuit, or of several of one model and task along a Pareto curve.

    Arguments:
        subject: the model of the circuits, its tokenizer and held-out text.
        circuits: one, or one for each target.
        name: what to call it; by default task and model.
        scorecard: as scorecard.json holds it.
        labels: a person's words for nodes.
        file: name that the page gives to labels that are saved from it, without its ending.
        config: how much is shown.

    ValueError for no circuits, CircuitMismatchError for circuits of another model or of several tasks.
    """
    config = config or ViewConfig()
    circuits = _checked(circuits, subject)
    model, nodes = subject.model, _union(circuits)
    names = names_of(nodes)
    judged = _encoded(subject, task, config.judged, config.seed)
    shown = _encoded(subject, task, config.pairs, config.seed)
    spans = [(max(0, last + 1 - config.longest), last + 1) for last in shown.last.tolist()]
    windows = _windows(subject, config)
    texts = _Texts(subject)
    theirs = activations(model, nodes, shown.tokens)
    on_text = activations(model, nodes, windows)
    heads = heads_of(model, nodes)
    edges, weights, left_out = _edges(subject, circuits, config)
    shared = Shared(
        nodes=nodes,
        names=names,
        edges=edges,
        shown=shown,
        spans=spans,
        judged=judged,
        judged_model=activations(model, nodes, judged.tokens),
        heads=heads,
        config=config,
    )
    points = [point(Runs(model, circuit), shared) for circuit in circuits]
    described = descriptions(model, nodes, on_text, windows)
    return {
        "name": name or f"{circuits[0].task} in {subject.name}",
        "file": file or f"{circuits[0].task}.{subject.name}",
        "task": circuits[0].task,
        "model": _model(subject, circuits[0]),
        "nodes": [
            {
                **_place(model, location, channel),
                "name": name,
                "score": _number(float(circuits[0].scores[location][channel])),
                "mean": _number(float(circuits[0].means.values[location][..., channel].float().mean())),
                "direct": direct,
                "examples": [one.to_json(on_text[..., i]) for one in examples(on_text[..., i], config)],
                "pairs": [rounded(theirs[row, start:stop, i]) for row, (start, stop) in enumerate(spans)],
                "description": _described(one, texts),
            }
            for i, (name, (location, channel), one, direct) in enumerate(
                zip(names, map(split_node, names), described, _direct(subject, shown, names), strict=True)
            )
        ],
        "edges": {"source": edges.source.tolist(), "target": edges.target.tolist(), "weight": rounded(weights)},
        "edges_left_out": left_out,
        "edges_note": edges_note(model),
        "points": points,
        "heads": patterns(model, heads, shown, spans),
        "pairs": _prompts(shown, spans, texts),
        "windows": [[texts.at(token) for token in row] for row in windows.tolist()],
        "at_work": at_work(subject, circuits[-1], task, windows, count=config.coloured),
        "tokens": texts.known,
        "scorecard": None if scorecard is None else dict(scorecard),
        "labels": dict(labels or {}),
        "provenance": {"circuits": [dict(circuit.provenance) for circuit in circuits], "view": vars(config)},
    }


class _Texts:
    """The texts of the tokens that a page mentions, each once."""

    def __init__(self, subject: Subject) -> None:
        self.tokenizer = subject.tokenizer
        self.known: list[str] = []
        self.places: dict[int, int] = {}

    def at(self, token: int) -> int:
        """Place of a token's text in `known`."""
        if token not in self.places:
            self.places[token] = len(self.known)
            self.known.append(self.text(token))
        return self.places[token]

    def text(self, token: int) -> str:
        """The text of a token; of a piece of a character, what the vocabulary calls it."""
        text = self.tokenizer.decode([token])
        assert isinstance(text, str)
        return self.tokenizer.convert_ids_to_tokens([token])[0] if "\ufffd" in text or not text else text


def _checked(circuits: Sequence[Circuit], subject: Subject) -> list[Circuit]:
    if not circuits:
        raise ValueError("circuits: got none; allowed are one or more")
    for circuit in circuits:
        circuit.check(subject.model)
        if circuit.task != circuits[0].task:
            raise CircuitMismatchError(
                f"circuits: of tasks {circuits[0].task!r} and {circuit.task!r}; one view shows one task"
            )
    return sorted(circuits, key=lambda one: -one.target)


def _union(circuits: Sequence[Circuit]) -> Nodes:
    union = circuits[0].nodes
    for circuit in circuits[1:]:
        union = {location: mask | circuit.nodes[location] for location, mask in union.items()}
    return union


def _encoded(subject: Subject, task: Task, pairs: int, seed: int) -> TaskBatch:
    """Pairs of the test split, which pruning never saw; a user's few pairs may be fewer than asked for."""
    count = min(pairs, task.size("test"))
    return encode(task, subject.tokenizer, "test", count, seed, context=subject.model.context)


def _windows(subject: Subject, config: ViewConfig) -> Int[Tensor, "n T"]:
    picked = torch.linspace(0, len(subject.sample) - 1, min(config.windows, len(subject.sample))).long()
    return subject.sample[picked, :-1]


def _edges(
    subject: Subject, circuits: Sequence[Circuit], config: ViewConfig
) -> tuple[EdgeTable, Float[Tensor, "n"], int]:
    """Every edge of any of the circuits with its weight, the largest first, and how many there was no room for; none of
    a model where a weight between two nodes is no edge (`edges_note`)."""
    if edges_note(subject.model):
        return edge_table({}, _union(circuits)), torch.empty(0), 0
    joined: EdgeSet = circuits[0].edge_set(subject.model)
    for circuit in circuits[1:]:
        joined = edge_union(joined, circuit.edge_set(subject.model))
    table = edge_table(joined, _union(circuits))
    matrices = subject.model.matrices()
    weights = torch.cat(
        [matrices[matrix].cpu()[index[0], index[1]].float() for matrix, index in joined.items()] or [torch.empty(0)]
    )
    order = weights.abs().argsort(descending=True, stable=True)[: config.edges]
    return table.chosen(order), weights[order], len(weights) - len(order)


def edges_note(model: Runnable) -> str:
    """Why a page shows nodes of this model and no edges; "" where it shows both."""
    uncut = anatomy(model).uncut
    if not uncut:
        return ""
    return f"nodes only: the model has {' and '.join(uncut)}, so that no single weight joins two nodes"


def _place(model: Runnable, location: str, channel: int) -> dict[str, Any]:
    kind = kind_of(location)
    head = head_of(model, location, channel) if kind in ("attn.q", "attn.k", "attn.v") else None
    return {"location": location, "layer": layer_of(location), "kind": kind, "channel": channel, "head": head}


def _direct(subject: Subject, batch: TaskBatch, names: Sequence[str]) -> list[float | None]:
    """For writes, how far one unit in the channel moves the answer's logit against the other's before the final norm's
    scale: towards the first class where answers are the same in all pairs, the mean size else. None for other nodes."""
    unembedding, gain = subject.model.unembedding().float().cpu(), anatomy(subject.model).final_norm.gain.float().cpu()
    moved = gain * (unembedding[batch.answer] - unembedding[batch.other])
    oriented = bool(batch.orientation.any())
    mean = (moved * batch.orientation[:, None]).mean(0) if oriented else moved.abs().mean(0)
    found = []
    for name in names:
        location, channel = split_node(name)
        found.append(_number(float(mean[channel])) if location.endswith("resid_delta") else None)
    return found


def _described(one: Mapping[str, Any], texts: _Texts) -> dict[str, Any]:
    """A description with places of texts in place of token ids, and its sentence."""
    lists = ("high", "low", "reads", "raises", "lowers")
    tokens = {token for key in lists for token, _ in one[key] or []}
    words = sentence(one, {token: texts.text(token) for token in tokens})
    found: dict[str, Any] = {"text": words, "profile": one["profile"]}
    for key in lists:
        found[key] = None if one[key] is None else [[texts.at(token), value] for token, value in one[key]]
    return found


def _prompts(batch: TaskBatch, spans: Sequence[Span], texts: _Texts) -> list[dict[str, Any]]:
    """The shown pairs: clean and corrupt prompt, each with its answers."""
    half = len(batch) // 2
    rows = [
        {
            "tokens": [texts.at(token) for token in batch.tokens[row, start:stop].tolist()],
            "start": start,
            "answer": texts.at(int(batch.answer[row])),
            "other": texts.at(int(batch.other[row])),
        }
        for row, (start, stop) in enumerate(spans)
    ]
    return [{"clean": rows[i], "corrupt": rows[i + half]} for i in range(half)]


def _model(subject: Subject, circuit: Circuit) -> dict[str, Any]:
    model = subject.model
    weights = list(model.matrices().values())
    density = sum(int(one.count_nonzero()) for one in weights) / sum(one.numel() for one in weights)
    return {
        "name": subject.name,
        "fingerprint": circuit.model,
        "n_layer": model.n_layer,
        "d_model": model.d_model,
        "n_head": model.n_head,
        "d_head": model.d_head,
        "density": round(density, 4),
        "nodes": sum(model.widths.values()),
    }


def _number(value: float | int) -> float:
    return float(f"{value:.3g}")

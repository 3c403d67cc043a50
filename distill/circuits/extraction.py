"""Taking a circuit out of its model: the numbers that it needs to run on its own.

Everything is put down as deviations from the run in which every node is ablated. In that run the residual stream is
known before any prompt is: the embedding row of the token, and a constant (or, with positions or means per position,
one constant per position). What the kept nodes do comes on top, in the few residual channels that they write, the
*touched* ones. So

- a linear map has as its bias what it gives with all sources ablated, and acts on deviations, kept edges alone;
- a norm needs the squares of all channels: those of the untouched ones are a number per token, worked out here;
- a head without a kept query or key has a fixed pattern, and without a kept value it writes a constant.

`extract` gives the tensors by name; `distill.circuits.standalone` runs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.edges import EdgeSet
from distill.model import operations as ops
from distill.model.anatomy import Anatomy, LayerParts, anatomy
from distill.model.run import Runnable
from distill.model.sites import Record

FIRST_BATCH = 512
"""Tokens run at once where position 0 is protected."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is no tensor in a circuit on its own; plain JSON values."""

    model: str
    """Fingerprint of the model it was taken from."""
    vocab_size: int
    d_model: int
    length: int
    """Longest text in tokens: the model's context, or as far as means per position reach."""
    activation: str
    eps: Mapping[str, float]
    """By sublayer, `3.attn`, and `final`."""
    center: bool
    """Whether norms take the mean out."""
    sublayers: Sequence[str]
    """Sublayers that write something kept, in the order of the run."""
    limits: Mapping[str, int]
    """Channels that AbsTopK keeps, at locations where more nodes are kept than that."""
    scale: Mapping[str, float]
    """What q k is multiplied by, by attention sublayer."""
    widths: Mapping[str, int]
    """Slots in each head that is computed, by attention sublayer."""
    protect_first: bool
    nodes: int
    edges: int


HEAD_FIELDS = {"model": str, "vocab_size": int, "d_model": int, "length": int, "activation": str, "eps": dict,
           "center": bool, "sublayers": list, "limits": dict, "scale": dict, "widths": dict, "protect_first": bool,
           "nodes": int, "edges": int}  # fmt: skip
"""What each field of a head is in a file."""


def extract(
    model: Runnable,
    nodes: Mapping[str, Bool[Tensor, "width"]],
    means: Means,
    edges: EdgeSet | None = None,
    first_tokens: Int[Tensor, "F"] | None = None,
) -> tuple[Head, dict[str, Tensor]]:
    """The circuit of these nodes and edges (None: all that join them), as it is defined; see `standalone`."""
    return _Extraction(model, nodes, means, edges).all(first_tokens)


class _Extraction:
    def __init__(self, model: Runnable, nodes: Mapping[str, Tensor], means: Means, edges: EdgeSet | None) -> None:
        self.model, self.means, self.edges = model, means, edges
        self.parts: Anatomy = anatomy(model)
        if self.parts.obstacles:
            raise ValueError(
                f"model: has {' and '.join(self.parts.obstacles)}; a circuit can stand alone where nodes are joined by "
                "weights alone, and sublayers add to the residual stream"
            )
        self.weights = model.matrices()
        weight = model.embedding()
        self.options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.kept = {location: mask.nonzero()[:, 0].to(weight.device) for location, mask in nodes.items()}
        for location in self.kept:
            if means.at(location, 1).dim() != 2:
                raise ValueError("means: one value per prompt; a circuit stands alone with one value per node only")
        self.length = (
            model.context
            if not means.per_position
            else min(model.context, *(len(value) for value in means.values.values()))
        )
        names = [f"{i}.{part}" for i in range(model.n_layer) for part in ("attn", "mlp")]
        self.sublayers = [name for name in names if len(self.kept[f"{name}.resid_delta"])]
        self.positional = means.per_position or means.protect_first
        self.tensors: dict[str, Tensor] = {}
        self.widths: dict[str, int] = {}
        self.slots: dict[str, Mapping[int, int]] = {}

    def mean(self, location: str) -> Float[Tensor, "rows width"]:
        """Ablation values, one row or one per position."""
        length = self.length if self.means.per_position else 1
        return self.means.at(location, length).to(**self.options)

    @torch.no_grad()
    def all(self, first_tokens: Tensor | None) -> tuple[Head, dict[str, Tensor]]:
        self._stream()
        for name in self.sublayers:
            source = f"{name}.act_in"
            self._nodes(source)
            if name.endswith("attn"):
                for part in ("q", "k", "v"):
                    self._map(source, f"{name}.{part}")
                    self._nodes(f"{name}.{part}")
                self._attention(name)
            else:
                self._map(source, f"{name}.post_act")
                self._nodes(f"{name}.post_act")
                self._map(f"{name}.post_act", f"{name}.resid_delta")
            self._nodes(f"{name}.resid_delta")
        self._readout()
        if self.means.protect_first:
            self._first(first_tokens)
        return self._head(), {name: value.contiguous() for name, value in self.tensors.items()}

    def _head(self) -> Head:
        final = self.parts.final_norm
        norms = {name: self._layer(name).norms[name.split(".")[1]] for name in self.sublayers}
        limits = {location: self.parts.kept[location] for location in self.kept}
        blocks = [value for name, value in self.tensors.items() if name.endswith("/weight")]
        return Head(
            model=self.means.model,
            vocab_size=self.model.vocab_size,
            d_model=self.model.d_model,
            length=self.length,
            activation=self.parts.activation,
            eps={"final": final.eps} | {name: norm.eps for name, norm in norms.items()},
            center=final.center,
            sublayers=self.sublayers,
            limits={
                location: limit for location, limit in limits.items() if limit and len(self.kept[location]) > limit
            },
            scale={name: self._layer(name).scale for name in self.sublayers if name.endswith("attn")},
            widths=self.widths,
            protect_first=self.means.protect_first,
            nodes=sum(len(kept) for kept in self.kept.values()),
            edges=sum(int(block.count_nonzero()) for block in blocks),
        )

    # The residual stream.

    def _stream(self) -> None:
        """Channels to be carried, the constants of the ablated run, and the squares of the untouched channels."""
        model, width = self.model, self.model.d_model
        touched = torch.zeros(width, dtype=torch.bool, device=self.options["device"])
        read = touched.clone()
        for name in self.sublayers:
            touched[self.kept[f"{name}.resid_delta"]] = True
            reads = self.kept[f"{name}.act_in"]
            read[reads[reads < width]] = True
        carried = torch.cat([touched.nonzero()[:, 0], (read & ~touched).nonzero()[:, 0]])
        slot = torch.full((width,), -1, device=carried.device).index_copy(
            0, carried, torch.arange(len(carried), device=carried.device)
        )
        positions = self.parts.embed_positions
        constant = torch.zeros(1, width, **self.options) if positions is None else positions[: self.length]
        constants: dict[str, Tensor] = {}
        for name in [f"{i}.{part}" for i in range(model.n_layer) for part in ("attn", "mlp")]:
            constants[name] = constant
            constant = constant + self.mean(f"{name}.resid_delta")
        embed = model.embedding()
        self.tensors |= {"embed": embed, "carried/embed": embed[:, carried], "constant": constant}
        self.tensors["touched"] = touched.nonzero()[:, 0]
        for name in self.sublayers:
            self._read(name, constants[name], slot)
            self.tensors[f"{name}/touched"] = constants[name][:, touched]
            self.tensors[f"{name}/write"] = slot[self.kept[f"{name}.resid_delta"]]
        if self.sublayers:
            self._squares([constants[name] for name in self.sublayers], ~touched)

    def _read(self, name: str, constant: Float[Tensor, "rows D"], slot: Int[Tensor, "D"]) -> None:
        part = name.split(".")[1]
        channels = self.kept[f"{name}.act_in"]
        inside = channels[channels < self.model.d_model]
        norm = self._layer(name).norms[part]
        self.tensors[f"{name}/read"] = slot[inside]
        self.tensors[f"{name}/constant"] = constant[:, inside]
        self.tensors[f"{name}/gain"] = norm.gain[inside]
        if norm.bias is not None:
            self.tensors[f"{name}/bias"] = norm.bias[inside]
        behind = channels[channels >= self.model.d_model] - self.model.d_model
        if len(behind):
            self.tensors[f"{name}/positions"] = self._layer(name).positions[part][: self.length, behind]

    def _squares(self, constants: Sequence[Float[Tensor, "#rows D"]], rest: Bool[Tensor, "D"]) -> None:
        """Of the untouched channels in the ablated run: sum and sum of squares, for each token, sublayer and constant.

        With constants per position the squares are kept apart, |e|^2 + |c|^2 + 2 e c, as a table of every token at
        every position would be too large; `cross` is 2 c.
        """
        embed = (self.model.embedding() * rest).double()
        stack = torch.stack(torch.broadcast_tensors(*constants), -1).double() * rest[:, None]
        self.tensors["embed/sum"] = embed.sum(-1, keepdim=True)
        self.tensors["constant/sum"] = stack.sum(1)
        square = embed.square().sum(-1, keepdim=True)
        if len(stack) == 1:
            self.tensors["embed/square"] = square + 2 * embed @ stack[0] + stack[0].square().sum(0)
        else:
            self.tensors["embed/square"] = square
            self.tensors["constant/square"] = stack.square().sum(1)
            self.tensors["constant/cross"] = (2 * stack).to(self.options["dtype"])

    def _readout(self) -> None:
        final = self.parts.final_norm
        optional = {"final/bias": final.bias, "logits_bias": self.parts.logits_bias, "bigram": self.parts.bigram}
        self.tensors |= {"unembed": self.model.unembedding(), "final/gain": final.gain}
        self.tensors |= {name: value for name, value in optional.items() if value is not None}

    # Nodes and edges.

    def _nodes(self, location: str) -> None:
        self.tensors[f"{location}/channel"] = self.kept[location]
        self.tensors[f"{location}/mean"] = self.mean(location)[:, self.kept[location]]

    def _map(self, source: str, target: str) -> None:
        """The kept edges, and what they add to: the target with every source ablated."""
        rows = self.weights[source, target][self.kept[target]]
        self.tensors[f"{target}/base"] = self.parts.biases[target][self.kept[target]] + self.mean(source) @ rows.T
        self.tensors[f"{target}/weight"] = self._block(source, target)

    def _block(self, source: str, target: str) -> Float[Tensor, "targets sources"]:
        weight = self.weights[source, target]
        block = weight[self.kept[target]][:, self.kept[source]]
        if self.edges is None:
            return block
        index = self.edges.get((source, target), torch.empty(2, 0, dtype=torch.long)).to(weight.device)
        return block * place_edges(index, self.kept[target], self.kept[source]).to(block)

    def _attention(self, name: str) -> None:
        """The map from values to writes through attention, for the heads that are not constant."""
        source, target = f"{name}.v", f"{name}.resid_delta"
        sink = self._layer(name).sink
        rows = self.weights[source, target][self.kept[target]]
        moved = {part: self._heads_of(f"{name}.{part}") for part in "qkv"}
        anchored = sink is not None or self.positional
        reached = rows.view(len(rows), self.model.n_head, -1).ne(0).any(-1).any(0)
        asking = moved["q"] | moved["k"] | self.positional
        live = asking & (moved["v"] | (reached & anchored))
        if not self.means.protect_first:
            live = live & (moved["q"] | moved["k"] | moved["v"])
        base = self.parts.biases[target][self.kept[target]][None]
        if not anchored:
            base = base + self.mean(source) @ rows.T
        for head in (reached & ~live).nonzero()[:, 0].tolist() if anchored else ():
            mixed = self._constant_pattern(name, head) @ self.mean(source)[:, self._channels(head)].expand(
                self.length, -1
            )
            base = base + mixed @ rows[:, self._channels(head)].T
        self.tensors[f"{target}/base"] = base
        self.tensors[f"{target}/weight"] = self._block(source, target)
        self._even(name, moved["v"] & ~live)
        if bool(live.any()):
            self._lay_out(name, rows, live.nonzero()[:, 0].tolist(), anchored)

    def _even(self, name: str, heads: Bool[Tensor, "N"]) -> None:
        """Kept values of heads without a kept query or key, and what share each earlier value has at each position.

        With one mean per node all of them have the same.
        """
        head_of = self.kept[f"{name}.v"] // self.model.d_head
        still = heads[head_of].nonzero()[:, 0]
        if len(still):
            shares = {head: self._constant_pattern(name, head)[:, 0] for head in head_of[still].unique().tolist()}
            self.tensors[f"{name}.v/still"] = still
            self.tensors[f"{name}/even"] = torch.stack([shares[head] for head in head_of[still].tolist()], 1)

    def _lay_out(self, name: str, rows: Float[Tensor, "targets C"], live: list[int], anchored: bool) -> None:
        """Narrow heads that hold only what varies: `width` slots each for queries, keys and values alike.

        Queries and keys: channels of which either is kept (all, where ablated ones depend on the position). What the
        others add to a score is one number per head, taken off its sink. Values: the kept ones; then for what the
        ablated ones add up to, a 1 (its share of the pattern's row), or all of them where they depend on the position.
        """
        parts = {part: self.kept[f"{name}.{part}"].tolist() for part in "qkv"}
        asked = {head: set(self._range(head)) & (set(parts["q"]) | set(parts["k"])) for head in live}
        asked = {head: list(self._range(head)) if self.positional else sorted(asked[head]) for head in live}
        carried = {head: sorted(set(self._range(head)) & set(parts["v"])) for head in live}
        extra = self.model.d_head if self.positional else int(anchored)
        width = max(1, *(max(len(asked[head]), len(carried[head]) + extra) for head in live))
        slots = {
            "qk": _slots([asked[head] for head in live], width),
            "v": _slots([carried[head] for head in live], width),
        }
        for part in "qk":
            self._place(f"{name}.{part}", slots["qk"])
            self._fix(f"{name}.{part}", slots["qk"], len(live) * width)
        self._place(f"{name}.v", slots["v"])
        ends = [row * width + len(carried[head]) for row, head in enumerate(live)]
        anchor = torch.zeros(len(rows), len(live) * width, **self.options)
        if self.positional:
            held = {c: end + j for head, end in zip(live, ends, strict=True) for j, c in enumerate(self._range(head))}
            self._fix(f"{name}.v", held, len(live) * width)
            anchor[:, list(held.values())] = rows[:, list(held)]
        else:
            ones = torch.zeros(1, len(live) * width, **self.options)
            if anchored:
                ones[:, ends] = 1
                fixed = (rows * self.mean(f"{name}.v")).view(len(rows), self.model.n_head, -1).sum(-1)
                anchor[:, ends] = fixed[:, live]
            self.tensors[f"{name}.v/fixed"] = ones
        self.tensors[f"{name}/anchor"] = anchor
        self._sink(name, live, asked)
        self.widths[name] = width

    def _place(self, location: str, slots: Mapping[int, int]) -> None:
        """Which kept nodes go to which slots; those of other heads go nowhere."""
        kept = self.kept[location].tolist()
        self.tensors[f"{location}/from"] = self._index([i for i, channel in enumerate(kept) if channel in slots])
        self.tensors[f"{location}/slot"] = self._index([slots[channel] for channel in kept if channel in slots])

    def _fix(self, location: str, slots: Mapping[int, int], total: int) -> None:
        """Ablation values in the slots, and where from they come at a protected position 0."""
        mean = self.mean(location)
        fixed = torch.zeros(len(mean), total, **self.options)
        fixed[:, list(slots.values())] = mean[:, list(slots)]
        self.tensors[f"{location}/fixed"] = fixed
        self.slots[location] = slots

    def _sink(self, name: str, live: list[int], asked: Mapping[int, list[int]]) -> None:
        layer = self._layer(name)
        if layer.sink is None:
            return
        sink = layer.sink[live]
        if not self.positional:
            product = (self.mean(f"{name}.q") * self.mean(f"{name}.k"))[0]
            left_out = [product[self._channels(head)].sum() - product[asked[head]].sum() for head in live]
            sink = sink - layer.scale * torch.stack(left_out)
        self.tensors[f"{name}/sink"] = sink

    def _layer(self, name: str) -> LayerParts:
        return self.parts.layers[int(name.split(".")[0])]

    def _index(self, values: list[int]) -> Int[Tensor, "n"]:
        return torch.tensor(values, dtype=torch.long, device=self.options["device"])

    def _range(self, head: int) -> range:
        return range(head * self.model.d_head, (head + 1) * self.model.d_head)

    def _channels(self, head: int) -> slice:
        return slice(head * self.model.d_head, (head + 1) * self.model.d_head)

    def _heads_of(self, location: str) -> Bool[Tensor, "N"]:
        found = torch.zeros(self.model.n_head, dtype=torch.bool, device=self.options["device"])
        found[self.kept[location] // self.model.d_head] = True
        return found

    def _constant_pattern(self, name: str, head: int) -> Float[Tensor, "T T"]:
        """Where a head looks with ablated queries and keys."""
        layer, at = self._layer(name), self._channels(head)
        q, k = (self.mean(f"{name}.{part}")[:, at].expand(self.length, -1)[None, None] for part in "qk")
        sink = None if layer.sink is None else layer.sink[head : head + 1]
        allowed = ops.visible(self.length, self.length, None, q.device)
        return ops.attention_pattern(q * (layer.scale * self.model.d_head**0.5), k, sink, allowed)[0, 0]

    # Position 0, where it is protected.

    def _first(self, tokens: Tensor | None) -> None:
        """What the whole model does at position 0, which sees nothing but its own token, for each such token."""
        device = self.options["device"]
        ids = torch.arange(self.model.vocab_size) if tokens is None else tokens.unique().cpu()
        found: dict[str, list[Tensor]] = {location: [] for location in self.slots if not location.endswith("q")}
        residual: list[Tensor] = []
        for batch in ids.split(FIRST_BATCH):
            record = Record(found)
            residual.append(self.model.run(batch[:, None].to(device), tap=record, stop="final_resid")[:, 0])
            for location, values in found.items():
                slots = self.slots[location]
                first = torch.zeros(len(batch), self.tensors[f"{location}/fixed"].shape[1], **self.options)
                first[:, list(slots.values())] = record.values[location][:, 0, list(slots)]
                values.append(first)
        self.tensors |= {f"{location}/first": torch.cat(values) for location, values in found.items()}
        self.tensors["first/residual"] = torch.cat(residual)
        row = torch.full((self.model.vocab_size,), -1).index_copy(0, ids, torch.arange(len(ids)))
        self.tensors["first/row"] = row.to(device)


def _slots(channels: list[list[int]], width: int) -> dict[int, int]:
    """Slot of each channel: those of row r from r * width on."""
    return {channel: row * width + j for row, some in enumerate(channels) for j, channel in enumerate(some)}


def place_edges(index: Int[Tensor, "2 n"], rows: Int[Tensor, "r"], columns: Int[Tensor, "c"]) -> Bool[Tensor, "r c"]:
    """Edges as a table of kept targets by kept sources, both ascending. ValueError for an edge at any other node."""
    place = []
    for row, kept, end in zip(index.contiguous(), (rows, columns), ("target", "source"), strict=True):
        at = torch.searchsorted(kept, row)
        known = at < len(kept)
        known[known.clone()] = kept[at[known]] == row[known]
        if not bool(known.all()):
            raise ValueError(f"edges: {end} channel {int(row[~known][0])} is not among the nodes kept there")
        place.append(at)
    table = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=index.device)
    table[place[0], place[1]] = True
    return table

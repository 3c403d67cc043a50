"""A circuit on its own: a torch module with the kept nodes and edges of a model, and nothing of the rest.

Its logits are those of the circuit as it is defined (`distill.circuits.edges.circuit_tap`): AbsTopK among kept
channels alone, dropped nodes and edges at their ablation values. They agree to rounding; only where AbsTopK has to
choose between two channels that rounding cannot tell apart may single precision choose the other one. What it keeps of
the model:

- for every kept node its ablation value; for every kept edge its weight, in small dense blocks;
- of all that is ablated, the constants that it adds up to (see `distill.circuits.extraction`);
- embedding, unembedding and bigram table, whole, as circuits do not mask these; a circuit that answers about a few
  words still has to know what every word is embedded as;
- of the norms: gains of what is read, and for each token the squares of the residual channels that no kept node writes,
  one number for each sublayer.

It is also the model to search in once most nodes are out: `difference` runs any part of its nodes and edges, and gates
on them give the gradient to each from one run (`distill.circuits.thinning`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.artifact import ArtifactError, load_tensors, save_tensors
from distill.circuits.ablation import FreezeNorms, Means
from distill.circuits.edges import EdgeSet
from distill.circuits.extraction import HEAD_FIELDS, Head, extract, place_edges
from distill.circuits.tasks import TaskBatch
from distill.fields import check_fields, check_numbers
from distill.model import operations as ops
from distill.model.anatomy import FED_BY, activation
from distill.model.run import Runnable
from distill.model.sites import kind_of
from distill.model.topk import abs_topk

KIND = "standalone"
SMALL = 2**21
"""Activations of kept nodes up to which a run takes one thread."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """How far nodes and edges of a module are there: 1 as they are, 0 ablated. Without an entry: as they are."""

    nodes: Mapping[str, Float[Tensor, "n"]] = field(default_factory=dict)
    """By location, for the kept nodes in ascending order."""
    edges: Mapping[str, Float[Tensor, "targets sources"]] = field(default_factory=dict)
    """By target location."""


@dataclass
class _Stream:
    """The residual stream of some positions: the channels that are carried, and what norms need of the others."""

    tokens: Int[Tensor, "B T"]
    at: Int[Tensor, "T"] | Int[Tensor, "B 1"]
    """Positions."""
    x: Float[Tensor, "B T carried"]
    square: Float[Tensor, "B T sublayers"]
    total: Float[Tensor, "B T sublayers"]
    frozen: Mapping[str, Float[Tensor, "B T 1"]]
    """1/sigma by sublayer, where it is given."""

    def only(self, rows: Int[Tensor, "B"], last: Int[Tensor, "B"]) -> "_Stream":
        """One position of each row."""

        def pick(value: Tensor) -> Tensor:
            return value[rows, last][:, None]

        return _Stream(
            tokens=pick(self.tokens),
            at=last[:, None],
            x=pick(self.x),
            square=pick(self.square),
            total=pick(self.total),
            frozen={name: pick(scale) for name, scale in self.frozen.items()},
        )


_WRONG = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError)


class Standalone(nn.Module):
    """A circuit without its model; see the module's docstring. Made by `standalone` or `Circuit.to_module`."""

    def __init__(self, head: Head, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.head = head
        for name, value in tensors.items():
            self.register_buffer(name.replace(".", ":"), value)
        self.activation = activation(head.activation)
        self.sublayers = list(head.sublayers)
        self.attention = [name for name in self.sublayers if name.endswith("attn")]

    def _find(self, name: str) -> Tensor | None:
        return self._buffers.get(name.replace(".", ":"))

    def _tensor(self, name: str) -> Tensor:
        found = self._find(name)
        assert found is not None, name
        return found

    def _row(self, name: str, at: Int[Tensor, "*at"]) -> Tensor:
        """A constant at some positions: (1, n), or by position (T, n) or (B, 1, n)."""
        return _rows(self._tensor(name), at)

    # What can be asked of it.

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits over the vocabulary at every position."""
        stream = self._start(tokens, None)
        for name in self.sublayers:
            self._sublayer(name, stream, Gates())
        logits = F.linear(self._final(stream), self._tensor("unembed"), self._find("logits_bias"))
        bigram = self._find("bigram")
        return logits if bigram is None else logits + F.embedding(tokens, bigram)

    def answers(
        self,
        tokens: Int[Tensor, "B T"],
        last: Int[Tensor, "B"],
        ids: Int[Tensor, "B n"],
        *,
        gates: Gates | None = None,
        norms: FreezeNorms | None = None,
    ) -> Float[Tensor, "B n"]:
        """Logits of some tokens after each prompt.

        Args:
            tokens: prompts, padded on the right.
            last: index of each prompt's last token.
            ids: the tokens that are asked about, for each prompt.
            gates: how far nodes and edges are there; gradients pass.
            norms: 1/sigma of every norm, to hold them at another run's.

        After the last attention nothing but the last position is computed. Small circuits run on one thread, whatever
        torch is set to, which they put back. ValueError for a text that is too long, a
        token outside the vocabulary, or one at position 0 that the module was not made for.
        """
        with self._few_threads(tokens):
            return self._answers(tokens[:, : int(last.max()) + 1], last, ids, gates or Gates(), norms)

    def _answers(self, tokens: Tensor, last: Tensor, ids: Tensor, gates: Gates, norms: FreezeNorms | None) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        stream = self._start(tokens, norms)
        if not self.attention:
            stream = stream.only(rows, last)
        for name in self.sublayers:
            if self.attention and name == self.attention[-1]:
                stream = self._sublayer(name, stream, gates, stream.only(rows, last))
            else:
                self._sublayer(name, stream, gates)
        scale = None if norms is None else norms.scales["final.norm_scale"][:, None]
        final = self._final(stream, scale)[:, 0]
        logits = (self._tensor("unembed")[ids] * final[:, None]).sum(-1)
        bias, bigram = self._find("logits_bias"), self._find("bigram")
        if bias is not None:
            logits = logits + bias[ids]
        return logits if bigram is None else logits + bigram[stream.tokens, ids]

    @contextmanager
    def _few_threads(self, tokens: Tensor) -> Iterator[None]:
        """One thread for a run that is a long row of small steps, at whose ends several would wait for each other."""
        before = torch.get_num_threads()
        if tokens.is_cuda or before == 1 or tokens.numel() * self.head.nodes > SMALL:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def difference(
        self,
        batch: TaskBatch,
        *,
        nodes: Mapping[str, Bool[Tensor, "width"]] | None = None,
        edges: EdgeSet | None = None,
        norms: FreezeNorms | None = None,
    ) -> Float[Tensor, "R"]:
        """Logit of the right answer minus that of the wrong one, per prompt, of the circuit or of a part of it.

        `nodes` and `edges` choose a part of what the module was made of (None: all of it), see `gates`; the numbers are
        those of `answer_difference` under the `circuit_tap` of the same nodes and edges. ValueError as `answers`.
        """
        return self.gated_difference(batch, self.gates(nodes, edges), norms)

    def gated_difference(self, batch: TaskBatch, gates: Gates, norms: FreezeNorms | None = None) -> Float[Tensor, "R"]:
        """The same with nodes and edges there in part; gradients pass to the gates."""
        batch = batch.to(self._tensor("embed").device)
        logits = self.answers(
            batch.tokens, batch.last, torch.stack([batch.answer, batch.other], 1), gates=gates, norms=norms
        )
        return logits[:, 0] - logits[:, 1]

    def gates(
        self,
        nodes: Mapping[str, Bool[Tensor, "width"]] | None = None,
        edges: EdgeSet | None = None,
    ) -> Gates:
        """Gates of 0 and 1 for a part of the nodes and of the edges; None takes all.

        ValueError for an edge between nodes that the module does not have. Nodes that it does not have, and nodes and
        edges that reach no write, change nothing.
        """
        options = {"dtype": self._tensor("embed").dtype, "device": self._tensor("embed").device}
        chosen: dict[str, Tensor] = {}
        for location, mask in (nodes or {}).items():
            channels = self._find(f"{location}/channel")
            if channels is not None:
                chosen[location] = mask.to(options["device"])[channels].to(**options)
        blocks: dict[str, Tensor] = {}
        for target in self._targets() if edges is not None else ():
            assert edges is not None
            index = edges.get((_source(target), target), torch.empty(2, 0, dtype=torch.long)).to(options["device"])
            rows, columns = (self._tensor(f"{location}/channel") for location in (target, _source(target)))
            blocks[target] = place_edges(index, rows, columns).to(**options)
        return Gates(nodes=chosen, edges=blocks)

    def channels(self, location: str) -> Int[Tensor, "n"]:
        """The kept nodes at a location, ascending; none at locations that reach no write."""
        found = self._find(f"{location}/channel")
        return self._tensor("touched")[:0] if found is None else found

    def _targets(self) -> list[str]:
        kinds = {"attn": ("q", "k", "v", "resid_delta"), "mlp": ("post_act", "resid_delta")}
        return [f"{name}.{kind}" for name in self.sublayers for kind in kinds[name.split(".")[1]]]

    # The run.

    def _start(self, tokens: Tensor, norms: FreezeNorms | None) -> _Stream:
        if tokens.shape[1] > self.head.length:
            raise ValueError(f"tokens: {tokens.shape[1]} tokens; this circuit reaches as far as {self.head.length}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.head.vocab_size:
            raise ValueError(
                f"tokens: ids from {int(tokens.min())} to {int(tokens.max())}; the vocabulary of this circuit's model "
                f"has {self.head.vocab_size}"
            )
        length = tokens.shape[1]
        at = torch.arange(length, device=tokens.device)
        square = total = torch.empty(*tokens.shape, 0, device=tokens.device)
        if self.sublayers:
            square = F.embedding(tokens, self._tensor("embed/square"))
            total = F.embedding(tokens, self._tensor("embed/sum")) + self._row("constant/sum", at)
            if self._find("constant/cross") is not None:
                cross = self._tensor("constant/cross")[:length]
                embed = F.embedding(tokens.T, self._tensor("embed"))
                square = square + self._row("constant/square", at) + (embed @ cross).transpose(0, 1)
        frozen = {}
        if norms is not None:
            frozen = {name: norms.scales[f"{name}.norm_scale"][:, :length] for name in self.sublayers}
        return _Stream(
            tokens=tokens,
            at=at,
            x=F.embedding(tokens, self._tensor("carried/embed")),
            square=square,
            total=total,
            frozen=frozen,
        )

    def _sublayer(self, name: str, stream: _Stream, gates: Gates, ahead: _Stream | None = None) -> _Stream:
        """Writes what a sublayer does into the stream; with `ahead`, positions of the same, only at these."""
        ahead = ahead or stream
        read = self._nodes(f"{name}.act_in", self._read(name, stream), stream.at, gates)
        if name.endswith("attn"):
            asking = read
            if ahead is not stream:
                rows = torch.arange(len(read), device=read.device)
                asking = read[rows, ahead.at[:, 0]][:, None]
            delta = self._attention(name, read, asking, stream, ahead, gates)
        else:
            neurons = self.activation(self._map(f"{name}.post_act", read, stream.at, gates))
            neurons = self._nodes(f"{name}.post_act", neurons, stream.at, gates)
            delta = self._map(f"{name}.resid_delta", neurons, stream.at, gates)
        delta = self._nodes(f"{name}.resid_delta", delta, ahead.at, gates)
        # In place: no step before has kept the stream itself for its gradient.
        ahead.x.index_add_(-1, self._tensor(f"{name}/write"), delta.expand(*ahead.x.shape[:2], -1))
        return ahead

    def _read(self, name: str, stream: _Stream) -> Float[Tensor, "B T n"]:
        """What the kept reads see: the stream after the norm."""
        touched = self._tensor("touched")
        moved = stream.x[..., : len(touched)] + self._row(f"{name}/touched", stream.at)
        which = self.sublayers.index(name)
        x = stream.x.index_select(-1, self._tensor(f"{name}/read")) + self._row(f"{name}/constant", stream.at)
        # Sums in float64, as the variance is the difference of two of them.
        square = (stream.square[..., which] + moved.square().sum(-1)) / self.head.d_model
        if self.head.center:
            middle = (stream.total[..., which] + moved.sum(-1)) / self.head.d_model
            square = square - middle.square()
            x = x - middle[..., None].to(x)
        scale = stream.frozen.get(name)
        if scale is None:
            scale = torch.rsqrt(square + self.head.eps[name])[..., None].to(x)
        x = x * scale * self._tensor(f"{name}/gain")
        bias, positions = self._find(f"{name}/bias"), self._find(f"{name}/positions")
        if bias is not None:
            x = x + bias
        if positions is None:
            return x
        behind = self._row(f"{name}/positions", stream.at)
        return torch.cat([x, behind.expand(*x.shape[:2], -1)], -1)

    def _nodes(self, location: str, z: Float[Tensor, "B T n"], at: Tensor, gates: Gates) -> Float[Tensor, "B T n"]:
        """Deviation of the kept nodes from their ablation values, after AbsTopK among them."""
        gate, limit = gates.nodes.get(location), self.head.limits.get(location)
        if limit is not None:
            z = abs_topk(z if gate is None else z * gate.detach(), limit)
        deviation = z - self._row(f"{location}/mean", at)
        return deviation if gate is None else deviation * gate

    def _map(
        self, target: str, deviation: Float[Tensor, "B T sources"], at: Tensor, gates: Gates
    ) -> Float[Tensor, "B T targets"]:
        """Into a location, by the kept edges, from the deviations of the sources."""
        return _product(deviation, self._weight(target, gates)) + self._row(f"{target}/base", at)

    def _weight(self, target: str, gates: Gates) -> Float[Tensor, "targets sources"]:
        weight, gate = self._tensor(f"{target}/weight"), gates.edges.get(target)
        return weight if gate is None else weight * gate

    def _attention(
        self,
        name: str,
        read: Float[Tensor, "B T n"],
        asking: Float[Tensor, "B Q n"],
        stream: _Stream,
        ahead: _Stream,
        gates: Gates,
    ) -> Float[Tensor, "#B #Q targets"]:
        """The kept writes of attention, before AbsTopK."""
        base = self._row(f"{name}.resid_delta/base", ahead.at)
        delta = base if base.dim() == 3 else base[None]
        weight = self._weight(f"{name}.resid_delta", gates)
        still = self._find(f"{name}.v/still")
        if still is not None:
            values = self._deviation(f"{name}.v", read, stream, gates, still)
            mean = values.cumsum(1)
            if ahead is not stream:
                mean = mean[torch.arange(len(mean), device=mean.device), ahead.at[:, 0]][:, None]
            delta = delta + _product(mean * self._row(f"{name}/even", ahead.at), weight[:, still])
        if name not in self.head.widths:
            return delta
        k = self._heads(f"{name}.k", read, stream, gates)
        q = self._heads(f"{name}.q", asking, ahead, gates) * (self.head.scale[name] * self.head.widths[name] ** 0.5)
        v = self._heads(f"{name}.v", read, stream, gates)
        sink = self._find(f"{name}/sink")
        if ahead is stream:
            mixed = ops.causal_attention(q, k, v, sink)
        else:
            seen = torch.arange(read.shape[1], device=read.device) <= ahead.at
            mixed = ops.attention_pattern(q, k, sink, seen[:, None, None]) @ v
        # What is ablated is mixed along with what is kept, each in slots of its own.
        chosen, slot = self._tensor(f"{name}.v/from"), self._tensor(f"{name}.v/slot")
        out = self._tensor(f"{name}/anchor").index_copy(1, slot, weight[:, chosen])
        return delta + _product(ops.merge_heads(mixed), out)

    def _heads(
        self, location: str, read: Float[Tensor, "B T n"], stream: _Stream, gates: Gates
    ) -> Float[Tensor, "B N T H"]:
        """Queries, keys or values of the heads that are computed, in their slots."""
        chosen, slot = self._tensor(f"{location}/from"), self._tensor(f"{location}/slot")
        heads = self._deviation(location, read, stream, gates, chosen, slot, self._tensor(f"{location}/fixed"))
        if self.head.protect_first and not location.endswith("q"):  # no later position sees a query
            heads = torch.cat([self._first(f"{location}/first", stream), heads[:, 1:]], 1)
        return ops.split_heads(heads, heads.shape[-1] // self.head.widths[location.rpartition(".")[0]])

    def _deviation(
        self,
        location: str,
        read: Float[Tensor, "B T sources"],
        stream: _Stream,
        gates: Gates,
        chosen: Int[Tensor, "n"],
        slot: Int[Tensor, "n"] | None = None,
        fixed: Float[Tensor, "rows C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Some kept nodes of a location as deviations; with `slot` added to what is `fixed`, each in its place."""
        if location in self.head.limits:
            found = self._nodes(location, self._map(location, read, stream.at, gates), stream.at, gates)
            found = found.index_select(-1, chosen)
            if slot is None or fixed is None:
                return found
            return _rows(fixed, stream.at).expand(*read.shape[:2], -1).index_add(-1, slot, found)
        # Without AbsTopK all of it is one linear map.
        weight, gate = self._weight(location, gates)[chosen], gates.nodes.get(location)
        offset = (self._tensor(f"{location}/base") - self._tensor(f"{location}/mean"))[:, chosen]
        if gate is not None:
            weight, offset = weight * gate[chosen, None], offset * gate[chosen]
        if slot is not None and fixed is not None:
            weight = weight.new_zeros(fixed.shape[1], weight.shape[1]).index_copy(0, slot, weight)
            rows = max(len(fixed), len(offset))
            offset = fixed.expand(rows, -1).index_add(1, slot, offset.expand(rows, -1))
        return _product(read, weight) + _rows(offset, stream.at)

    def _first(self, name: str, stream: _Stream) -> Float[Tensor, "B 1 n"]:
        """What the whole model does at position 0."""
        row = self._tensor("first/row")[stream.tokens[:, :1]]
        if bool((row < 0).any()):
            token = int(stream.tokens[:, :1][row < 0][0])
            raise ValueError(
                f"tokens: token {token} at position 0, which is protected from ablation; this circuit was made for "
                f"{int((self._tensor('first/row') >= 0).sum())} other tokens there (first_tokens)"
            )
        return self._tensor(name)[row]

    def _final(self, stream: _Stream, scale: Tensor | None = None) -> Float[Tensor, "B T D"]:
        """The whole residual stream, after the final norm."""
        touched = self._tensor("touched")
        residual = F.embedding(stream.tokens, self._tensor("embed")) + self._row("constant", stream.at)
        moved = stream.x[..., : len(touched)] + self._row("constant", stream.at)[..., touched]
        residual = residual.index_copy(-1, touched, moved)
        if self.head.protect_first:
            first = stream.at == 0
            if bool(first.any()):
                residual = torch.where(first[..., None], self._first("first/residual", stream), residual)
        if scale is None:
            scale = ops.norm_scale(residual, center=self.head.center, eps=self.head.eps["final"])
        return ops.scaled(
            residual, scale, self._tensor("final/gain"), self._find("final/bias"), center=self.head.center
        )

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file that needs no model to be read. Returns the path."""
        tensors = {name: value.cpu() for name, value in self.state_dict().items()}
        save_tensors(Path(path), tensors, {"kind": KIND, **asdict(self.head)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Standalone":
        """Reads what `save` wrote. ArtifactError for any other file."""
        tensors, head = load_tensors(Path(path), kind=KIND)
        try:
            check_fields(path, head, HEAD_FIELDS)
            for name in ("eps", "limits", "scale", "widths"):
                check_numbers(path, name, head[name])
            module = cls(Head(**{name: head[name] for name in HEAD_FIELDS}), tensors)
            module._try()
        except _WRONG as error:
            raise ArtifactError(f"{path}: is no whole circuit, {type(error).__name__}: {error}") from error
        return module

    @torch.no_grad()
    def _try(self) -> None:
        """Runs on two tokens; whatever does not fit in what was read comes to light there."""
        rows = self._find("first/row")
        first = 0 if rows is None or not self.head.protect_first else int((rows >= 0).nonzero()[0, 0])
        self(torch.full((1, min(2, self.head.length)), first))


def _rows(table: Float[Tensor, "rows n"], at: Int[Tensor, "*at"]) -> Tensor:
    """What a table with one row, or one for each position, holds at some positions: (1, n), (T, n) or (B, 1, n)."""
    if len(table) == 1:
        return table
    counts_up = at.dim() == 1  # then they are 0 ... T - 1
    return table[: len(at)] if counts_up else table[at]


def _product(x: Float[Tensor, "*rows sources"], weight: Float[Tensor, "targets sources"]) -> Tensor:
    if not weight.numel():
        return x.new_zeros(*x.shape[:-1], len(weight))
    # Compiled maps gain by the zeros of a weight, but their way back is meant for larger ones.
    return F.linear(x, weight) if torch.is_grad_enabled() else ops.linear(x, weight, None)


def _source(target: str) -> str:
    kind = kind_of(target)
    return target.removesuffix(kind) + FED_BY[kind]


def standalone(
    model: Runnable,
    nodes: Mapping[str, Bool[Tensor, "width"]],
    means: Means,
    edges: EdgeSet | None = None,
    *,
    first_tokens: Int[Tensor, "F"] | None = None,
) -> Standalone:
    """The circuit of these nodes and edges as a module of its own, on the model's device and in its precision.

    Args:
        model: where they come from; nothing of it is kept but copies of numbers.
        nodes: kept nodes, by location.
        means: ablation values of every node, one per node, or one per position and node.
        edges: kept edges; None keeps all that join the nodes.
        first_tokens: tokens that may stand at position 0, where `means` protect it: the whole model runs there, on
            each of them once. None takes the vocabulary.

    ValueError where the residual stream has an activation or AbsTopK of its own, and for ablation values that differ
    from prompt to prompt.
    """
    head, tensors = extract(model, nodes, means, edges, first_tokens)
    return Standalone(head, {name: value.clone() for name, value in tensors.items()})

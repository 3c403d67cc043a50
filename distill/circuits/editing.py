"""Editing a model at the nodes of a circuit: what a tap does at run time, folded into weights and biases for good.

    edit = plan("ablate", ["2.mlp.post_act.17"], constants(means))
    fixed = edit.apply(model)                # an ordinary model of the same class; `model` itself is left as it is
    same = model.run(tokens, tap=edit.tap(model))

Every change of a node is x -> value + factor (x - value): `ablate` has factor 0 and the node's mean as the value,
`clamp` factor 0 and a value of one's own, `scale` any factor. `cut-edges` makes an edge contribute the mean of its
source. The constant is one number per node, also where the means of a circuit are one per position, since no bias
depends on the position: there it is their mean over positions, without position 0 where that is protected.

How that becomes exact (up to rounding), by the place of the node; AbsTopK, where the model has it there, has chosen
before anything is changed, so the node goes on competing for a slot as it did:

- a read `act_in` or a neuron `post_act`: the columns of the maps that read it are scaled, and what its constant
  contributes goes into their biases;
- a value `attn.v`: likewise, with factor alone. A constant passes through attention unchanged only where the rows of
  the pattern sum to 1. An attention sink takes a share that differs from token to token, so with a sink no bias
  stands for a constant other than 0;
- `attn.q`, `attn.k`, and the writes `resid_delta`: no weight reads these after AbsTopK. Where there is no AbsTopK
  (GPT-2) the rows that make them are scaled and their biases set, which is exact, as for `attn.v` there. Behind an
  AbsTopK only one change is exact: to hold the node at 0 and out of the competition (`competition=False`), which zeroes
  its row and bias, so that the slot it had falls to another channel.

`competition=False` takes a node that is held at a constant out of the competition at the other places too: the gain of
its norm, or its row, becomes 0. That is how circuits are run (`MaskTap`). What is not exact is refused, unless asked
for (`inexact=True`): then the row and bias are changed in front of AbsTopK, which may drop the constant, or keep
it at the cost of another channel.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.circuits.ablation import Means
from distill.circuits.edges import EdgeSet, EdgeTap
from distill.model import DenseModel, SparseTransformer
from distill.model.anatomy import Anatomy, anatomy
from distill.model.run import Runnable
from distill.model.sites import Tap, chain, kind_of, layer_of, node_name, split_node
from distill.model.transformer import Layer, SparseTransformerConfig

Op = Literal["ablate", "scale", "clamp", "cut-edges"]
OPS: tuple[Op, ...] = ("ablate", "scale", "clamp", "cut-edges")
Model = TypeVar("Model", SparseTransformer, DenseModel)
READ_BY_MAPS = ("attn.act_in", "mlp.act_in", "mlp.post_act")
NO_BIAS = "{name}: the maps that its constant would go into have no bias; exact is to clamp at 0"
_EDGE = re.compile(r"(?P<source>[^>\s]+)->(?P<target>[^>\s]+)")


class InexactError(ValueError):
    """A change that no weights and biases stand for; the message says why, and what is possible."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of one node: x -> value + factor (x - value)."""

    node: str
    """Its name, `2.mlp.post_act.17`."""
    factor: float = 0.0
    """0 holds it at the value, 1 leaves it alone."""
    value: float = 0.0
    """What it is moved to, in units of the activation."""
    competition: bool = True
    """Whether it goes on competing for a slot of AbsTopK; without, the factor has to be 0."""

    @property
    def shift(self) -> float:
        """What is added to factor * x."""
        return (1.0 - self.factor) * self.value


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One weight that from now on sees its source at a constant."""

    source: str
    target: str
    value: float = 0.0
    """The constant."""


@dataclass(frozen=True, kw_only=True)
class ModelEdit:
    """Changes of nodes and cuts of edges of one model. What has factor 1 and would change nothing is left out."""

    changes: tuple[Change, ...] = ()
    cuts: tuple[Cut, ...] = ()
    inexact: bool = False
    """Whether changes that cannot be folded exactly are made in front of AbsTopK."""

    def __post_init__(self) -> None:
        names = [change.node for change in self.changes]
        if len(set(names)) < len(names):
            raise ValueError(f"nodes: got {sorted(names)}, allowed is each node once")
        if both := {cut.target for cut in self.cuts} & set(names):
            raise ValueError(f"nodes: {min(both)} is changed and has an edge cut into it; allowed is one or the other")
        for change in self.changes:
            if not change.competition and change.factor != 0:
                raise ValueError(f"factor: got {change.factor} for {change.node} out of competition, allowed is 0")
        object.__setattr__(self, "changes", tuple(one for one in self.changes if one.factor != 1))

    def check(self, model: Runnable) -> None:
        """ValueError for a node or edge that the model does not have, InexactError for what it cannot fold."""
        widths = model.widths
        for name in [change.node for change in self.changes] + [end for c in self.cuts for end in (c.source, c.target)]:
            location, channel = split_node(name)
            if channel >= widths.get(location, 0):
                raise ValueError(f"node: {name} is none of this model's, which has {widths.get(location, 0)} there")
        matrices = model.matrices()
        for cut in self.cuts:
            (source, i), (target, j) = split_node(cut.source), split_node(cut.target)
            if (source, target) not in matrices or float(matrices[source, target][j, i]) == 0:
                raise ValueError(f"edge: {cut.source}->{cut.target} is no weight of this model")
        if not self.inexact:
            for reason in self._obstacles(model):
                raise InexactError(reason)

    def exact(self, model: Runnable) -> bool:
        """Whether weights and biases of this model stand for all of the edit."""
        return next(self._obstacles(model), None) is None

    def _obstacles(self, model: Runnable) -> Iterator[str]:
        parts, maps = anatomy(model), _maps(model)
        for one in (*self.changes, *self.cuts):
            if reason := _obstacle(parts, one) or _unbiased(model, parts, maps, one):
                yield reason

    def tap(self, model: Runnable) -> Tap:
        """A tap under which `model` computes what the edited model does, where the edit is exact."""
        taps: list[Tap] = [_ChangeTap(self.changes)]
        if self.cuts:
            taps.append(_cut_tap(model, self.cuts))
        return chain(*taps)

    @torch.no_grad()
    def apply(self, model: Model) -> Model:
        """A copy of the model with the edit in its weights and biases; without any changes equal bit for bit.

        A sparse model without biases (`linear_bias`) gets some where a constant needs them. ValueError as `check`, and
        for maps of a dense model that have no bias and would need one.
        """
        self.check(model)
        edited = copy.deepcopy(model)
        if isinstance(edited, SparseTransformer) and not edited.architecture.linear_bias and self._shifts():
            edited = _with_biases(edited)
        maps, parts = _maps(edited), anatomy(edited)
        for cut in self.cuts:
            (source, i), (target, j) = split_node(cut.source), split_node(cut.target)
            (one,) = maps[source, target]
            one.add(j, one.weight[j, i] * cut.value, cut.target)
            one.weight[j, i] = 0
        for change in self.changes:
            _fold(edited, maps, change, parts)
        return edited

    def _shifts(self) -> bool:
        return any(change.shift for change in self.changes) or any(cut.value for cut in self.cuts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes that are changed, and the edges that are cut, in a person's words."""
        return (*(one.node for one in self.changes), *(f"{cut.source}->{cut.target}" for cut in self.cuts))


def constants(means: Means) -> dict[str, Float[Tensor, "width"]]:
    """One mean per node, by location: over positions where there are several, without a protected position 0."""
    values = {}
    for location, value in means.values.items():
        rows = value[1:] if means.protect_first and value.dim() == 2 and len(value) > 1 else value
        values[location] = rows.double().mean(0).float() if value.dim() == 2 else value
    return values


def plan(
    op: str,
    names: Sequence[str],
    means: Mapping[str, Float[Tensor, "width"]],
    *,
    factor: float | None = None,
    value: float | None = None,
    competition: bool = True,
    inexact: bool = False,
) -> ModelEdit:
    """An edit in the words of the command line.

    Arguments:
        op: one of `OPS`.
        names: nodes, `2.mlp.post_act.17`; for cut-edges edges, `2.mlp.act_in.3->2.mlp.post_act.17`.
        means: what a node is moved to where `value` does not say (`constants`).
        factor: for scale: what is left of a node's deviation from the value.
        value: what all nodes are moved to, in units of the activation; needed for clamp.
        competition, inexact: see the module's docstring.

    ValueError for what does not fit together.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, allowed are {', '.join(OPS)}")
    if (factor is None) == (op == "scale"):
        raise ValueError(f"factor: got {factor} with op {op}; scale needs one, and no other op has any")
    if op == "clamp" and value is None:
        raise ValueError("value: missing; clamp needs the value to hold the nodes at")
    if op == "ablate" and value is not None:
        raise ValueError(f"value: got {value} with ablate, which takes the mean; clamp holds nodes at a value")
    if not names:
        raise ValueError("nodes: none given; allowed are one or more")

    def moved_to(name: str) -> float:
        location, channel = split_node(name)
        if location not in means or channel >= len(means[location]):
            raise ValueError(f"node: {name} is none of this model's")
        return float(means[location][channel]) if value is None else value

    if op == "cut-edges":
        ends = [parse_edge(name) for name in names]
        cuts = tuple(Cut(source=one, target=other, value=moved_to(one)) for one, other in ends)
        return ModelEdit(cuts=cuts, inexact=inexact)
    made = [
        Change(node=name, factor=factor or 0.0, value=moved_to(name), competition=competition or bool(factor))
        for name in names
    ]
    return ModelEdit(changes=tuple(made), inexact=inexact)


def parse_edge(name: str) -> tuple[str, str]:
    """Source and target of `SOURCE->TARGET`. ValueError for anything else."""
    found = _EDGE.fullmatch(name)
    if found is None:
        raise ValueError(f"edge: got {name!r}, allowed is SOURCE->TARGET, such as 0.mlp.act_in.3->0.mlp.post_act.17")
    ends = found["source"], found["target"]
    for end in ends:
        split_node(end)
    return ends


def obstacle(model: Runnable, one: Change | Cut) -> str | None:
    """Why a change or cut of this model is not exact, in words; None where it is."""
    parts = anatomy(model)
    return _obstacle(parts, one) or _unbiased(model, parts, _maps(model), one)


def _obstacle(parts: Anatomy, one: Change | Cut) -> str | None:
    name = one.node if isinstance(one, Change) else one.source
    location = split_node(name)[0]
    kind, topk = kind_of(location), parts.kept[location] is not None
    sink = parts.layers[layer_of(location)].sink is not None
    shift = one.shift if isinstance(one, Change) else one.value
    if isinstance(one, Cut) and parts.uncut:
        return f"{name}: the model has {' and '.join(parts.uncut)}, no single edge of it can be cut"
    if kind in READ_BY_MAPS:
        return None
    if kind == "attn.v":
        if shift == 0 or not sink or (not topk and isinstance(one, Change)):
            return None
        return (
            f"{name}: held at {shift:.4g} it is no constant behind attention, whose sink takes a share that differs "
            "from token to token; exact is to clamp it at 0"
        )
    assert isinstance(one, Change), one
    if not topk or (one.factor == 0 and one.value == 0 and not one.competition):
        return None
    return (
        f"{name}: AbsTopK chooses behind the only weights that make it, so no weights hold it at {one.value:.4g} "
        f"with factor {one.factor:g}; exact is to clamp it at 0 out of competition"
    )


def _unbiased(
    model: Runnable, parts: Anatomy, maps: Mapping[tuple[str, str], Sequence["_Map"]], one: Change | Cut
) -> str | None:
    """Why a constant cannot go into a dense model's maps that have no bias; a sparse model would get some."""
    if isinstance(model, SparseTransformer) or (one.shift if isinstance(one, Change) else one.value) == 0:
        return None
    if isinstance(one, Cut):
        name, found = one.source, maps.get((split_node(one.source)[0], split_node(one.target)[0]), ())
    else:
        name, location = one.node, split_node(one.node)[0]
        end = 0 if _behind(parts, one) else 1
        found = [each for ends, several in maps.items() if ends[end] == location for each in several]
    return NO_BIAS.format(name=name) if any(each.bias is None for each in found) else None


def _behind(parts: Anatomy, change: Change) -> bool:
    """Whether a change goes into the maps that read its node, and not into those that make it."""
    location = split_node(change.node)[0]
    kind, topk = kind_of(location), parts.kept[location] is not None
    sink = parts.layers[layer_of(location)].sink is not None
    # Where values are shared by heads (grouped-query attention) one row makes what several columns read.
    return kind in READ_BY_MAPS or (kind == "attn.v" and topk and (change.shift == 0 or not sink))


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Map:
    """A linear map as (out, in), a view that writes through to the model, and its bias."""

    weight: Tensor
    bias: Tensor | None

    def add(self, rows: Any, what: Tensor, name: str) -> None:
        """Adds to the bias; where there is none, nothing but zeros may be added."""
        if self.bias is not None:
            self.bias[rows] += what
        elif bool((what != 0).any()):
            raise InexactError(NO_BIAS.format(name=name))


def _maps(model: Runnable) -> dict[tuple[str, str], list[_Map]]:
    """Every linear map between node locations; a gated MLP has two into its neurons."""
    found: dict[tuple[str, str], list[_Map]] = {}
    for i in range(model.n_layer):
        read, write = (f"{i}.attn.act_in", f"{i}.attn.resid_delta"), (f"{i}.mlp.act_in", f"{i}.mlp.resid_delta")
        heads, out, up, down = _layer_maps(model, i)
        for name, one in zip("qkv", heads, strict=True):
            found[read[0], f"{i}.attn.{name}"] = [one]
        found[f"{i}.attn.v", read[1]] = [out]
        found[write[0], f"{i}.mlp.post_act"] = up
        found[f"{i}.mlp.post_act", write[1]] = [down]
    return found


def _layer_maps(model: Runnable, i: int) -> tuple[list[_Map], _Map, list[_Map], _Map]:
    """q, k and v; attention's write; the maps into the neurons; and out of them."""
    if isinstance(model, SparseTransformer):
        layer = model.layers[i]
        assert isinstance(layer, Layer)
        linear = [_Map(one.weight, one.bias) for one in (layer.attn_q, layer.attn_k, layer.attn_v, layer.attn_out)]
        return linear[:3], linear[3], [_Map(layer.mlp_in.weight, layer.mlp_in.bias)], _plain(layer.mlp_out)
    assert isinstance(model, DenseModel)
    family = model.family

    def maps(name: str) -> list[_Map]:
        part, pieces = model.part(name, i), 3 if name == family.qkv else 1
        weight, bias = part.get_parameter("weight").detach(), getattr(part, "bias", None)
        rows = (weight.T if family.transposed else weight).chunk(pieces)
        biases = [None] * pieces if bias is None else bias.detach().chunk(pieces)
        return [_Map(one, other) for one, other in zip(rows, biases, strict=True)]

    names = (family.qkv,) if isinstance(family.qkv, str) else family.qkv
    gates = [] if family.mlp_gate is None else maps(family.mlp_gate)
    heads = [one for name in names for one in maps(name)]
    return heads, maps(family.attn_out)[0], [*maps(family.mlp_in), *gates], maps(family.mlp_out)[0]


def _plain(linear: nn.Linear) -> _Map:
    return _Map(linear.weight, linear.bias)


def _fold(model: Runnable, maps: Mapping[tuple[str, str], list[_Map]], change: Change, parts: Anatomy) -> None:
    """One change, into the maps that read the node where that is exact, else into those that make it."""
    location, channel = split_node(change.node)
    kind, topk = kind_of(location), parts.kept[location] is not None
    if _behind(parts, change):
        for (source, _), readers in maps.items():
            for one in readers if source == location else ():
                one.add(slice(None), one.weight[:, channel] * change.shift, change.node)
                one.weight[:, channel] *= change.factor
        if change.competition or not topk:
            return
        change = replace(change, value=0.0)  # the constant has gone into the readers; what is left is to silence
    if kind.endswith("act_in"):
        _silence_norm(model, location, channel)
        return
    for (_, target), makers in maps.items():
        for one in makers if target == location else ():
            one.weight[channel] *= change.factor
            if one.bias is not None:
                one.bias[channel] *= change.factor
            one.add(channel, one.weight.new_tensor(change.shift), change.node)


def _silence_norm(model: Runnable, location: str, channel: int) -> None:
    """No gain and no bias for one channel of the norm in front of a read, which then never takes a slot of AbsTopK."""
    assert isinstance(model, SparseTransformer), "no dense model has AbsTopK"
    layer, part = model.layers[layer_of(location)], kind_of(location).split(".")[0]
    norm = getattr(layer, f"{part}_norm")
    if channel >= model.d_model:
        norm, channel = getattr(layer, f"{part}_position_norm"), channel - model.d_model
    for parameter in (norm.weight, norm.bias):
        if parameter is not None:
            parameter[channel] = 0


def _with_biases(model: SparseTransformer) -> SparseTransformer:
    """The same model with biases of 0 in its linear maps."""
    config = SparseTransformerConfig(**asdict(replace(model.architecture, linear_bias=True)))
    wider = SparseTransformer(config)
    nn.Module.to(wider, next(model.parameters()).device)
    state = {name: torch.zeros_like(value) for name, value in wider.state_dict().items() if name.endswith(".bias")}
    wider.load_state_dict({**state, **model.state_dict()})
    return wider.train(model.training)


# --- taps ------------------------------------------------------------------------------------------------------------


class _ChangeTap:
    """Changes nodes as they pass, behind AbsTopK; what is out of competition is zeroed in front of it."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.at: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for location in dict.fromkeys(split_node(change.node)[0] for change in changes):
            here = [change for change in changes if split_node(change.node)[0] == location]
            channel = [split_node(change.node)[1] for change in here]
            silent = [c for c, change in zip(channel, here, strict=True) if not change.competition]
            factor, shift = ([getattr(change, name) for change in here] for name in ("factor", "shift"))
            self.at[location] = (
                torch.tensor(channel),
                torch.tensor(factor),
                torch.tensor(shift),
                torch.tensor(silent, dtype=torch.long),
            )
        self.wants = frozenset({"pre"}) if any(len(found[3]) for found in self.at.values()) else frozenset()

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        location = site.removesuffix(".pre")
        if location not in self.at:
            return x
        channel, factor, shift, silent = self.at[location]
        if location != site:
            return x.index_fill(-1, silent.to(x.device), 0)
        channel = channel.to(x.device)
        return x.index_copy(-1, channel, x[..., channel] * factor.to(x) + shift.to(x))


def _cut_tap(model: Runnable, cuts: Sequence[Cut]) -> EdgeTap:
    removed: dict[tuple[str, str], list[tuple[int, int]]] = {}
    values = {location: torch.zeros(width) for location, width in model.widths.items()}
    for cut in cuts:
        (source, i), (target, j) = split_node(cut.source), split_node(cut.target)
        removed.setdefault((source, target), []).append((j, i))
        values[source][i] = cut.value
    edges: EdgeSet = {matrix: torch.tensor(sorted(index)).T for matrix, index in removed.items()}
    means = Means(values=values, magnitude=values, model="", data="", tokens=0)
    return EdgeTap(model, edges, means)


def edge_names(edges: Mapping[tuple[str, str], Tensor]) -> list[str]:
    """Names of a set of edges, `SOURCE->TARGET`, in the order of the run."""
    return [
        f"{node_name(source, int(i))}->{node_name(target, int(j))}"
        for (source, target), index in edges.items()
        for j, i in index.T
    ]

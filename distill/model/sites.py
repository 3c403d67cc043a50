"""Names of the places in a model, and the taps that read and write there.

A *node location* is a tensor whose channels are the nodes of circuits ([G 2.2]; the names are those of OpenAI's
released code, so that circuits can be exchanged). A *residual site* is the residual stream between two sublayers:
bridges live there, and runs can be stopped and started there.

A *tap* is a callable `(site, x) -> x`. A run hands it every node location (after AbsTopK) and every residual site it
passes, as (B, T, width), and goes on with what comes back. Recording, replacing, masking, ablating, steering and
interchange are all taps. A tap with an attribute `wants`, a set out of `EXTRAS`, is handed more:

- `pre`: `{location}.pre`, the tensor before AbsTopK, where the model has an AbsTopK at that location;
- `norm_scale`: `{i}.attn.norm_scale`, `{i}.mlp.norm_scale`, `final.norm_scale`: 1/sigma of a norm, (B, T, 1);
- `pattern`: `{i}.attn.pattern`: attention probabilities without the sink's share, (B, N, T, T).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

KINDS = (
    "attn.act_in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.resid_delta",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)
"""Kinds of node location in one layer, in the order of the run."""

FINAL_SITE = "final_resid"
EXTRAS = frozenset({"pre", "norm_scale", "pattern"})


@runtime_checkable
class Tap(Protocol):
    """What a run calls at every site; see the module's docstring."""

    def __call__(self, site: str, x: Tensor, /) -> Tensor: ...


def node_locations(n_layer: int) -> tuple[str, ...]:
    """All node locations of a model of `n_layer` layers, in the order of the run: `{i}.attn.act_in` and so on."""
    return tuple(f"{i}.{kind}" for i in range(n_layer) for kind in KINDS)


def residual_sites(n_layer: int) -> tuple[str, ...]:
    """The 2L+1 residual sites in the order of the run: `{i}.resid_in`, `{i}.resid_mid`, and `final_resid`."""
    halves = tuple(f"{i}.{half}" for i in range(n_layer) for half in ("resid_in", "resid_mid"))
    return (*halves, FINAL_SITE)


def layer_of(site: str) -> int:
    """The layer index at the front of a site's name. ValueError for a name without one."""
    head = site.split(".", 1)[0]
    if not head.isdigit():
        raise ValueError(f"site: {site!r} has no layer; allowed are names such as '3.attn.act_in' or '3.resid_in'")
    return int(head)


def kind_of(location: str) -> str:
    """`attn.act_in` for `3.attn.act_in`. ValueError for a name that is no node location."""
    head, _, kind = location.partition(".")
    if not head.isdigit() or kind not in KINDS:
        raise ValueError(f"location: {location!r} is no node location; allowed are LAYER.KIND with KIND in {KINDS}")
    return kind


def node_name(location: str, channel: int) -> str:
    """The name of a node, `3.attn.act_in.83`: the same in commands, JSON and pages."""
    kind_of(location)
    return f"{location}.{channel}"


def split_node(name: str) -> tuple[str, int]:
    """(`3.attn.act_in`, 83) for `3.attn.act_in.83`. ValueError for a name that is no node."""
    location, _, channel = name.rpartition(".")
    if not channel.isdigit():
        raise ValueError(f"node: {name!r} is no node; allowed are names such as '3.attn.act_in.83'")
    kind_of(location)
    return location, int(channel)


def wants(tap: Tap | None, extra: str) -> bool:
    """Whether `tap` asks for one of `EXTRAS`."""
    return extra in getattr(tap, "wants", ())


def site_index(site: str, n_layer: int, *, field: str) -> int:
    """Position of a residual site in the run; ValueError naming `field` where there is none such."""
    sites = residual_sites(n_layer)
    if site not in sites:
        raise ValueError(f"{field}: {site!r} is no residual site of this model; allowed are {', '.join(sites)}")
    return sites.index(site)


class Record:
    """Keeps what passes: `.values[site]` after a run. `sites` limits it to some; None keeps all."""

    def __init__(self, sites: Collection[str] | None = None) -> None:
        self.sites = None if sites is None else frozenset(sites)
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if self.sites is None or site in self.sites:
            self.values[site] = x
        return x


class Replace:
    """Puts given tensors in place of what passes; each must broadcast to the tensor it replaces."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = dict(values)

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site not in self.values:
            return x
        return self.values[site].to(x).expand_as(x)


class Edit:
    """Applies a function at some sites: `Edit({"2.resid_in": lambda x: x + direction})`."""

    def __init__(self, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self.edits = dict(edits)

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        return self.edits[site](x) if site in self.edits else x


class Chain:
    """Several taps as one, called in the order given; it wants what any of them wants."""

    def __init__(self, *taps: Tap) -> None:
        self.taps = taps
        self.wants = frozenset().union(*(getattr(tap, "wants", ()) for tap in taps))

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        for tap in self.taps:
            extra = site.rpartition(".")[2]
            if extra not in EXTRAS or wants(tap, extra):
                x = tap(site, x)
        return x


def chain(*taps: Tap) -> Chain:
    """`Chain(*taps)`."""
    return Chain(*taps)

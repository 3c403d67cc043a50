"""What a model is made of, under one set of names for sparse and dense models.

`Runnable` says how to run a model and where its edges are; who takes a piece out of a model (a circuit on its own)
needs the rest too: norms, biases, sinks, the reach of AbsTopK. Tensors are those of the model, detached, not copies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from distill.model.dense import DenseModel, norm_options
from distill.model.run import Runnable
from distill.model.sites import kind_of
from distill.model.transformer import ACTIVATIONS, RESIDUAL_TOPK, Layer, Norm, SparseTransformer

FED_BY = {
    "attn.q": "attn.act_in",
    "attn.k": "attn.act_in",
    "attn.v": "attn.act_in",
    "attn.resid_delta": "attn.v",
    "mlp.post_act": "mlp.act_in",
    "mlp.resid_delta": "mlp.post_act",
}
"""Kind of node location that the edges into another come from."""


@dataclass(frozen=True, kw_only=True)
class NormParts:
    """One norm: gain * (x - mean) / sigma + bias, without the mean where it does not centre."""

    gain: Float[Tensor, " D"]
    bias: Float[Tensor, " D"] | None
    center: bool
    eps: float


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What a layer has besides its weights."""

    norms: Mapping[str, NormParts]
    """Norm before each sublayer, `attn` and `mlp`."""
    positions: Mapping[str, Float[Tensor, "context P"]]
    """Read-only position channels behind the residual ones in each sublayer's read, where there are such."""
    sink: Float[Tensor, " N"] | None
    """Logit of each head's attention sink."""
    scale: float
    """What q k is multiplied by before the softmax."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model without its matrices: see `Runnable.matrices`, `embedding`, `unembedding` for these."""

    layers: tuple[LayerParts, ...]
    final_norm: NormParts
    biases: Mapping[str, Float[Tensor, " width"]]
    """Bias of the linear map into a node location; zeros where the model has none."""
    kept: Mapping[str, int | None]
    """Channels that AbsTopK keeps at each node location; None where it does not act."""
    activation: str
    """Name of the non-linearity of the MLP, for `activation`."""
    embed_positions: Float[Tensor, "context D"] | None
    """Learned positions that are added to the embedding."""
    logits_bias: Float[Tensor, " V"] | None
    bigram: Float[Tensor, "V V"] | None
    uncut: tuple[str, ...] = ()
    """What joins nodes other than by one weight, in words; single edges of such a model cannot be cut."""
    obstacles: tuple[str, ...] = ()
    """What the model does that these parts and its matrices do not tell, in words; a piece of it cannot stand alone."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The non-linearity of that name. ValueError for a name that neither this package nor transformers knows."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name not in ACT2FN:
        raise ValueError(f"activation: {name!r} is not known; allowed are {', '.join(sorted({*ACTIVATIONS, *ACT2FN}))}")
    return ACT2FN[name]


@singledispatch
def anatomy(model: Runnable) -> Anatomy:
    """The parts of a model. ValueError for a model of an unknown class."""
    known = ", ".join(sorted(kind.__name__ for kind in anatomy.registry if kind is not object))
    raise ValueError(f"model: the parts of a {type(model).__name__} are not known; allowed are {known}")


@anatomy.register
def _sparse(model: SparseTransformer) -> Anatomy:
    a = model.architecture
    biases: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        maps = {"q": layer.attn_q, "k": layer.attn_k, "v": layer.attn_v, "resid_delta": layer.attn_out}
        biases |= {f"{i}.attn.{name}": _bias(linear) for name, linear in maps.items()}
        biases |= {f"{i}.mlp.post_act": _bias(layer.mlp_in), f"{i}.mlp.resid_delta": _bias(layer.mlp_out)}
        positions = {}
        if a.position == "concat":
            with torch.no_grad():
                positions["attn"] = layer.attn_position_norm(model.embed_positions.weight)
                positions["mlp"] = layer.mlp_position_norm(model.embed_positions.weight)
        layers.append(
            LayerParts(
                norms={"attn": _norm(layer.attn_norm), "mlp": _norm(layer.mlp_norm)},
                positions=positions,
                sink=None if layer.attn_sink is None else layer.attn_sink.detach(),
                scale=a.d_head**-0.5,
            )
        )
    residual = () if a.residual_activation == "identity" else (f"{a.residual_activation} on the residual stream",)
    places = (place for place in RESIDUAL_TOPK if a.kept(place, a.d_model) is not None)
    residual += tuple(f"AbsTopK on the residual stream ({place})" for place in places)
    bias = model.unembed.bias
    return Anatomy(
        layers=tuple(layers),
        final_norm=_norm(model.final_norm),
        biases=biases,
        kept={location: a.kept(kind_of(location), width) for location, width in model.widths.items()},
        activation=a.activation,
        embed_positions=model.embed_positions.weight.detach() if a.position == "added" else None,
        logits_bias=None if bias is None else bias.detach(),
        bigram=None if model.bigram is None else model.bigram.detach(),
        obstacles=residual,
    )


@anatomy.register
def _dense(model: DenseModel) -> Anatomy:
    family = model.family
    biases: dict[str, Tensor] = {}
    layers = []
    for i in range(model.n_layer):
        for name, part in zip("qkv", model.qkv(i, model.bias), strict=True):
            biases[f"{i}.attn.{name}"] = part
        biases[f"{i}.attn.resid_delta"] = model.bias(family.attn_out, i)
        biases[f"{i}.mlp.post_act"] = model.bias(family.mlp_in, i)
        biases[f"{i}.mlp.resid_delta"] = model.bias(family.mlp_out, i)
        scale = getattr(model.part(family.attn, i), "scaling", 1.0)  # GPT-Neo does not scale
        assert isinstance(scale, float), scale
        layers.append(
            LayerParts(
                norms={
                    "attn": _norm(model.part(family.attn_norm, i)),
                    "mlp": _norm(model.part(family.mlp_norm, i)),
                },
                positions={},
                sink=None,
                scale=scale,
            )
        )
    positions = family.embed_positions
    return Anatomy(
        layers=tuple(layers),
        final_norm=_norm(model.part(family.final_norm)),
        biases=biases,
        kept=dict.fromkeys(model.widths),
        activation=getattr(model.config, family.activation),
        embed_positions=None if positions is None else model.part(positions).get_parameter("weight").detach(),
        logits_bias=getattr(model.part(family.unembed), "bias", None),
        bigram=None,
        uncut=model.uncut,
        obstacles=model.obstacles,
    )


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def _norm(norm: nn.Module) -> NormParts:
    if isinstance(norm, Norm):
        gain, bias, center, eps = norm.weight, norm.bias, norm.center, norm.eps
    else:
        gain, bias, center, eps = norm_options(norm)
    return NormParts(gain=gain.detach(), bias=None if bias is None else bias.detach(), center=center, eps=eps)

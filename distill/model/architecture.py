"""Shape and options of a weight-sparse transformer, as a checked value and as a Hugging Face configuration."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from transformers import PreTrainedConfig

from distill.command import no_type_check
from distill.model import operations as ops
from distill.model.sites import KINDS

RESIDUAL_TOPK = ("resid_post_attn", "resid_post_mlp")
LARGEST_BIGRAM = 8192
"""Vocabulary up to which a dense (V, V) bigram table makes sense; it takes 256 MiB there, and 10 GiB at GPT-2's."""
ACTIVATIONS = {name: ops.ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu")}


@no_type_check  # it checks its values itself, and says what is allowed
@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape and options of a weight-sparse transformer [G 2.1, A.1]; every value is checked when it is made."""

    vocab_size: int = 2048
    """Tokens in the vocabulary (V)."""
    context: int = 256
    """Longest sequence, in tokens (T)."""
    n_layer: int = 4
    """Layers (L)."""
    d_model: int = 256
    """Width of the residual stream, in channels (D)."""
    d_head: int = 16
    """Width of an attention head, in channels (H)."""
    n_head: int | None = None
    """Heads per layer (N); by default d_model / d_head."""
    d_mlp: int | None = None
    """Neurons per layer (F); by default 4 * d_model."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm before each sublayer and at the end: root mean square, or LayerNorm."""
    norm_bias: bool = False
    """Whether norms have a bias (LayerNorm only)."""
    norm_eps: float = 1e-5
    """Added to the variance in a norm."""
    linear_bias: bool = True
    """Whether the linear maps have biases."""
    activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
    """Non-linearity of the MLP; gelu is the exact one, gelu_new its tanh form."""
    topk_fraction: float | None = 0.25
    """Share of channels that AbsTopK keeps at a location, in (0, 1]; none switches it off."""
    topk_at: tuple[str, ...] = KINDS
    """Where AbsTopK acts: kinds of node location, resid_post_attn, resid_post_mlp."""
    residual_activation: Literal["identity", "relu"] = "identity"
    """Applied to the residual stream after each sublayer."""
    position: Literal["none", "added", "concat"] = "none"
    """Learned positions: none, added to the embedding, or read-only channels beside every read."""
    d_position: int = 0
    """Position channels (P), with position=concat only."""
    sink: bool = True
    """Whether each head has an attention sink: a logit without a value in the softmax."""
    bigram: bool = True
    """Whether a dense (V, V) table is added to the logits by the current token; for a vocabulary up to 8192."""
    tied_unembedding: bool = False
    """Whether the unembedding is the embedding."""
    logits_bias: bool = False
    """Whether the logits have a bias per token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "topk_at", tuple(self.topk_at))
        for name in ("vocab_size", "context", "n_layer", "d_model", "d_head"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, name, value, "1 and more")
        if self.n_head is None:
            _require(self.d_model % self.d_head == 0, "d_model", self.d_model, f"multiples of d_head {self.d_head}")
        for name in ("n_head", "d_mlp"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, int) and value >= 1), name, value, "1 and more, or none")
        _require(self.norm in ("rms", "layer"), "norm", self.norm, "rms, layer")
        _require(self.norm == "layer" or not self.norm_bias, "norm_bias", self.norm_bias, "false with norm=rms")
        _require(self.norm_eps >= 0, "norm_eps", self.norm_eps, "0 and more")
        _require(self.activation in ACTIVATIONS, "activation", self.activation, ", ".join(ACTIVATIONS))
        fraction = self.topk_fraction
        _require(fraction is None or 0 < fraction <= 1, "topk_fraction", fraction, "numbers in (0, 1], or none")
        places = (*KINDS, *RESIDUAL_TOPK)
        _require(set(self.topk_at) <= set(places), "topk_at", self.topk_at, ", ".join(places))
        kinds = ("identity", "relu")
        _require(self.residual_activation in kinds, "residual_activation", self.residual_activation, ", ".join(kinds))
        _require(self.position in ("none", "added", "concat"), "position", self.position, "none, added, concat")
        concat = self.position == "concat"
        _require(
            self.d_position >= 1 if concat else self.d_position == 0,
            "d_position",
            self.d_position,
            "1 and more with position=concat, else 0",
        )
        _require(
            not self.bigram or self.vocab_size <= LARGEST_BIGRAM,
            "bigram",
            self.bigram,
            f"false with vocab_size {self.vocab_size}; a dense (V, V) table is kept up to {LARGEST_BIGRAM} tokens",
        )

    @property
    def heads(self) -> int:
        """Heads per layer, where the default is worked out."""
        return self.d_model // self.d_head if self.n_head is None else self.n_head

    @property
    def neurons(self) -> int:
        """Neurons per layer, where the default is worked out."""
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    def resolved(self) -> "Architecture":
        """The same with every default worked out, as it is saved: a later change of width moves nothing else."""
        return replace(self, n_head=self.heads, d_mlp=self.neurons)

    def width(self, kind: str) -> int:
        """Channels at a kind of node location."""
        if kind.endswith("act_in"):
            return self.d_model + self.d_position
        if kind in ("attn.q", "attn.k", "attn.v"):
            return self.heads * self.d_head
        return self.neurons if kind == "mlp.post_act" else self.d_model

    def kept(self, kind: str, width: int) -> int | None:
        """Channels that AbsTopK keeps out of `width` at a place; None where it does not act."""
        if self.topk_fraction is None or kind not in self.topk_at:
            return None
        return max(1, int(self.topk_fraction * width))


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field}: {value!r} is not possible; allowed: {allowed}")


@no_type_check  # transformers passes what is no field on to __post_init__
class SparseTransformerConfig(PreTrainedConfig):
    """The Hugging Face configuration: the fields of `Architecture`, flat, and those of transformers."""

    model_type = "distill_sparse"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "head_dim": "d_head",
        "max_position_embeddings": "context",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        names = [field.name for field in fields(Architecture)]
        architecture = Architecture(**{name: kwargs.pop(name) for name in names if name in kwargs}).resolved()
        for name in names:
            setattr(self, name, getattr(architecture, name))
        kwargs.setdefault("tie_word_embeddings", architecture.tied_unembedding)
        super().__post_init__(**kwargs)

    @property
    def architecture(self) -> Architecture:
        """The same values, frozen and checked."""
        return Architecture(**{field.name: getattr(self, field.name) for field in fields(Architecture)})

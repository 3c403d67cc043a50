"""Where the parts of transformers' decoders are found: a map of names for each architecture.

A family has, in every layer, a norm and an attention, then a norm and an MLP, each added to the residual stream. What
computes attention and MLP from both at once (GPT-NeoX and GPT-J with parallel residuals) is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of modules, from the model or from a block, and of what stands in the configuration."""

    embed_tokens: str
    embed_positions: str | None
    """Learned positions that are added to the embedding."""
    rotary: str | None = None
    """What turns queries and keys by position: a module that gives cosines and sines."""
    blocks: str
    final_norm: str
    unembed: str
    attn_norm: str
    attn: str
    qkv: str | tuple[str, str, str]
    """Linear maps to q, k and v; or one whose output is q, k and v, in this order."""
    attn_out: str
    pattern: str | None = None
    """A module that the attention probabilities pass through; None: transformers chooses attention by its name."""
    cache: str = "past_key_values"
    """What the attention calls the keys and values of earlier tokens."""
    mlp_norm: str
    mlp: str
    mlp_in: str
    mlp_gate: str | None = None
    """Linear map whose activation the output of `mlp_in` is multiplied by."""
    mlp_out: str
    activation: str
    """Field of the configuration that names the non-linearity."""
    decisive: tuple[str, ...]
    """Fields of the configuration that decide what is computed."""
    transposed: bool = False
    """Whether linear weights are stored (in, out), as by Conv1D."""


FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        embed_tokens="transformer.wte",
        embed_positions="transformer.wpe",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        attn_norm="ln_1",
        attn="attn",
        qkv="attn.c_attn",
        attn_out="attn.c_proj",
        mlp_norm="ln_2",
        mlp="mlp",
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        activation="activation_function",
        decisive=(
            "model_type",
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "n_inner",
            "activation_function",
            "layer_norm_epsilon",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
            "tie_word_embeddings",
        ),
        transposed=True,
    ),
    "gpt_neo": Family(
        embed_tokens="transformer.wte",
        embed_positions="transformer.wpe",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        attn_norm="ln_1",
        attn="attn",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        attn_out="attn.attention.out_proj",
        pattern="attn.attention.attn_dropout",
        cache="layer_past",
        mlp_norm="ln_2",
        mlp="mlp",
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        activation="activation_function",
        decisive=(
            "model_type",
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_layers",
            "num_heads",
            "attention_layers",
            "window_size",
            "intermediate_size",
            "activation_function",
            "layer_norm_epsilon",
            "tie_word_embeddings",
        ),
    ),
    "llama": Family(
        embed_tokens="model.embed_tokens",
        embed_positions=None,
        rotary="model.rotary_emb",
        blocks="model.layers",
        final_norm="model.norm",
        unembed="lm_head",
        attn_norm="input_layernorm",
        attn="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attn_out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        mlp_in="mlp.up_proj",
        mlp_gate="mlp.gate_proj",
        mlp_out="mlp.down_proj",
        activation="hidden_act",
        decisive=(
            "model_type",
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "hidden_act",
            "rms_norm_eps",
            "rope_parameters",
            "attention_bias",
            "mlp_bias",
            "tie_word_embeddings",
        ),
    ),
}
"""Families that can be wrapped, by transformers' `model_type`."""

PARALLEL = frozenset({"gpt_neox", "gptj", "phi", "falcon", "cohere", "codegen"})
"""Families whose layers read the residual stream once for attention and MLP together."""


def check_family(model_type: str) -> None:
    """ValueError for the `model_type` of a dense model that cannot be wrapped."""
    if model_type not in FAMILIES:
        why = ", whose attention and MLP read the residual stream side by side: there is no site between them,"
        raise ValueError(
            f"the architecture {model_type[:60]!r}{why if model_type in PARALLEL else ''} cannot be wrapped; allowed "
            f"are {', '.join(FAMILIES)}"
        )

"""The weight-sparse transformer [G 2.1, A.1]: a GPT-2-shaped decoder in which zero means "nothing here".

RMSNorm reads, small heads, an attention sink per head, AbsTopK at every node location, a dense bigram table beside
the network. The weights are ordinary dense tensors whose zeros the training keeps (`distill.training.sparsity`); the
same class at kept fraction 1 is the dense model to compare with.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from distill.command import no_type_check
from distill.model import operations as ops
from distill.model.compact import load_compact, save_compact
from distill.model.run import Context, Runnable
from distill.model.sites import KINDS, Tap, layer_of, node_locations, wants
from distill.model.topk import abs_topk

RESIDUAL_TOPK = ("resid_post_attn", "resid_post_mlp")
COMPACT_FILE = "model.sparse.safetensors"
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "code_revision", "proxies"}
AUTO_OPTIONS = {"trust_remote_code", "use_safetensors", "adapter_kwargs", "_from_auto", "_commit_hash"}
COMPACT_OPTIONS = frozenset({"config", "dtype", "torch_dtype"} | HUB_OPTIONS | AUTO_OPTIONS)
"""Options of `from_pretrained` that a folder with a `COMPACT_FILE` takes."""
PLAIN_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Weights as `save_pretrained` writes them."""
LARGEST_BIGRAM = 8192
"""Vocabulary up to which a dense (V, V) bigram table makes sense; it takes 256 MiB there, and 10 GiB at GPT-2's."""
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


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


class Linear(nn.Linear):
    """`nn.Linear` by `operations.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Norm(nn.Module):
    """Gain and perhaps bias of an RMSNorm or LayerNorm."""

    def __init__(self, width: int, *, center: bool, bias: bool, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.center, self.eps = center, eps

    def forward(self, x: Tensor, name: str = "", tap: Tap | None = None) -> Tensor:
        scale = ops.norm_scale(x, center=self.center, eps=self.eps)
        if tap is not None and wants(tap, "norm_scale"):
            scale = tap(f"{name}.norm_scale", scale)
        return ops.scaled(x, scale, self.weight, self.bias, center=self.center)


class Layer(nn.Module):
    """Parameters of one layer; what is done with them stands in `SparseTransformer.sublayer`."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        read, heads, bias = a.width("attn.act_in"), a.heads * a.d_head, a.linear_bias
        self.attn_norm = _norm(a, a.d_model)
        self.attn_q = Linear(read, heads, bias=bias)
        self.attn_k = Linear(read, heads, bias=bias)
        self.attn_v = Linear(read, heads, bias=bias)
        self.attn_sink = nn.Parameter(torch.zeros(a.heads)) if a.sink else None
        self.attn_out = Linear(heads, a.d_model, bias=bias)
        self.mlp_norm = _norm(a, a.d_model)
        self.mlp_in = Linear(read, a.neurons, bias=bias)
        self.mlp_out = Linear(a.neurons, a.d_model, bias=bias)
        if a.position == "concat":
            self.attn_position_norm = _norm(a, a.d_position)
            self.mlp_position_norm = _norm(a, a.d_position)


def _norm(a: Architecture, width: int) -> Norm:
    return Norm(width, center=a.norm == "layer", bias=a.norm_bias, eps=a.norm_eps)


class SparseTransformer(Runnable, PreTrainedModel, GenerationMixin):
    """Weight-sparse transformer, a Hugging Face model: `save_pretrained`, `from_pretrained`, `generate`.

    `SparseTransformer(config)` draws its weights from torch's global generator.
    """

    config_class = SparseTransformerConfig
    config: SparseTransformerConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    base_model_prefix = ""
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _tied_weights_keys = {"unembed.weight": "embed_tokens.weight"}

    def __init__(self, config: SparseTransformerConfig) -> None:
        PreTrainedModel.__init__(self, config)
        a = self.architecture = config.architecture
        self.n_layer, self.d_model, self.vocab_size, self.context = a.n_layer, a.d_model, a.vocab_size, a.context
        self.n_head, self.d_head, self.has_positions = a.heads, a.d_head, a.position != "none"
        self.embed_tokens = nn.Embedding(a.vocab_size, a.d_model)
        if a.position != "none":
            self.embed_positions = nn.Embedding(a.context, a.d_position or a.d_model)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.n_layer))
        self.final_norm = _norm(a, a.d_model)
        self.unembed = Linear(a.d_model, a.vocab_size, bias=a.logits_bias)
        self.bigram = nn.Parameter(torch.zeros(a.vocab_size, a.vocab_size)) if a.bigram else None
        self.post_init()

    @classmethod
    def build(cls, architecture: Architecture, *, seed: int = 0) -> "SparseTransformer":
        """A new model with weights drawn from a generator of its own seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(SparseTransformerConfig(**asdict(architecture)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights of variance 1 / fan in, the writes smaller so that the stream does not grow with depth."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, Norm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Layer):
            for out in (module.attn_out, module.mlp_out):
                init.normal_(out.weight, std=(2 * self.n_layer * out.in_features) ** -0.5)
            if module.attn_sink is not None:
                init.zeros_(module.attn_sink)
        elif module is self and self.bigram is not None:
            init.zeros_(self.bigram)

    # The run: what each sublayer does.

    @property
    def widths(self) -> dict[str, int]:
        return {
            location: self.architecture.width(location.split(".", 1)[1]) for location in node_locations(self.n_layer)
        }

    def embed(
        self, tokens: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.embed_tokens(tokens)
        if self.architecture.position != "added":
            return x
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return x + self.embed_positions(position_ids)

    def sublayer(
        self, site: str, x: Float[Tensor, "B T D"], context: Context, tap: Tap | None
    ) -> Float[Tensor, "B T D"]:
        index = layer_of(site)
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        attention = site.endswith("resid_in")
        delta = (
            self._attention(index, layer, x, context, tap) if attention else self._mlp(index, layer, x, context, tap)
        )
        x = x + delta
        if self.architecture.residual_activation == "relu":
            x = F.relu(x)
        kept = self.architecture.kept(RESIDUAL_TOPK[0 if attention else 1], self.d_model)
        return x if kept is None else abs_topk(x, kept)

    def _attention(
        self, index: int, layer: Layer, x: Float[Tensor, "B T D"], context: Context, tap: Tap | None
    ) -> Float[Tensor, "B T D"]:
        name = f"{index}.attn"
        read = layer.attn_norm(x, name, tap)
        if self.architecture.position == "concat":
            positions = layer.attn_position_norm(self.embed_positions(context.position_ids))
            read = torch.cat([read, positions], -1)
        read = self._node(f"{name}.act_in", read, tap)
        q = self._node(f"{name}.q", layer.attn_q(read), tap)
        k = self._node(f"{name}.k", layer.attn_k(read), tap)
        v = self._node(f"{name}.v", layer.attn_v(read), tap)
        q, k, v = (ops.split_heads(z, self.n_head) for z in (q, k, v))
        if context.cache is not None:
            k, v = context.cache.update(k, v, index)
        pattern_wanted = tap is not None and wants(tap, "pattern")
        if context.cache is None and context.attention_mask is None and not pattern_wanted:
            mixed = ops.causal_attention(q, k, v, layer.attn_sink)
        else:
            allowed = ops.visible(q.shape[2], k.shape[2], context.attention_mask, x.device)
            pattern = ops.attention_pattern(q, k, layer.attn_sink, allowed)
            if tap is not None and pattern_wanted:
                pattern = tap(f"{name}.pattern", pattern)
            mixed = pattern @ v
        return self._node(f"{name}.resid_delta", layer.attn_out(ops.merge_heads(mixed)), tap)

    def _mlp(
        self, index: int, layer: Layer, x: Float[Tensor, "B T D"], context: Context, tap: Tap | None
    ) -> Float[Tensor, "B T D"]:
        name = f"{index}.mlp"
        read = layer.mlp_norm(x, name, tap)
        if self.architecture.position == "concat":
            positions = layer.mlp_position_norm(self.embed_positions(context.position_ids))
            read = torch.cat([read, positions], -1)
        read = self._node(f"{name}.act_in", read, tap)
        neurons = ACTIVATIONS[self.architecture.activation](layer.mlp_in(read))
        neurons = self._node(f"{name}.post_act", neurons, tap)
        return self._node(f"{name}.resid_delta", layer.mlp_out(neurons), tap)

    def _node(self, location: str, x: Tensor, tap: Tap | None) -> Tensor:
        """AbsTopK where the model has it there, and the tap."""
        kept = self.architecture.kept(location.split(".", 1)[1], x.shape[-1])
        if kept is not None:
            if tap is not None and wants(tap, "pre"):
                x = tap(f"{location}.pre", x)
            x = abs_topk(x, kept)
        return x if tap is None else tap(location, x)

    def readout(
        self, residual: Float[Tensor, "*rows D"], tokens: Int[Tensor, "*rows"], *, tap: Tap | None = None
    ) -> Float[Tensor, "*rows V"]:
        logits = self.unembed(self.final_norm(residual, "final", tap))
        return logits if self.bigram is None else logits + F.embedding(tokens, self.bigram)

    # What circuits are made of.

    def matrices(self) -> dict[tuple[str, str], Float[Tensor, "n_target n_source"]]:
        found: dict[tuple[str, str], Tensor] = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            for name, linear in (("q", layer.attn_q), ("k", layer.attn_k), ("v", layer.attn_v)):
                found[f"{i}.attn.act_in", f"{i}.attn.{name}"] = linear.weight.detach()
            found[f"{i}.attn.v", f"{i}.attn.resid_delta"] = layer.attn_out.weight.detach()
            found[f"{i}.mlp.act_in", f"{i}.mlp.post_act"] = layer.mlp_in.weight.detach()
            found[f"{i}.mlp.post_act", f"{i}.mlp.resid_delta"] = layer.mlp_out.weight.detach()
        return found

    def embedding(self) -> Float[Tensor, "V D"]:
        return self.embed_tokens.weight.detach()

    def unembedding(self) -> Float[Tensor, "V D"]:
        return self.unembed.weight.detach()

    def describe(self) -> Mapping[str, Any]:
        return {"model_type": SparseTransformerConfig.model_type, **asdict(self.architecture)}

    # Hugging Face's side.

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Hugging Face's calling convention for `run`: logits (B, T, V), and with labels the mean loss in nats.

        Labels are shifted inside; -100 marks positions without a target.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        logits = self.run(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values
        )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a folder whose weights are stored sparsely (`save_compact`) is read as well.

        Of transformers' options such a folder takes `config` and `dtype`, and those that speak of a hub have no
        meaning there. ValueError for any other one, and for weights that are damaged or do not fit the configuration.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / COMPACT_FILE).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        for name, value in kwargs.items():
            if name not in COMPACT_OPTIONS and value is not None:
                raise ValueError(
                    f"{name}: got {value!r}, but {folder / COMPACT_FILE} is not read by transformers; allowed are "
                    "config and dtype (move the model with .to(device) once it is loaded)"
                )
        model = cls(kwargs.get("config") or SparseTransformerConfig.from_pretrained(folder), *args)
        state = load_compact(folder / COMPACT_FILE)
        _check_fits(folder / COMPACT_FILE, state, model.state_dict())
        model.load_state_dict(state)
        model.tie_weights()
        return nn.Module.to(model, _dtype(kwargs.get("dtype", kwargs.get("torch_dtype")), state)).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; what an earlier `save_compact` left in the folder, which would be read first, goes."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / COMPACT_FILE).unlink(missing_ok=True)

    def save_compact(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and the weights with their zeros left out, the bigram table in float16.

        Weights that an earlier `save_pretrained` left in the folder go.
        """
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        save_compact(Path(folder) / COMPACT_FILE, self.state_dict())
        for pattern in PLAIN_FILES:
            for path in Path(folder).glob(pattern):
                path.unlink()


def _check_fits(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError unless both hold the same tensors in the same shapes."""
    for name in sorted(state.keys() | wanted.keys()):
        if name not in state:
            raise ValueError(f"{path}: lacks {name!r}, which the config.json beside it asks for")
        if name not in wanted:
            raise ValueError(f"{path}: holds {name!r}, which the config.json beside it has no place for")
        stored, asked = tuple(state[name].shape), tuple(wanted[name].shape)
        if stored != asked:
            raise ValueError(f"{path}: {name!r} has shape {stored}, the config.json beside it says {asked}")


def _dtype(asked: str | torch.dtype | None, state: Mapping[str, Tensor]) -> torch.dtype:
    """The type of the weights that was asked for: by name, as it is, or (none, auto) the one they were saved in."""
    if asked is None or asked == "auto":
        return state["embed_tokens.weight"].dtype
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: got {asked!r}, allowed are auto and floating-point types such as float32, bfloat16")
    return found

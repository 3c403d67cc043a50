"""The weight-sparse transformer [G 2.1, A.1]: a GPT-2-shaped decoder in which zero means "nothing here".

RMSNorm reads, small heads, an attention sink per head, AbsTopK at every node location, a dense bigram table beside
the network. The weights are ordinary dense tensors whose zeros the training keeps (`distill.training.sparsity`); the
same class at kept fraction 1 is the dense model to compare with.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from distill.model import operations as ops
from distill.model.architecture import ACTIVATIONS as ACTIVATIONS
from distill.model.architecture import LARGEST_BIGRAM as LARGEST_BIGRAM
from distill.model.architecture import RESIDUAL_TOPK, Architecture, SparseTransformerConfig
from distill.model.compact import load_compact, save_compact
from distill.model.openai import read_checkpoint
from distill.model.run import Context, Runnable
from distill.model.sites import Tap, layer_of, node_locations, wants
from distill.model.topk import abs_topk

COMPACT_FILE = "model.sparse.safetensors"
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "code_revision", "proxies"}
AUTO_OPTIONS = {"trust_remote_code", "use_safetensors", "adapter_kwargs", "_from_auto", "_commit_hash"}
COMPACT_OPTIONS = frozenset({"config", "dtype", "torch_dtype"} | HUB_OPTIONS | AUTO_OPTIONS)
"""Options of `from_pretrained` that a folder with a `COMPACT_FILE` takes."""
PLAIN_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Weights as `save_pretrained` writes them."""


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

    def forward(self, x: Tensor, name: str = "", tap: Tap | None = None, k: int | None = None) -> Tensor:
        """The norm of x, and AbsTopK of that where `k` is given; `name` is what a tap knows the norm by."""
        if tap is None or not wants(tap, "norm_scale"):
            return ops.norm_topk(x, self.weight, self.bias, center=self.center, eps=self.eps, k=k)
        scale = tap(f"{name}.norm_scale", ops.norm_scale(x, center=self.center, eps=self.eps))
        x = ops.scaled(x, scale, self.weight, self.bias, center=self.center)
        return x if k is None else abs_topk(x, k)


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

    @classmethod
    def from_openai(cls, folder: str | os.PathLike[str]) -> "SparseTransformer":
        """A checkpoint that OpenAI released (`beeg_config.json`, `final_model.pt`), in evaluation mode, on the CPU.

        ArtifactError, a ValueError, names the file and the option or tensor that is missing, unknown or impossible.
        """
        checkpoint = read_checkpoint(folder)
        with torch.device("meta"):
            model = cls(SparseTransformerConfig(**asdict(checkpoint.architecture)))
        model.load_state_dict(checkpoint.tensors, assign=True)
        model.tie_weights()
        return model.eval()

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
        x = ops.embedding(self.embed_tokens.weight, tokens)
        if self.architecture.position != "added":
            return x
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return x + ops.embedding(self.embed_positions.weight, position_ids)

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
        positions = layer.attn_position_norm if self.architecture.position == "concat" else None
        read = self._read(name, layer.attn_norm, positions, x, context, tap)
        maps = {f"{name}.q": layer.attn_q, f"{name}.k": layer.attn_k, f"{name}.v": layer.attn_v}
        q, k, v = (ops.split_heads(z, self.n_head) for z in self._nodes(maps, read, tap))
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
        return self._nodes({f"{name}.resid_delta": layer.attn_out}, ops.merge_heads(mixed), tap)[0]

    def _mlp(
        self, index: int, layer: Layer, x: Float[Tensor, "B T D"], context: Context, tap: Tap | None
    ) -> Float[Tensor, "B T D"]:
        name = f"{index}.mlp"
        positions = layer.mlp_position_norm if self.architecture.position == "concat" else None
        read = self._read(name, layer.mlp_norm, positions, x, context, tap)
        (neurons,) = self._nodes({f"{name}.post_act": layer.mlp_in}, read, tap, self.architecture.activation)
        return self._nodes({f"{name}.resid_delta": layer.mlp_out}, neurons, tap)[0]

    def _read(
        self,
        name: str,
        norm: Norm,
        positions: Norm | None,
        x: Float[Tensor, "B T D"],
        context: Context,
        tap: Tap | None,
    ) -> Float[Tensor, "B T read"]:
        """The nodes `act_in`: the residual stream after the norm, and with concatenated positions those too."""
        location = f"{name}.act_in"
        if positions is not None or wants(tap, "pre"):
            read = norm(x, name, tap)
            if positions is not None:
                read = torch.cat(
                    [read, positions(ops.embedding(self.embed_positions.weight, context.position_ids))], -1
                )
            return self._node(location, read, tap)
        read = norm(x, name, tap, k=self._kept(location))
        return read if tap is None else tap(location, read)

    def _nodes(
        self, maps: Mapping[str, Linear], x: Tensor, tap: Tap | None, activation: str = "identity"
    ) -> list[Tensor]:
        """The nodes that linear maps of x make, by location: the activation of each, AbsTopK and the tap."""
        pairs = [(linear.weight, linear.bias) for linear in maps.values()]
        if wants(tap, "pre"):
            outs = ops.linear_topk(x, pairs, activation=activation)
            return [self._node(location, out, tap) for location, out in zip(maps, outs, strict=True)]
        outs = ops.linear_topk(x, pairs, activation=activation, keep=[self._kept(location) for location in maps])
        return [out if tap is None else tap(location, out) for location, out in zip(maps, outs, strict=True)]

    def _node(self, location: str, x: Tensor, tap: Tap | None) -> Tensor:
        """AbsTopK where the model has it there, and the tap."""
        kept = self._kept(location)
        if kept is not None:
            if tap is not None and wants(tap, "pre"):
                x = tap(f"{location}.pre", x)
            x = abs_topk(x, kept)
        return x if tap is None else tap(location, x)

    def _kept(self, location: str) -> int | None:
        kind = location.split(".", 1)[1]
        return self.architecture.kept(kind, self.architecture.width(kind))

    def readout(
        self, residual: Float[Tensor, "*rows D"], tokens: Int[Tensor, "*rows"], *, tap: Tap | None = None
    ) -> Float[Tensor, "*rows V"]:
        read = self.final_norm(residual, "final", tap)
        return ops.logits(read, self.unembed.weight, self.unembed.bias, self.bigram, tokens)

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
            loss = ops.cross_entropy(logits[:, :-1], labels[:, 1:])
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
        config = kwargs.get("config") or SparseTransformerConfig.from_pretrained(folder)
        state = load_compact(folder / COMPACT_FILE)
        if config.n_layer > len(state):
            raise ValueError(f"{folder / COMPACT_FILE}: {len(state)} tensors, but n_layer is {config.n_layer}")
        # Without memory, so that a configuration of any size is only compared with what there is.
        with torch.device("meta"):
            model = cls(config, *args)
        _check_fits(folder / COMPACT_FILE, state, model.state_dict())
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return nn.Module.to(model, _dtype(kwargs.get("dtype", kwargs.get("torch_dtype")), state)).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; what an earlier `save_compact` left in the folder, which would be read first, goes."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / COMPACT_FILE).unlink(missing_ok=True)

    def save_compact(self, folder: str | os.PathLike[str], *, bigram: str = "float16") -> None:
        """Writes config.json and the weights with their zeros left out, the bigram table as told.

        Weights that an earlier `save_pretrained` left in the folder go. A rounded table makes another model, with
        another fingerprint: that of what `from_pretrained` gives back.

        Args:
            bigram: float32 keeps the table, float16 and int8 round it (`distill.model.compact.save_compact`).
        """
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        save_compact(Path(folder) / COMPACT_FILE, self.state_dict(), rounded={"bigram": bigram})
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

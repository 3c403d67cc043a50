"""Dense Hugging Face models behind the same run as the sparse one.

The modules are transformers' own. Only the order norm, attention, add, norm, MLP, add stands here, once for all
families, because the blocks of transformers add to the residual stream inside, where no hook reaches. A family is a
map of names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from distill.model import operations as ops
from distill.model.families import FAMILIES, PARALLEL
from distill.model.run import Context, Runnable
from distill.model.sites import Tap, layer_of, node_locations, wants
from distill.model.transformer import Architecture

TAPPED = "distill_tapped"
"""Name under which transformers finds the attention that hands its pattern to a tap."""


def _tapped_attention(
    module: nn.Module,
    query: Float[Tensor, "B N Q H"],
    key: Float[Tensor, "B M K H"],
    value: Float[Tensor, "B M K H"],
    attention_mask: Tensor | None,
    *,
    scaling: float,
    tapped: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B Q N H"], Float[Tensor, "B N Q K"]]:
    """Attention in the open, in the form transformers asks for; masks come in the form of any implementation."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None:
        attention_mask = ops.visible(query.shape[2], key.shape[2], None, query.device)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    pattern = tapped(F.dropout(scores.softmax(-1), dropout, module.training))
    return (pattern @ value).transpose(1, 2), pattern


AttentionInterface.register(TAPPED, _tapped_attention)


class DenseModel(Runnable):
    """A pretrained dense model that is read, replaced, stopped and started like a sparse one.

    Without a tap its logits equal those of the wrapped model bit for bit. It is kept in evaluation mode on loading.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config = model.config
        if config.model_type not in FAMILIES:
            why = ", whose attention and MLP read the residual stream side by side: there is no site between them,"
            raise ValueError(
                f"model: the architecture {config.model_type!r}{why if config.model_type in PARALLEL else ''} "
                f"cannot be wrapped; allowed are {', '.join(FAMILIES)}"
            )
        if getattr(config, "add_cross_attention", False):
            raise ValueError("model: add_cross_attention=True; only decoders without cross-attention can be wrapped")
        self.hf = model
        self.family = FAMILIES[config.model_type]
        # Names that transformers gives every family, whatever its configuration calls them.
        self.n_layer, self.d_model = config.num_hidden_layers, config.hidden_size
        self.n_head, self.d_head = config.num_attention_heads, _head_width(config)
        self.n_group = self.n_head // (getattr(config, "num_key_value_heads", None) or self.n_head)
        self.vocab_size, self.context = config.vocab_size, config.max_position_embeddings
        self.has_positions = self.family.embed_positions is not None
        # Else a later `train(self.training)` would switch the dropout of a model in evaluation mode on.
        self.train(model.training)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **kwargs: Any) -> "DenseModel":
        """Loads a model from a folder, or by its hub name, in float32 unless `dtype` says otherwise."""
        kwargs.setdefault("dtype", torch.float32)
        kwargs.setdefault("use_safetensors", True)  # a pytorch_model.bin is a pickle
        return cls(AutoModelForCausalLM.from_pretrained(name_or_folder, **kwargs).eval())

    @classmethod
    def build_gpt2(cls, architecture: Architecture, *, seed: int = 0) -> "DenseModel":
        """A new GPT-2 with the vocabulary, context, layers, widths and heads of `architecture`, without dropout.

        Its weights are drawn, as transformers does, from a generator of its own seed. Heads are at least 32 wide.
        """
        a = architecture
        config = GPT2Config(
            vocab_size=a.vocab_size,
            n_positions=a.context,
            n_embd=a.d_model,
            n_layer=a.n_layer,
            n_head=max(1, a.d_model // max(a.d_head, 32)),
            n_inner=a.neurons,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=a.vocab_size - 1,
            eos_token_id=a.vocab_size - 1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(GPT2LMHeadModel(config).eval())

    @property
    def config(self) -> Any:
        """The wrapped model's configuration."""
        return self.hf.config

    def part(self, name: str | None, layer: int | None = None) -> nn.Module:
        """A module by its name in the family: of the model, or of the block of a layer."""
        assert name is not None
        return self.hf.get_submodule(name if layer is None else f"{self.family.blocks}.{layer}.{name}")

    def _weight(self, name: str, layer: int) -> Tensor:
        weight = self.part(name, layer).get_parameter("weight").detach()
        return weight.T if self.family.transposed else weight

    def bias(self, name: str, layer: int) -> Float[Tensor, " out"]:
        """Bias of one of a block's linear maps, detached; zeros where it has none."""
        found = getattr(self.part(name, layer), "bias", None)
        if found is None:
            weight = self._weight(name, layer)
            return weight.new_zeros(weight.shape[0])
        return found.detach()

    def qkv(self, layer: int, part: Callable[[str, int], Tensor]) -> Sequence[Tensor]:
        """What `part` (a function of name and layer) gives for q, k and v, however they are stored."""
        names = self.family.qkv
        return part(names, layer).chunk(3) if isinstance(names, str) else [part(name, layer) for name in names]

    @property
    def uncut(self) -> tuple[str, ...]:
        """What joins nodes of this family other than by one weight, in words."""
        found = {"a gated MLP": self.family.mlp_gate is not None, "values shared by heads": self.n_group > 1}
        return tuple(words for words, there in found.items() if there)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """What this family does that cannot be told by weights between nodes and biases, in words."""
        found = {
            "rotary positions": self.family.rotary is not None,
            "a gated MLP": self.family.mlp_gate is not None,
            "attention to a window": "local" in getattr(self.config, "attention_layers", ()),
        }
        return tuple(words for words, there in found.items() if there)

    @property
    def widths(self) -> dict[str, int]:
        values = self.n_head // self.n_group * self.d_head
        of = {"q": self.n_head * self.d_head, "k": values, "v": values}
        of["post_act"] = self._weight(self.family.mlp_in, 0).shape[0]
        return {
            location: of.get(location.rpartition(".")[2], self.d_model) for location in node_locations(self.n_layer)
        }

    def embed(
        self, tokens: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.part(self.family.embed_tokens)(tokens)
        if self.family.embed_positions is None:
            return x
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return x + self.part(self.family.embed_positions)(position_ids)

    def prepare(self, x: Float[Tensor, "B T D"], context: Context) -> Any:
        # position_ids must not be passed where they only count up: transformers would look for packed sequences.
        mask = create_causal_mask(
            config=self.hf.config,
            inputs_embeds=x,
            attention_mask=context.attention_mask,
            past_key_values=context.cache,
            position_ids=context.position_ids,
        )
        shared = {"attention_mask": mask, self.family.cache: context.cache}
        if self.family.rotary is None:
            return shared
        turns = self.part(self.family.rotary)(x, position_ids=context.position_ids)
        return shared | {"position_embeddings": turns}

    def sublayer(
        self, site: str, x: Float[Tensor, "B T D"], context: Context, tap: Tap | None
    ) -> Float[Tensor, "B T D"]:
        i = layer_of(site)
        attention = site.endswith("resid_in")
        name = f"{i}.attn" if attention else f"{i}.mlp"
        norm = self.part(self.family.attn_norm if attention else self.family.mlp_norm, i)
        read = self._norm(norm, x, name, tap)
        if tap is not None:
            read = tap(f"{name}.act_in", read)
        with self._hooked(i, attention, tap):
            if attention:
                part = self.part(self.family.attn, i)
                with self._pattern_tapped(i, tap) as options:
                    delta = part(read, **context.prepared, **options)[0]
            else:
                delta = self.part(self.family.mlp, i)(read)
        if tap is not None:
            delta = tap(f"{name}.resid_delta", delta)
        return delta + x

    @contextmanager
    def _hooked(self, i: int, attention: bool, tap: Tap | None) -> Iterator[None]:
        """Hands q, k, v or the neurons to the tap from inside transformers' module, for the length of one call."""
        if tap is None:
            yield
            return
        with ExitStack() as stack:
            if not attention:
                part = self.part(self.family.mlp_out, i)
                stack.callback(part.register_forward_pre_hook(partial(_tap_neurons, i, tap)).remove)
            elif isinstance(self.family.qkv, str):
                part = self.part(self.family.qkv, i)
                stack.callback(part.register_forward_hook(partial(_tap_qkv, i, tap)).remove)
            else:
                for name, path in zip("qkv", self.family.qkv, strict=True):
                    part = self.part(path, i)
                    stack.callback(part.register_forward_hook(partial(_tap_one, f"{i}.attn.{name}", tap)).remove)
            yield

    @contextmanager
    def _pattern_tapped(self, i: int, tap: Tap | None) -> Iterator[dict[str, Any]]:
        """What the attention module has to be given for the tap to see its pattern, for the length of one call."""
        if tap is None or not wants(tap, "pattern"):
            yield {}
            return
        if self.family.pattern is not None:
            handle = self.part(self.family.pattern, i).register_forward_hook(
                partial(_tap_one, f"{i}.attn.pattern", tap)
            )
            try:
                yield {}
            finally:
                handle.remove()
            return
        usual = self.hf.config._attn_implementation
        self.hf.config._attn_implementation = TAPPED
        try:
            yield {"tapped": partial(tap, f"{i}.attn.pattern")}
        finally:
            self.hf.config._attn_implementation = usual

    def _norm(self, norm: nn.Module, x: Tensor, name: str, tap: Tap | None) -> Tensor:
        if tap is None or not wants(tap, "norm_scale"):
            return norm(x)
        gain, bias, center, eps = norm_options(norm)
        scale = tap(f"{name}.norm_scale", ops.norm_scale(x, center=center, eps=eps))
        return ops.scaled(x, scale, gain, bias, center=center)

    def readout(
        self, residual: Float[Tensor, "*rows D"], tokens: Int[Tensor, "*rows"], *, tap: Tap | None = None
    ) -> Float[Tensor, "*rows V"]:
        final = self._norm(self.part(self.family.final_norm), residual, "final", tap)
        return self.part(self.family.unembed)(final)

    def matrices(self) -> dict[tuple[str, str], Float[Tensor, "n_target n_source"]]:
        """As in `Runnable`. Of a gated MLP the map that is multiplied by the gate; where heads share their values the
        sum over these heads' writes: what joins is right, and a weight is that of a mean pattern."""
        found: dict[tuple[str, str], Tensor] = {}
        for i in range(self.n_layer):
            for name, weight in zip("qkv", self.qkv(i, self._weight), strict=True):
                found[f"{i}.attn.act_in", f"{i}.attn.{name}"] = weight
            write = self._weight(self.family.attn_out, i)
            if self.n_group > 1:
                write = write.unflatten(1, (-1, self.n_group, self.d_head)).sum(2).flatten(1)
            found[f"{i}.attn.v", f"{i}.attn.resid_delta"] = write
            found[f"{i}.mlp.act_in", f"{i}.mlp.post_act"] = self._weight(self.family.mlp_in, i)
            found[f"{i}.mlp.post_act", f"{i}.mlp.resid_delta"] = self._weight(self.family.mlp_out, i)
        return found

    def embedding(self) -> Float[Tensor, "V D"]:
        return self._tensor(self.family.embed_tokens)

    def unembedding(self) -> Float[Tensor, "V D"]:
        return self._tensor(self.family.unembed)

    def _tensor(self, name: str) -> Tensor:
        return self.part(name).get_parameter("weight").detach()

    def describe(self) -> Mapping[str, Any]:
        # What decides the computation and nothing else: a release of transformers may add fields to a configuration.
        return {name: getattr(self.hf.config, name) for name in self.family.decisive}


def _tap_qkv(i: int, tap: Tap, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    parts = output.chunk(3, -1)
    return torch.cat([tap(f"{i}.attn.{name}", part) for name, part in zip("qkv", parts, strict=True)], -1)


def _tap_one(name: str, tap: Tap, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return tap(name, output)


def _tap_neurons(i: int, tap: Tap, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return tap(f"{i}.mlp.post_act", inputs[0])


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def norm_options(norm: nn.Module) -> tuple[Tensor, Tensor | None, bool, float]:
    """Gain, bias, whether it centres, and epsilon of a LayerNorm or of one of transformers' RMSNorms."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight, norm.bias, True, norm.eps
    epsilon = getattr(norm, "variance_epsilon", None)
    assert isinstance(epsilon, float), norm
    return norm.get_parameter("weight"), None, False, epsilon

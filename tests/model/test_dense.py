from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from distill.model import DenseModel, Record, Replace, load_model, load_tokenizer, residual_sites
from distill.model.anatomy import activation

SORT = Path(__file__).parents[3] / "shared" / "checkpoints" / "gpt-nano-sort"


SPECIAL: dict[str, Any] = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=12, n_head=3, n_positions=16, **SPECIAL),
    "gpt_neo": GPTNeoConfig(
        hidden_size=12, num_layers=2, num_heads=3, attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=16, **SPECIAL,
    ),
    "llama": LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=4, max_position_embeddings=16, attention_bias=True, **SPECIAL,
    ),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    """A small random model, gains and biases not those of a fresh one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def hf(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of every family."""
    return build(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Iterator[GPT2LMHeadModel]:
    model = build("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    yield model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(3))


def test_logits_are_those_of_transformers_bit_for_bit(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    model = DenseModel(hf)
    assert torch.equal(model.run(tokens), hf(tokens).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    assert torch.equal(model.run(tokens, attention_mask=mask), hf(tokens, attention_mask=mask).logits)
    assert torch.equal(model.run(tokens, tap=Record()), hf(tokens).logits)


def test_the_wrapper_is_in_the_mode_of_what_it_wraps(gpt2: GPT2LMHeadModel) -> None:
    assert not DenseModel(gpt2).training


def test_stop_then_start_equals_the_whole_run(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    model = DenseModel(hf)
    whole = model.run(tokens)
    for site in residual_sites(2):
        residual = model.run(tokens, stop=site)
        assert torch.equal(model.run(tokens, start=site, residual=residual), whole)


def test_residual_sites_are_the_hidden_states(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    record = Record()
    DenseModel(hf).run(tokens, tap=record)
    hidden = hf(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(record.values["0.resid_in"], hidden[0])
    assert torch.equal(record.values["1.resid_in"], hidden[1])


def test_every_location_can_be_read_and_written(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    model, record = DenseModel(hf), Record()
    whole = model.run(tokens, tap=record)
    assert {name: record.values[name].shape[-1] for name in model.widths} == model.widths
    assert torch.equal(model.run(tokens, tap=Replace(record.values)), whole)
    for location in model.widths:
        noise = torch.randn(record.values[location].shape, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(model.run(tokens, tap=Replace({location: noise})), whole), location
    assert torch.equal(model.run(tokens), whole)


def test_matrices_map_what_is_read_to_what_is_written(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    model, record = DenseModel(hf), Record()
    model.run(tokens, tap=record)
    values, matrices = record.values, model.matrices()
    for (source, target), weight in matrices.items():
        assert weight.shape == (model.widths[target], model.widths[source])
    for name in ("q", "k", "v"):
        made = values["1.attn.act_in"] @ matrices["1.attn.act_in", f"1.attn.{name}"].T
        expected = values[f"1.attn.{name}"] - model.qkv(1, model.bias)["qkv".index(name)]
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    made = values["1.mlp.post_act"] @ matrices["1.mlp.post_act", "1.mlp.resid_delta"].T
    expected = values["1.mlp.resid_delta"] - model.bias(model.family.mlp_out, 1)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    read, up, gate = (values["0.mlp.act_in"], matrices["0.mlp.act_in", "0.mlp.post_act"], model.family.mlp_gate)
    neurons = read @ up.T + model.bias(model.family.mlp_in, 0)
    act = activation(getattr(model.config, model.family.activation))
    neurons = act(neurons) if gate is None else neurons * act(read @ model.part(gate, 0).get_parameter("weight").T)
    torch.testing.assert_close(values["0.mlp.post_act"], neurons, rtol=1e-4, atol=1e-5)


def test_values_shared_by_heads_are_joined_to_what_any_of_these_writes(tokens: torch.Tensor) -> None:
    model = DenseModel(build("llama"))
    write = model.part("self_attn.o_proj", 0).get_parameter("weight")
    # Two key-value heads of three heads each; the first value head serves heads 0 to 2.
    expected = write[:, 0:4] + write[:, 4:8] + write[:, 8:12]
    torch.testing.assert_close(model.matrices()["0.attn.v", "0.attn.resid_delta"][:, :4], expected)
    record = Record()
    model.run(tokens, tap=record)
    # At the first token every head looks at that token alone.
    made = record.values["0.attn.v"][:, 0] @ model.matrices()["0.attn.v", "0.attn.resid_delta"].T
    torch.testing.assert_close(made + model.bias("self_attn.o_proj", 0), record.values["0.attn.resid_delta"][:, 0])


def test_frozen_norms_freeze_the_scale_and_not_the_centring(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    class Frozen:
        wants = frozenset({"norm_scale"})

        def __init__(self) -> None:
            self.scales: dict[str, torch.Tensor] = {}

        def __call__(self, site: str, x: torch.Tensor, /) -> torch.Tensor:
            return self.scales.setdefault(site, x) if site.endswith("norm_scale") else x

    model, tap = DenseModel(hf), Frozen()
    torch.testing.assert_close(model.run(tokens, tap=tap), model.run(tokens))
    assert len(tap.scales) == 5
    residual = model.run(tokens, stop="final_resid")
    frozen = model.readout(3 * residual, tokens, tap=tap)
    bias = getattr(model.part(model.family.final_norm), "bias", None)
    bias = 0 if bias is None else bias @ model.unembedding().T
    torch.testing.assert_close(frozen - bias, 3 * (model.readout(residual, tokens) - bias), rtol=1e-4, atol=1e-4)


def test_a_cache_gives_the_same(hf: PreTrainedModel, tokens: torch.Tensor) -> None:
    model = DenseModel(hf)
    cache = DynamicCache(config=hf.config)
    first = model.run(tokens[:, :5], past_key_values=cache)
    rest = model.run(tokens[:, 5:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), model.run(tokens))


class Pattern(Record):
    wants = frozenset({"pattern"})


@pytest.mark.parametrize("padded", [False, True])
def test_patterns_are_those_of_transformers_and_can_be_replaced(
    hf: PreTrainedModel, tokens: torch.Tensor, padded: bool
) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :2] = 1 - int(padded)
    model, tap = DenseModel(hf), Pattern(["0.attn.pattern", "1.attn.pattern"])
    torch.testing.assert_close(
        model.run(tokens, tap=tap, attention_mask=mask)[:, 2:], model.run(tokens, attention_mask=mask)[:, 2:]
    )
    usual = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    expected = hf(tokens, attention_mask=mask, output_attentions=True).attentions
    hf.set_attn_implementation(str(usual))
    for i in range(2):
        torch.testing.assert_close(tap.values[f"{i}.attn.pattern"][:, :, 2:], expected[i][:, :, 2:])
    looking_at_itself = {"0.attn.pattern": torch.eye(9)}
    replaced = model.run(tokens, tap=Patterned(looking_at_itself), stop="0.resid_mid")
    alone = torch.stack([model.run(tokens[:, t : t + 1], position_ids=torch.full((2, 1), t), stop="0.resid_mid")[:, 0]
                         for t in range(9)], 1)  # fmt: skip
    torch.testing.assert_close(replaced, alone)
    assert hf.config._attn_implementation == usual


class Patterned(Replace):
    wants = frozenset({"pattern"})


def test_what_cannot_be_wrapped_is_refused_in_words() -> None:
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, is_decoder=True)
    with pytest.raises(ValueError, match="'bert' cannot be wrapped; allowed are gpt2, gpt_neo, llama"):
        DenseModel(BertLMHeadModel(config))
    neox = GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **SPECIAL)
    with pytest.raises(ValueError, match="'gpt_neox', whose attention and MLP read the residual stream side by side"):
        DenseModel(GPTNeoXForCausalLM(neox))


def test_what_weights_do_not_tell_is_named() -> None:
    assert DenseModel(build("gpt2")).obstacles == ()
    assert DenseModel(build("gpt_neo")).obstacles == ("attention to a window",)
    assert DenseModel(build("llama")).obstacles == ("rotary positions", "a gated MLP")


@pytest.mark.skipif(not SORT.is_dir(), reason="the checkpoint gpt-nano-sort is not beside the project")
def test_a_checkpoint_that_someone_else_trained_sorts() -> None:
    model = load_model(SORT)
    assert isinstance(model, DenseModel)
    numbers = torch.tensor([[2, 0, 1, 1, 0, 2]])
    tokens = numbers
    for _ in range(6):
        tokens = torch.cat([tokens, model.run(tokens)[:, -1:].argmax(-1)], 1)
    assert tokens[0, 6:].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(load_tokenizer(SORT)) == 3


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="names no model_type"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "config.json")
    with pytest.raises(ValueError, match="nowhere-at-all cannot be loaded"):
        load_model("nowhere-at-all")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)

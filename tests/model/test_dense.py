from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, DynamicCache, GPT2Config, GPT2LMHeadModel

from distill.model import DenseModel, Record, Replace, load_model, load_tokenizer, residual_sites

SORT = Path(__file__).parents[3] / "shared" / "checkpoints" / "gpt-nano-sort"


@pytest.fixture(scope="module")
def gpt2() -> Iterator[GPT2LMHeadModel]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=12, n_head=3, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)
    yield GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(3))


def test_logits_are_those_of_transformers_bit_for_bit(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    model = DenseModel(gpt2)
    assert torch.equal(model.run(tokens), gpt2(tokens).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    assert torch.equal(model.run(tokens, attention_mask=mask), gpt2(tokens, attention_mask=mask).logits)
    assert torch.equal(model.run(tokens, tap=Record()), gpt2(tokens).logits)


def test_the_wrapper_is_in_the_mode_of_what_it_wraps(gpt2: GPT2LMHeadModel) -> None:
    assert not DenseModel(gpt2).training


def test_stop_then_start_equals_the_whole_run(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    model = DenseModel(gpt2)
    whole = model.run(tokens)
    for site in residual_sites(2):
        residual = model.run(tokens, stop=site)
        assert torch.equal(model.run(tokens, start=site, residual=residual), whole)


def test_residual_sites_are_the_hidden_states(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    record = Record()
    DenseModel(gpt2).run(tokens, tap=record)
    hidden = gpt2(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(record.values["0.resid_in"], hidden[0])
    assert torch.equal(record.values["1.resid_in"], hidden[1])


def test_every_location_can_be_read_and_written(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    model, record = DenseModel(gpt2), Record()
    whole = model.run(tokens, tap=record)
    assert {name: record.values[name].shape[-1] for name in model.widths} == model.widths
    assert torch.equal(model.run(tokens, tap=Replace(record.values)), whole)
    for location in model.widths:
        noise = torch.randn(record.values[location].shape, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(model.run(tokens, tap=Replace({location: noise})), whole), location
    assert torch.equal(model.run(tokens), whole)


def test_matrices_map_what_is_read_to_what_is_written(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    model, record = DenseModel(gpt2), Record()
    model.run(tokens, tap=record)
    values, matrices = record.values, model.matrices()
    for name in ("q", "k", "v"):
        weight = matrices["1.attn.act_in", f"1.attn.{name}"]
        torch.testing.assert_close(values["1.attn.act_in"] @ weight.T, values[f"1.attn.{name}"])
    weight = matrices["1.mlp.post_act", "1.mlp.resid_delta"]
    torch.testing.assert_close(values["1.mlp.post_act"] @ weight.T, values["1.mlp.resid_delta"])
    assert matrices["0.attn.v", "0.attn.resid_delta"].shape == (12, 12)
    assert matrices["0.mlp.act_in", "0.mlp.post_act"].shape == (48, 12)


def test_frozen_norms_freeze_the_scale_and_not_the_centring(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    class Frozen:
        wants = frozenset({"norm_scale"})

        def __init__(self) -> None:
            self.scales: dict[str, torch.Tensor] = {}

        def __call__(self, site: str, x: torch.Tensor, /) -> torch.Tensor:
            return self.scales.setdefault(site, x) if site.endswith("norm_scale") else x

    model, tap = DenseModel(gpt2), Frozen()
    torch.testing.assert_close(model.run(tokens, tap=tap), model.run(tokens))
    assert len(tap.scales) == 5
    residual = model.run(tokens, stop="final_resid")
    frozen = model.readout(3 * residual, tokens, tap=tap)
    bias = model.hf.transformer.ln_f.bias @ model.unembedding().T
    torch.testing.assert_close(frozen - bias, 3 * (model.readout(residual, tokens) - bias), rtol=1e-4, atol=1e-4)


def test_a_cache_gives_the_same(gpt2: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    model = DenseModel(gpt2)
    cache = DynamicCache(config=gpt2.config)
    first = model.run(tokens[:, :5], past_key_values=cache)
    rest = model.run(tokens[:, 5:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), model.run(tokens))


class Pattern(Record):
    wants = frozenset({"pattern"})


@pytest.mark.parametrize("padded", [False, True])
def test_patterns_are_those_of_transformers_and_can_be_replaced(
    gpt2: GPT2LMHeadModel, tokens: torch.Tensor, padded: bool
) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :2] = 1 - int(padded)
    model, tap = DenseModel(gpt2), Pattern(["0.attn.pattern", "1.attn.pattern"])
    torch.testing.assert_close(
        model.run(tokens, tap=tap, attention_mask=mask)[:, 2:], model.run(tokens, attention_mask=mask)[:, 2:]
    )
    usual = gpt2.config._attn_implementation
    gpt2.set_attn_implementation("eager")
    expected = gpt2(tokens, attention_mask=mask, output_attentions=True).attentions
    gpt2.set_attn_implementation(str(usual))
    for i in range(2):
        torch.testing.assert_close(tap.values[f"{i}.attn.pattern"][:, :, 2:], expected[i][:, :, 2:])
    looking_at_itself = {"0.attn.pattern": torch.eye(9)}
    replaced = model.run(tokens, tap=Patterned(looking_at_itself), stop="0.resid_mid")
    alone = torch.stack([model.run(tokens[:, t : t + 1], position_ids=torch.full((2, 1), t), stop="0.resid_mid")[:, 0]
                         for t in range(9)], 1)  # fmt: skip
    torch.testing.assert_close(replaced, alone)
    assert gpt2.config._attn_implementation == usual


class Patterned(Replace):
    wants = frozenset({"pattern"})


def test_what_cannot_be_wrapped_is_refused_in_words() -> None:
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, is_decoder=True)
    with pytest.raises(ValueError, match="'bert' cannot be wrapped; allowed are gpt2"):
        DenseModel(BertLMHeadModel(config))


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
    with pytest.raises(ValueError, match="is no JSON"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "config.json")
    with pytest.raises(ValueError, match="nowhere-at-all cannot be loaded"):
        load_model("nowhere-at-all")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)

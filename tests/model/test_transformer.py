import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from distill.model import Architecture, Record, Replace, SparseTransformer, residual_sites, set_path
from distill.model.sites import KINDS
from distill.model.transformer import LARGEST_BIGRAM

TINY = Architecture(vocab_size=31, context=16, n_layer=2, d_model=16, d_head=4)
OPTIONS = [
    TINY,
    Architecture(**{**vars(TINY), "position": "added"}),
    Architecture(**{**vars(TINY), "position": "concat", "d_position": 3}),
    Architecture(**{**vars(TINY), "norm": "layer", "norm_bias": True, "sink": False, "activation": "gelu_new"}),
    Architecture(**{**vars(TINY), "topk_at": (*KINDS, "resid_post_mlp"), "residual_activation": "relu"}),
    Architecture(**{**vars(TINY), "topk_fraction": None, "bigram": False, "linear_bias": False, "logits_bias": True}),
    Architecture(**{**vars(TINY), "tied_unembedding": True, "n_head": 2, "d_mlp": 24}),
]


def _model(architecture: Architecture = TINY) -> SparseTransformer:
    model = SparseTransformer.build(architecture, seed=1).eval()
    if model.bigram is not None:
        torch.nn.init.normal_(model.bigram, generator=torch.Generator().manual_seed(2))
    return model.requires_grad_(False)


def _tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(3))


class Everything:
    """A tap that asks for every extra, and keeps all that passes."""

    wants = frozenset({"pre", "norm_scale", "pattern"})

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def __call__(self, site: str, x: torch.Tensor, /) -> torch.Tensor:
        self.seen[site] = x
        return x


@pytest.mark.parametrize("architecture", OPTIONS)
def test_stop_then_start_equals_the_whole_run(architecture: Architecture) -> None:
    model, tokens = _model(architecture), _tokens()
    whole = model.run(tokens)
    for site in residual_sites(2):
        residual = model.run(tokens, stop=site)
        assert torch.equal(model.run(tokens, start=site, residual=residual), whole)


@pytest.mark.parametrize("architecture", OPTIONS)
def test_every_location_can_be_read_and_written(architecture: Architecture) -> None:
    model, tokens = _model(architecture), _tokens()
    record = Record()
    whole = model.run(tokens, tap=record)
    assert {name: record.values[name].shape[-1] for name in model.widths} == dict(model.widths)
    assert set(record.values) == set(model.widths) | set(residual_sites(2))
    assert torch.equal(model.run(tokens, tap=Replace(record.values)), whole)
    for site in record.values:
        changed = model.run(tokens, tap=Replace({site: record.values[site] + 1}))
        # A shift of all q alike can leave a softmax as it is; no other site may be without effect.
        assert site.endswith(".q") or not torch.equal(changed, whole), site


@pytest.mark.parametrize("architecture", OPTIONS)
def test_cache_and_padding_change_nothing(architecture: Architecture) -> None:
    model, tokens = _model(architecture), _tokens()
    whole = model.run(tokens)
    first = model(tokens[:, :5], use_cache=True)
    rest = model.run(tokens[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    ids = (torch.arange(12) - 3).clamp(min=0).expand(2, -1)
    torch.testing.assert_close(model.run(padded, attention_mask=mask, position_ids=ids)[:, 3:], whole)


def test_abs_topk_keeps_a_quarter_at_every_location() -> None:
    record = Record()
    model = _model()
    model.run(_tokens(), tap=record)
    for location, width in model.widths.items():
        assert int((record.values[location] != 0).sum(-1).max()) <= width // 4


def test_the_bigram_table_adds_the_row_of_the_current_token() -> None:
    model, tokens = _model(), _tokens()
    with_table = model.run(tokens)
    assert model.bigram is not None
    table = model.bigram.clone()
    model.bigram.zero_()
    torch.testing.assert_close(with_table - model.run(tokens), table[tokens])


def test_extras_are_handed_to_a_tap_that_wants_them() -> None:
    model, tokens, tap = _model(), _tokens(), Everything()
    torch.testing.assert_close(model.run(tokens, tap=tap), model.run(tokens))
    residual = tap.seen["1.resid_mid"]
    rms = residual.pow(2).mean(-1, keepdim=True)
    torch.testing.assert_close(tap.seen["1.mlp.norm_scale"], torch.rsqrt(rms + 1e-5))
    assert tap.seen["0.attn.pattern"].shape == (2, 4, 9, 9)
    assert float(tap.seen["0.attn.pattern"].sum(-1).max()) < 1
    assert tap.seen["0.attn.q.pre"].ne(0).all()
    assert "final.norm_scale" in tap.seen


def test_saving_and_loading(tmp_path: Path) -> None:
    model, tokens = _model(), _tokens()
    model.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert isinstance(loaded, SparseTransformer)
    assert torch.equal(loaded.run(tokens), model.run(tokens))
    assert loaded.fingerprint() == model.fingerprint()
    assert AutoConfig.from_pretrained(tmp_path / "dense").architecture == TINY.resolved()


def test_compact_storage_keeps_every_weight(tmp_path: Path) -> None:
    model = _model()
    for parameter in model.parameters():
        parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.1)
    model.save_compact(tmp_path)
    loaded = SparseTransformer.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        expected = value.half().float() if name == "bigram" else value
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_a_folder_holds_the_weights_that_were_saved_last(tmp_path: Path) -> None:
    first, second = SparseTransformer.build(TINY, seed=1), SparseTransformer.build(TINY, seed=2)
    first.save_compact(tmp_path)
    second.save_pretrained(tmp_path)
    assert not (tmp_path / "model.sparse.safetensors").exists()
    assert SparseTransformer.from_pretrained(tmp_path).fingerprint() == second.fingerprint()
    second.save_pretrained(tmp_path, max_shard_size="4KB")
    assert list(tmp_path.glob("model-*-of-*.safetensors"))
    first.save_compact(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.sparse.safetensors"]
    assert SparseTransformer.from_pretrained(tmp_path).fingerprint() == first.fingerprint()


def test_compact_weights_come_in_the_type_asked_for(tmp_path: Path) -> None:
    _model().save_compact(tmp_path)
    for options, dtype in (
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "float64"}, torch.float64),
    ):
        loaded = SparseTransformer.from_pretrained(tmp_path, **options)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64
    _model().to(torch.float64).save_compact(tmp_path)
    assert SparseTransformer.from_pretrained(tmp_path).dtype == torch.float64
    with pytest.raises(ValueError, match="device_map: got 'auto'.*allowed are config and dtype"):
        SparseTransformer.from_pretrained(tmp_path, device_map="auto")
    with pytest.raises(ValueError, match="dtype: got 'int8', allowed"):
        SparseTransformer.from_pretrained(tmp_path, dtype="int8")


def test_a_table_of_pairs_wants_a_small_vocabulary() -> None:
    Architecture(vocab_size=LARGEST_BIGRAM)
    Architecture(vocab_size=50257, bigram=False)
    with pytest.raises(ValueError, match="bigram: True is not possible; allowed: false with vocab_size 8193"):
        Architecture(vocab_size=8193)


def test_generate_with_and_without_cache() -> None:
    model, tokens = _model(), _tokens(1, 4)
    texts = [
        model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cache, attention_mask=tokens.ge(0).long())
        for cache in (True, False)
    ]
    assert texts[0].shape == (1, 12)
    assert torch.equal(texts[0], texts[1])


def test_the_loss_is_the_mean_over_shifted_targets() -> None:
    model, tokens = _model(), _tokens()
    logits = model.run(tokens)
    log_p = logits.log_softmax(-1)
    targets = [-float(log_p[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(8)]
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(sum(targets) / 16, rel=1e-5)


def test_defaults_follow_the_width() -> None:
    wide = replace(TINY, d_model=32)
    assert (wide.heads, wide.neurons) == (8, 128)
    assert (wide.resolved().n_head, wide.resolved().d_mlp) == (8, 128)


def test_seeds_reproduce() -> None:
    assert SparseTransformer.build(TINY, seed=5).fingerprint() == SparseTransformer.build(TINY, seed=5).fingerprint()
    assert SparseTransformer.build(TINY, seed=5).fingerprint() != SparseTransformer.build(TINY, seed=6).fingerprint()


def test_matrices_are_the_weights_between_the_locations() -> None:
    model = _model()
    widths = model.widths
    for (source, target), weight in model.matrices().items():
        assert weight.shape == (widths[target], widths[source])
    assert len(model.matrices()) == 2 * 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0),
        ("n_layer", "two"),
        ("d_model", 18),
        ("topk_fraction", 0.0),
        ("topk_fraction", 1.5),
        ("topk_at", ("attn.nowhere",)),
        ("norm", "batch"),
        ("norm_bias", True),
        ("norm_eps", -1.0),
        ("activation", "swish"),
        ("residual_activation", "gelu"),
        ("position", "rotary"),
        ("d_position", 4),
        ("n_head", 0),
    ],
)
def test_impossible_values_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as error:
        Architecture(**{**vars(TINY), "n_head": None, field: value})
    assert "allowed" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "0.resid_in"}, "start"),
        ({"residual": torch.zeros(2, 9, 16)}, "start"),
        ({"stop": "7.resid_in"}, "stop"),
        ({"stop": "0.resid_in", "start": "1.resid_in", "residual": torch.zeros(2, 9, 16)}, "stop"),
    ],
)
def test_impossible_stretches_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model().run(_tokens(), **arguments)


def test_texts_that_do_not_fit_are_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match="17 tokens; the context of this model is 16"):
        _model().run(_tokens(1, 17))
    with pytest.raises(ValueError, match="vocabulary of this model has 31"):
        _model().run(torch.tensor([[3, 31]]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), cut=st.integers(1, 8))
def test_the_future_never_reaches_back(seed: int, cut: int) -> None:
    model, tokens = _model(), _tokens()
    other = tokens.clone()
    other[:, cut:] = torch.randint(0, 31, other[:, cut:].shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model.run(tokens)[:, :cut], model.run(other)[:, :cut])


def test_a_new_model_starts_near_the_uniform_guess() -> None:
    model = SparseTransformer.build(Architecture(vocab_size=512, context=32, n_layer=2, d_model=64), seed=0)
    tokens = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(math.log(512), abs=1.0)


def _gradients(model: SparseTransformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kept", [1.0, 0.2])
@pytest.mark.parametrize("architecture", OPTIONS)
def test_compiled_and_plain_operations_agree(architecture: Architecture, kept: float) -> None:
    # Wide enough for products without the zeros.
    model = _model(replace(architecture, d_model=64, n_head=None, d_mlp=None)).requires_grad_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(4)) < kept)
    tokens, found = _tokens(), []
    first, last = residual_sites(2)[1], residual_sites(2)[3]
    try:
        for path in ("plain", "auto"):
            set_path(path)
            record, everything = Record(), Everything()
            results = {"logits": model.run(tokens), "tapped": model.run(tokens, tap=record)}
            results |= {"all tapped": model.run(tokens, tap=everything)}
            residual = model.run(tokens, stop=first)
            results |= {"stretch": model.run(tokens, start=first, residual=residual, stop=last)}
            results |= {"masked": model.run(tokens, attention_mask=torch.ones_like(tokens))}
            half = model(tokens[:, :5], use_cache=True).past_key_values
            results |= {"cached": model.run(tokens[:, 5:], past_key_values=half)}
            with torch.no_grad():
                results |= {"nothing recorded": model.run(tokens)}
            found.append(results | record.values | everything.seen | _gradients(model, tokens))
    finally:
        set_path("auto")
    plain, fast = found
    assert list(fast) == list(plain) and len(fast) > 50
    for name, value in plain.items():
        torch.testing.assert_close(
            fast[name], value, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )
    with pytest.raises(ValueError, match="path: 'fast'"):
        set_path("fast")

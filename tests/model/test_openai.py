"""OpenAI's checkpoints: an independent forward by the definition of their format, and the loader held to it.

`definition` below is written from what `distill/formats/README.md` says of their format, in numpy and double precision,
one head at a time; it shares no code with the package.
"""

import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from distill.artifact import ArtifactError
from distill.model import Architecture, SparseTransformer
from distill.model.openai import DEFAULTS, config_of, read_checkpoint, write_checkpoint

PLACES = ("attn_in", "attn_out", "mlp_in", "mlp_out", "attn_q", "attn_k", "attn_v", "mlp_neuron",
          "resid_post_attn", "resid_post_mlp")  # fmt: skip


# --- the definition --------------------------------------------------------------------------------------------------


def definition(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one sequence of tokens (T,)."""
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    d_head = config["d_head"] or config["d_model"] // config["n_head"]
    here = set(config["afrac_loctypes"].split(","))

    def sparse(x: np.ndarray, place: str) -> np.ndarray:
        if config["afrac"] is None or place not in here:
            return x
        out = np.zeros_like(x)
        for row, kept in zip(x, out, strict=True):
            for channel in sorted(range(len(row)), key=lambda c: -abs(row[c]))[: int(config["afrac"] * len(row))]:
                kept[channel] = row[channel]
        return out

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        if config["rms_norm"]:
            eps = 2.0**-23  # float32's machine epsilon
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]
        return x + w[f"{name}.bias"] if config["ln_bias"] else x

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        x = x @ w[f"{name}.weight"].T
        return x + w[f"{name}.bias"] if config["bias"] else x

    def attention(x: np.ndarray, block: str) -> np.ndarray:
        q, k, v = np.split(linear(sparse(x, "attn_in"), f"{block}.attn.c_attn"), 3, axis=-1)
        q, k, v = sparse(q, "attn_q"), sparse(k, "attn_k"), sparse(v, "attn_v")
        mixed = np.zeros_like(v)
        for head in range(config["n_head"]):
            mine = slice(head * d_head, (head + 1) * d_head)
            for t in range(len(x)):
                scores = [float(q[t, mine] @ k[s, mine]) / math.sqrt(d_head) for s in range(t + 1)]
                if config["sink"]:
                    scores.append(float(w[f"{block}.attn.attn_imp.sink_logit"][head]))
                share = np.exp(np.array(scores) - max(scores))
                share = share / share.sum()
                mixed[t, mine] = share[: t + 1] @ v[: t + 1, mine]
        return sparse(linear(mixed, f"{block}.attn.c_proj"), "attn_out")

    def mlp(x: np.ndarray, block: str) -> np.ndarray:
        x = linear(sparse(x, "mlp_in"), f"{block}.mlp.c_fc")
        relu = config["activation_type"] == "relu"
        x = np.maximum(x, 0) if relu else x * (1 + erf(x / math.sqrt(2))) / 2
        return sparse(linear(sparse(x, "mlp_neuron"), f"{block}.mlp.c_proj"), "mlp_out")

    positions = w["transformer.wpe.weight"][: len(tokens)]
    concat = config["d_pos_emb"] is not None
    x = w["transformer.wte.weight"][tokens] + (0 if concat else positions)
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}"
        for sublayer, number, place in ((attention, 1, "resid_post_attn"), (mlp, 2, "resid_post_mlp")):
            read = norm(x, f"{block}.ln_{number}")
            if concat:
                read = np.concatenate([read, norm(positions, f"{block}.ln_p{number}")], axis=-1)
            x = x + sublayer(read, block)
            if config["residual_activation_type"] == "relu":
                x = np.maximum(x, 0)
            x = sparse(x, place)
    logits = norm(x, "transformer.ln_f") @ w["lm_head.weight"].T
    if "final_logits_bias" in w:
        logits = logits + w["final_logits_bias"]
    return logits + w["bigram_table"][tokens] if config["enable_bigram_table"] else logits


# --- checkpoints to hold it against ----------------------------------------------------------------------------------


def random_state(config: Mapping[str, Any], *, seed: int, logits_bias: bool = True) -> dict[str, torch.Tensor]:
    """Every tensor that the format asks for, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    d, v = config["d_model"], config["vocab_size"]
    extra = config["d_pos_emb"] or 0
    heads = config["n_head"] * (config["d_head"] or d // config["n_head"])
    neurons = config["d_mlp"] or 4 * d

    def draw(*shape: int, around: float = 0.0) -> torch.Tensor:
        return around + torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    state: dict[str, torch.Tensor] = {}

    def add_norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = draw(width, around=1.0)
        if config["ln_bias"] and not config["rms_norm"]:
            state[f"{name}.bias"] = draw(width)

    def add_linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = draw(out, into)
        if config["bias"]:
            state[f"{name}.bias"] = draw(out)

    state["transformer.wte.weight"] = draw(v, d) * 2
    state["transformer.wpe.weight"] = draw(config["block_size"], extra or d) * 2
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}"
        for number in (1, 2):
            add_norm(f"{block}.ln_{number}", d)
            if extra:
                add_norm(f"{block}.ln_p{number}", extra)
        add_linear(f"{block}.attn.c_attn", 3 * heads, d + extra)
        add_linear(f"{block}.attn.c_proj", d, heads)
        add_linear(f"{block}.mlp.c_fc", neurons, d + extra)
        add_linear(f"{block}.mlp.c_proj", d, neurons)
        if config["sink"]:
            state[f"{block}.attn.attn_imp.sink_logit"] = draw(config["n_head"])
    add_norm("transformer.ln_f", d)
    state["lm_head.weight"] = state["transformer.wte.weight"] if config["tied_unembed"] else draw(v, d)
    if logits_bias:
        state["final_logits_bias"] = draw(v)
    if config["enable_bigram_table"]:
        state["bigram_table"] = draw(v, v)
    return state


def put(folder: Path, config: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "beeg_config.json").write_text(json.dumps(dict(config)))
    torch.save(dict(state), folder / "final_model.pt")
    return folder


SMALL = {**DEFAULTS, "block_size": 12, "vocab_size": 19, "n_layer": 2, "n_head": 2, "d_model": 8, "d_mlp": 12}
configs = st.fixed_dictionaries(
    {
        "bias": st.booleans(),
        "ln_bias": st.booleans(),
        "rms_norm": st.booleans(),
        "residual_activation_type": st.sampled_from(["identity", "relu"]),
        "activation_type": st.sampled_from(["gelu", "relu"]),
        "afrac": st.sampled_from([None, 0.25, 0.5, 0.7, 1.0]),
        "afrac_loctypes": st.lists(st.sampled_from(PLACES), unique=True).map(",".join),
        "tied_unembed": st.booleans(),
        "d_head": st.sampled_from([None, 5]),
        "d_mlp": st.sampled_from([None, 12]),
        "enable_bigram_table": st.booleans(),
        "learnable_bigram_table": st.booleans(),
        "d_pos_emb": st.sampled_from([None, 3]),
        "sink": st.booleans(),
        "n_layer": st.sampled_from([1, 2]),
        "n_head": st.sampled_from([1, 2, 4]),
        "flash": st.booleans(),
    }
).map(lambda chosen: {**SMALL, **chosen})


def bits(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().view(torch.int32) for name, tensor in state.items()}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(config=configs, seed=st.integers(0, 99), logits_bias=st.booleans())
def test_every_option_computes_what_the_definition_says_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], seed: int, logits_bias: bool
) -> None:
    state = random_state(config, seed=seed, logits_bias=logits_bias)
    folder = put(tmp_path_factory.mktemp("theirs"), config, state)
    model = SparseTransformer.from_openai(folder)
    tokens = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(seed))
    expected = np.stack([definition(config, state, row.numpy()) for row in tokens])
    with torch.no_grad():
        logits = model(tokens).logits.double().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)

    back = tmp_path_factory.mktemp("back")
    checkpoint = read_checkpoint(folder)
    write_checkpoint(back, model.architecture, model.state_dict(), like=checkpoint.config)
    again = torch.load(back / "final_model.pt", weights_only=True)
    assert again.keys() == state.keys()
    for name, tensor in bits(state).items():
        assert torch.equal(bits(again)[name], tensor), name
    written = json.loads((back / "beeg_config.json").read_text())
    assert written.pop("bigram_table_rank", 0) is None
    meant = {"d_head": config["d_head"] or 8 // config["n_head"], "d_mlp": config["d_mlp"] or 32}
    meant |= {"ln_bias": config["ln_bias"] and not config["rms_norm"]}
    assert written == {**config, **meant}


def test_the_definition_depends_on_every_option() -> None:
    """A reference that overlooked an option would let the loader overlook it too."""
    base = {**SMALL, "afrac": 0.5, "sink": True, "d_pos_emb": 3, "enable_bigram_table": True, "tied_unembed": False,
            "afrac_loctypes": "attn_in"}  # fmt: skip
    state = random_state(base, seed=0)
    tokens = np.array([3, 1, 4, 1, 5])
    whole = definition(base, state, tokens)
    for name, value in (
        ("sink", False),
        ("afrac", None),
        ("enable_bigram_table", False),
        ("bias", False),
        ("ln_bias", False),
        ("rms_norm", True),
        ("residual_activation_type", "relu"),
        ("activation_type", "relu"),
        *(("afrac_loctypes", place) for place in PLACES[1:]),
    ):
        assert np.abs(definition({**base, name: value}, state, tokens) - whole).max() > 1e-3, (name, value)
    for name in state:
        changed = {**state, name: state[name] + torch.randn_like(state[name])}
        assert np.abs(definition(base, changed, tokens) - whole).max() > 1e-3, name


def test_with_a_cache_the_logits_are_the_same(tmp_path: Path) -> None:
    for number, config in enumerate(({**SMALL, "sink": True}, {**SMALL, "d_pos_emb": 3, "afrac": 0.5})):
        model = SparseTransformer.from_openai(put(tmp_path / str(number), config, random_state(config, seed=1)))
        tokens = torch.randint(0, 19, (1, 5), generator=torch.Generator().manual_seed(0))
        texts = [model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert texts[0].shape == (1, 11) and torch.equal(*texts)


def test_a_loaded_model_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    for tied in (True, False):
        config = {**SMALL, "tied_unembed": tied}
        model = SparseTransformer.from_openai(put(tmp_path / f"theirs{tied}", config, random_state(config, seed=2)))
        assert (model.unembed.weight is model.embed_tokens.weight) == tied
        assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
        model.save_pretrained(tmp_path / f"ours{tied}")
        again = SparseTransformer.from_pretrained(tmp_path / f"ours{tied}")
        assert again.fingerprint() == model.fingerprint()


# --- older files, and files that are wrong ---------------------------------------------------------------------------


def test_older_files_and_left_out_options_are_understood(tmp_path: Path) -> None:
    state = random_state(SMALL, seed=3, logits_bias=False)
    now = SparseTransformer.from_openai(put(tmp_path / "now", SMALL, state))
    old = {name: value for name, value in SMALL.items() if DEFAULTS[name] != value}
    old["n_mlp"] = old.pop("d_mlp")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(12, 12).tril()[None, None] for i in range(2)}
    more = {"use_tied_aux_matrix": False, "bigram_table_rank": None}
    then = SparseTransformer.from_openai(put(tmp_path / "then", {**old, **more}, {**state, **masks}))
    assert now.unembed.bias is None and then.fingerprint() == now.fingerprint()
    halves = {name: tensor.half() for name, tensor in state.items()}
    half = SparseTransformer.from_openai(put(tmp_path / "half", SMALL, halves))
    assert half.dtype == torch.float32
    assert torch.equal(half.embed_tokens.weight, state["transformer.wte.weight"].half().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 8}, "unknown option 'n_embd'; allowed are block_size, "),
        ({"use_tied_aux_matrix": True}, "use_tied_aux_matrix is on"),
        ({"n_mlp": 3}, "n_mlp and d_mlp both given"),
        ({"n_layer": "2"}, "n_layer is '2'; allowed: whole numbers from 1"),
        ({"n_layer": True}, "n_layer is True; allowed: whole numbers"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, but final_model.pt has"),
        ({"d_head": 0}, "d_head is 0; allowed: whole numbers from 1, or null"),
        ({"n_head": 3}, "d_model is 8; allowed: multiples of n_head, 3"),
        ({"afrac": 1.5}, "afrac is 1.5; allowed: numbers above 0 up to 1, or null"),
        ({"afrac": 0.1}, "afrac: 0.1 keeps none of the 8 channels at attn_in; allowed: 1 and more"),
        ({"afrac_loctypes": "attn_in,ears"}, "afrac_loctypes is 'attn_in,ears'; allowed: names with commas"),
        ({"activation_type": "silu"}, "activation_type is 'silu'; allowed: gelu, relu"),
        ({"sink": 1}, "sink is 1; allowed: true, false"),
        ({"dropout": 1}, "dropout is 1; allowed: numbers from 0 to below 1"),
        ({"tokenizer_name": None}, "tokenizer_name is None; allowed: text"),
        ({"vocab_size": 9000, "enable_bigram_table": True}, "bigram: True is not possible"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = put(tmp_path, {**SMALL, **changes}, random_state(SMALL, seed=0))
    with pytest.raises(ArtifactError) as error:
        SparseTransformer.from_openai(folder)
    said = str(error.value)
    assert message in said and str(folder / "beeg_config.json") in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"afrac": NaN}', '"x"'])
def test_broken_configurations_are_named(tmp_path: Path, text: str) -> None:
    put(tmp_path, SMALL, random_state(SMALL, seed=0))
    (tmp_path / "beeg_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"beeg_config\.json"):
        SparseTransformer.from_openai(tmp_path)


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "lacks 'lm_head.weight'"),
        (
            lambda s: s.update(extra=torch.ones(2)),
            "holds 'extra', which the beeg_config.json beside it has no place for",
        ),
        (lambda s: s.update({WTE: torch.ones(3, 8)}), "has shape (3, 8), beeg_config.json says (19, 8)"),
        (lambda s: s.update({WTE: torch.ones(19, 8, dtype=torch.int32)}), "is of torch.int32, allowed are"),
        (lambda s: s.update({WTE: [1.0]}), "is of type list, allowed are tensors"),
        (lambda s: s.update({WTE: s[WTE].to_sparse()}), "is a torch.sparse_coo tensor"),
        (lambda s: s.update({WTE: torch.ones(1, 1).expand(19, 8)}), "but the file holds 4 bytes of it"),
        (lambda s: s.update({WTE: torch.ones(19, 8)}), "tied_unembed is on"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    state = random_state(SMALL, seed=0)
    change(state)
    put(tmp_path, SMALL, state)
    with pytest.raises(ArtifactError) as error:
        SparseTransformer.from_openai(tmp_path)
    said = str(error.value)
    assert message in said and "final_model.pt" in said and len(said.splitlines()) == 1


class Trap:
    """Unpickled without care it would run a program."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("unpickled",)


def test_files_that_are_no_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = random_state(SMALL, seed=0)
    weights = put(tmp_path, SMALL, state) / "final_model.pt"
    whole = weights.read_bytes()

    def refused(content: bytes) -> str:
        weights.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"final_model\.pt") as error:
            SparseTransformer.from_openai(tmp_path)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        assert "cut" in refused(whole[:length])
    trap = io.BytesIO()
    torch.save({WTE: Trap()}, trap)
    assert "holds more than weights" in refused(trap.getvalue())
    legacy = io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    assert "torch 1.6 and later" in refused(legacy.getvalue())
    listed = io.BytesIO()
    torch.save([state], listed)
    assert "holds a list" in refused(listed.getvalue())
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in one.infolist():
            other.writestr(entry.filename, one.read(entry))
    assert "is a packed archive" in refused(packed.getvalue())
    weights.unlink()
    with pytest.raises(ArtifactError, match="no such checkpoint file"):
        SparseTransformer.from_openai(tmp_path)
    with pytest.raises(ArtifactError, match="no such folder"):
        SparseTransformer.from_openai(tmp_path / "nowhere")
    assert "unpickled" not in capsys.readouterr().out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(place=st.floats(0, 1), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    config = {**SMALL, "n_layer": 1}
    weights = put(tmp_path_factory.mktemp("changed"), config, random_state(config, seed=0)) / "final_model.pt"
    content = bytearray(weights.read_bytes())
    content[int(place * (len(content) - 1))] = value
    weights.write_bytes(content)
    try:
        model = SparseTransformer.from_openai(weights.parent)
    except ArtifactError as error:
        assert "final_model.pt" in str(error)
    else:
        assert model.embed_tokens.weight.shape == (19, 8)


# --- the way back ----------------------------------------------------------------------------------------------------


def test_models_of_ours_become_theirs(tmp_path: Path) -> None:
    architecture = Architecture(vocab_size=19, context=12, n_layer=2, d_model=16, d_head=4, norm_eps=2.0**-23)
    model = SparseTransformer.build(architecture, seed=4).eval()
    assert model.bigram is not None
    torch.nn.init.normal_(model.bigram, generator=torch.Generator().manual_seed(0))
    write_checkpoint(tmp_path, model.architecture, model.state_dict())
    config = json.loads((tmp_path / "beeg_config.json").read_text())
    state = torch.load(tmp_path / "final_model.pt", weights_only=True)
    assert not state["transformer.wpe.weight"].any()  # no positions: a table of zeros is the same
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = model(tokens).logits[0].double().numpy()
    np.testing.assert_allclose(definition(config, state, tokens[0].numpy()), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_eps", 1e-6, "norm_eps: 1e-06 has no place in OpenAI's format; allowed there: 1.19"),
        ("activation", "gelu_new", "activation: 'gelu_new' has no place in OpenAI's format; allowed there: gelu, relu"),
        ("n_head", 3, "n_head: 3 has no place in OpenAI's format; allowed there: divisors of d_model, 16"),
    ],
)
def test_what_their_format_has_no_word_for_is_named(field: str, value: Any, message: str) -> None:
    fits = {"vocab_size": 19, "context": 12, "n_layer": 1, "d_model": 16, "d_head": 4, "norm_eps": 2.0**-23}
    config_of(Architecture(**fits))
    with pytest.raises(ValueError) as error:
        config_of(Architecture(**{**fits, field: value}))
    assert message in str(error.value)

"""The loop: what a step does, what is logged, and that stopping and resuming change nothing."""

import json
import math
import os
import platform
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from distill.artifact import ArtifactError, Provenance
from distill.model import kernels, linear_path
from distill.training.checkpoint import checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from distill.training.optim import make_optimizer
from distill.training.sparsity import sparse_parameters
from distill.training.trainer import TrainConfig, TrainingError, train, tune_malloc

torch.set_num_threads(1)

VOCABULARY = 12
DATA = np.tile(np.arange(VOCABULARY, dtype=np.uint16), 60)
PROVENANCE = Provenance(kind="run", command="test", config={}, seed=0, data="abc")
CONFIG = TrainConfig(
    steps=20, batch=4, context=6, learning_rate=0.1, kept=0.25, log_every=4, eval_every=10, save_every=5
)


class Net(nn.Module):
    """Predicts the next token from this one, with a gain that is not projected."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, 8)
        self.final_norm = nn.RMSNorm(8)
        self.unembed = nn.Linear(8, VOCABULARY)
        with torch.no_grad():
            for parameter in (self.embed_tokens.weight, self.unembed.weight, self.unembed.bias):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens):
        return self.unembed(self.final_norm(self.embed_tokens(tokens)))


class Cut(Exception):
    pass


def run(folder: Path, config=CONFIG, *, resume=False, evaluate=None, cut=None, wrong=None, net=None, **more):
    """Train a `Net` on noisy embeddings (so that the random state matters); stop before step `cut`."""
    net = net or Net()

    def objective(tokens, step):
        if step == cut:
            raise Cut
        hidden = net.embed_tokens(tokens[:, :-1])
        logits = net.unembed(net.final_norm(hidden + 0.01 * torch.randn_like(hidden)))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if wrong is not None and step == 3:
            loss = wrong(net, loss)
        return loss, {"double": 2 * loss, "one": 1.0}

    torch.manual_seed(5)
    sparse = sparse_parameters(net)
    arguments = {"sparse": sparse, "evaluate": evaluate, "resume": resume, "provenance": PROVENANCE, **more}
    history = train(net, objective, DATA, config, folder, **arguments)
    return net, history


def weights(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_training_learns_and_ends_exactly_sparse(tmp_path):
    net, history = run(tmp_path, replace(CONFIG, steps=60, learning_rate=0.3))
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]
    for name, kept in (("embed_tokens.weight", 24), ("unembed.weight", 24), ("unembed.bias", 3)):
        assert int((net.get_parameter(name) != 0).sum()) == kept
    assert int((net.final_norm.weight != 0).sum()) == 8


def test_lines_by_hand(tmp_path):
    seen = []

    def evaluate():
        seen.append(torch.is_grad_enabled())
        return {"heldout_loss": 1.5}

    _, history = run(tmp_path, replace(CONFIG, keep_best=False), evaluate=evaluate)
    assert [line["step"] for line in history] == [4, 8, 10, 12, 16, 20]
    assert [line["step"] for line in history if "heldout_loss" in line] == [10, 20]
    assert len(seen) == 2
    assert metrics(tmp_path) == history
    first, middle, last = history[0], history[2], history[-1]
    assert first["double"] == pytest.approx(2 * first["loss"])
    assert (first["one"], first["tokens"]) == (1.0, 4 * 4 * 6)
    # After 4 of 20 steps, annealed over 10: 1 - 0.75 * 0.4; the rate of update 3 with no whole step of warm-up.
    assert first["kept"] == pytest.approx(0.7)
    assert first["rate"] == pytest.approx(0.1 * 17 / 20)
    assert first["rate_sparse"] == pytest.approx(0.1 * 17 / 20 * math.sqrt(0.25 / 0.7))
    assert first["nonzeros"] == 2 * round(0.7 * 96) + round(0.7 * 12)
    assert (middle["kept"], middle["nonzeros"]) == (0.25, 51)
    assert last["rate"] == last["rate_sparse"] == pytest.approx(0.1 / 20)
    assert "dead_residual_channels" in last


def test_switches(tmp_path):
    _, plain = run(tmp_path / "plain", replace(CONFIG, sharkfin=False))
    assert all(line["rate"] == line["rate_sparse"] for line in plain)
    _, dense = run(tmp_path / "dense", replace(CONFIG, kept=1.0))
    assert all(line["kept"] == 1 and line["nonzeros"] == 204 and line["rate"] == line["rate_sparse"] for line in dense)
    _, off = run(tmp_path / "off", replace(CONFIG, grad_rms="off"))
    _, clip = run(tmp_path / "clip", replace(CONFIG, grad_rms="clip"))
    # Under 1 at first, where clipping does nothing, later above.
    assert off[0]["gradient_rms"] < 1 < off[-2]["gradient_rms"]
    assert off[0]["loss"] == clip[0]["loss"]
    assert off[-1]["loss"] != clip[-1]["loss"]
    _, normal = run(tmp_path / "normal")
    assert normal[-1]["loss"] != off[-1]["loss"]


class Wide(Net):
    """A `Net` with a matrix that is worth measuring."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(256, 256)


def test_the_linear_path_is_measured_once_and_held_on_to(tmp_path, monkeypatch):
    if not kernels.available():
        pytest.skip("no compiler on this machine")
    measured, used = [], []

    def measure(shapes, tokens, linear):
        measured.append((set(shapes), tokens))
        return linear_path.LinearPath(crossovers={(256, 256): 0.125}, threads=1)

    def watch(net, loss):
        used.append([linear_path.chosen(256, 256, density) for density in (0.125, 0.13)])
        return loss

    monkeypatch.setattr(linear_path, "measure", measure)
    with pytest.raises(Cut):
        run(tmp_path / "run", cut=8, wrong=watch, net=Wide())
    assert measured == [({(256, 256), (VOCABULARY, 8)}, 24)]
    saved = linear_path.LinearPath.load(tmp_path / "run" / "linear_path.json")
    assert saved.crossovers == {(256, 256): 0.125}
    run(tmp_path / "run", resume=True, net=Wide())
    assert len(measured) == 1 and used == [[True, False]]
    assert linear_path.chosen(256, 256, 0.13)  # the general rule, again


def test_a_named_linear_path_is_used_and_saved(tmp_path):
    used = []

    def watch(net, loss):
        used.append(linear_path.chosen(256, 256, 0.9))
        return loss

    run(tmp_path / "sparse", wrong=watch, linear_path="sparse")
    run(tmp_path / "file", wrong=watch, linear_path=str(tmp_path / "sparse" / "linear_path.json"))
    run(tmp_path / "dense", wrong=watch, linear_path="dense")
    assert used == [True, True, False]
    assert not (tmp_path / "auto").exists()
    run(tmp_path / "auto")
    assert not (tmp_path / "auto" / "linear_path.json").exists()  # nothing here is worth measuring
    with pytest.raises(ArtifactError, match="no such linear path"):
        run(tmp_path / "none", linear_path="quick")


def test_floor_reaches_the_units(tmp_path):
    class Units(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp_in, self.mlp_out = nn.Linear(VOCABULARY, 40, bias=False), nn.Linear(40, VOCABULARY, bias=False)

    units = Units()
    with torch.no_grad():
        units.mlp_in.weight[:5] *= 100  # five neurons would take everything

    def objective(tokens, step):
        logits = units.mlp_out(F.gelu(units.mlp_in(F.one_hot(tokens[:, :-1], VOCABULARY).float())))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}

    for floor, least in ((0, 0), (2, 2)):
        config = replace(CONFIG, kept=0.1, floor=floor, anneal_fraction=0.0, steps=1)
        arguments = {"sparse": sparse_parameters(units), "provenance": PROVENANCE}
        trained = {name: p.detach().clone() for name, p in units.named_parameters()}
        train(units, objective, DATA, config, tmp_path / str(floor), **arguments)
        counts = (units.mlp_in.weight != 0).sum(1)
        assert int(counts.min()) == least
        assert int(counts.sum()) == (48 if floor == 0 else 48 + 35 * 2)
        with torch.no_grad():
            for name, p in units.named_parameters():
                p.copy_(trained[name])


@pytest.mark.parametrize("cut", [5, 13, 18])
def test_resumed_equals_uninterrupted(tmp_path, cut):
    evaluate = lambda: {"noise": float(torch.rand(()))}  # noqa: E731
    whole, history = run(tmp_path / "whole", evaluate=evaluate)
    with pytest.raises(Cut):
        run(tmp_path / "cut", evaluate=evaluate, cut=cut)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')  # killed while writing
    torch.rand(7)
    resumed, continued = run(tmp_path / "cut", evaluate=evaluate, resume=True)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    assert timeless(continued) == timeless(history) == timeless(metrics(tmp_path / "cut"))
    last = [load_file(checkpoints(tmp_path / name)[-1] / "moments.safetensors") for name in ("whole", "cut")]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_resume_of_a_finished_or_not_yet_saved_run(tmp_path):
    net, history = run(tmp_path / "done")
    again, same = run(tmp_path / "done", resume=True)
    assert same == history
    assert torch.equal(again.unembed.weight, net.unembed.weight)
    with pytest.raises(Cut):
        run(tmp_path / "early", cut=4)
    anew, _ = run(tmp_path / "early", resume=True)
    assert torch.equal(anew.unembed.weight, net.unembed.weight)


def test_newest_checkpoints_stay(tmp_path):
    run(tmp_path, replace(CONFIG, keep_checkpoints=3))
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (10, 15, 20)]
    assert checkpoint_path(tmp_path, 15).is_dir()


def test_a_run_is_not_written_over(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="folder: .* holds a run already"):
        run(tmp_path)


@pytest.mark.parametrize(("change", "field"), [({"steps": 40}, "steps"), ({"betas": (0.8, 0.9)}, "betas")])
def test_other_settings_are_not_resumed(tmp_path, change, field):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"{field}: got .*to resume"):
        run(tmp_path, replace(CONFIG, **change), resume=True)


def test_settings_of_the_log_may_change(tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, cut=12)
    _, history = run(tmp_path, replace(CONFIG, log_every=1), resume=True)
    assert [line["step"] for line in history] == [4, 8, *range(11, 21)]


def test_damaged_and_foreign_checkpoints(tmp_path):
    net, _ = run(tmp_path)
    optimizer = make_optimizer(net, {})
    other = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match="other modules"):
        load_checkpoint(checkpoints(tmp_path)[-1], other, make_optimizer(other, {}))
    foreign, before = tmp_path / "foreign", {name: one.clone() for name, one in net.state_dict().items()}
    weights = {name: torch.zeros_like(one) for name, one in before.items()}
    moments = {"stranger/exp_avg": torch.ones(2)}
    known = Provenance(kind="run", command="a test", config={}, seed=0, data=None)
    options = {"candidates": {}, "state": {}, "provenance": known, "keep": 1}
    save_checkpoint(foreign, 1, (weights, moments), **options)
    with pytest.raises(ArtifactError, match="holds moments of 'stranger', which is no parameter"):
        load_checkpoint(checkpoints(foreign)[-1], net, optimizer)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    state = checkpoints(tmp_path)[-1] / "state.json"
    state.write_text(state.read_text().replace('"step": 20', '"step": 21'))
    with pytest.raises(ArtifactError, match="sha256"):
        load_checkpoint(checkpoints(tmp_path)[-1], net, optimizer)
    load_checkpoint(checkpoints(tmp_path)[-2], net, optimizer)


def poison_gradient(net, loss):
    net.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)
    return loss


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda net, loss: loss * math.nan, "step 3: loss is nan"),
        (poison_gradient, "step 3: gradient of final_norm.weight is not finite"),
    ],
)
def test_what_is_not_finite_stops(tmp_path, wrong, message):
    with pytest.raises(TrainingError, match=f"{message}.*learning_rate.*step-00000002"):
        run(tmp_path, replace(CONFIG, save_every=2), wrong=wrong)
    run(tmp_path, replace(CONFIG, save_every=2), resume=True)


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(Cut):
        run(tmp_path, cut=7)
    monkeypatch.setattr("distill.training.checkpoint.write_json", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, resume=True)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005"]
    resumed, _ = run(tmp_path, resume=True)
    whole, _ = run(tmp_path / "whole")
    assert torch.equal(resumed.unembed.weight, whole.unembed.weight)


def test_interrupt_saves_and_resumes(tmp_path, capsys):
    def press(net, loss):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 20"):
        run(tmp_path / "cut", wrong=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert "resume from" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-00000004"]
    resumed, _ = run(tmp_path / "cut", resume=True)
    whole, _ = run(tmp_path / "whole")
    assert torch.equal(resumed.unembed.weight, whole.unembed.weight)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch", 0), ("context", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("kept", 0.0),
        ("kept", 1.1), ("floor", -1), ("anneal_fraction", 1.1),
        ("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -1.0), ("warmup_fraction", -0.1), ("seed", -1),
        ("log_every", 0), ("eval_every", -1), ("save_every", -1), ("keep_checkpoints", 0), ("accumulate", 0),
        ("reseed_every", -1),
    ],
)  # fmt: skip
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}: got .*allowed are"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("anneal", "slow"), ("grad_rms", "none"), ("precision", "half")])
def test_words_are_checked(field, value):
    config = TrainConfig()
    object.__setattr__(config, field, value)  # the type checker of these tests would refuse it as an argument
    with pytest.raises(ValueError, match=f"{field}: got '{value}', allowed are"):
        config.__post_init__()


@pytest.mark.parametrize(("field", "value"), [("jump", True), ("reseed_every", 5), ("precision", "bfloat16")])
def test_what_the_candidate_mode_cannot_do_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value!r}, allowed are .* with candidate_mode"):
        TrainConfig(**{"candidate_mode": True, field: value})


def test_malloc_is_tuned_where_glibc_is():
    assert tune_malloc() == (platform.libc_ver()[0] == "glibc")

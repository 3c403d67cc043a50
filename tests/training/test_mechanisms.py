"""What a step can do besides, what is kept of it, and what is said of it."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn

from distill.artifact import Provenance
from distill.training.checkpoint import best_checkpoint, checkpoints
from distill.training.dead import ENTRIES, reseed_
from distill.training.log import make_engine
from distill.training.optim import make_optimizer
from distill.training.plot import plot_run
from distill.training.sparsity import late_parameters, sparse_parameters, sparsity_report
from distill.training.trainer import TrainConfig, train

VOCABULARY = 12
DATA = np.tile(np.arange(VOCABULARY, dtype=np.uint16), 60)
PROVENANCE = Provenance(kind="run", command="test", config={}, seed=0, data="abc")
CONFIG = TrainConfig(steps=10, batch=4, context=6, learning_rate=0.1, kept=0.25, log_every=1, save_every=0)


class Net(nn.Module):
    """Embedding, one layer of neurons without a residual stream, unembedding."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, 8, dtype=dtype)
        self.mlp_in, self.mlp_out = nn.Linear(8, 16, dtype=dtype), nn.Linear(16, 8, dtype=dtype)
        self.unembed = nn.Linear(8, VOCABULARY, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mlp_out(F.gelu(self.mlp_in(self.embed_tokens(tokens[:, :-1]))))
        return F.cross_entropy(self.unembed(x).flatten(0, 1), tokens[:, 1:].flatten())


def run(folder: Path, config: TrainConfig = CONFIG, *, net: Net | None = None, **more: Any) -> tuple[Net, list[dict]]:
    net = net or Net()
    arguments = {"sparse": sparse_parameters(net), "provenance": PROVENANCE, **more}
    return net, train(net, lambda tokens, step: (net.loss(tokens), {}), DATA, config, folder, **arguments)


# --- the step ---


def test_embeddings_and_biases_jump_at_the_end_of_annealing(tmp_path: Path) -> None:
    assert late_parameters(dict(Net().named_parameters())) == [
        "embed_tokens.weight", "mlp_in.bias", "mlp_out.bias", "unembed.weight", "unembed.bias",
    ]  # fmt: skip
    config = replace(CONFIG, jump=True, floor=0)
    assert [config.late_after(step) for step in (0, 4, 5, 10)] == [1.0, 1.0, 0.25, 0.25]
    net, history = run(tmp_path / "jump", config)
    late = 2 * VOCABULARY * 8 + 16 + 8 + VOCABULARY
    kept = [1 - 0.75 * step / 5 for step in range(1, 6)]
    expected = [2 * round(128 * share) + late for share in kept[:4]] + [2 * 32 + 2 * 24 + 4 + 2 + 3] * 6
    assert [line["nonzeros"] for line in history] == expected
    assert int(net.embed_tokens.weight.count_nonzero()) == 24
    _, plain = run(tmp_path / "plain", replace(config, jump=False))
    assert plain[3]["nonzeros"] < history[3]["nonzeros"]


@pytest.mark.parametrize("plain", [False, True])
def test_parts_of_a_batch_make_the_same_step(tmp_path: Path, plain: bool) -> None:
    dtype = torch.float64 if plain else torch.float32
    runs = {}
    for parts in (1, 2, 4):
        runs[parts] = run(tmp_path / str(parts), replace(CONFIG, accumulate=parts), net=Net(dtype))
    for parts in (2, 4):
        for name, weight in runs[1][0].named_parameters():
            other = runs[parts][0].get_parameter(name)
            assert torch.allclose(weight, other, rtol=1e-9 if plain else 1e-3, atol=1e-12 if plain else 1e-4), name
        for one, other in zip(runs[1][1], runs[parts][1], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"batch: got 4, allowed are multiples of 3 \(1 processes x accumulate 3\)"):
        run(tmp_path / "3", replace(CONFIG, accumulate=3))


def test_bfloat16_is_for_the_passes_alone(tmp_path: Path) -> None:
    seen = []
    net = Net()
    net.mlp_out.register_forward_hook(lambda module, read, out: seen.append(out.dtype))
    run(tmp_path / "half", replace(CONFIG, precision="bfloat16"), net=net)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    exact, history = run(tmp_path / "exact")
    half, other = Net(), run(tmp_path / "again", replace(CONFIG, precision="bfloat16"))[1]
    assert other[0]["loss"] == pytest.approx(history[0]["loss"], rel=0.02)
    assert other[0]["loss"] != history[0]["loss"]
    assert int(net.mlp_in.weight.count_nonzero()) == int(exact.mlp_in.weight.count_nonzero()) == 32
    assert half.mlp_in.weight.dtype == torch.float32


def test_the_launcher_may_ask_for_bfloat16_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "bf16"))
    asked, _ = run(tmp_path / "asked", engine=engine)
    set_, _ = run(tmp_path / "set", replace(CONFIG, precision="bfloat16"), engine=engine)
    assert torch.equal(asked.mlp_in.weight, set_.mlp_in.weight)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    with pytest.raises(ValueError, match="precision: launched with fp16, allowed are no and bf16"):
        run(tmp_path / "half", engine=engine)


def dead_net() -> Net:
    net = Net()
    with torch.no_grad():
        net.mlp_in.weight[3] = 0  # reads nothing
        net.mlp_out.weight[:, 5] = 0  # writes nothing
        net.mlp_in.weight[7], net.mlp_out.weight[:, 7] = 0, 0
    return net


def named(net: Net) -> dict[str, nn.Parameter]:
    """As in a model, where the maps are a layer's."""
    return {f"layers.0.{name}": p for name, p in net.named_parameters()}


def test_dead_neurons_are_given_weights_again() -> None:
    net = dead_net()
    assert sparsity_report(named(net))["dead_neurons"] == 3 / 16
    optimizer = make_optimizer(net, sparse_parameters(net))
    for p in net.parameters():
        optimizer.state[p] = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    medians = {name: before[name][before[name] != 0].abs().median() for name in ("mlp_in.weight", "mlp_out.weight")}
    assert reseed_(named(net), optimizer, seed=1) == 3
    assert sparsity_report(named(net))["dead_neurons"] == 0
    changed = {name: p.detach() != before[name] for name, p in net.named_parameters()}
    for name, units in (("mlp_in.weight", changed["mlp_in.weight"]), ("mlp_out.weight", changed["mlp_out.weight"].T)):
        counts = units.sum(1).tolist()
        dead = {"mlp_in.weight": (3, 7), "mlp_out.weight": (5, 7)}[name]
        assert counts == [ENTRIES if unit in dead else 0 for unit in range(16)]
        weight = net.get_parameter(name)
        assert torch.allclose(weight[changed[name]].abs(), medians[name])
        moment = optimizer.state[weight]["exp_avg"]
        assert torch.equal(moment == 0, changed[name])
    assert not changed["embed_tokens.weight"].any()
    assert reseed_(named(net), optimizer, seed=1) == 0


def test_reseeding_ends_with_the_annealing(tmp_path: Path) -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dead_net()

    layered = Layered()
    arguments: dict[str, Any] = {"sparse": sparse_parameters(layered), "provenance": PROVENANCE}
    config = replace(CONFIG, reseed_every=2, floor=0)
    history = train(layered, lambda tokens, step: (layered.net.loss(tokens), {}), DATA, config, tmp_path, **arguments)
    # Updates 2 and 4 of the five that anneal.
    assert [line["reseeded"] for line in history][2] >= 1
    assert all(line["reseeded"] == 0 for i, line in enumerate(history) if i not in (2, 4))
    assert history[-1]["nonzeros"] == 2 * 32 + 2 * 24 + 4 + 2 + 3


# --- what is kept ---


def test_the_best_checkpoint_at_the_target_stays(tmp_path: Path) -> None:
    losses = iter([0.1, 0.2, 0.9, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    net = Net()
    config = replace(CONFIG, save_every=1, eval_every=0, keep_checkpoints=2)
    _, history = run(tmp_path, config, net=net, evaluate=lambda: {"heldout_loss": next(losses)})
    assert [line["heldout_loss"] for line in history][:3] == [0.1, 0.2, 0.9]
    # Steps 1 to 4 are above the target fraction; 5 is the first at it, and the lowest.
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-00000009", "step-00000010"]
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step-00000005"
    run(tmp_path / "none", replace(config, keep_best=False), evaluate=lambda: {"heldout_loss": 1.0})
    assert len(checkpoints(tmp_path / "none")) == 2
    assert best_checkpoint(tmp_path / "nowhere") is None


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_mechanisms as t
import torch
torch.set_num_threads(1)
net = t.Net()
def objective(tokens, step):
    if step == 7:
        print("now", flush=True)
        time.sleep(600)
    return net.loss(tokens), {{}}
config = t.replace(t.CONFIG, save_every=2)
t.train(net, objective, t.DATA, config, Path({folder!r}), sparse=t.sparse_parameters(net), provenance=t.PROVENANCE)
"""


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with_to_the_bit(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"now\n"
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    child.stdout.close()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000006"]
    config = replace(CONFIG, save_every=2)
    resumed, lines = run(tmp_path / "run", config, resume=True)
    whole, history = run(tmp_path / "whole", config)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name
    assert [line["step"] for line in lines] == [line["step"] for line in history] == list(range(1, 11))


# --- what is said ---


def test_norms_by_hand(tmp_path: Path) -> None:
    net, history = run(tmp_path)
    numel = sum(p.numel() for p in net.parameters())
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in net.parameters()))
    assert history[-1]["weight_norm"] == pytest.approx(norm, rel=1e-5)
    for line in history:
        assert line["gradient_norm"] == pytest.approx(line["gradient_rms"] * math.sqrt(numel))
    assert history[0]["gradient_norm"] > 0


def test_every_tensor_has_its_share_and_norm(tmp_path: Path) -> None:
    net, _ = run(tmp_path, replace(CONFIG, eval_every=5), evaluate=lambda: {"heldout_loss": 1.0, "sample": "x»y"})
    lines = [json.loads(line) for line in (tmp_path / "tensors.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    found = lines[-1]["tensors"]
    assert set(found) == set(sparse_parameters(net))
    for name, weight in sparse_parameters(net).items():
        assert found[name]["kept"] == int(weight.count_nonzero())
        assert found[name]["norm"] == pytest.approx(float(weight.detach().norm()))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in metrics if "sample" in line] == ["x»y"] * 2


class Kept(GeneralTracker):
    """A tracker that remembers."""

    name = "kept"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict]] = []
        self.finished = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        self.config = values

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackers_get_every_line(tmp_path: Path) -> None:
    tracker = Kept()
    _, history = run(tmp_path, engine=Accelerator(cpu=True, log_with=tracker))
    assert [step for step, _ in tracker.lines] == [line["step"] for line in history]
    assert tracker.lines[-1][1]["loss"] == history[-1]["loss"]
    assert tracker.config["kept"] == 0.25 and isinstance(tracker.config["betas"], str)
    assert tracker.finished


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.training.log.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="trackers: got 'wandb', allowed are those installed: none is"):
        make_engine(replace(CONFIG, trackers=("wandb",)), tmp_path)


def test_a_run_is_drawn(tmp_path: Path) -> None:
    _, history = run(tmp_path, evaluate=lambda: {"heldout_loss": 1.0, "sample": "x"})
    plot_run(history, tmp_path / "run.png")
    plot_run([], tmp_path / "empty.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "run.png").stat().st_size > (tmp_path / "empty.png").stat().st_size + 2000

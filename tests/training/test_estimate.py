"""What is said of a training before it starts: counts by hand, time in proportion."""

from dataclasses import replace

import pytest
import torch

from distill.command import parse
from distill.model import Architecture, SparseTransformer
from distill.training import TrainConfig, estimate_run, sparse_parameters
from distill.training.estimate import Timing, _scaled, laid_out
from distill.training.presets import PRESETS

SHAPE = Architecture(vocab_size=300, context=16, n_layer=3, d_model=16, d_head=8)
CONFIG = TrainConfig(steps=10, batch=4, context=16, kept=0.25)


def test_counts_are_those_of_the_model() -> None:
    found = estimate_run(SHAPE, CONFIG, timed=False)
    model = SparseTransformer.build(SHAPE)
    projected = sparse_parameters(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.projected == sum(p.numel() for p in projected.values())
    assert found.nonzeros == sum(round(p.numel() / 4) for p in projected.values())
    assert found.tokens == 10 * 4 * 16
    assert found.state_bytes == 16 * found.parameters and found.checkpoint_bytes == 12 * found.parameters
    # 3 layers of reads and writes (6 x 16), heads (4 x 16), neurons (2 x 64), twice 300 logits: of 4 bytes, 64 tokens.
    assert found.activation_bytes == 4 * 64 * (3 * (96 + 64 + 128) + 600)
    assert found.model_bytes == 6 * found.nonzeros + 2 * 300**2
    assert found.floors == (1,)  # 0.25 * 16 / 4, for every unit reads or writes 16 channels
    assert (
        estimate_run(SHAPE, replace(CONFIG, accumulate=2), timed=False).activation_bytes == found.activation_bytes / 2
    )
    assert found.timing is None and "time" not in found.describe()
    assert f"{found.parameters:,} parameters" in found.describe()


def test_the_time_is_measured_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def timed(architecture: Architecture, config: TrainConfig, sequences: int, fraction: float, device: object):
        calls.append((architecture.n_layer, sequences, fraction))
        speed = 1.0 if fraction == 1 else 0.5
        return speed * (2 + architecture.n_layer), speed * 0.5 * architecture.n_layer

    monkeypatch.setattr("distill.training.estimate._timed", timed)
    monkeypatch.setattr("distill.training.estimate.chosen", lambda o, i, density: density <= 0.5)
    monkeypatch.setattr("distill.training.estimate.MEASURED_FLOPS", 0)
    timing = estimate_run(SHAPE, CONFIG).timing
    assert isinstance(timing, Timing)
    assert calls == [(1, 1, 1.0), (2, 1, 1.0), (1, 1, 0.25), (2, 1, 0.25)]
    # Passes of one of four sequences: 2 + 3 layers; the update 0.5 a layer.
    assert timing.dense_step == pytest.approx(4 * 5 + 1.5)
    assert timing.sparse_step == pytest.approx(timing.dense_step / 2)
    # Kept after steps 1 to 5: 0.85, 0.7, 0.55, 0.4, 0.25: three of ten are dense.
    assert timing.seconds == pytest.approx(3 * timing.dense_step + 7 * timing.sparse_step)
    assert _scaled(3.0, 2.0, 8) == 3.0 and _scaled(1.0, 3.0, 2) == 4.0


def test_a_real_measurement() -> None:
    small = replace(SHAPE, vocab_size=32)
    timing = estimate_run(small, replace(CONFIG, steps=4)).timing
    assert timing is not None and timing.seconds > 0 and timing.sequences == 4
    assert timing.dense_step > 0 and timing.sparse_step > 0
    assert "measured now at 1 and 2 layers" in estimate_run(small, replace(CONFIG, steps=1)).describe()


def test_presets_are_possible_and_the_paper_is_large() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of a training."""

        vocab_size: int = 2048
        """Size of the vocabulary."""
        architecture: Architecture = Architecture()
        """Shape."""
        config: TrainConfig = TrainConfig()
        """Length."""

    sizes = {}
    for name in PRESETS:
        options = parse(Options, ["--preset", name], description="", presets=PRESETS)
        assert options is not None
        assert options.config.context <= options.architecture.context
        sizes[name] = estimate_run(options.architecture, options.config, timed=False)
    assert list(sizes) == ["tiny", "laptop", "paper-small", "paper"]
    counts = [size.parameters for size in sizes.values()]
    assert counts == sorted(counts)
    # 8 layers of 12 x 2048^2 weights, 5 x 2048 + 8192 biases, 2 norms and 128 sinks; table, embeddings, last norm.
    layer = 12 * 2048**2 + 5 * 2048 + 8192 + 2 * 2048 + 128
    assert sizes["paper"].parameters == 8 * layer + 3 * 2048**2 + 2048
    assert sizes["paper"].nonzeros == pytest.approx(sizes["paper"].projected / 64, rel=1e-6)


def test_a_large_model_is_laid_out_without_memory() -> None:
    model = laid_out(Architecture(n_layer=100, d_model=8192))
    assert {p.device for p in model.parameters()} == {torch.device("meta")}

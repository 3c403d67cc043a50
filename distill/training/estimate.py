"""What a training is going to make, see, hold in memory and take, before it starts.

Counts follow from the shape: the model is laid out without memory. The time is measured: whole steps of models of one
and of two layers of the same width, on this machine and these threads, of as many sequences of the batch as a second
or so allows, once dense and once at the target fraction. What is a layer's and what is beside the layers comes from
the two depths; the passes scale with the sequences, the update of the weights does not; and the schedule says how many
steps are dense (while so much is kept that products with the zeros left out would not pay) and how many sparse.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from distill.model import Architecture, DenseModel, SparseTransformer, SparseTransformerConfig
from distill.model.linear_path import chosen
from distill.training.objective import next_token_loss
from distill.training.optim import make_optimizer, set_rate
from distill.training.process import tune_malloc
from distill.training.settings import TrainConfig
from distill.training.sparsity import automatic_floor, project_, sparse_parameters, unit_axis

STATE_BYTES = 16
"""Per parameter: weight, gradient and two moments, float32."""
SAVED_BYTES = 12
"""Per parameter in a checkpoint: the same without the gradient."""
ENTRY_BYTES = 6
"""Per entry that stays, in a compact model folder: its value and the gap before it."""
MEASURED_FLOPS = 2**36
"""Products that a measured step is cut to, about, by leaving out sequences."""
REPEATS = 2
BUSY = 1.5
"""Processes a core above which the clock says more about the others than about the work."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a training takes, extrapolated from a short measurement."""

    dense_step: float
    """Seconds of a step in which all entries are kept."""
    sparse_step: float
    """Seconds of a step at the target fraction."""
    seconds: float
    """Of the whole training, evaluations and checkpoints left out."""
    sequences: int
    """How many of the batch were measured."""
    batch: int
    threads: int
    device: str
    busy: float
    """How many processes each core was shared by meanwhile; 0 where the system does not say."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training comes to."""

    parameters: int
    projected: int
    """Of them in projected tensors."""
    nonzeros: int
    """Entries of these that stay at the target fraction, those that the floor can add left out."""
    floors: tuple[int, ...]
    """Floors of the tensors that have neurons or head channels, each value once."""
    tokens: int
    """Seen, over all steps."""
    state_bytes: int
    """Weights, gradients and moments."""
    activation_bytes: int
    """Kept for the backward pass of one part of the batch, about."""
    checkpoint_bytes: int
    model_bytes: int
    """Of the model folder, without zeros, bigram table in half precision, about."""
    timing: Timing | None
    """None: not measured."""

    def describe(self) -> str:
        """For people, in a few lines."""
        floors = "/".join(map(str, self.floors)) or "none"
        lines = [
            f"{self.parameters:,} parameters, {self.projected:,} of them projected, of which {self.nonzeros:,} stay; "
            f"floor {floors}",
            f"{self.tokens:,} tokens",
            f"memory: {size_of(self.state_bytes)} for weights, gradients and moments, "
            f"about {size_of(self.activation_bytes)} for activations",
            f"disk: {size_of(self.checkpoint_bytes)} a checkpoint, about {size_of(self.model_bytes)} the model folder",
        ]
        if self.timing is not None:
            t = self.timing
            busy = f", by processor time, as {t.busy:.1f} processes shared each core" if t.busy > BUSY else ""
            lines.append(
                f"time: about {duration_of(t.seconds)} on {t.device} with {t.threads} threads: {t.dense_step:.3g} s a "
                f"dense step, {t.sparse_step:.3g} s a sparse one; measured now at 1 and 2 layers of this width with "
                f"{t.sequences} of {t.batch} sequences, the rest in proportion{busy}"
            )
        return "\n".join(lines)


def estimate_run(
    architecture: Architecture, config: TrainConfig, *, device: torch.device | None = None, timed: bool = True
) -> Estimate:
    """What training a model of this shape comes to.

    Arguments:
        architecture: its shape, with the vocabulary.
        config: the settings.
        device: where it is timed; none: the CPU.
        timed: whether it is timed at all (seconds to a minute).
    """
    model = laid_out(architecture)
    sparse = sparse_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    projected = sum(p.numel() for p in sparse.values())
    kept = sum(round(config.kept * p.numel()) for p in sparse.values())
    table = architecture.vocab_size**2 if architecture.bigram else 0
    tokens = config.batch * config.context // config.accumulate
    per_token = kept_numbers(architecture) + 2 * architecture.vocab_size  # the logits twice
    dense = config.kept == 1
    return Estimate(
        parameters=total,
        projected=projected,
        nonzeros=kept,
        floors=tuple(sorted({_floor(name, p, config) for name, p in sparse.items() if unit_axis(name) is not None})),
        tokens=config.steps * config.batch * config.context,
        state_bytes=STATE_BYTES * total,
        activation_bytes=4 * tokens * per_token,
        checkpoint_bytes=SAVED_BYTES * total,
        model_bytes=4 * total if dense else ENTRY_BYTES * kept + 2 * table,
        timing=measured(architecture, config, device or torch.device("cpu")) if timed else None,
    )


def kept_numbers(architecture: Architecture) -> int:
    """Numbers a token that a pass through all layers keeps for its backward pass, about; without the logits."""
    a = architecture
    # Reads, queries, keys, values, mixed values and writes of a layer, and the two sides of its neurons.
    return a.n_layer * (6 * a.d_model + 4 * a.heads * a.d_head + 2 * a.neurons)


def plan(model: SparseTransformer | DenseModel, config: TrainConfig) -> str:
    """What a training is going to make and see, in two lines for people: counts, nothing is timed."""
    total = sum(parameter.numel() for parameter in model.parameters())
    projected = sum(parameter.numel() for parameter in sparse_parameters(model).values())
    nonzeros = round(config.kept * projected)
    tokens = config.steps * config.batch * config.context
    return (
        f"{total:,} parameters, {projected:,} of them projected, of which {nonzeros:,} stay at kept {config.kept:g}\n"
        f"{config.steps:,} steps of {config.batch} x {config.context} tokens, {tokens:,} tokens; "
        f"weights, gradients and moments: {STATE_BYTES * total / 2**20:,.0f} MiB"
    )


def laid_out(architecture: Architecture) -> SparseTransformer:
    """A model of that shape whose tensors have no memory."""
    with torch.device("meta"):
        return SparseTransformer(SparseTransformerConfig(**asdict(architecture)))


def _floor(name: str, weight: torch.Tensor, config: TrainConfig) -> int:
    axis = unit_axis(name)
    assert axis is not None, name
    width = weight.shape[1 - axis]
    return automatic_floor(config.kept, width) if config.floor is None else min(config.floor, width)


def measured(architecture: Architecture, config: TrainConfig, device: torch.device) -> Timing:
    """Times steps of one and of two layers, and scales them to the whole training."""
    if device.type == "cpu":
        tune_malloc()
    one, two = (replace(architecture, n_layer=number) for number in (1, 2))
    flops = 6 * sum(p.numel() for p in laid_out(two).parameters()) * config.context
    sequences = max(1, min(config.batch, MEASURED_FLOPS // flops))

    def step(fraction: float) -> float:
        found = [_timed(a, config, sequences, fraction, device) for a in (one, two)]
        # A layer's share, and what is beside the layers: never below nothing, however the clock trembles.
        passes, update = (_scaled(a, b, architecture.n_layer) for a, b in zip(*found, strict=True))
        return passes * config.batch / sequences + update

    dense = step(1.0)
    sparse = step(config.kept) if config.kept < 1 else dense
    shape = architecture.neurons, architecture.d_model
    kept = [config.kept_after(n + 1) for n in range(0, config.steps, max(1, config.steps // 1000))]
    share = sum(not chosen(*shape, fraction) for fraction in kept) / len(kept)
    seconds = config.steps * (share * dense + (1 - share) * sparse)
    return Timing(
        dense_step=dense,
        sparse_step=sparse,
        seconds=seconds,
        sequences=sequences,
        batch=config.batch,
        threads=torch.get_num_threads(),
        device=str(device),
        busy=_busy(),
    )


def _scaled(one: float, two: float, layers: int) -> float:
    """Of `layers` layers, from the seconds of one and of two."""
    layer = max(two - one, 0.0)
    return max(one - layer, 0.0) + layers * layer


def _timed(
    architecture: Architecture, config: TrainConfig, sequences: int, fraction: float, device: torch.device
) -> tuple[float, float]:
    """Seconds of forward and backward pass, and of the optimiser's step with its projection; the shortest of some."""
    model = SparseTransformer.build(architecture, seed=0)
    nn.Module.to(model, device)
    sparse = sparse_parameters(model)
    optimizer = make_optimizer(model, sparse, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    set_rate(optimizer, config.learning_rate, 1.0)
    for parameter in sparse.values():
        project_(parameter, fraction)
    objective = next_token_loss(model)
    generator = torch.Generator().manual_seed(0)
    size = (sequences, config.context + 1)
    tokens = torch.randint(architecture.vocab_size, size, generator=generator).to(device)

    def passes() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss, _ = objective(tokens, 0)
        loss.backward()

    def update() -> None:
        optimizer.step(scale=1.0, fraction=fraction)

    best = [float("inf"), float("inf")]
    for repeat in range(1 + REPEATS):
        for number, work in enumerate((passes, update)):
            seconds = _clocked(work, device)
            if repeat:  # the first one compiles, makes lists and fills caches
                best[number] = min(best[number], seconds)
    return best[0], best[1]


def _clocked(work: Callable[[], None], device: torch.device) -> float:
    """Seconds by the clock; on cores that other processes share, the processor time of this one over its threads."""
    begun, used = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "cpu" and _busy() > BUSY:
        return (time.process_time() - used) / torch.get_num_threads()
    return time.perf_counter() - begun


def _busy() -> float:
    """How many processes share each core, 0 where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def size_of(count: int | float) -> str:
    """A number of bytes, for people."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def duration_of(seconds: float) -> str:
    """A time, for people."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"

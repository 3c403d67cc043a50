"""What it costs to watch a dense model through the rows of its bridge's encoders, beside the dense forward alone.

python tests/benchmarks/watch_cost.py
"""

import statistics
from collections.abc import Callable

import torch
from measure import seconds_of
from work import Row

from distill.circuits.live import LiveWatch
from distill.circuits.watch import Watch
from distill.model import Architecture, DenseModel, residual_sites

MOST = 0.1
"""Share of the dense forward that the watch may take on top of it."""
NODES = 96
"""Channels that are read, spread over the residual sites: more than the circuits of the shipped student need."""
SHAPES = ((128, 3, (4, 128)), (128, 3, (1, 1)), (768, 12, (1, 128)), (768, 12, (1, 1)))
"""Width and layers of the dense model, sequences and tokens of a pass: the shipped GPT-2 and the size of GPT-2 small,
each reading text and generating. At one token of a model so small the calls of Python decide, not the dot products."""


def watch_of(dense: DenseModel) -> Watch:
    """A watch over random rows of every residual site."""
    generator = torch.Generator().manual_seed(0)
    sites = residual_sites(dense.n_layer)
    parts = [part for part in torch.arange(NODES).tensor_split(len(sites)) if len(part)]
    return Watch(
        model=dense.fingerprint(),
        model_name="dense",
        task="none",
        names=tuple(f"{site}.{int(c)}" for site, part in zip(sites, parts, strict=False) for c in part),
        mean=torch.zeros(NODES),
        spread=torch.ones(NODES),
        effect=torch.ones(NODES),
        slope=torch.ones(NODES),
        rows={
            site: torch.randn(len(part), dense.d_model, generator=generator)
            for site, part in zip(sites, parts, strict=False)
        },
        places=dict(zip(sites, parts, strict=False)),
        offset=torch.zeros(NODES),
        threshold=1e9,
    )


def watch(turns: int) -> list[Row]:
    """A forward of transformers' own model, alone and watched as in `generate`, in turns."""
    rows: list[Row] = []
    for width, layers, shape in SHAPES:
        dense = DenseModel.build_gpt2(Architecture(d_model=width, n_layer=layers, vocab_size=2048, context=256))
        ids = torch.randint(2048, shape, generator=torch.Generator().manual_seed(0))
        live = LiveWatch(watch_of(dense), dense)
        share = _share(dense, ids, live, turns)
        name = f"watch, {layers} layers of {width}, {NODES} rows, {shape[0]} x {shape[1]} tokens"
        print(f"{name}: {share:+.1%} of the dense forward (asked: at most {MOST:.0%})", flush=True)
        rows.append({"what": name, "overhead": share, "asked_at_most": MOST})
    return rows


def _share(dense: DenseModel, ids: torch.Tensor, live: LiveWatch, turns: int) -> float:
    """Median over turns of the seconds that a watched pass takes more than a plain one, as a share of the latter."""

    def once() -> None:
        with torch.no_grad():
            dense.hf(ids)

    def watched() -> None:
        live.restart()
        once()

    once()
    inner = max(4, 360 // (ids.numel() * dense.n_layer))
    shares = []
    for _ in range(turns):
        plain = seconds_of(once, inner)
        with live:
            shares.append(seconds_of(watched, inner) / plain - 1)
    return statistics.median(shares)


SECTIONS: dict[str, Callable[[int], list[Row]]] = {"watch": watch}


if __name__ == "__main__":
    watch(7)

"""Circuits on their own against the masked model, in turns in one process, both by the fastest operations there are.

    python tests/benchmarks/bench_standalone.py --out standalone.json

Two tables. *Answers*: logits of two answers after each of 128 prompts of 32 tokens, from circuits of random nodes (0.9%
of the model's, queries and keys in pairs) of new models with 2% of their weights, D >= 512; at least 20x is asked for.
*Search*: on the shipped sparse model, one validation run and one run with gradients to every node, as cleaning up a
circuit takes them, for node sets of several sizes: what is gained by dropping what is decided out already. Both are
asked to agree to 1e-5 first. On a busy machine the clock says little, and threads wait for each other. A few minutes;
the last line is the summary.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine, threads

from distill import command
from distill.artifact import write_json
from distill.circuits.ablation import node_means
from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.masks import MaskTap, Nodes, node_count
from distill.circuits.standalone import standalone
from distill.circuits.subject import load_subject
from distill.circuits.tasks import TaskBatch, encode, load_task
from distill.circuits.thinning import node_importance
from distill.model import Architecture, DenseModel, SparseTransformer
from distill.model.run import Runnable

PROMPTS, LENGTH, VOCABULARY = 128, 32, 2048
SHARE, LEAST = 0.009, 20.0
INNER = 11
"""Calls of the faster one in one turn."""
SIZES = (0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of bench_standalone."""

    turns: int = 5
    """Timed turns of each comparison."""
    task: str = "single_double_quote"
    """Task of the search table."""
    out: Path | None = None
    """JSON file for the results."""


def random_nodes(model: Runnable, share: float, seed: int = 0) -> Nodes:
    """A share of the nodes at every location; queries and keys of the same channels."""
    generator = torch.Generator().manual_seed(seed)
    nodes = {place: torch.rand(width, generator=generator) < share for place, width in model.widths.items()}
    return {place: nodes[place.removesuffix("k") + "q"] if place.endswith(".k") else mask for place, mask in
            nodes.items()}  # fmt: skip


def random_prompts() -> TaskBatch:
    """Prompts of differing lengths with two answers each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(PROMPTS) % 2
    last = torch.randint(LENGTH // 2, LENGTH, (PROMPTS,), generator=generator)
    last[0] = LENGTH - 1
    answers = torch.randint(VOCABULARY, (2, PROMPTS), generator=generator)
    return TaskBatch(
        tokens=torch.randint(VOCABULARY, (PROMPTS, LENGTH), generator=generator),
        attention_mask=(torch.arange(LENGTH) <= last[:, None]).long(),
        last=last,
        answer=answers[0],
        other=answers[1],
        orientation=torch.zeros(PROMPTS),
        labels=labels,
    )


def sparse_model(width: int, layers: int) -> SparseTransformer:
    """A new model in which 2% of the weights are left."""
    model = SparseTransformer.build(Architecture(d_model=width, n_layer=layers, vocab_size=VOCABULARY, context=128))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.matrices().values():
            weight.mul_(torch.rand(weight.shape, generator=generator) < 0.02)
    return model.eval()


def gpt2(width: int, layers: int) -> DenseModel:
    """A new GPT-2."""
    return DenseModel.build_gpt2(Architecture(d_model=width, n_layer=layers, vocab_size=VOCABULARY, context=128)).eval()


def compared(
    name: str, masked: Callable[[], object], alone: Callable[[], object], turns: int, **more: Any
) -> dict[str, Any]:
    """Seconds of both, in turns, by the clock and of processor time, which counts on a busy machine; medians."""
    taken: list[tuple[float, ...]] = []
    for turn in range(-1, turns):
        slow, quick = seconds(masked, 1), seconds(alone, INNER)
        if turn >= 0:
            taken.append((*slow, *quick, slow[0] / quick[0], slow[1] / quick[1]))
    found = [statistics.median(values) for values in zip(*taken, strict=True)]
    row = dict(zip(("masked", "masked_cpu", "alone", "alone_cpu", "ratio", "cpu_ratio"), found, strict=True))
    print(
        f"{name:62s} {1e3 * row['masked']:8.1f} ms -> {1e3 * row['alone']:7.2f} ms  {row['ratio']:6.1f}x "
        f"(processor {1e3 * row['masked_cpu']:8.1f} -> {1e3 * row['alone_cpu']:7.2f} ms  {row['cpu_ratio']:6.1f}x)",
        flush=True,
    )
    return {"name": name, **row, **more}


def seconds(work: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median of some calls: by the clock, and of processor time."""
    taken = []
    for _ in range(runs):
        begun, busy = time.perf_counter(), time.process_time()
        work()
        taken.append((time.perf_counter() - begun, time.process_time() - busy))
    clock, processor = (statistics.median(values) for values in zip(*taken, strict=True))
    return clock, processor


@torch.no_grad()
def answers(turns: int) -> list[dict[str, Any]]:
    """Logits of two answers, from circuits under 1% of the nodes."""
    rows = []
    batch = random_prompts()
    for kind, build, width, layers in (
        ("sparse", sparse_model, 512, 4),
        ("sparse", sparse_model, 1024, 2),
        ("GPT-2", gpt2, 512, 4),
    ):
        model = build(width, layers)
        means = node_means(model, batch.tokens[:16])
        nodes = random_nodes(model, SHARE)
        tap, module = MaskTap(nodes, means), standalone(model, nodes, means)
        torch.testing.assert_close(module.difference(batch), answer_difference(model, batch, tap), rtol=0, atol=1e-5)
        size = {"nodes": node_count(nodes), "of": sum(model.widths.values())}
        for count in (1, 2):
            with threads(count):
                rows.append(
                    compared(
                        f"{kind}, D={width}, L={layers}, {size['nodes']} of {size['of']} nodes, {count} threads",
                        lambda model=model, tap=tap: answer_difference(model, batch, tap),
                        lambda module=module: module.difference(batch),
                        turns,
                        **size,
                    )
                )
    return rows


def search(turns: int, task: str) -> list[dict[str, Any]]:
    """A validation run, and a run with gradients to the nodes, on the shipped sparse model."""
    rows = []
    subject = load_subject("sparse")
    model, means = subject.model, subject.means
    batch = encode(load_task(task), subject.tokenizer, "val", 32, 0, context=model.context)
    with threads(1), frozen(model):
        for share in SIZES:
            nodes = random_nodes(model, share)
            module = standalone(model, nodes, means)

            def judged(nodes: Nodes = nodes) -> torch.Tensor:
                with torch.no_grad():
                    return answer_difference(model, batch, MaskTap(nodes, means))

            def alone(module: Any = module) -> torch.Tensor:
                with torch.no_grad():
                    return module.difference(batch)

            def scored(nodes: Nodes = nodes) -> None:
                masks = {place: mask.float().requires_grad_() for place, mask in nodes.items()}
                loss = two_way_loss(answer_difference(model, batch, MaskTap(masks, means)))
                torch.autograd.grad(loss, list(masks.values()))

            def scored_alone(nodes: Nodes = nodes, module: Any = module) -> None:
                node_importance(module, batch, nodes)

            torch.testing.assert_close(alone(), judged(), rtol=1e-5, atol=1e-5)
            name = f"shipped sparse model, {node_count(nodes)} nodes, "
            rows.append(compared(name + "validation run", judged, alone, turns))
            rows.append(compared(name + "gradients to all nodes", scored, scored_alone, turns))
            begun = time.perf_counter()
            standalone(model, nodes, means)
            rows[-1]["build"] = time.perf_counter() - begun
    return rows


def bench_standalone(options: Options) -> None:
    """Run both tables, print, save."""
    if options.turns < 1:
        raise ValueError(f"turns: got {options.turns}, allowed are whole numbers from 1")
    here = machine()
    print(f"{here['processor']}, {here['instructions']}, load {here['load']:.1f}")
    rows = {"answers": answers(options.turns), "search": search(options.turns, options.task)}
    if options.out is not None:
        write_json(options.out, {"machine": here, "turns": options.turns, "results": rows})
    least, busy = (min(row[name] for row in rows["answers"]) for name in ("ratio", "cpu_ratio"))
    gains = [row["cpu_ratio"] for row in rows["search"]]
    print(
        f"answers: at least {least:.1f}x the masked model by the clock, {busy:.1f}x of processor time "
        f"({LEAST:g}x asked for); search: {min(gains):.1f}x to {max(gains):.1f}x of processor time as nodes go"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark on a command line; returns the exit status."""
    return command.run(bench_standalone, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())

"""The comparisons of `bench_all`: top-k, inference, mask learning, training steps, options of the plain path."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from measure import Line, in_turns, setting_of

from distill.circuits.prune import PruneConfig, learn, new_masks
from distill.circuits.subject import load_subject
from distill.circuits.tasks import encode, load_task
from distill.model import Architecture, SparseTransformer
from distill.model.topk import abs_topk
from distill.training.sparsity import project_, sparse_parameters

Row = Line | dict[str, Any]
TOKENS = (8, 256)
VOCABULARY = 2048


def sparse_model(width: int, layers: int, kept: float, *, context: int = 256, seed: int = 0) -> SparseTransformer:
    """A new model with every weight tensor cut to `kept`."""
    architecture = Architecture(d_model=width, n_layer=layers, vocab_size=VOCABULARY, context=context)
    model = SparseTransformer.build(architecture, seed=seed)
    for parameter in sparse_parameters(model).values():
        project_(parameter, kept)
    return model


def tokens(extra: int = 0, *, shape: tuple[int, int] = TOKENS) -> torch.Tensor:
    """Random token ids (B, T + extra)."""
    return torch.randint(VOCABULARY, (shape[0], shape[1] + extra), generator=torch.Generator().manual_seed(0))


def topk(turns: int) -> list[Row]:
    """AbsTopK forward and backward."""
    rows: list[Row] = []
    for width in (4096, 1024):
        x = torch.randn(2048, width, requires_grad=True)
        grad = torch.randn(2048, width)

        def both(x: torch.Tensor = x, grad: torch.Tensor = grad, width: int = width) -> None:
            torch.autograd.grad(abs_topk(x, width // 4), x, grad)

        name = f"AbsTopK forward + backward, 2048 x {width}, keep 1/4"
        rows.append(in_turns(name, both, both, turns=turns, warm=2, inner=3, least=8, stretch=14))
    return rows


def inference(turns: int) -> list[Row]:
    """Logits of 2048 tokens."""
    model = sparse_model(2048, 4, 0.01).eval()
    ids = tokens()

    def forward() -> None:
        with torch.no_grad():
            model.run(ids)

    return [in_turns("inference forward, D=2048, L=4, 1%", forward, forward, turns=turns, least=18, stretch=25)]


def masks(turns: int) -> list[Row]:
    """Steps of mask learning on the quickstart's sparse model."""
    subject = load_subject("sparse")
    config = PruneConfig(steps=10)
    train = encode(load_task("if_equals"), subject.tokenizer, "train", 64, 0)
    model = subject.model.requires_grad_(False)

    def steps() -> None:
        learn(model, train, subject.means, config, 0.15, new_masks(model, config))

    name = "mask optimisation step, quickstart's sparse model"
    line = in_turns(name, steps, steps, turns=turns, least=3, stretch=6)
    return [replace(line, reference=line.reference / config.steps, fast=line.fast / config.steps)]


def plain_options(turns: int) -> list[Row]:
    """What other allocation, bfloat16 and torch.compile do for the plain path: forward and backward at D=1024."""
    model = sparse_model(1024, 2, 0.01)
    ids = tokens(1)
    compiled = torch.compile(model.run)

    def step(run: Callable[..., torch.Tensor], setting: Callable[[], Any] = nullcontext) -> Callable[[], None]:
        def once() -> None:
            with setting():
                loss = F.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            model.zero_grad()

        return once

    plain = step(model.run)
    half = step(model.run, lambda: torch.autocast("cpu", torch.bfloat16))
    options = {
        "tuned allocation": (plain, True),
        "bfloat16 autocast": (half, False),
        "torch.compile": (step(compiled), False),
        "torch.compile, tuned allocation": (step(compiled), True),
    }
    return [
        in_turns(
            f"plain forward + backward, D=1024, L=2: {name}",
            plain,
            fast,
            turns=turns,
            fast_setting=lambda tuned=tuned: setting_of("plain", tuned=tuned),
        )
        for name, (fast, tuned) in options.items()
    ]


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "topk": topk,
    "inference": inference,
    "masks": masks,
    "plain_options": plain_options,
}

"""The comparisons of `bench_all`: top-k, inference, mask learning, training steps, options of the plain path."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from measure import Line, in_turns, setting_of

from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.masks import MaskTap, NodeMasks
from distill.circuits.subject import load_subject
from distill.circuits.tasks import encode, load_task
from distill.model import Architecture, SparseTransformer
from distill.model.topk import abs_topk
from distill.training.optim import gradient_norm, gradient_scale, make_optimizer, set_rate
from distill.training.sparsity import automatic_floor, project_, sparse_parameters, unit_axis

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


def training_step(width: int, layers: int, kept: float) -> Callable[[], None]:
    """A whole step on a model of its own: loss, gradients, their scale, AdamW, projection with the default floor."""
    model = sparse_model(width, layers, kept)
    sparse = sparse_parameters(model)
    axes = {name: unit_axis(name) for name in sparse}
    floors = {
        name: (automatic_floor(kept, sparse[name].shape[1 - axis]), axis)
        for name, axis in axes.items()
        if axis is not None
    }
    optimizer = make_optimizer(model, sparse, floors=floors)
    set_rate(optimizer, 1e-3, 1.0)
    numel = sum(parameter.numel() for parameter in model.parameters())
    ids = tokens(1)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        rms = float(gradient_norm(model.parameters())) / numel**0.5
        optimizer.step(scale=gradient_scale(rms, "normalize"), fraction=kept)

    return step


def steps(turns: int) -> list[Row]:
    """Whole exact training steps of 2048 tokens."""
    asked = (((1024, 2, 0.01), 8, 15), ((4096, 1, 0.004), 12, 20))
    return [
        in_turns(
            f"whole exact training step, D={shape[0]}, L={shape[1]}, {shape[2]:.1%}",
            training_step(*shape),
            training_step(*shape),
            turns=turns,
            least=least,
            stretch=stretch,
        )
        for shape, least, stretch in asked
    ]


def optimiser(turns: int) -> list[Row]:
    """AdamW and projection of one matrix, the gradient given."""

    def step() -> Callable[[], None]:
        weight = torch.nn.Parameter(torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)))
        project_(weight, 0.01)
        module = torch.nn.ParameterDict({"weight": weight})
        optimizer = make_optimizer(module, {"weight": weight})
        set_rate(optimizer, 1e-3, 1.0)
        grad = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1))

        def once() -> None:
            weight.grad = grad
            optimizer.step(fraction=0.01)

        return once

    name = "optimiser + projection, 4M entries, 1% kept"
    return [in_turns(name, step(), step(), turns=turns, warm=3, inner=3, least=10, stretch=25)]


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
    """A step of mask learning under task loss and price, 16 prompts, on the quickstart's sparse model."""
    subject = load_subject("sparse")
    batch = encode(load_task("if_equals"), subject.tokenizer, "train", 8, 0)
    model = subject.model.requires_grad_(False)
    learned = NodeMasks(model.widths)
    optimizer = torch.optim.AdamW([learned.tau], lr=3e-2)

    def step() -> None:
        mask, count = learned()
        difference = answer_difference(model, batch, MaskTap(mask, subject.means, competition=True))
        optimizer.zero_grad()
        (two_way_loss(difference) + 1e-4 * count).backward()
        optimizer.step()
        learned.clamp()

    name = "mask optimisation step, quickstart's sparse model"
    return [in_turns(name, step, step, turns=turns, inner=5, least=3, stretch=6)]


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
    "steps": steps,
    "topk": topk,
    "optimiser": optimiser,
    "inference": inference,
    "masks": masks,
    "plain_options": plain_options,
}

"""The comparisons of `bench_all`: top-k, inference, mask learning, training steps, options of the plain path."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Line, all_in_turns, in_turns, setting_of

from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.masks import MaskTap, NodeMasks
from distill.circuits.subject import Subject, load_subject
from distill.circuits.tasks import encode, load_task
from distill.model import Architecture, SparseTransformer, operations
from distill.model.kernels.candidates import sample_of
from distill.model.topk import abs_topk
from distill.training.candidates import CandidateConfig, CandidateTraining
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


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A model with its optimiser."""

    step: Callable[[], None]
    """One whole training step."""
    held: Callable[[], int]
    """Bytes of gradients, optimiser state and samples now."""


def training_run(width: int, layers: int, kept: float, *, candidates: bool = False) -> TrainingRun:
    """A whole step on a model of its own: loss, gradients, their scale, AdamW, projection with the default floor.

    With `candidates` the first step is exact and chooses them, and the others are sampled.
    """
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
    ids, done = tokens(1), itertools.count()
    sampled = CandidateTraining(
        sparse if candidates else {},
        optimizer,
        CandidateConfig(refresh=10**6, exact_last=0.0, below=1.0),
        steps=10**6,
        kept_after=lambda step: kept,
        floors={name: floors.get(name, (0, None)) for name in sparse},
    )

    def step() -> None:
        sampled.begin(next(done))
        optimizer.zero_grad()
        operations.cross_entropy(model.run(ids[:, :-1]), ids[:, 1:]).backward()
        squares = float(gradient_norm(model.parameters())) ** 2 + sampled.squares()
        scale = gradient_scale((squares / numel) ** 0.5, "normalize")
        optimizer.step(scale=scale, fraction=kept, without=sampled.parameters)
        sampled.step(scale, kept)

    def held() -> int:
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        samples = [sample_of(p) for p in sampled.parameters]
        indices = [index for s in samples if s is not None and (index := s.index) is not None]
        beside = [t for s in samples if s is not None for t in (s.values, s.gradient, s.flat)]
        beside += [t for index in indices for t in (index.start, index.at, index.panel_start)]
        own = [t for name, t in sampled.tensors().items() if "exp_avg" in name]
        return sum(t.numel() * t.element_size() for t in (*state, *grads, *beside, *own) if t is not None)

    return TrainingRun(step=step, held=held)


def training_step(width: int, layers: int, kept: float, *, candidates: bool = False) -> Callable[[], None]:
    """The step of a `training_run`."""
    return training_run(width, layers, kept, candidates=candidates).step


STEPS = (((1024, 2, 0.01), (8, 15), (15, 25)), ((4096, 1, 0.004), (12, 20), (40, 60)))
"""Width, layers and kept fraction; the ratio asked for and its stretch, exact and with candidates."""


def steps(turns: int) -> list[Row]:
    """Whole training steps of 2048 tokens, exact and with candidates between two choices of them."""
    rows: list[Row] = []
    for shape, exact, sampled in STEPS:
        ways = {}
        for candidates, (least, stretch) in ((False, exact), (True, sampled)):
            how = "step with candidates" if candidates else "exact training step"
            name = f"whole {how}, D={shape[0]}, L={shape[1]}, {shape[2]:.1%}"
            ways[name] = training_step(*shape, candidates=candidates), {"least": least, "stretch": stretch}
        # Candidates are chosen in the second step.
        rows += all_in_turns(training_step(*shape), ways, turns=turns, warm=2, settle=1)
    return rows


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
    """A step of mask learning under task loss and price on the quickstart's sparse model: of about as many tokens as a
    training step has, and of the few prompts that pruning takes."""
    subject = load_subject("sparse")
    return [
        _mask_line(subject, 100, turns, least=3, stretch=6),
        _mask_line(subject, 8, turns),
    ]


def _mask_line(subject: Subject, pairs: int, turns: int, **asked: float) -> Line:
    batch = encode(load_task("if_equals"), subject.tokenizer, "train", pairs, 0)
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

    name = f"mask optimisation step, quickstart's sparse model, {batch.tokens.numel()} tokens"
    return in_turns(name, step, step, turns=turns, inner=5, **asked)


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

"""Step time of forward and backward against width, density and threads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Line, in_turns, threads
from work import sparse_model, tokens


def _step(width: int, layers: int, kept: float) -> Callable[[], None]:
    model = sparse_model(width, layers, kept)
    ids = tokens(1)

    def step() -> None:
        F.cross_entropy(model.run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    return step


def width(turns: int) -> list[Line]:
    """Sixteen non-zeros per residual channel and matrix row of D entries, at growing width."""
    rows = []
    for size in (256, 512, 1024, 2048):
        step = _step(size, 1, 16 / size)
        rows.append(in_turns(f"forward + backward, L=1, 16 of D={size} kept", step, step, turns=min(turns, 3)))
    return rows


def density(turns: int) -> list[Line]:
    """One width at growing density."""
    rows = []
    for kept in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        step = _step(1024, 1, kept)
        rows.append(in_turns(f"forward + backward, D=1024, L=1, kept {kept:g}", step, step, turns=min(turns, 3)))
    return rows


def thread_counts(turns: int) -> list[Line]:
    """One model on one thread, two, four ..., up to those that torch uses."""
    rows = []
    step = _step(1024, 2, 0.01)
    count = 1
    while count <= torch.get_num_threads():
        with threads(count):
            rows.append(in_turns(f"forward + backward, D=1024, L=2, 1%, threads {count}", step, step, turns=turns))
        count *= 2
    return rows


SECTIONS = {"width": width, "density": density, "threads": thread_counts}

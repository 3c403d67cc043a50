"""Which way a linear map takes: without the zeros of its weight, or as a dense product. Its density decides, per shape.

`kernels.worth_it` is the general rule. A training measures its own shapes once, on its machine, and holds on to what it
found: the two ways differ by rounding, so a resumed run has to take the same ones.
"""

import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.artifact import ArtifactError, read_record, write_record
from distill.command import no_type_check
from distill.model import kernels

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (tokens, i), weight (o, i), bias (o) or none) -> (tokens, o)."""

DENSITIES = (0.5, 0.4, 1 / 3, 0.25, 0.2, 0.15, 0.1, 0.05)
"""Where the two ways may be compared; the highest at which the sparse one wins is the crossover."""
LEAST_ENTRIES = 1 << 16
"""Smaller matrices are not measured: little hangs on them, and the general rule says the same in every run."""
MOST_PRODUCTS = 1 << 29
"""Entries times tokens that a product is measured with, at most."""
REPEATS, SECONDS = (3, 30), 0.1
"""Least and most times that each product is made, and for how long within these; the shortest one counts."""
ACTIVE = 0.25
"""Share of the incoming gradient that is not zero, as behind an AbsTopK."""


@no_type_check  # it checks its values itself, and says what is allowed
@dataclass(frozen=True, kw_only=True)
class LinearPath:
    """Up to which density a weight (o, i) is multiplied without its zeros."""

    crossovers: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """By shape (o, i), in [0, 1]; 0 is never."""
    other: float | None = None
    """For all other shapes; none: the general rule."""
    machine: str = ""
    """Where the crossovers were measured."""
    threads: int = 0
    """On how many threads they were measured; 0: they were not."""

    def __post_init__(self) -> None:
        for shape, density in [*self.crossovers.items(), ("other shapes", self.other or 0.0)]:
            if not 0 <= density <= 1:
                raise ValueError(f"linear_path: got {density} for {shape}, allowed is 0 to 1")

    def chosen(self, o: int, i: int, density: float) -> bool:
        """Whether a weight (o, i) of that share of non-zeros is multiplied without its zeros."""
        crossover = self.crossovers.get((o, i), self.other)
        if crossover is None:
            return kernels.worth_it(o, i, density)
        return crossover > 0 and density <= crossover

    def describe(self) -> str:
        """In a line, for people."""
        parts = [f"{density:.2g} at {o} x {i}" for (o, i), density in self.crossovers.items()]
        parts.append("elsewhere by the general rule" if self.other is None else f"{self.other:.2g} elsewhere")
        return f"products leave out the zeros of weights up to this density: {', '.join(parts)}"

    def save(self, path: Path) -> None:
        """Writes JSON that `load` reads. ArtifactError or OSError where it cannot be written."""
        shapes = [{"o": o, "i": i, "density": density} for (o, i), density in self.crossovers.items()]
        content = {"kind": "linear path", "machine": self.machine, "threads": self.threads}
        write_record(path, content | {"crossovers": shapes, "other": self.other})

    @classmethod
    def load(cls, path: Path) -> "LinearPath":
        """Reads what `save` wrote. ArtifactError for a file that is missing or something else."""
        content = read_record(path, what="linear path")
        try:
            if content["kind"] != "linear path":
                raise ValueError
            return cls(
                crossovers={(int(c["o"]), int(c["i"])): float(c["density"]) for c in content["crossovers"]},
                other=None if content["other"] is None else float(content["other"]),
                machine=str(content["machine"]),
                threads=int(content["threads"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"{path}: is no linear path ({error})") from None


GENERAL = LinearPath()
FIXED = {"sparse": LinearPath(other=1.0), "dense": LinearPath(other=0.0)}
"""By the words that a user says."""
_now = GENERAL


def chosen(o: int, i: int, density: float) -> bool:
    """Whether a weight (o, i) of that share of non-zeros is multiplied without its zeros, by the path in use."""
    return _now.chosen(o, i, density)


@contextmanager
def use(path: LinearPath) -> Iterator[None]:
    """Takes `path` for the whole process, until the block ends."""
    global _now
    before, _now = _now, path
    try:
        yield
    finally:
        _now = before


def fixed(choice: str) -> LinearPath:
    """The path that a user names: sparse, dense, auto (the general rule), or a file. ArtifactError for a bad file."""
    if choice == "auto":
        return GENERAL
    return FIXED[choice] if choice in FIXED else LinearPath.load(Path(choice))


def measure(shapes: Iterable[tuple[int, int]], tokens: int, linear: Linear) -> LinearPath:
    """Times forward and backward of both ways for each shape, and where they cross.

    Arguments:
        shapes: (o, i) of the weights, in any order; small ones are left to the general rule.
        tokens: rows of a batch.
        linear: the linear map that asks `chosen`.
    """
    found = {}
    for o, i in sorted(set(shapes)):
        if o * i >= LEAST_ENTRIES and kernels.worth_it(o, i, 0.0):
            found[o, i] = _crossover(o, i, tokens, linear)
    return LinearPath(crossovers=found, machine=_machine(), threads=torch.get_num_threads()) if found else GENERAL


def _crossover(o: int, i: int, tokens: int, linear: Linear) -> float:
    """The highest of `DENSITIES` at which the sparse way wins, by bisection; 0 where it never does."""
    tokens = max(1, min(tokens, MOST_PRODUCTS // (o * i)))
    wins = bisect_left(range(len(DENSITIES)), True, key=lambda at: _sparse_wins(o, i, tokens, DENSITIES[at], linear))
    return DENSITIES[wins] if wins < len(DENSITIES) else 0.0


def _sparse_wins(o: int, i: int, tokens: int, density: float, linear: Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, i, generator=generator).requires_grad_()
    grad = torch.randn(tokens, o, generator=generator) * (torch.rand(tokens, o, generator=generator) < ACTIVE)
    weight = torch.randn(o, i, generator=generator) * (torch.rand(o, i, generator=generator) < density)
    weight.requires_grad_()
    seconds = {name: [float("inf")] for name in FIXED}
    end = time.perf_counter() + SECONDS
    for repeat in range(1 + REPEATS[1]):
        for name, path in FIXED.items():
            with use(path):
                begun = time.perf_counter()
                torch.autograd.grad(linear(x, weight, None), (x, weight), grad)
                taken = time.perf_counter() - begun
            if repeat:  # the first one makes lists and fills caches
                seconds[name].append(taken)
        if repeat >= REPEATS[0] and time.perf_counter() > end:
            break
    return min(seconds["sparse"]) <= min(seconds["dense"])


def _machine() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())

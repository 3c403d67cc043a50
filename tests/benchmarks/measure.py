"""Measuring two ways of doing one thing, in turns in one process, so that the machine's mood hits both alike."""

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from distill.artifact import versions
from distill.model import kernels, operations

# malloc.h. The values that glibc's own adjustment ends at once blocks of 32 MiB and more have been freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULT = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
_TUNED = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 1 << 30))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the results: a reference against a faster way."""

    name: str
    """What was timed."""
    reference: float
    """Median seconds of the plain way."""
    fast: float
    """Median seconds of the other."""
    ratio: float
    """Median over the turns of reference / fast."""
    spread: tuple[float, float]
    """Least and largest ratio of a turn."""
    turns: int
    """Turns taken."""
    least: float | None = None
    """Ratio that must be reached; None where nothing is asked for."""
    stretch: float | None = None
    """Ratio that would be better still."""
    more: dict[str, Any] = field(default_factory=dict)
    """Whatever else belongs to the line."""

    def text(self) -> str:
        """The line for a person."""
        asked = "" if self.least is None else f"   asked {self.least:g}x, stretch {self.stretch:g}x"
        low, high = self.spread
        return (
            f"{self.name:58s} {1e3 * self.reference:9.1f} ms -> {1e3 * self.fast:8.1f} ms  {self.ratio:6.1f}x "
            f"({low:.1f} to {high:.1f}){asked}"
        )


def in_turns(
    name: str,
    reference: Callable[[], object],
    fast: Callable[[], object],
    *,
    turns: int = 5,
    warm: int = 1,
    inner: int = 1,
    fast_setting: Callable[[], Any] | None = None,
    **more: Any,
) -> Line:
    """Times `reference` on the plain path with default allocation against `fast` on the automatic one, in turns.

    Arguments:
        name: of the line.
        reference: one piece of work, called `inner` times a turn.
        fast: the same work the other way, called `inner` times a turn.
        turns: how often each is timed; the medians are given.
        warm: turns before that are not timed.
        inner: calls in one timing, for short work.
        fast_setting: context in which `fast` runs; by default the automatic path with tuned allocation.
        more: fields of the line (`least`, `stretch`, `more`).
    """
    ways = {name: (fast, more)}
    return all_in_turns(reference, ways, turns=turns, warm=warm, inner=inner, fast_setting=fast_setting)[0]


def all_in_turns(
    reference: Callable[[], object],
    ways: Mapping[str, tuple[Callable[[], object], dict[str, Any]]],
    *,
    turns: int = 5,
    warm: int = 1,
    inner: int = 1,
    settle: int = 0,
    fast_setting: Callable[[], Any] | None = None,
) -> list[Line]:
    """As `in_turns` for several faster ways, each with the name and further fields of its line: one turn times all.

    `settle` calls of a faster way come before its timing in every turn: the plain way with default allocation hands
    its memory back, and the first call after it pays for fresh pages, as no step of a training but the first does.
    """
    setting = fast_setting or (lambda: setting_of("auto", tuned=True))
    seconds: list[list[float]] = []
    for turn in range(-warm, turns):
        with setting_of("plain", tuned=False):
            taken = [seconds_of(reference, inner)]
        with setting():
            for fast, _ in ways.values():
                for _ in range(settle):
                    fast()
                taken.append(seconds_of(fast, inner))
        if turn >= 0:
            seconds.append(taken)
    slow, *quick = zip(*seconds, strict=True)
    lines = []
    for (name, (_, more)), fast in zip(ways.items(), quick, strict=True):
        ratios = [one / other for one, other in zip(slow, fast, strict=True)]
        line = Line(
            name=name,
            reference=statistics.median(slow),
            fast=statistics.median(fast),
            ratio=statistics.median(ratios),
            spread=(min(ratios), max(ratios)),
            turns=turns,
            **more,
        )
        print(line.text(), flush=True)
        lines.append(line)
    return lines


def seconds_of(work: Callable[[], object], inner: int) -> float:
    begun = time.perf_counter()
    for _ in range(inner):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / inner


@contextmanager
def setting_of(path: str, *, tuned: bool) -> Iterator[None]:
    """The operations of `path`, with glibc's allocation as it is by default or tuned as the trainer tunes it."""
    allocate(tuned)
    operations.set_path(path)
    try:
        yield
    finally:
        operations.set_path("auto")


def allocate(tuned: bool) -> None:
    """Sets glibc's malloc; elsewhere it stays as it is."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _TUNED if tuned else _DEFAULT:
            mallopt(parameter, value)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch's and our own kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compiled": kernels.available(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "versions": versions(),
    }

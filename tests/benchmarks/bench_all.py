"""All speed benchmarks: the plain path with default allocation against the fast one, in turns in one process.

    python tests/benchmarks/bench_all.py --out results.json
    python tests/benchmarks/bench_all.py --only topk inference --turns 9

Prints a line per comparison and a summary, and writes everything with the machine's description as JSON. On a quiet
machine the whole takes about half an hour, most of it the plain steps at D=4096. Published results: RESULTS.md.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bridge_cost
import devices
import roofline
import scaling
import watch_cost
import whole
import work
from measure import Line, machine

from distill import command
from distill.artifact import write_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of bench_all."""

    only: tuple[str, ...] = ()
    """Sections to run; none: all of them."""
    turns: int = 5
    """Timed turns of each comparison."""
    out: Path | None = None
    """JSON file for the results."""


def bench_all(options: Options) -> None:
    """Run the sections, print, save."""
    parts = (work, whole, bridge_cost, watch_cost, devices, scaling, roofline)
    sections = {name: section for part in parts for name, section in part.SECTIONS.items()}
    chosen = options.only or tuple(sections)
    for name in chosen:
        if name not in sections:
            raise ValueError(f"only: {name!r} is no section; allowed are {', '.join(sections)}")
    if options.turns < 1:
        raise ValueError(f"turns: got {options.turns}, allowed are whole numbers from 1")
    found: dict[str, list[dict[str, object]]] = {}
    missed: list[str] = []
    here = machine()
    print(f"{here['processor']}, {here['threads']} threads, {here['instructions']}, load {here['load']:.1f}")
    for name in chosen:
        rows = sections[name](options.turns)
        found[name] = [asdict(row) if isinstance(row, Line) else row for row in rows]
        missed += [row.name for row in rows if isinstance(row, Line) and row.least and row.ratio < row.least]
        if options.out is not None:
            write_json(options.out, {"machine": here, "turns": options.turns, "results": found})
    print(f"below what is asked: {', '.join(missed) or 'none'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks on a command line; returns the exit status."""
    return command.run(bench_all, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
